"""Tables and pictures of ``docs/evidence.md`` and ``docs/evidence_tables.md`` from stored results.

    python benchmarks/settle_it/report.py [--results DIR] [--out DIR]

A table replaces the text between ``<!-- table NAME -->`` and ``<!-- end -->`` of a page; the rest is written by hand.
``--out DIR`` writes one page of all tables to DIR instead.
"""

import argparse
import json
import re
import sys
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from hpd_verl.tools.intervals import Comparison, Estimate, bootstrap_seeds, compare_seeds, holm  # noqa: E402
from settle_it import grid  # noqa: E402
from settle_it.confirmation import BESIDE, BEST_OF, CANDIDATE, ranking  # noqa: E402
from settle_it.results import FOLDER, Results, pass_at, right_shares  # noqa: E402

FOLLOWED = ("sft", "hpd", "hpd_no_sampling", "fkl", "rkl_exact", "jsd_exact", "fkl T2")
"""Methods whose curves are drawn."""
REAL_MODEL = FOLDER / "real_model.json"
EARLIER = FOLDER / "earlier"
"""Of a run of "warm" whose students had other weights."""
PAGES = (ROOT / "docs" / "evidence.md", ROOT / "docs" / "evidence_tables.md")
PICTURES = ROOT / "docs" / "evidence"
AT_EACH_TEMPERATURE = {
    name: (name, f"{name} T1.5", f"{name} T2") for name, method in grid.AT_TEMPERATURE_1.items() if method.needs_teacher
}
"""An objective to its methods at temperatures of 1, 1.5 and 2."""
Found = Mapping[str, Sequence[dict[str, Any]]]
"""Results by method, by rising seed."""


_REGIMES = [regime for regime in grid.REGIMES if regime != grid.READER]
"""Those with tables of their own; the other's students stand in the table of self-teachers."""


def of_common_seeds(found: Found, names: Iterable[str]) -> Found:
    """The results of some methods, of the seeds that all of them have: others would not be compared fairly."""
    named = {name: found[name] for name in names if name in found}
    seeds = min((len(each) for each in named.values()), default=0)
    return {name: each[:seeds] for name, each in named.items()}


def accuracy(results: Sequence[dict[str, Any]], measure: str = "sampled") -> np.ndarray:
    """Share of right answers, [seeds, problems]."""
    return right_shares(results, measure, samples=1 if measure == "greedy" else grid.SAMPLES)


def less(first: Sequence[dict[str, Any]], second: Sequence[dict[str, Any]], measure: str = "sampled") -> Comparison:
    """The first method's accuracy less the second's."""
    return compare_seeds(accuracy(first, measure), accuracy(second, measure))


def mean(results: Sequence[dict[str, Any]], *path: str) -> float:
    """The mean over seeds of a number that results hold at a path."""
    values = []
    for result in results:
        value: Any = result
        for name in path:
            value = value[name]
        values.append(value)
    return float(np.mean(values))


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def scores(found: Found) -> str:
    """A row a method, the best first."""
    head = ["method", "rate", "seeds", "avg@8 [95%]", "greedy", "tuned decode", "pass@8", "KL(p, q)", "KL(q, p)"]
    head += ["entropy", "in rollouts", "clipped", "CPU s"]
    rows = []
    for name, results in found.items():
        value = bootstrap_seeds(accuracy(results))
        others = [accuracy(results, "greedy"), accuracy(results, "tuned"), pass_at(results, "sampled", grid.SAMPLES, 8)]
        numbers = [mean(results, "held_out", each) for each in ("forward_kl", "reverse_kl", "entropy")]
        numbers.append(mean(results, "rollouts", "entropy"))
        row = [f"`{name}`", f"{results[0]['job']['rate']:g}", str(len(results))]
        row.append(percent(value))
        row += [f"{100 * each.mean():.1f}" for each in others] + [f"{each:.3f}" for each in numbers]
        if "training" in results[0]:
            row.append(f"{mean(results, 'training', 'clipped_share'):.2f}")
            row.append(f"{mean(results, 'cpu_seconds'):.0f}" if "cpu_seconds" in results[0] else "")
        else:
            row[1] = ""
            row += ["", ""]
        rows.append((-value.value, row))
    return table(head, [row for _, row in sorted(rows)])


