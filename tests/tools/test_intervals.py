"""Estimates and comparisons against their definitions, written out."""

import itertools
import random
import statistics as standard

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpd_verl.tools.intervals import avg_at_k, bootstrap, bootstrap_seeds, compare, compare_seeds, holm, pass_at_k


@given(st.integers(1, 7).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n), st.integers(1, n))))
def test_pass_at_k_is_the_share_of_subsets_with_a_right_answer(case: tuple[int, int, int]) -> None:
    n, right, k = case
    answers = [True] * right + [False] * (n - right)
    subsets = list(itertools.combinations(answers, k))
    assert pass_at_k(n, right, k) == pytest.approx(sum(map(any, subsets)) / len(subsets))


def test_pass_at_k_of_many_answers() -> None:
    """Where factorials overflow a float."""
    assert pass_at_k(10_000, 1, 10) == pytest.approx(1e-3)
    assert pass_at_k(10_000, 10_000, 1) == 1.0
    for k in (0, 5):
        with pytest.raises(ValueError, match="draw"):
            pass_at_k(4, 2, k)


def test_interval_is_the_bootstraps() -> None:
    """Against all resamples of four problems, drawn exhaustively."""
    values = [0.0, 0.25, 0.5, 1.0]
    means = sorted(standard.mean(each) for each in itertools.product(values, repeat=4))
    found = bootstrap(values)
    assert found.value == avg_at_k(values) == 0.4375
    assert found.problems == 4
    # 256 resamples: within two of their steps of the exact quantile.
    assert means[4] <= found.low <= means[8]
    assert means[-9] <= found.high <= means[-5]
    many = [value**2 for value in range(30)]
    assert bootstrap(many) == bootstrap(many)
    assert bootstrap(many, seed=1) != bootstrap(many)


def test_interval_of_a_share_is_near_the_normal_one() -> None:
    values = [1.0] * 120 + [0.0] * 280
    found = bootstrap(values)
    half = 1.96 * (0.3 * 0.7 / 400) ** 0.5
    assert found.low == pytest.approx(0.3 - half, abs=0.006)
    assert found.high == pytest.approx(0.3 + half, abs=0.006)


def test_weighted_mean_and_edges() -> None:
    found = bootstrap([1.0, 3.0], weights=[3.0, 1.0])
    assert found.value == 1.5
    assert (found.low, found.high) == (1.0, 3.0)
    single = bootstrap([0.5])
    assert (single.value, single.low, single.high) == (0.5, 0.5, 0.5)
    with pytest.raises(ValueError, match="no problems"):
        bootstrap([])


def exact_p_value(differences: list[float]) -> float:
    """Of all signs."""
    observed = abs(sum(differences))
    sums = [
        abs(sum(s * d for s, d in zip(signs, differences, strict=True)))
        for signs in itertools.product((1, -1), repeat=len(differences))
    ]
    return sum(each >= observed - 1e-9 for each in sums) / len(sums)


@pytest.mark.parametrize("seed", range(4))
def test_p_value_is_the_permutation_tests(seed: int) -> None:
    generator = random.Random(seed)
    first = [generator.random() for _ in range(9)]
    second = [min(1.0, value + generator.random() * 0.3 * seed) for value in first]
    found = compare(first, second)
    differences = [b - a for a, b in zip(first, second, strict=True)]
    assert found.difference == pytest.approx(standard.mean(differences))
    assert found.p_value == pytest.approx(exact_p_value(differences), abs=0.02)
    assert found.low <= found.difference <= found.high


def test_comparison_of_equal_and_of_turned_runs() -> None:
    first, second = [1.0, 0.0, 1.0, 0.0], [0.0, 0.0, 1.0, 1.0]
    same = compare(first, first)
    assert (same.difference, same.low, same.high, same.p_value) == (0.0, 0.0, 0.0, 1.0)
    one, other = compare(first, second), compare(second, first)
    assert one.p_value == other.p_value == 1.0
    assert (one.low, one.high) == (-other.high, -other.low)
    with pytest.raises(ValueError, match="3 and 4 problems"):
        compare(first[:3], second)


def test_pairs_see_what_separate_intervals_do_not() -> None:
    """The same gain on every problem is certain, however much problems differ."""
    first = np.linspace(0, 0.9, 50).tolist()
    second = [value + 0.05 for value in first]
    assert bootstrap(first).high > bootstrap(second).low
    found = compare(first, second)
    assert found.p_value < 0.001
    assert found.low == pytest.approx(0.05)


def test_holm() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9]) == pytest.approx([1.0, 1.0])


def test_a_comparison_over_seeds_is_paired() -> None:
    """Problems that differ much between one another do not hide a difference that all of them have."""
    rng = np.random.default_rng(0)
    scores = rng.uniform(0, 0.9, size=(5, 60))
    found = compare_seeds(scores + 0.05, scores)
    assert found.difference == pytest.approx(0.05)
    assert (found.low, found.high) == pytest.approx((0.05, 0.05))
    assert found.verdict == "better"
    assert compare_seeds(scores, scores + 0.05).verdict == "worse"
    value = bootstrap_seeds(scores)
    assert value.low < scores.mean() < value.high
    assert compare_seeds(scores, scores).p_value == 1


def test_an_interval_over_seeds_is_that_of_all_draws() -> None:
    """Two seeds of three problems, drawn exhaustively: wider than problems alone where seeds differ."""
    scores = np.array([[0.0, 0.5, 1.0], [0.2, 0.9, 1.0]])
    means = sorted(
        float(scores[np.ix_(seeds, problems)].mean())
        for seeds in itertools.product(range(2), repeat=2)
        for problems in itertools.product(range(3), repeat=3)
    )
    found = bootstrap_seeds(scores)
    assert (found.value, found.problems) == (pytest.approx(0.6), 3)
    assert means[0] <= found.low <= means[6]  # 108 draws
    assert means[-7] <= found.high <= means[-1]
