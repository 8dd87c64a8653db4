"""Run one stage of a pipeline once. Output goes to a log, time and memory to a file that marks it done.

    python examples/stage.py RUN_DIR NAME -- COMMAND...     the stage
    python examples/stage.py RUN_DIR                        a table of the stages that are done

RUN_DIR/NAME.done is written after success; a stage with it is skipped. Processes left behind by an earlier start are
ended first. If the command fails, the end of its log is shown. SIGTERM and SIGUSR1 go to the command, whose exit code
is the stage's. Memory is the peak sum of the processes' proportional sets (shared pages count once).
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import FrameType

import psutil

VARIABLE = "HPD_RUN_DIR"
"""Environment variable of all processes of a run, by which an earlier start's are found."""
STAGE = "HPD_STAGE"
"""The process id of the stage's own."""
INTERVAL = 2.0
"""Seconds between looks at the memory."""
LEAST_ROOM = 1 << 20
"""Bytes free on the disk under which a failure is told with them: the log may lack its reason then."""


def of_run(run_dir: Path, stage: int | None = None) -> list[psutil.Process]:
    """Processes of this run except this one and its ancestors; with ``stage`` only those that it started."""
    own = {os.getpid(), *(parent.pid for parent in psutil.Process().parents())}
    found = []
    for process in psutil.process_iter():
        try:
            environment = process.environ()
        except psutil.Error:
            continue  # ended meanwhile, or another user's
        is_of_stage = stage is None or environment.get(STAGE) == str(stage)
        if process.pid not in own and environment.get(VARIABLE) == str(run_dir) and is_of_stage:
            found.append(process)
    return found


def memory(processes: list[psutil.Process]) -> int:
    """Bytes that these processes hold."""
    total = 0
    for process in processes:
        try:
            total += process.memory_full_info().pss
        except psutil.Error:
            continue
    return total


def end(processes: list[psutil.Process]) -> None:
    for process in processes:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue
    psutil.wait_procs(processes, timeout=30)


def run(run_dir: Path, name: str, command: list[str]) -> None:
    """Run the command and write the file that says so.

    Raises:
        SystemExit: the command failed.
    """
    done, log = run_dir / f"{name}.done", run_dir / f"{name}.log"
    if done.exists():
        print(f"[{name}] done before", flush=True)
        return
    left = of_run(run_dir)
    if left:
        print(f"[{name}] ending {len(left)} processes of an earlier start", flush=True)
        end(left)
    print(f"[{name}] log in {log}", flush=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that its processes are ended
    start, peak = time.monotonic(), 0
    process: subprocess.Popen[bytes] | None = None
    asked: list[int] = []

    def pass_on(number: int, frame: FrameType | None) -> None:
        asked.append(number)
        if process is not None:
            process.send_signal(number)

    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, pass_on)
    with open(log, "a") as stream:
        begin = stream.tell()
        environment = {**os.environ, VARIABLE: str(run_dir), STAGE: str(os.getpid())}
        try:
            process = subprocess.Popen(command, stdout=stream, stderr=subprocess.STDOUT, env=environment)
            for each in asked:  # while it was started
                process.send_signal(each)
            while process.poll() is None:
                peak = max(peak, memory(of_run(run_dir, os.getpid())))
                try:
                    process.wait(INTERVAL)
                except subprocess.TimeoutExpired:
                    continue
        except OSError as error:
            sys.exit(f"[{name}] cannot start {command[0]}: {error.strerror}")
        finally:
            end(of_run(run_dir, os.getpid()))
    if process.returncode != 0:
        output = log.read_bytes()[begin:].decode(errors="replace")
        print(*(line[:500] for line in output.splitlines()[-30:]), sep="\n", file=sys.stderr)
        said = f"[{name}] failed with exit code {process.returncode}; log in {log}"
        if shutil.disk_usage(run_dir).free < LEAST_ROOM:
            said += f"; no space is left at {run_dir}: make room and give the same command again"
        if not asked:
            sys.exit(said)
        print(said, file=sys.stderr)
        sys.exit(process.returncode if process.returncode > 0 else 128 - process.returncode)
    result = {"stage": name, "seconds": round(time.monotonic() - start, 1), "peak_gib": round(peak / 2**30, 2)}
    print(f"[{name}] {result['seconds']:.0f} s, {result['peak_gib']} GiB", flush=True)
    unfinished = done.with_suffix(".unfinished")
    with open(unfinished, "w") as stream:
        stream.write(json.dumps(result) + "\n")
        stream.flush()
        os.fsync(stream.fileno())  # a power cut must not leave an empty file under the name that says it is done
    unfinished.replace(done)


def table(run_dir: Path) -> str:
    """The stages that are done, in their order.

    Raises:
        ValueError: a file that says so is damaged.
    """
    files = sorted(run_dir.glob("*.done"), key=lambda file: file.stat().st_mtime_ns)
    lines = [f"{'stage':<30}{'seconds':>10}{'peak GiB':>10}"]
    for file in files:
        try:
            each = json.loads(file.read_text())
            lines.append(f"{each['stage']:<30}{each['seconds']:>10.0f}{each['peak_gib']:>10.2f}")
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise ValueError(f"{file}: damaged; remove it, and the stage is repeated") from error
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("name", nargs="?")
    parser.add_argument("command", nargs=argparse.REMAINDER, help="after --")
    args = parser.parse_args()
    run_dir = args.run_dir.resolve()
    command = args.command[1:] if args.command[:1] == ["--"] else args.command
    if args.name is not None and (not command or Path(args.name).name != args.name):
        parser.error("NAME is a word, and after -- stands a command")
    try:
        if args.name is None:
            print(table(run_dir))
            return
        run_dir.mkdir(parents=True, exist_ok=True)
        run(run_dir, args.name, command)
    except ValueError as error:
        sys.exit(f"Error: {error}")
    except OSError as error:
        place = error.filename or run_dir
        sys.exit(f"Error: {place}: {error.strerror}; RUN_DIR needs a folder with room that can be written")


if __name__ == "__main__":
    main()
