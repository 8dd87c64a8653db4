"""verl's reward function of programs: 1.0 if an answer's last code block passes the row's tests in a sandbox.

    reward.custom_reward_function.path=pkg://hpd_verl.rewards.code

The ground truth is what ``data_prep/humaneval.py`` and ``data_prep/mbpp.py`` write, statements that use the answer's
names and raise where it is wrong; or JSON, ``{"inputs": [...], "outputs": [...]}``, of a script's standard input and
output. ``HPD_SANDBOX_SECONDS`` is the time that one answer may take, all its inputs together.
"""

import json
import os
from dataclasses import replace
from typing import Any

from hpd_verl.rewards.answers import code_of
from hpd_verl.rewards.guest import asked_names
from hpd_verl.rewards.sandbox import Limits, Outcome, SandboxError, check, run

SECONDS = "HPD_SANDBOX_SECONDS"


def outcome_of(answer: str, ground_truth: str, extra_info: dict[str, Any] | None = None) -> Outcome:
    """What becomes of an answer's program.

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
    code = code_of(answer, [info["entry_point"]] if info.get("entry_point") else _names(ground_truth))
    if not code.strip():
        return Outcome("failed", "the answer holds no code")
    if ground_truth.lstrip().startswith("{"):
        return _by_output(code, ground_truth, limits)
    preamble, function = str(info.get("preamble") or ""), str(info.get("entry_point") or "")
    # The answer may take the problem's helpers for given; what the tests use of them is a copy of their own.
    return check(f"{preamble}\n{code}", ground_truth, helper=preamble, function=function, limits=limits)


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
    """The answer's names that tests use; none where they are no program, which the sandbox says."""
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


def _by_output(code: str, ground_truth: str, limits: Limits) -> Outcome:
    try:
        cases = json.loads(ground_truth)
        pairs = list(zip(map(str, cases["inputs"]), map(str, cases["outputs"]), strict=True))
    except (ValueError, KeyError, TypeError) as error:
        raise SandboxError(
            f"ground_truth={ground_truth[:60]!r}: neither tests nor JSON of inputs and outputs ({error})"
        ) from None
    if not pairs:
        raise SandboxError("ground_truth: no inputs; leave the row out")
    left = limits.seconds
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


def _lines(text: str) -> list[str]:
    """Without spaces at the ends of lines and of the text."""
    return [line.rstrip() for line in text.rstrip().splitlines()]
