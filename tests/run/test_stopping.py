"""What signals do to a process that handles them, each case in a process of its own."""

import signal
import subprocess
import sys
import time

import pytest

from hpd_verl.run import stopping

PROGRAM = """
import sys, time
from hpd_verl.run.stopping import StopSignals

signals = StopSignals(ask=lambda: sys.argv[1] == "training", says=sys.argv[2] == "says")
signals.install()
print("ready", flush=True)
while sys.stdin.readline():
    if signals.asked_by and sys.argv[1] == "training":
        signals.end(step=3, total_steps=9, checkpoint="folder/global_step_3")
signals.ignore()
print("went on to its end", flush=True)
time.sleep(1)
"""
FIRST = "SIGTERM: the run ends after this step, with a checkpoint"
STOPPED = "Stopped by SIGTERM after step 3 of 9: folder/global_step_3, exit code 75"


class Process:
    """The program above; ``step`` is what a trainer does between two steps."""

    def __init__(self, phase: str = "training", says: str = "says") -> None:
        command = [sys.executable, "-c", PROGRAM, phase, says]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self.line() == "ready"

    def line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def step(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()

    def end(self) -> tuple[int, str]:
        output, _ = self.process.communicate(timeout=20)
        return self.process.returncode, output.strip()


def test_the_step_is_finished_and_the_process_ends() -> None:
    process = Process()
    process.process.terminate()
    assert process.line() == FIRST
    process.step()
    assert process.end() == (stopping.EXIT_CODE, STOPPED)


def test_sigusr1_may_be_repeated_and_sigterm_may_follow() -> None:
    """Slurm warns first and terminates later; a scheduler and a launcher may both pass on a SIGTERM."""
    process = Process()
    for number in (signal.SIGUSR1, signal.SIGUSR1, signal.SIGTERM, signal.SIGTERM):
        process.process.send_signal(number)
        time.sleep(0.1)
    process.step()
    lines = process.end()
    assert lines == (stopping.EXIT_CODE, f"{FIRST}\n{STOPPED}".replace("SIGTERM", "SIGUSR1"))


def test_a_second_sigterm_ends_it_at_once() -> None:
    process = Process()
    process.process.terminate()
    assert process.line() == FIRST
    time.sleep(stopping.SAME_REQUEST + 0.1)
    process.process.terminate()
    assert process.end() == (128 + signal.SIGTERM, "")


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_nothing_is_waited_for_before_the_first_step(number: signal.Signals) -> None:
    process = Process(phase="starting")
    process.process.send_signal(number)
    assert process.end() == (75, f"Ended by {number.name} before the first step, exit code 75")


def test_a_run_that_has_made_its_last_step_is_not_ended_by_a_late_signal() -> None:
    process = Process(phase="starting")
    assert process.process.stdin is not None
    process.process.stdin.close()
    process.process.stdin = None
    assert process.line() == "went on to its end"
    process.process.send_signal(signal.SIGUSR1)
    process.process.terminate()
    assert process.end() == (0, "")


def test_one_rank_speaks() -> None:
    process = Process(says="does not say")
    process.process.terminate()
    time.sleep(0.2)
    process.step()
    assert process.end() == (stopping.EXIT_CODE, "")
