"""Means over seeds and problems with intervals, and paired comparisons.

The bootstrap resamples seeds and problems. Comparisons are paired: the same seeds and problems on both sides.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

RESAMPLES = 2000


def right_shares(results: Sequence[dict[str, Any]], measure: str, samples: int) -> np.ndarray:
    """Share of right answers, [seeds, problems], from the counts that results keep as digits."""
    return np.array([[int(count) for count in result[measure]] for result in results]) / samples


def pass_at(results: Sequence[dict[str, Any]], measure: str, samples: int, k: int) -> np.ndarray:
    """Unbiased estimate that one of k answers is right, [seeds, problems] (Chen et al. 2021, arXiv 2107.03374)."""
    missed = [math.comb(samples - right, k) / math.comb(samples, k) for right in range(samples + 1)]
    return np.array([[1 - missed[int(count)] for count in result[measure]] for result in results])


def resampled_means(scores: np.ndarray, seed: int = 0) -> np.ndarray:
    """Means of ``RESAMPLES`` draws of seeds and of problems, with replacement, from [seeds, problems]."""
    rng = np.random.default_rng(seed)
    seeds, problems = scores.shape
    rows = rng.multinomial(seeds, [1 / seeds] * seeds, size=RESAMPLES)
    columns = rng.multinomial(problems, [1 / problems] * problems, size=RESAMPLES)
    return np.einsum("rs,sp,rp->r", rows, scores, columns) / (seeds * problems)


@dataclass(frozen=True)
class Estimate:
    """A mean with its 95% interval."""

    mean: float
    low: float
    high: float


def estimate(scores: np.ndarray) -> Estimate:
    """Of [seeds, problems]."""
    low, high = np.quantile(resampled_means(scores), [0.025, 0.975])
    return Estimate(float(scores.mean()), float(low), float(high))


@dataclass(frozen=True)
class Comparison:
    """A difference of means with its 95% interval and a two-sided p-value."""

    difference: float
    low: float
    high: float
    p: float

    @property
    def verdict(self) -> str:
        return "better" if self.low > 0 else "worse" if self.high < 0 else "within noise"


def compare(first: np.ndarray, second: np.ndarray) -> Comparison:
    """First less second, each [seeds, problems], paired by both; seeds that one of them lacks are left out."""
    seeds = min(len(first), len(second))
    difference = first[:seeds] - second[:seeds]
    means = resampled_means(difference)
    low, high = np.quantile(means, [0.025, 0.975])
    share = min((means <= 0).mean(), (means >= 0).mean())
    return Comparison(float(difference.mean()), float(low), float(high), float(min(1.0, 2 * max(share, 1 / RESAMPLES))))


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's adjusted p-values."""
    order = np.argsort(p_values)
    adjusted, running = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(order):
        running = max(running, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = running
    return adjusted
