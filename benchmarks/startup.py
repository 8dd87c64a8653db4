"""Time to the first step of a command: its processes, when each began, and their CPU time.

    python benchmarks/startup.py -- python -m verl.trainer.main_ppo algorithm=hpd OVERRIDES

Ends the command once it has printed its first step, and appends a row per process to benchmarks/results/startup.csv.
CPU time depends less on the machine's load than wall-clock time.
"""

import argparse
import os
import re
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import psutil
from results import append_rows, machine

ROOT = Path(__file__).resolve().parents[1]
FIRST_STEP = re.compile(r"\bstep:1 - ")
INTERVAL = 0.2
LEAST_CPU_SECONDS = 0.1


@dataclass
class Sampled:
    """A process as last seen."""

    began: float
    name: str
    cpu: float = 0.0
    megabytes: float = 0.0


def name_of(process: psutil.Process) -> str:
    """What Ray calls a worker, else the program or script."""
    command = process.cmdline()
    if command and command[0].startswith("ray::"):
        return re.split(r"[.#:]", command[0].removeprefix("ray::"))[0].strip()
    scripts = [Path(part).stem for part in command[1:4] if part.endswith(".py")]
    module = [command[index + 1] for index, part in enumerate(command[:-1]) if part == "-m"]
    return (scripts or module or [process.name()])[0]


def sample(top: psutil.Process, begin: float, found: dict[tuple[int, float], Sampled]) -> None:
    """Look at a process and all its descendants."""
    for process in [top, *top.children(recursive=True)]:
        try:
            key = (process.pid, process.create_time())
            name, times = name_of(process), process.cpu_times()
            entry = found.setdefault(key, Sampled(max(0.0, key[1] - begin), name))
            if name != "IDLE":  # Ray's word for a worker that waits, before its work and after
                entry.name = name
            entry.cpu, entry.megabytes = times.user + times.system, process.memory_info().rss / 2**20
        except (psutil.NoSuchProcess, psutil.ZombieProcess):
            continue


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--csv", type=Path, default=ROOT / "benchmarks" / "results" / "startup.csv")
    parser.add_argument("--name", default="", help="name of the rows")
    parser.add_argument("command", nargs="+", help="after --")
    arguments = parser.parse_args()
    begin = time.time()
    process = subprocess.Popen(
        arguments.command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    lines: list[str] = []
    stepped = threading.Event()

    def read() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            lines.append(line)
            if FIRST_STEP.search(line):
                stepped.set()

    threading.Thread(target=read, daemon=True).start()
    found: dict[tuple[int, float], Sampled] = {}
    try:
        while not stepped.is_set() and process.poll() is None:
            sample(psutil.Process(process.pid), begin, found)
            time.sleep(INTERVAL)
        seconds = time.time() - begin
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
    if not stepped.is_set():
        sys.exit("".join(lines[-40:]) + f"the command ended with {process.wait()} before its first step")

    processes = sorted(found.values(), key=lambda each: each.began)
    total = sum(each.cpu for each in processes)
    print(f"first step after {seconds:.1f} s, {total:.1f} s of CPU time in {len(processes)} processes")
    rows = []
    for each in processes:
        if each.cpu >= LEAST_CPU_SECONDS:
            print(f"{each.began:6.1f} s  {each.cpu:6.2f} s of CPU  {each.megabytes:6.0f} MB  {each.name}")
        rows.append(
            {
                **machine(),
                "name": arguments.name,
                "first_step": round(seconds, 2),
                "process": each.name,
                "began": round(each.began, 2),
                "cpu_seconds": round(each.cpu, 2),
                "megabytes": round(each.megabytes),
            }
        )
    append_rows(arguments.csv, rows)


if __name__ == "__main__":
    main()
