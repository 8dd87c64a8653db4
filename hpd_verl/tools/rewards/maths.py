r"""verl's reward function of maths: 1.0 if an answer is equal to the ground truth (``maths_equal.py``).

    reward.custom_reward_function.path=pkg://hpd_verl.tools.rewards.maths

After the reasoning, the last ``\boxed{}`` counts, else the text after the last ``####``, else the end
(``maths_equal.statement``). ``extra_info.tolerance`` of a row is the largest difference between equal numbers. May be
called from any thread; a comparison longer than ``SECONDS`` is not equal, and the rest is linear in the text.
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
from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any

from hpd_verl.tools.rewards.answers import boxed, without_reasoning

SECONDS = 5.0
"""Of one comparison."""
START_SECONDS = 120.0
"""Until sympy is imported."""
ANSWER_CHARACTERS = 2000
"""Of an answer without a box, from its end; a longer content of a box is no answer."""

_WORKER = str(Path(__file__).with_name("maths_worker.py"))


class MathsError(RuntimeError):
    """math-verify does not start here, or a row's ground truth or tolerance is none."""


def compute_score(
    data_source: str,
    solution_str: str,
    ground_truth: str,
    extra_info: dict[str, Any] | None = None,
    **kwargs: Any,
) -> float:
    """1.0 if the answer is right, else 0.0.

    Raises:
        MathsError: math-verify is not installed, the ground truth is empty, or the tolerance is no number of 0 or more.
    """
    wanted = str(ground_truth if ground_truth is not None else "").strip()
    if not wanted:
        raise MathsError("ground_truth: it is empty; leave the row out")
    tolerance = _tolerance(extra_info)
    given, in_box = final_answer(solution_str)
    if not given.strip():
        return 0.0
    if _plain(given) == _plain(wanted):
        return 1.0
    return float(_WORKERS.equal(wanted, given, in_box, tolerance))


def _tolerance(extra_info: Mapping[str, Any] | None) -> str:
    """``extra_info.tolerance``, "0" without one."""
    found = extra_info.get("tolerance") if isinstance(extra_info, Mapping) else None
    if found is None:
        return "0"
    try:
        value = Fraction(str(found))
    except (ValueError, ZeroDivisionError):
        value = Fraction(-1)
    if isinstance(found, bool) or value < 0:
        raise MathsError(f"extra_info.tolerance={found!r}: expected a number, 0 or more")
    return str(value)


def final_answer(answer: str) -> tuple[str, bool]:
    r"""The last ``\boxed{}`` of an answer, what follows its last ``####``, or its end; and whether it is of a box."""
    text = without_reasoning(answer)
    given = boxed(text)
    if given is not None:
        return given if len(given) <= ANSWER_CHARACTERS else "", True
    if re.search(r"\\(?:boxed|fbox)\s*+\{", text):  # cut within its box
        return "", True
    _, mark, rest = text.rpartition("####")
    return (rest if mark else text)[-ANSWER_CHARACTERS:].strip(), False


def _plain(text: str) -> str:
    """Without outer dollars, a full stop at the end, and spaces but those between words or numbers."""
    return re.sub(r"(?<!\.)\.$", "", re.sub(r"(?<!\w)\s+|\s+(?!\w)", "", text).strip("$"))


class _Worker:
    """A process that compares, one question at a time."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, _WORKER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
        self.ready = False

    def equal(self, *question: Any) -> bool | None:
        """The verdict; None if it does not come in time, and this worker has ended."""
        assert self.process.stdin is not None
        if not self.ready and self._line(START_SECONDS) != "ready":
            self.end()
            raise MathsError("math-verify does not start; install hpd-verl[evaluation]")
        self.ready = True
        try:
            self.process.stdin.write(json.dumps(question).encode() + b"\n")
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

    def equal(self, wanted: str, given: str, in_box: bool = True, tolerance: str = "0") -> bool:
        """As ``maths_equal.equal``; False for what takes too long."""
        if self._owner != os.getpid():  # a fork: the workers are its parent's
            self.__init__()  # type: ignore[misc]
        with self._places:
            with self._lock:
                worker = self._idle.pop() if self._idle else None
            if worker is not None and worker.process.poll() is not None:
                worker.end()
                worker = None
            worker = worker or _Worker()
            verdict = worker.equal(wanted, given, in_box, tolerance)
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
