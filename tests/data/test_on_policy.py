"""The on-policy quota is exact, spread over the data sources and reproducible."""

import math

import pytest

from hpd_verl.config import FractionSchedule
from hpd_verl.data.on_policy import advantages, choose_rollouts, rollout_quota, shared_prompts


@pytest.mark.parametrize("fraction", [0.0, 0.1, 0.25, 1 / 3, 0.5, 0.9, 1.0])
def test_quota_adds_up_to_the_fraction(fraction: float) -> None:
    """After any number of steps the rollouts so far are the fraction of all rows, rounded down."""
    schedule = FractionSchedule(fraction, fraction, 1)
    total = 0
    for step in range(1, 50):
        quota = rollout_quota(schedule, step, 7)
        assert abs(quota - fraction * 7) < 1
        total += quota
        assert total == int(fraction * 7 * step + 1e-9)


def test_quota_follows_a_linear_schedule() -> None:
    schedule = FractionSchedule(0.0, 1.0, 5)
    assert [rollout_quota(schedule, step, 8) for step in range(1, 8)] == [0, 2, 4, 6, 8, 8, 8]


def test_choice_is_stratified_and_reproducible() -> None:
    """A quota of half takes half of each data source; the same step gives the same rows, another step others."""
    sources = ["a"] * 8 + ["b"] * 4
    chosen = choose_rollouts(sources, [False] * 12, 6, seed=1, step=3)
    assert sum(chosen[:8]) == 4
    assert sum(chosen[8:]) == 2
    assert chosen == choose_rollouts(sources, [False] * 12, 6, seed=1, step=3)
    assert any(chosen != choose_rollouts(sources, [False] * 12, 6, seed=1, step=step) for step in (4, 5, 6))


def test_rows_without_demonstration_come_first() -> None:
    """They count towards the quota, and exceed it if there are more of them."""
    missing = [True, False, False, True]
    assert sum(choose_rollouts([""] * 4, missing, 3, seed=0, step=1)) == 3
    assert choose_rollouts([""] * 4, missing, 1, seed=0, step=1) == missing


def test_rollouts_share_prompts() -> None:
    """Demonstrations keep theirs; the last group may be smaller."""
    chosen = [True, False, True, True, False, True]
    assert shared_prompts(chosen, 1) == [0, 1, 2, 3, 4, 5]
    assert shared_prompts(chosen, 3) == [0, 1, 0, 0, 4, 5]
    assert shared_prompts(chosen, 8) == [0, 1, 0, 0, 4, 0]
    assert shared_prompts([False] * 3, 4) == [0, 1, 2]


def test_advantages_are_of_the_prompt() -> None:
    """Less the mean over the prompt's rollouts; a demonstration has none and counts for none."""
    found = advantages([1.0, math.nan, 0.0, 3.0, 2.0], [4, 4, 4, 7, 8])
    assert found == pytest.approx([0.5, math.nan, -0.5, 0.0, 0.0], nan_ok=True)
