"""Chooses the rollout rows of a batch: an exact quota, spread evenly over the data sources, and their prompts."""

import math
import random
from collections.abc import Sequence

from hpd_verl.config import FractionSchedule


def cumulative_fraction(schedule: FractionSchedule, step: int) -> float:
    """Sum of the schedule's values over the steps 1..step."""
    ramp = min(step, schedule.steps)
    slope = (schedule.end - schedule.start) / max(schedule.steps - 1, 1)
    return ramp * schedule.start + slope * ramp * (ramp - 1) / 2 + (step - ramp) * schedule.end


def rollout_quota(schedule: FractionSchedule, step: int, rows: int) -> int:
    """Rows of the batch of a step that the student answers.

    Rounding carries over: after any number of steps the rollouts so far are the fraction of all rows, rounded down.
    A pure function of the step, so a resumed run continues the same sequence.
    """

    def so_far(steps: int) -> int:
        return math.floor(cumulative_fraction(schedule, steps) * rows + 1e-9)

    return min(rows, so_far(step) - so_far(step - 1))


def choose_rollouts(sources: Sequence[str], missing: Sequence[bool], quota: int, seed: int, step: int) -> list[bool]:
    """Choose the rows to roll out.

    Args:
        sources: each row's data source; the quota is spread over them in proportion (systematic sampling).
        missing: rows without a demonstration; they are rolled out in any case and count towards the quota.
        quota: rows to roll out; more only if more have no demonstration.
        seed, step: the choice is a pure function of them.

    Returns:
        One flag a row.
    """
    generator = random.Random(f"{seed}-{step}")
    chosen = list(missing)
    candidates = [row for row, is_missing in enumerate(missing) if not is_missing]
    generator.shuffle(candidates)
    candidates.sort(key=lambda row: sources[row])  # stable: random within a source
    wanted = min(max(0, quota - sum(missing)), len(candidates))
    offset = generator.random()
    for pick in range(wanted):
        chosen[candidates[math.floor((pick + offset) * len(candidates) / wanted)]] = True
    return chosen


def shared_prompts(chosen: Sequence[bool], rollouts_per_prompt: int) -> list[int]:
    """The row whose prompt each row takes.

    Args:
        chosen: the rows to roll out.
        rollouts_per_prompt: so many of them at a time take the first one's; the last ones may be fewer.
    """
    takes = list(range(len(chosen)))
    rollouts = [row for row, is_chosen in enumerate(chosen) if is_chosen]
    for place, row in enumerate(rollouts):
        takes[row] = rollouts[place - place % rollouts_per_prompt]
    return takes


def advantages(rewards: Sequence[float], prompts: Sequence[int]) -> list[float]:
    """Each rollout's reward less the mean over the rollouts of its prompt.

    Args:
        rewards: of each row, NaN for what is no rollout.
        prompts: number of each row's prompt.
    """
    of_prompt: dict[int, list[float]] = {}
    for reward, prompt in zip(rewards, prompts, strict=True):
        if not math.isnan(reward):
            of_prompt.setdefault(prompt, []).append(reward)
    means = {prompt: sum(values) / len(values) for prompt, values in of_prompt.items()}
    return [reward - means.get(prompt, math.nan) for reward, prompt in zip(rewards, prompts, strict=True)]
