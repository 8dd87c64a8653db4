"""A command that ends with its parent, and takes what it has started with it."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

WRAPPED = [sys.executable, "-m", "hpd_verl.run.with_parent"]
SLEEPS = ["sh", "-c", "sleep 300 & echo $! $$ > pids; wait"]
"""A command that has started another."""


def is_running(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


def pids(folder: Path) -> list[int]:
    deadline = time.monotonic() + 30
    while not (folder / "pids").exists() or len((folder / "pids").read_text().split()) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return [int(word) for word in (folder / "pids").read_text().split()]


def assert_end(processes: list[int]) -> None:
    deadline = time.monotonic() + 10
    while any(map(is_running, processes)):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_ends_with_a_killed_parent(tmp_path: Path) -> None:
    start = f"import subprocess; subprocess.Popen({[*WRAPPED, *SLEEPS]}, stdin=subprocess.PIPE).wait()"
    parent = subprocess.Popen([sys.executable, "-c", start], cwd=tmp_path)
    processes = pids(tmp_path)
    assert all(map(is_running, processes))
    parent.kill()
    parent.wait()
    assert_end(processes)


@pytest.mark.parametrize("which", ["the command", "the wrapper"])
def test_nothing_is_left_of_a_killed_command(tmp_path: Path, which: str) -> None:
    wrapper = subprocess.Popen([*WRAPPED, *SLEEPS], stdin=subprocess.PIPE, cwd=tmp_path)
    processes = pids(tmp_path)
    if which == "the command":
        os.kill(processes[1], signal.SIGKILL)
    else:
        wrapper.kill()
    assert wrapper.wait(10) == (-signal.SIGKILL if which == "the wrapper" else 128 + signal.SIGKILL)
    assert_end(processes)


def test_status_of_the_command() -> None:
    assert subprocess.Popen([*WRAPPED, "sh", "-c", "exit 7"], stdin=subprocess.PIPE).wait(10) == 7
