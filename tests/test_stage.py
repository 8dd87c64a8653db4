"""A stage of a pipeline: done once, begun anew after a failure or a kill, alone."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil

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


def test_a_failing_stage_takes_its_processes_along(tmp_path: Path) -> None:
    pid = tmp_path / "pid"
    result = run(tmp_path / "run", "bad", f"setsid sleep 60 > {os.devnull} 2>&1 & echo $! > {pid}; exit 1")
    assert result.returncode == 1
    left = int(pid.read_text())
    assert not psutil.pid_exists(left) or psutil.Process(left).status() == psutil.STATUS_ZOMBIE
