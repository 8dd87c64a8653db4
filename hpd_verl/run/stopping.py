"""Stopping a run by a signal: the current step is finished and saved, then the process ends with ``EXIT_CODE``.

SIGUSR1 may be repeated. A second SIGTERM ends the process at once. Before there is anything to save, either signal ends
it at once.
"""

import signal
import sys
import time
from collections.abc import Callable
from types import FrameType

EXIT_CODE = 75
"""Exit code of a run stopped before its last step (EX_TEMPFAIL of sysexits.h): the same command resumes it."""

SAME_REQUEST = 1.0
"""Seconds within which several SIGTERMs count as one: a scheduler and a launcher may both pass on the same."""


_ask: list[Callable[[], bool]] = []


def learn_of_stops(is_asked: Callable[[], bool]) -> None:
    """Say how this process learns that the run shall end, for what waits deep inside a step."""
    _ask[:] = [is_asked]


def is_stop_asked() -> bool:
    """Whether the run shall end; False where this process does not learn of it."""
    return any(ask() for ask in _ask)


class StopSignals:
    """Stop requests by signals of this process.

    Args:
        ask: passes the request on to what is running; False where nothing would be lost: the process ends at once.
            Called in the main thread, for every signal that asks.
        says: print a line about what happens; of several ranks, one does.
    """

    def __init__(self, ask: Callable[[], bool], says: bool = True) -> None:
        self.ask = ask
        self.says = says
        self.asked_by: signal.Signals | None = None
        self._terminated_at: float | None = None

    def install(self) -> None:
        """Handle the signals from here on. Only the main thread may call this."""
        for number in (signal.SIGUSR1, signal.SIGTERM):
            signal.signal(number, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if number == signal.SIGTERM:
            if self._terminated_at is not None and now - self._terminated_at > SAME_REQUEST:
                sys.exit(128 + signal.SIGTERM)
            self._terminated_at = self._terminated_at or now
        first, self.asked_by = self.asked_by is None, self.asked_by or signal.Signals(number)
        if not self.ask():
            self.ignore()
            self._say(f"Ended by {self.asked_by.name} before the first step, exit code {EXIT_CODE}")
            sys.exit(EXIT_CODE)
        if first:
            self._say(f"{self.asked_by.name}: the run ends after this step, with a checkpoint")

    def ignore(self) -> None:
        """Ask for nothing from here on: the process ends, and Python's own end would let a signal kill it."""
        for number in (signal.SIGUSR1, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)

    def _say(self, line: str) -> None:
        if self.says:
            print(line, flush=True)

    def end(self, step: int, total_steps: int, checkpoint: str | None) -> None:
        """End the process after it has stopped as asked.

        Args:
            step: the last that was made.
            total_steps: of the whole run.
            checkpoint: folder that holds the step; None where none was made.
        """
        self.ignore()
        name = "a signal" if self.asked_by is None else self.asked_by.name  # another rank's
        if checkpoint is None:
            self._say(f"Ended by {name} before the first step, exit code {EXIT_CODE}")
        else:
            self._say(f"Stopped by {name} after step {step} of {total_steps}: {checkpoint}, exit code {EXIT_CODE}")
        sys.exit(EXIT_CODE)
