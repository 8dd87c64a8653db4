r"""verl's reward function of the quickstart: 1.0 if the last \boxed{...} of an answer is the right number.

reward.custom_reward_function.path=examples/quickstart/reward.py
"""

import re
from typing import Any

_BOXED = re.compile(r"\\boxed\s*\{\s*([^{}]*?)\s*\}")


def extract_answer(solution: str) -> str | None:
    r"""The content of the last \boxed{...}, or None without one."""
    boxes = _BOXED.findall(solution)
    return boxes[-1] if boxes else None


def compute_score(
    data_source: str,
    solution_str: str,
    ground_truth: str,
    extra_info: dict[str, Any] | None = None,
    **kwargs: Any,
) -> float:
    """verl's contract of ``reward.custom_reward_function``."""
    return float(extract_answer(solution_str) == str(ground_truth).strip())
