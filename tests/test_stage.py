"""A stage of a pipeline: done once, begun anew after a failure or a kill, alone."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

STAGE = Path(__file__).resolve().parents[1] / "examples" / "stage.py"


def command(run_dir: Path, name: str, *words: str) -> list[str]:
    return [sys.executable, str(STAGE), str(run_dir), name, "--", *words]


def run(run_dir: Path, name: str, script: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(command(run_dir, name, "bash", "-c", script), capture_output=True, text=True, timeout=60)


def test_a_stage_is_done_once(tmp_path: Path) -> None:
    file = tmp_path / "count"
    for said in ("log in", "done before"):
        result = run(tmp_path / "run", "first", f"echo once >> {file}; echo output")
        assert result.returncode == 0, result.stderr
        assert said in result.stdout
    assert file.read_text() == "once\n"
    assert (tmp_path / "run" / "first.log").read_text() == "output\n"
    assert json.loads((tmp_path / "run" / "first.done").read_text())["stage"] == "first"
    table = subprocess.run([sys.executable, STAGE, tmp_path / "run"], capture_output=True, text=True, timeout=60)
    assert [line.split()[0] for line in table.stdout.splitlines()] == ["stage", "first"]


def test_a_failure_is_shown_and_not_done(tmp_path: Path) -> None:
    result = run(tmp_path, "bad", "printf 'what \\xff was wrong\\n'; exit 7")
    assert result.returncode == 1
    assert "was wrong" in result.stderr
    assert f"[bad] failed with exit code 7; log in {tmp_path / 'bad.log'}" in result.stderr
    assert not (tmp_path / "bad.done").exists()
    result = run(tmp_path, "bad", "echo now other; exit 7")
    assert "now other" in result.stderr
    assert "was wrong" not in result.stderr  # of an earlier start
    assert run(tmp_path, "bad", "true").returncode == 0


def test_what_a_killed_start_left_is_ended(tmp_path: Path) -> None:
    """Processes in a session of their own outlive a kill of the stage; another run's are left alone."""
    leave = "setsid sleep 60 & echo $! > {}; touch {}; sleep 60"
    pids = []
    for name in ("this", "other"):
        pid, ready = tmp_path / f"{name}.pid", tmp_path / f"{name}.ready"
        stage = subprocess.Popen(
            command(tmp_path / name, "long", "bash", "-c", leave.format(pid, ready)), stdout=subprocess.DEVNULL
        )
        while not ready.exists():
            time.sleep(0.05)
        stage.kill()
        stage.wait()
        pids.append(int(pid.read_text()))
    try:
        result = run(tmp_path / "this", "long", "true")
        assert result.returncode == 0, result.stderr
        assert "processes of an earlier start" in result.stdout
        alive = [psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE for pid in pids]
        assert alive == [False, True]
    finally:
        for process in psutil.process_iter():
            try:
                if process.environ().get("HPD_RUN_DIR") == str(tmp_path / "other"):
                    process.kill()
            except psutil.Error:
                continue


def test_an_end_by_a_signal_takes_its_processes_along(tmp_path: Path) -> None:
    ready = tmp_path / "ready"
    stage = subprocess.Popen(
        command(tmp_path / "run", "long", "bash", "-c", f"touch {ready}; sleep 60 & echo $!; wait"),
        stdout=subprocess.DEVNULL,
    )
    log = tmp_path / "run" / "long.log"
    while not (ready.exists() and log.read_text().strip()):
        time.sleep(0.05)
    stage.terminate()
    assert stage.wait(30) == 143
    left = int(log.read_text())
    assert not psutil.pid_exists(left) or psutil.Process(left).status() == psutil.STATUS_ZOMBIE
    assert not (tmp_path / "run" / "long.done").exists()


def test_a_failing_stage_takes_its_processes_along(tmp_path: Path) -> None:
    pid = tmp_path / "pid"
    result = run(tmp_path / "run", "bad", f"setsid sleep 60 > {os.devnull} 2>&1 & echo $! > {pid}; exit 1")
    assert result.returncode == 1
    left = int(pid.read_text())
    assert not psutil.pid_exists(left) or psutil.Process(left).status() == psutil.STATUS_ZOMBIE


@pytest.mark.parametrize(
    ("script", "code"), [("trap 'exit 75' USR1 TERM; touch {}; sleep 60 & wait", 75), ("touch {}; exec sleep 60", 0)]
)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_goes_to_the_command(tmp_path: Path, script: str, code: int, number: signal.Signals) -> None:
    """Whose exit code is the stage's; nothing is left, nothing done."""
    ready = tmp_path / "ready"
    stage = subprocess.Popen(
        command(tmp_path / "run", "long", "bash", "-c", script.format(ready)), stdout=subprocess.DEVNULL
    )
    while not ready.exists():
        time.sleep(0.05)
    time.sleep(0.2)
    stage.send_signal(number)
    assert stage.wait(20) == (code or 128 + number)
    assert not (tmp_path / "run" / "long.done").exists()


@pytest.mark.parametrize("words", [("a", "--"), ("a/b", "--", "true"), ("a", "--", "/no/such/command")])
def test_what_is_no_stage_is_said_in_a_line(tmp_path: Path, words: tuple[str, ...]) -> None:
    found = subprocess.run([sys.executable, STAGE, tmp_path, *words], capture_output=True, text=True, timeout=60)
    assert found.returncode in (1, 2)
    assert "Traceback" not in found.stderr


def test_a_run_dir_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    result = run(tmp_path / "file", "first", "true")
    assert result.returncode == 1
    assert result.stderr == (
        f"Error: {tmp_path / 'file'}: File exists; RUN_DIR needs a folder with room that can be written\n"
    )


def test_a_full_disk_is_said_and_the_stage_is_not_done(tmp_path: Path) -> None:
    limited = f"ulimit -f 0; exec {shlex.join(command(tmp_path, 'first', 'true'))}"
    result = subprocess.run(["bash", "-c", limited], capture_output=True, text=True, timeout=60)
    assert result.returncode == 1
    assert result.stderr.startswith(f"Error: {tmp_path}")
    assert "File too large; RUN_DIR needs a folder with room" in result.stderr
    assert result.stderr.count("\n") == 1
    assert not (tmp_path / "first.done").exists()
    assert run(tmp_path, "first", "true").returncode == 0
    assert (tmp_path / "first.done").exists()


def test_a_torn_mark_is_named(tmp_path: Path) -> None:
    run(tmp_path, "first", "true")
    (tmp_path / "first.done").write_text('{"stage": "fi')
    table = subprocess.run([sys.executable, STAGE, tmp_path], capture_output=True, text=True, timeout=60)
    assert table.returncode == 1
    assert table.stderr == f"Error: {tmp_path / 'first.done'}: damaged; remove it, and the stage is repeated\n"
