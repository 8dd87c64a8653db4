"""Means with 95% CIs and paired comparisons: of a run over problems, of a method over seeds and problems.

The bootstrap resamples problems, and seeds where there are several: answers to one problem are not independent.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import comb

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 10_000
RESAMPLES_OF_SEEDS = 2_000
CONFIDENCE = 0.95
_CHUNK = 1 << 22  # draws that exist at once

Scores = NDArray[np.float64]


@dataclass(frozen=True)
class Estimate:
    """A mean with its bootstrap interval."""

    value: float
    low: float
    high: float
    problems: int


@dataclass(frozen=True)
class Comparison:
    """A difference of two means on the same problems."""

    difference: float
    low: float
    high: float
    p_value: float
    """Two-sided."""
    problems: int

    @property
    def verdict(self) -> str:
        """Of the side whose mean comes first in the difference."""
        return "better" if self.low > 0 else "worse" if self.high < 0 else "within noise"


def avg_at_k(scores: Sequence[float]) -> float:
    """The mean score of a problem's k answers."""
    return float(np.mean(scores))


def pass_at_k(answers: int, right: int, k: int) -> float:
    """The unbiased estimate of the chance that one of k answers is right (Chen et al. 2021, arXiv 2107.03374).

    Args:
        answers: drawn of the problem, at least k.
        right: of these.
        k: at least 1.

    Raises:
        ValueError: fewer answers than k.
    """
    if not 1 <= k <= answers:
        raise ValueError(f"pass@{k}: of {answers} answers a problem; draw {k} or more")
    return 1.0 - comb(answers - right, k) / comb(answers, k)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's adjusted p-values."""
    order = np.argsort(p_values)
    raised = np.asarray(p_values)[order] * np.arange(len(p_values), 0, -1)
    adjusted = np.empty(len(p_values))
    adjusted[order] = np.maximum.accumulate(np.minimum(raised, 1.0))
    return adjusted.tolist()


# ------------------------------ over problems ------------------------------


def bootstrap(values: Sequence[float], seed: int = 0, weights: Sequence[float] | None = None) -> Estimate:
    """The mean of values, one a problem, with the percentile interval of its bootstrap over problems.

    Args:
        values: at least one.
        seed: of the draws.
        weights: of the problems, above 0; None for equal ones.

    Raises:
        ValueError: no values.
    """
    data = np.asarray(values, dtype=np.float64)
    if not len(data):
        raise ValueError("no problems")
    shares = np.ones_like(data) if weights is None else np.asarray(weights, dtype=np.float64)
    generator = np.random.default_rng(seed)
    means = []
    for count in _chunks(len(data)):
        drawn = generator.integers(len(data), size=(count, len(data)))
        means.append((data[drawn] * shares[drawn]).sum(1) / shares[drawn].sum(1))
    return Estimate(float(np.average(data, weights=shares)), *_interval(np.concatenate(means)), len(data))


def compare(first: Sequence[float], second: Sequence[float], seed: int = 0) -> Comparison:
    """The second run minus the first, on the same problems in the same order.

    The p-value is of a permutation test that swaps the runs problem by problem.

    Raises:
        ValueError: different numbers of values, or none.
    """
    if len(first) != len(second):
        raise ValueError(f"{len(first)} and {len(second)} problems: compare runs on the same ones")
    differences = np.asarray(second, dtype=np.float64) - np.asarray(first, dtype=np.float64)
    found = bootstrap(differences.tolist(), seed)
    return Comparison(found.value, found.low, found.high, _permutation_p_value(differences, seed), found.problems)


def _permutation_p_value(differences: Scores, seed: int) -> float:
    """How often a mean at least as far from 0 comes up when each difference's sign is drawn."""
    generator = np.random.default_rng(seed)
    # Differences of 0 are the same under either sign; rounding must not part equal means.
    moving = differences[differences != 0]
    limit = abs(moving.sum()) * (1 - 1e-9)
    extreme = 0
    for count in _chunks(len(moving)):
        signs = generator.integers(2, size=(count, len(moving))) * 2 - 1
        extreme += int((abs((signs * moving).sum(1)) >= limit).sum())
    return (extreme + 1) / (RESAMPLES + 1)


def _chunks(width: int) -> list[int]:
    """Numbers of resamples that are drawn at once, each of this many problems."""
    rows = max(1, _CHUNK // max(1, width))
    return [min(rows, RESAMPLES - start) for start in range(0, RESAMPLES, rows)]


# ------------------------------ over seeds and problems ------------------------------


def bootstrap_seeds(scores: Scores) -> Estimate:
    """The mean of scores, [seeds, problems], with the interval of its bootstrap over both."""
    return Estimate(float(scores.mean()), *_interval(_means_over_seeds(scores)), scores.shape[1])


def compare_seeds(first: Scores, second: Scores) -> Comparison:
    """First less second, each [seeds, problems], paired by both; seeds that one of them lacks are left out.

    The p-value is the bootstrap's.
    """
    seeds = min(len(first), len(second))
    difference = first[:seeds] - second[:seeds]
    means = _means_over_seeds(difference)
    share = min((means <= 0).mean(), (means >= 0).mean())
    p_value = float(min(1.0, 2 * max(share, 1 / RESAMPLES_OF_SEEDS)))
    return Comparison(float(difference.mean()), *_interval(means), p_value, difference.shape[1])


def _means_over_seeds(scores: Scores) -> Scores:
    """Means of draws of seeds and of problems, with replacement."""
    generator = np.random.default_rng(0)
    rows, columns = (
        generator.multinomial(count, [1 / count] * count, size=RESAMPLES_OF_SEEDS) for count in scores.shape
    )
    return np.einsum("rs,sp,rp->r", rows, scores, columns) / scores.size


def _interval(means: Scores) -> tuple[float, float]:
    low, high = np.quantile(means, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return float(low), float(high)