def summary(found: Found, reference: str) -> str:
    """A row a method, the best first: accuracy, the same at the tuned decode temperature, and the difference to one."""
    rows = []
    for name, results in found.items():
        value, tuned = bootstrap_seeds(accuracy(results)), 100 * accuracy(results, "tuned").mean()
        difference = "" if name == reference else points(less(results, found[reference]))
        rows.append((-value.value, [f"`{name}`", percent(value), f"{tuned:.1f}", difference]))
    head = ["method", "avg@8 [95%]", "tuned decode", f"less `{reference}`, points [95%]"]
    return table(head, [row for _, row in sorted(rows)])


def named_comparisons(found: Found, pairs: Sequence[tuple[str, str]]) -> str:
    """Comparisons that were named in advance, with Holm's correction over those that there are."""
    pairs = [(first, second) for first, second in pairs if first in found and second in found]
    results = [less(found[first], found[second]) for first, second in pairs]
    tuned = [less(found[first], found[second], "tuned") for first, second in pairs]
    rows = [
        [f"`{first}` - `{second}`", points(each), f"{p:.3f}", points(decoded)]
        for (first, second), each, decoded, p in zip(
            pairs, results, tuned, holm([each.p_value for each in results]), strict=True
        )
    ]
    return table(["comparison", "avg@8, points [95%]", "p, Holm", "at the tuned decode temperature"], rows)


def percent(value: Estimate) -> str:
    return f"{100 * value.value:.1f} [{100 * value.low:.1f}, {100 * value.high:.1f}]"


def points(comparison: Comparison) -> str:
    return f"{100 * comparison.difference:+.1f} [{100 * comparison.low:+.1f}, {100 * comparison.high:+.1f}]"


def verdicts(results: Results, reference: str) -> str:
    """Wins, ties and losses of every method against one, a row a method and a column a regime; not corrected."""
    rows: dict[str, dict[str, str]] = defaultdict(dict)
    regimes = [regime for regime in _REGIMES if reference in results.of("test", regime)]
    for regime in regimes:
        found = results.of("test", regime)
        for name, each in found.items():
            if name != reference and not is_special(name):
                comparison = less(each, found[reference])
                rows[name][regime] = f"{comparison.verdict}, {points(comparison)}"
    ordered = sorted(rows, key=lambda name: (sum("better" not in text for text in rows[name].values()), name))
    cells = [[f"`{name}`", *(rows[name].get(regime, "") for regime in regimes)] for name in ordered]
    return table(["method", *regimes], cells)


def every_regime(results: Results) -> str:
    """Accuracy of every objective in every regime; an arrow where it is worse than the best of ``grid.AIM`` there.

    In "rollouts" an objective counts as trained on rollouts alone. Those that are not worse in most regimes come first.
    """
    names = (*grid.AT_TEMPERATURE_1, *grid.GATED, "opd", *grid.OF_ROLLOUTS)
    columns: dict[str, dict[str, Sequence[dict[str, Any]]]] = {}
    for regime in _REGIMES:
        suffix = ", rollouts" if regime == grid.ROLLOUTS else ""
        found = results.of("test", regime, [f"{name}{suffix}" for name in names])
        if any(f"{name}{suffix}" in found for name in grid.AIM):
            columns[regime] = {name.removesuffix(suffix): each for name, each in found.items()}
    cells: dict[str, dict[str, str]] = defaultdict(dict)
    for regime, of_names in columns.items():
        best = max((name for name in grid.AIM if name in of_names), key=lambda name: accuracy(of_names[name]).mean())
        for name, each in of_names.items():
            worse = name != best and less(each, of_names[best]).verdict == "worse"
            cells[name][regime] = f"{100 * accuracy(each).mean():.1f}" + (" ↓" if worse else "")
    worse_in = {name: sum("↓" in cell for cell in row.values()) for name, row in cells.items()}
    order = sorted(cells, key=lambda name: (worse_in[name] - len(cells[name]), worse_in[name]))
    rows = [[f"`{name}`", *(cells[name].get(regime, "") for regime in columns)] for name in order]
    return table(["objective", *columns], rows)


def is_special(name: str) -> bool:
    """Of the suites that have tables of their own, or of no training."""
    apart = (grid.SENSITIVITY, grid.WITHOUT_CLIPPING, grid.BY_TEMPERATURE, grid.SELF_TAUGHT, (grid.BEFORE,))
    return any(name in each for each in apart)


