"""Means over problems, their CIs, and the comparison of two runs on the same problems.

The bootstrap resamples problems, because answers to one problem are not independent.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import comb

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 10_000
CONFIDENCE = 0.95
_CHUNK = 1 << 22  # draws that exist at once


@dataclass(frozen=True)
class Estimate:
    """A mean over problems with its bootstrap interval."""

    value: float
    low: float
    high: float
    problems: int


@dataclass(frozen=True)
class Comparison:
    """The second run minus the first, on the problems of both."""

    difference: float
    low: float
    high: float
    p_value: float
    """Two-sided, of a permutation test that swaps the runs problem by problem."""
    problems: int


def avg_at_k(scores: Sequence[float]) -> float:
    """The mean score of a problem's k answers."""
    return float(np.mean(scores))


def pass_at_k(answers: int, right: int, k: int) -> float:
    """The unbiased estimate of the chance that one of k answers is right.

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


def bootstrap(values: Sequence[float], seed: int = 0, weights: Sequence[float] | None = None) -> Estimate:
    """The mean of values, one a problem, with the percentile interval of its bootstrap over problems.

    Args:
        values: at least one.
        seed: of the draws.
        weights: of the problems, above 0; None for equal ones.

    Raises:
        ValueError: no values.
    """
    data, shares = _checked(values, weights)
    means = _resampled_means(data, shares, seed)
    low, high = np.quantile(means, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Estimate(float(np.average(data, weights=shares)), float(low), float(high), len(data))


def compare(first: Sequence[float], second: Sequence[float], seed: int = 0) -> Comparison:
    """Two runs on the same problems, values in the same order.

    Raises:
        ValueError: different numbers of values, or none.
    """
    if len(first) != len(second):
        raise ValueError(f"{len(first)} and {len(second)} problems: compare runs on the same ones")
    differences = np.asarray(second, dtype=np.float64) - np.asarray(first, dtype=np.float64)
    estimate = bootstrap(differences.tolist(), seed)
    return Comparison(
        estimate.value, estimate.low, estimate.high, _permutation_p_value(differences, seed), len(differences)
    )


def _checked(
    values: Sequence[float], weights: Sequence[float] | None
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    data = np.asarray(values, dtype=np.float64)
    if not len(data):
        raise ValueError("no problems")
    return data, np.ones_like(data) if weights is None else np.asarray(weights, dtype=np.float64)


def _resampled_means(data: NDArray[np.float64], weights: NDArray[np.float64], seed: int) -> NDArray[np.float64]:
    generator = np.random.default_rng(seed)
    rows = max(1, _CHUNK // len(data))
    means = []
    for start in range(0, RESAMPLES, rows):
        drawn = generator.integers(len(data), size=(min(rows, RESAMPLES - start), len(data)))
        means.append((data[drawn] * weights[drawn]).sum(1) / weights[drawn].sum(1))
    return np.concatenate(means)


def _permutation_p_value(differences: NDArray[np.float64], seed: int) -> float:
    """How often a mean at least as far from 0 comes up when each difference's sign is drawn."""
    generator = np.random.default_rng(seed)
    # Differences of 0 are the same under either sign; rounding must not part equal means.
    moving = differences[differences != 0]
    limit = abs(moving.sum()) * (1 - 1e-9)
    rows, extreme = max(1, _CHUNK // max(1, len(moving))), 0
    for start in range(0, RESAMPLES, rows):
        signs = generator.integers(2, size=(min(rows, RESAMPLES - start), len(moving))) * 2 - 1
        extreme += int((abs((signs * moving).sum(1)) >= limit).sum())
    return (extreme + 1) / (RESAMPLES + 1)
