"""The candidate for a better objective: chosen on validation problems, compared once on what nothing was chosen on."""

from settle_it.grid import FRESH_SEEDS, METHODS, Suite
from settle_it.results import Results

BEST_OF = ("hpd", "hpd_no_sampling", "fkl", "rkl_exact", "seqkd", "jsd_exact")
"""The candidate is to be as good as the best of these, each at temperature 1."""


def ranking(results: Results, regimes: tuple[str, ...] = ("small", "warm")) -> list[tuple[float, str]]:
    """Validation accuracy at the best learning rate, mean over regimes, of all methods that were tuned; best first."""
    means = results.validation_means()
    methods = {method for _, method in means}
    tuned = [name for name in methods if all((regime, name) in means for regime in regimes)]
    return sorted(
        ((sum(max(means[regime, name].values()) for regime in regimes) / len(regimes), name) for name in tuned),
        reverse=True,
    )


def chosen_candidate(results: Results) -> str:
    """The best on validation that is none of those it is compared with."""
    return next(name for _, name in ranking(results) if name not in BEST_OF)


def confirmation(results: Results) -> Suite:
    """Fresh seeds, and fresh problems for training and test."""
    names = [chosen_candidate(results), *BEST_OF]
    methods = {name: METHODS[name] for name in names}
    return Suite(
        "confirmation", methods, ("small", "warm", "long"), {name: name for name in names}, FRESH_SEEDS, "fresh"
    )
