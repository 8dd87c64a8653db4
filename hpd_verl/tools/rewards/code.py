"""verl's reward function of programs: 1.0 if an answer's last code block passes the row's tests in a sandbox.

    reward.custom_reward_function.path=pkg://hpd_verl.tools.rewards.code

The ground truth is what ``data_prep/humaneval.py`` and ``data_prep/mbpp.py`` write, statements that use the answer's
names and raise where it is wrong; or JSON, ``{"inputs": [...], "outputs": [...]}``, of a script's standard input and
output, each a text or a list of lines. With ``"fn_name"`` they are arguments and result of that function, or of that
method of the answer's class ``Solution``: lists of arguments, or texts with an argument in JSON on each line, as
LiveCodeBench has them. ``HPD_SANDBOX_SECONDS`` is the time that one answer may take, all its inputs together.
"""

import json
import os
import re
from dataclasses import replace
from typing import Any

from hpd_verl.tools.rewards.answers import code_of
from hpd_verl.tools.rewards.guest import asked_names
from hpd_verl.tools.rewards.sandbox import Limits, Outcome, SandboxError, check, run

SECONDS = "HPD_SANDBOX_SECONDS"

_FUTURE = re.compile(r"^from[ \t]+__future__[ \t]+import[ \t]+(?:\([^)]*\)|[^\n(;#]*)", re.M)
_GIVEN = """\
from typing import *
from collections import *
from functools import *
from itertools import *
from heapq import *
from bisect import *
import bisect, collections, functools, heapq, itertools, math, random, re, string, sys
"""
"""Names that an answer with ``fn_name`` may use without import, as on the sites that set such problems."""
_CALLS = """
import json
def listed(value):  # a tuple is written as a list in JSON
    return list(value) if isinstance(value, tuple) else value
for number, (given, wanted) in enumerate(json.loads({cases!r}), start=1):
    result = listed(asked(*given))
    assert result == wanted, f"input {{number}} gives another result"
"""


def outcome_of(answer: str, ground_truth: str, extra_info: dict[str, Any] | None = None) -> Outcome:
    """The result of an answer's program.

    Args:
        answer: the model's.
        ground_truth: tests, or inputs and outputs.
        extra_info: ``entry_point``, the name of the function asked for, and ``preamble``, what stands before it in the
            problem (imports, helpers), where the data has them.

    Raises:
        SandboxError: the sandbox does not work here, or the ground truth is neither.
    """
    info = extra_info or {}
    limits = _limits()
    if not isinstance(ground_truth, str) or not ground_truth.strip():
        raise SandboxError(f"ground_truth={ground_truth!r}: expected tests; prepare the data by data_prep")
    cases = _cases(ground_truth) if ground_truth.lstrip().startswith("{") else None
    if cases is not None:
        names = [str(cases["fn_name"]), "Solution"] if cases.get("fn_name") else []
    else:
        names = [info["entry_point"]] if info.get("entry_point") else _names(ground_truth)
    code = code_of(answer, names)
    if not code.strip():
        return Outcome("failed", "the answer holds no code")
    preamble, function = str(info.get("preamble") or ""), str(info.get("entry_point") or "")
    if cases is not None and names:
        tests, function = _by_calls(code, cases)
        return check(_after(preamble or _GIVEN, code), tests, function=function, limits=limits)
    if cases is not None:
        return _by_output(code, cases, limits)
    # The answer may take the problem's helpers for given; what the tests use of them is a copy of their own.
    return check(_after(preamble, code), ground_truth, helper=preamble, function=function, limits=limits)


def compute_score(
    data_source: str,
    solution_str: str,
    ground_truth: str,
    extra_info: dict[str, Any] | None = None,
    **kwargs: Any,
) -> float:
    """1.0 if the program passes all tests, else 0.0.

    Raises:
        SandboxError: no sandbox, or no tests.
    """
    return float(outcome_of(solution_str, ground_truth, extra_info).passed)


