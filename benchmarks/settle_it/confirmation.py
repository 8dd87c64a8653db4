"""The candidate for a better objective: chosen on validation problems, compared once on fresh seeds and problems."""

from settle_it.grid import FRESH_SEEDS, METHODS, RATES, Suite
from settle_it.results import Results

CANDIDATE = "power_label 0.4 T1.5, teacher 1"
"""The best on validation when the confirmation was run; what is tuned later does not change it."""
BEST_OF = ("hpd", "hpd_no_sampling", "fkl", "rkl_exact", "seqkd", "jsd_exact")
"""The candidate is to be as good as the best of these, each at temperature 1."""

BESIDE = ("fkl T2", "sft")
"""Run along for the reader."""


def ranking(results: Results) -> list[tuple[float, str]]:
    """Validation accuracy in the regime "warm" at the best learning rate, of all that were tuned, the best first."""
    means = results.validation_means()
    warm = {method: means[regime, method] for regime, method in means if regime == "warm" and method in METHODS}
    tuned = {method: by_rate for method, by_rate in warm.items() if set(RATES) <= set(by_rate)}
    return sorted(((max(by_rate.values()), method) for method, by_rate in tuned.items()), reverse=True)


def confirmation() -> Suite:
    """Fresh seeds, and fresh problems for training and test."""
    names = dict.fromkeys([CANDIDATE, *BEST_OF, *BESIDE])
    methods = {name: METHODS[name] for name in names}
    return Suite("confirmation", methods, ("warm",), {name: name for name in names}, FRESH_SEEDS, "fresh")