def identical_rates(results: Results) -> str:
    """Validation accuracy at each learning rate, a row a method: what tuning saw."""
    means = results.validation_means()
    columns = [(regime, rate) for regime in grid.REGIMES for rate in grid.RATES if regime in {key[0] for key in means}]
    rows = []
    for name in grid.METHODS:
        values = [means.get((regime, name), {}).get(rate) for regime, rate in columns]
        if any(value is not None for value in values):
            rows.append([f"`{name}`", *("" if value is None else f"{100 * value:.1f}" for value in values)])
    return table(["method", *(f"{regime}, {rate:g}" for regime, rate in columns)], rows)


def candidates(results: Results) -> str:
    """Validation accuracy at the best learning rate: what the candidate was chosen by."""
    together = {*grid.CANDIDATES, *grid.CORE, *grid.PAPER, "fkl T2", "hpd T2"}  # tuned on the same students
    rows = [[f"`{name}`", f"{100 * value:.1f}"] for value, name in ranking(results) if name in together]
    return table(["method", "validation"], rows)


def temperatures(results: Results) -> str:
    """Accuracy by the temperature of the objective, a row an objective, and what 2 changes against 1, on the seeds
    that all have."""
    found = of_common_seeds(results.of("test", "warm"), [name for row in AT_EACH_TEMPERATURE.values() for name in row])
    rows = []
    for name, at_each in AT_EACH_TEMPERATURE.items():
        values = [found.get(each) for each in at_each]
        if not any(values[1:]):
            continue
        row = [f"`{name}`", *("" if each is None else percent(bootstrap_seeds(accuracy(each))) for each in values)]
        first, _, last = values
        if first is not None and last is not None:
            row += [points(less(last, first, each)) for each in ("sampled", "tuned")]
        rows.append(row)
    return table(["objective", "1", "1.5", "2", "2 less 1, points", "the same at the tuned decode temperature"], rows)


def real_model(results: Mapping[str, Mapping[str, float]]) -> str:
    """Of ``real_model.py``, the least forward KL first."""
    measured = ("nll", "forward_kl", "reverse_kl", "entropy")
    students = [name for name in results if name not in ("setting", "teacher", "student")]
    students.sort(key=lambda name: results[name]["forward_kl"])
    names = {"teacher": "teacher", "student": "student before"} | {name: f"`{name}`" for name in students}
    rows = [
        [label, *(f"{results[name][measure]:.3f}" for measure in measured), f"{results[name].get('cpu_seconds', ''):}"]
        for name, label in names.items()
    ]
    return table(["method", "NLL", "KL(p, q)", "KL(q, p)", "entropy", "CPU s"], rows)


def self_taught(results: Results) -> str:
    """Students that are their own teachers against ``sft`` from the same start, a row a start and method."""
    rows = []
    for regime in (grid.READER, "warm"):
        found = results.of("test", regime, [*grid.SELF_TAUGHT, "sft", grid.BEFORE])
        order = sorted(found, key=lambda name: -accuracy(found[name]).mean())
        for name in order if not grid.SELF_TAUGHT.keys().isdisjoint(found) else ():
            each = found[name]
            row = [regime, f"`{name}`", f"{each[0]['job']['rate']:g}" if name != grid.BEFORE else "", str(len(each))]
            row += [percent(bootstrap_seeds(accuracy(each)))]
            row += [f"{100 * accuracy(each, measure).mean():.1f}" for measure in ("greedy", "tuned")]
            row += [f"{mean(each, 'held_out', 'forward_kl'):.3f}", f"{mean(each, 'rollouts', 'entropy'):.3f}"]
            if name == "sft":
                row += ["", ""]
            else:
                row += [points(less(each, found["sft"], measure)) for measure in ("sampled", "tuned")]
            row.append("" if name == grid.BEFORE else f"{mean(each, 'cpu_seconds'):.0f}")
            rows.append(row)
    head = ["start", "method", "rate", "seeds", "avg@8 [95%]", "greedy", "tuned decode", "KL(p, q)", "in rollouts"]
    head += ["less `sft`, points [95%]", "the same at the tuned decode", "CPU s"]
    return table(head, rows)


def sensitivity(results: Results) -> str:
    found = results.of("test", "warm", grid.SENSITIVITY)
    rows = []
    for name, each in found.items():
        value = bootstrap_seeds(accuracy(each))
        rows.append([f"`{name}`", percent(value), f"{mean(each, 'rollouts', 'entropy'):.3f}"])
    return table(["coefficients", "avg@8 [95%]", "entropy in rollouts"], rows)