def _names(tests: str) -> list[str]:
    """The answer's names that tests use; none if the tests are not a program, which the sandbox reports."""
    try:
        return asked_names(tests)[0]
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return []


def _limits() -> Limits:
    value = os.environ.get(SECONDS, "10")
    try:
        return Limits(seconds=float(value))
    except ValueError:
        raise SandboxError(f"{SECONDS}={value}: expected seconds, a number above 0") from None


def _after(preamble: str, code: str) -> str:
    """An answer after what stands before it; ``from __future__ import annotations`` must come before both."""
    return "\n".join([*(found[0] for found in _FUTURE.finditer(code)), preamble, _FUTURE.sub("", code)])


def _cases(ground_truth: str) -> dict[str, Any]:
    """JSON of inputs and outputs, as many of the one as of the other.

    Raises:
        SandboxError: it is something else.
    """
    try:
        cases = json.loads(ground_truth)
        pairs = len(cases["inputs"]), len(cases["outputs"])
        lists = isinstance(cases["inputs"], list) and isinstance(cases["outputs"], list)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise SandboxError(
            f"ground_truth={ground_truth[:60]!r}: neither tests nor JSON of inputs and outputs ({error})"
        ) from None
    if not lists or pairs[0] != pairs[1]:
        raise SandboxError(f"ground_truth: {pairs[0]} inputs and {pairs[1]} outputs; expected lists of one length")
    if not pairs[0]:
        raise SandboxError("ground_truth: no inputs; leave the row out")
    found: dict[str, Any] = cases
    return found


def _by_calls(code: str, cases: dict[str, Any]) -> tuple[str, str]:
    """Tests that call ``fn_name``, and the name that they ask the answer for."""
    name = cases["fn_name"]
    if not isinstance(name, str) or not name.isidentifier():
        raise SandboxError(f"ground_truth: fn_name={name!r} is no name of a function")
    pairs = []
    for number, (given, wanted) in enumerate(zip(cases["inputs"], cases["outputs"], strict=True), start=1):
        try:
            if isinstance(given, str):
                given = [json.loads(line) for line in given.splitlines() if line.strip()]
            if isinstance(wanted, str):
                wanted = json.loads(wanted)
        except ValueError as error:
            raise SandboxError(f"ground_truth: input {number} or its output is no JSON ({error})") from None
        if not isinstance(given, list):
            raise SandboxError(f"ground_truth: input {number} is {given!r:.60}; expected a list of arguments")
        pairs.append([given, wanted])
    in_class = re.search(r"^class[ \t]+Solution\b", code, re.M)
    asked = f"asked = Solution().{name}" if in_class else f"asked = {name}"
    return asked + _CALLS.format(cases=json.dumps(pairs)), "Solution" if in_class else name


def _by_output(code: str, cases: dict[str, Any], limits: Limits) -> Outcome:
    left = limits.seconds
    pairs = ((_text(given), _text(wanted)) for given, wanted in zip(cases["inputs"], cases["outputs"], strict=True))
    for number, (given, wanted) in enumerate(pairs, start=1):
        if left <= 0:
            return Outcome("timeout", f"input {number}: the time of the answer is over")
        outcome = run(code, stdin=given, limits=replace(limits, seconds=left))
        left -= outcome.seconds
        if not outcome.passed:
            return outcome
        if _lines(outcome.output) != _lines(wanted):
            return Outcome("failed", f"input {number} gives another output", outcome.output)
    return outcome


def _text(value: Any) -> str:
    """A text, which may be given as a list of its lines or as a number."""
    lines = value if isinstance(value, list) else [value]
    if not all(isinstance(line, str | int | float) for line in lines):
        raise SandboxError(f"ground_truth: {value!r:.60}: expected a text or a list of lines; with fn_name, arguments")
    return "\n".join(map(str, lines))


def _lines(text: str) -> list[str]:
    """Without spaces at the ends of lines and of the text."""
    return [line.rstrip() for line in text.rstrip().splitlines()]
