"""Waiting for servers, of which a run that shall end soon has enough."""

import concurrent.futures
import time
from collections.abc import Iterable
from typing import Any

from hpd_verl.run.stopping import is_stop_asked
from hpd_verl.teacher.teacher import TeacherUnavailable

LOOK = 2.0
"""Seconds between two looks at what else has happened; of ranks that wait together, far below the process group's
timeout."""
STOP_AFTER = 5.0
"""Seconds for which a run that shall end still waits for an answer."""

STOPPED = "the run shall end, and the teacher has not answered"


class Patience:
    """How long a run that shall end still waits, from its first look on."""

    def __init__(self) -> None:
        self._asked_at: float | None = None

    def is_over(self) -> bool:
        if self._asked_at is None and is_stop_asked():
            self._asked_at = time.monotonic()
        return self._asked_at is not None and time.monotonic() - self._asked_at >= STOP_AFTER


def wait(futures: "Iterable[concurrent.futures.Future[Any]]") -> None:
    """Wait until all have ended, or one has failed; which is for the caller to see.

    Raises:
        TeacherUnavailable: the run shall end, and one has not ended.
    """
    waiting, patience = list(futures), Patience()
    while True:
        done, left = concurrent.futures.wait(waiting, LOOK, "FIRST_EXCEPTION")
        if not left or any(each.exception() is not None for each in done):
            return
        if patience.is_over():
            raise TeacherUnavailable(STOPPED)