def clipping(results: Results) -> str:
    found = results.of("test", "warm")
    rows = []
    for name in grid.WITHOUT_CLIPPING:
        clipped = name.split()[0]
        if name in found and clipped in found:
            comparison = less(found[name], found[clipped])
            share = mean(found[clipped], "training", "clipped_share")
            rows.append([f"`{clipped}`", f"{share:.2f}", points(comparison)])
    return table(["method", "steps clipped", "without clipping, points [95%]"], rows)


def draw_regime(found: Found, regime: str, file: Path) -> None:
    """Accuracy with intervals; entropy and KL over training, as in the paper's figure 1."""
    shown = {name: each for name, each in found.items() if not is_special(name)}
    order = sorted(shown, key=lambda name: accuracy(shown[name]).mean())
    figure, axes = plt.subplots(1, 3, figsize=(15, max(4.0, 0.22 * len(order) + 1)), constrained_layout=True)
    for place, name in enumerate(order):
        value = bootstrap_seeds(accuracy(shown[name]))
        color = "tab:red" if name == "hpd" else "tab:blue"
        axes[0].plot([100 * value.low, 100 * value.high], [place, place], color=color)
        axes[0].plot(100 * value.value, place, "o", color=color)
    axes[0].set_yticks(range(len(order)), order, fontsize=8)
    axes[0].set_title(f"{regime}: avg@8, %, with 95% interval", fontsize=10)
    for number, name in enumerate(FOLLOWED):
        if name not in shown:
            continue
        style = {"color": f"C{number}", "label": name}
        curves = [result["training"] for result in shown[name]]
        if "entropy" in curves[0]:  # sft, without a teacher, logs none
            axes[1].plot(curves[0]["step"], np.mean([curve["entropy"] for curve in curves], axis=0), **style)
        followed = [result["rollout_entropy"] for result in shown[name] if "rollout_entropy" in result]
        if followed:
            steps = np.linspace(0, curves[0]["step"][-1], len(followed[0]) + 1)[1:]
            axes[2].plot(steps, np.mean(followed, axis=0), "o-", **style)
    axes[1].set_title("entropy on the training rows, at the objective's temperature, nats", fontsize=10)
    axes[2].set_title("entropy in rollouts at temperature 1, nats, one seed", fontsize=10)
    for axis in axes[1:]:
        axis.set_xlabel("step")
    axes[2].legend(fontsize=8, loc="center left", bbox_to_anchor=(1.02, 0.5))
    figure.savefig(file, dpi=100)
    plt.close(figure)


def draw_sensitivity(results: Results, file: Path) -> None:
    """Heat maps: HPD's coefficients, temperature by objective, and the share of rollouts."""
    warm, rollouts = results.of("test", "warm"), results.of("test", grid.ROLLOUTS)
    levels = ("0.5", "1", "2")
    coefficients = {
        forward: [f"hpd forward {forward} reverse {reverse} reinforce 1" for reverse in levels] for forward in levels
    }
    temperatures = {name: row for name, row in AT_EACH_TEMPERATURE.items() if name in warm}
    fractions = {name: [f"{name}, 0 rollouts", f"{name}, 0.25 rollouts", f"{name}, rollouts"] for name in grid.LEAN}
    height = max(3.5, 0.32 * len(temperatures) + 1)
    figure, axes = plt.subplots(1, 3, figsize=(15, height), constrained_layout=True)
    _heat(axes[0], warm, coefficients, levels)
    axes[0].set(xlabel="reverse_coef", ylabel="forward_coef", title="warm, hpd: avg@8, %")
    _heat(axes[1], warm, temperatures, ("1", "1.5", "2"))
    axes[1].set(xlabel="temperature", title="warm: avg@8, %")
    _heat(axes[2], rollouts, fractions, ("0", "0.25", "1"))
    axes[2].set(xlabel="on_policy_fraction", title="rollouts: avg@8, %")
    figure.savefig(file, dpi=100)
    plt.close(figure)


def _heat(axis: Any, found: Found, names: Mapping[str, Sequence[str]], columns: Sequence[str]) -> None:
    """Accuracy of the methods of each row, by its label; a place without results stays empty."""
    found = of_common_seeds(found, [name for row in names.values() for name in row])
    scores = [
        [100 * accuracy(found[name]).mean() if name in found else np.nan for name in row] for row in names.values()
    ]
    values = np.array(scores).reshape(len(names), len(columns))
    axis.imshow(values, aspect="auto", cmap="viridis")
    axis.set_xticks(range(len(columns)), columns)
    axis.set_yticks(range(len(names)), list(names), fontsize=8)
    middle = np.nanmean(values) if not np.isnan(values).all() else 0.0
    for row, column in np.ndindex(values.shape):
        if not np.isnan(values[row, column]):
            color = "white" if values[row, column] < middle else "black"
            axis.text(column, row, f"{values[row, column]:.1f}", ha="center", va="center", color=color, fontsize=8)


