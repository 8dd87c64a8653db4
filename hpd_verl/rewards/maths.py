r"""verl's reward function of maths: 1.0 if math-verify finds an answer equal to the ground truth.

    reward.custom_reward_function.path=pkg://hpd_verl.rewards.maths

Of an answer counts what follows its reasoning: its last ``\boxed{}``; else what follows its last ``####``, else what
math-verify finds in its last lines. May be called from any thread; what takes longer than ``SECONDS`` is not equal.
"""

import atexit
import json
import os
import re
import select
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from hpd_verl.rewards.answers import boxed, without_reasoning

SECONDS = 5.0
"""Of one comparison."""
START_SECONDS = 120.0
"""Until sympy is imported."""
ANSWER_CHARACTERS = 2000
"""Of an answer without a box, from its end; a longer content of a box is no answer."""

_WORKER = str(Path(__file__).with_name("maths_worker.py"))


class MathsError(RuntimeError):
    """math-verify does not start here, or there is no ground truth."""


def compute_score(
    data_source: str,
    solution_str: str,
    ground_truth: str,
    extra_info: dict[str, Any] | None = None,
    **kwargs: Any,
) -> float:
    """1.0 if the answer is right, else 0.0.

    Raises:
        MathsError: math-verify is not installed, or the ground truth is empty.
    """
    wanted = _readable(str(ground_truth if ground_truth is not None else "")).strip()
    if not wanted:
        raise MathsError("ground_truth: it is empty; leave the row out")
    given, in_box = final_answer(solution_str)
    given = _readable(given)
    if not given.strip():
        return 0.0
    if _plain(given) == _plain(wanted):
        return 1.0
    return float(_WORKERS.equal(wanted, f"\\boxed{{{given}}}" if in_box else given))


def final_answer(answer: str) -> tuple[str, bool]:
    r"""The last ``\boxed{}`` of an answer, what follows its last ``####``, or its end; and whether it is of a box."""
    text = without_reasoning(answer)
    given = boxed(text)
    if given is not None:
        return given if len(given) <= ANSWER_CHARACTERS else "", True
    _, mark, rest = text.rpartition("####")
    return (rest if mark else text)[-ANSWER_CHARACTERS:].strip(), False


_ASIDE = re.compile(r"(?<=\d)(?:\\[,!;: ]|~|\{,\})(?=\d{3}(?!\d))|\\!|(?<=\d)\s*\\%|(?<=[\d}])~\s*$")
_POWER = re.compile(r"(?<![\w.])(\d+(?:\.\d+)?)[eE]([+-]?\d{1,3})(?!\w)")


def _readable(text: str) -> str:
    """Without marks that math-verify reads otherwise: a space between thousands, percent, a degree sign, 1.5e3."""
    return _POWER.sub(r"\1\\times10^{\2}", _ASIDE.sub("", text).replace("°", "^\\circ"))


def _plain(text: str) -> str:
    """Without outer dollars, a full stop at the end, and spaces but those between words or numbers."""
    return re.sub(r"(?<!\w)\s+|\s+(?!\w)", "", text).strip("$").rstrip(".")


class _Worker:
    """A process that compares, one question at a time."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, _WORKER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
        self.ready = False

    def equal(self, wanted: str, given: str) -> bool | None:
        """The verdict; None if it does not come in time, and this worker has ended."""
        assert self.process.stdin is not None
        if not self.ready and self._line(START_SECONDS) != "ready":
            self.end()
            raise MathsError("math-verify does not start; install hpd-verl[evaluation]")
        self.ready = True
        try:
            self.process.stdin.write(json.dumps([wanted, given]).encode() + b"\n")
            self.process.stdin.flush()
            verdict = self._line(SECONDS)
        except BrokenPipeError:
            verdict = None
        if verdict is None:
            self.end()
        return None if verdict is None else verdict == "true"

    def _line(self, seconds: float) -> str | None:
        assert self.process.stdout is not None
        line, deadline = b"", time.monotonic() + seconds
        poll = select.poll()  # unlike select.select it takes descriptors above 1023
        poll.register(self.process.stdout, select.POLLIN)
        while not line.endswith(b"\n"):
            left = deadline - time.monotonic()
            if left <= 0 or not poll.poll(1000 * left):
                return None
            part = os.read(self.process.stdout.fileno(), 4096)
            if not part:
                return None
            line += part
        return line.decode().strip()

    def end(self) -> None:
        self.process.kill()
        self.process.communicate()


class _Workers:
    """Workers that wait for a question; a thread that finds none starts one, up to as many as there are cores."""

    def __init__(self) -> None:
        self._idle: list[_Worker] = []
        self._lock = threading.Lock()
        self._places = threading.BoundedSemaphore(min(8, os.cpu_count() or 1))
        self._owner = os.getpid()

    def equal(self, wanted: str, given: str) -> bool:
        if self._owner != os.getpid():  # a fork: the workers are its parent's
            self.__init__()  # type: ignore[misc]
        with self._places:
            with self._lock:
                worker = self._idle.pop() if self._idle else None
            if worker is not None and worker.process.poll() is not None:
                worker.end()
                worker = None
            worker = worker or _Worker()
            verdict = worker.equal(wanted, given)
            if verdict is not None:
                with self._lock:
                    self._idle.append(worker)
        return bool(verdict)

    def end(self) -> None:
        """End the workers that wait."""
        if self._owner == os.getpid():
            while self._idle:
                self._idle.pop().end()


_WORKERS = _Workers()
atexit.register(_WORKERS.end)