def tables(results: Results) -> dict[str, str]:
    """All tables that there are results for, by the name of their place."""
    out: dict[str, str] = {}
    for regime in _REGIMES:
        found = results.of("test", regime)
        plain = {name: each for name, each in found.items() if not is_special(name)}
        if plain:
            before = {name: each for name, each in found.items() if name == grid.BEFORE}
            out[f"scores {regime}"] = scores(plain | before)
            if regime == "warm" and "hpd" in plain:
                out[f"summary {regime}"] = summary(plain | before, "hpd")
            compared = grid.ROLLOUTS_COMPARED if regime == grid.ROLLOUTS else grid.COMPARED
            out[f"comparisons {regime}"] = named_comparisons(plain, compared)
            if any(first in plain for first, _ in grid.ELSEWHERE.get(regime, ())):
                out[f"elsewhere {regime}"] = named_comparisons(plain, grid.ELSEWHERE[regime])
        fresh = results.of("fresh", regime)
        if fresh:
            out[f"confirmation {regime}"] = scores(fresh)
            for role, name in (("candidate", CANDIDATE), ("beside", BESIDE[0])):
                pairs = [(name, other) for other in BEST_OF]
                out[f"confirmation of the {role} {regime}"] = named_comparisons(fresh, pairs)
        of_anew = results.of(grid.ANEW, regime)
        anew = of_common_seeds(of_anew, of_anew)
        if anew:
            out[f"anew {regime}"] = scores(anew)
            pairs = [(grid.EVERYWHERE, other) for other in grid.COMPARED_ANEW[regime][1:]]
            out[f"comparisons anew {regime}"] = named_comparisons(anew, pairs)
    out["every regime"] = every_regime(results)
    for reference in ("hpd", "fkl"):
        out[f"against {reference}"] = verdicts(results, reference)
    if REAL_MODEL.exists():
        out["real model"] = real_model(json.loads(REAL_MODEL.read_text()))
    out["rates"] = identical_rates(results)
    out["candidates"] = candidates(results)
    out["temperatures"] = temperatures(results)
    if earlier := Results(EARLIER).of("test", "warm"):
        out["scores of other students"] = scores(earlier)
    out["self-teachers"] = self_taught(results)
    out["sensitivity"] = sensitivity(results)
    out["clipping"] = clipping(results)
    return out


def filled(page: str, made: Mapping[str, str]) -> str:
    """The page with its tables made anew.

    Raises:
        ValueError: the page has a place for a table that there is not.
    """

    def fill(match: re.Match[str]) -> str:
        name = match[1]
        if name not in made:
            raise ValueError(f"there is no table {name!r}; there are {', '.join(made)}")
        return f"<!-- table {name} -->\n\n{made[name]}\n\n<!-- end -->"

    return re.sub(r"<!-- table (.*?) -->.*?<!-- end -->", fill, page, flags=re.DOTALL)


def write_report(results: Results, out: Path | None) -> None:
    """Fill the pages of ``docs/``, or write a page of all tables into ``out``; pictures beside it."""
    made = tables(results)
    pictures = PICTURES if out is None else out
    pictures.mkdir(parents=True, exist_ok=True)
    for regime in _REGIMES:
        if found := results.of("test", regime):
            draw_regime(found, regime, pictures / f"{regime}.png")
    draw_sensitivity(results, pictures / "sensitivity.png")
    if out is None:
        pages = {page: filled(page.read_text(), made) for page in PAGES}
    else:
        parts = [f"## {name}\n\n<!-- table {name} -->\n\n{each}\n\n<!-- end -->\n\n" for name, each in made.items()]
        pages = {out / "evidence.md": "".join(parts)}
    for page, text in pages.items():
        page.write_text(text)
        print(f"Report: {page}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=FOLDER)
    parser.add_argument("--out", type=Path, help="write one page of all tables to this folder instead")
    arguments = parser.parse_args()
    write_report(Results(arguments.results), arguments.out)


if __name__ == "__main__":
    main()
