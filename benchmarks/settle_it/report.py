"""Tables and pictures from stored results.

    python benchmarks/settle_it/report.py [--results DIR] [--out DIR]

The unit of resampling is a seed and a problem: an interval is of the mean over both, and a comparison is paired, the
same seeds and problems on both sides.
"""

import argparse
import json
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from settle_it.grid import COMPARED, REGIMES  # noqa: E402

RESAMPLES = 2000
Key = tuple[str, float]
"""Objective and temperature."""


def read(folder: Path) -> dict[str, dict[Key, list[dict[str, Any]]]]:
    """Regime to objective and temperature to results, in the order of their seeds; test jobs only."""
    found: dict[str, dict[Key, list[dict[str, Any]]]] = defaultdict(lambda: defaultdict(list))
    for file in sorted(folder.glob("test_*.json")):
        result = json.loads(file.read_text())
        job = result["job"]
        if job["clip_grad"] == 1.0 and not job["settings"]:
            found[job["regime"]][job["objective"], job["temperature"]].append(result)
    for by_key in found.values():
        for results in by_key.values():
            results.sort(key=lambda result: result["job"]["seed"])
    return found


def matrix(results: list[dict[str, Any]], measure: str = "sampled") -> np.ndarray:
    """Scores, [seeds, problems]."""
    return np.array([result["test"][measure] for result in results])


def resampled_means(scores: np.ndarray, seed: int = 0) -> np.ndarray:
    """Means of ``RESAMPLES`` draws of seeds and of problems, with replacement."""
    rng = np.random.default_rng(seed)
    seeds, problems = scores.shape
    rows = rng.integers(seeds, size=(RESAMPLES, seeds))
    columns = rng.integers(problems, size=(RESAMPLES, problems))
    return np.array([scores[np.ix_(row, column)].mean() for row, column in zip(rows, columns, strict=True)])


def interval(means: np.ndarray) -> tuple[float, float]:
    """The middle 95%."""
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def compare(first: np.ndarray, second: np.ndarray) -> dict[str, float]:
    """Difference of means, its interval and a two-sided p-value, paired by seed and problem."""
    means = resampled_means(first - second)
    low, high = interval(means)
    share = min((means <= 0).mean(), (means >= 0).mean())
    return {
        "difference": float((first - second).mean()),
        "low": low,
        "high": high,
        "p": float(min(1.0, 2 * max(share, 1 / RESAMPLES))),
    }


def holm(p_values: list[float]) -> list[float]:
    """Holm's adjusted p-values."""
    order = np.argsort(p_values)
    adjusted, running = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(order):
        running = max(running, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = running
    return adjusted


def mean_of(results: list[dict[str, Any]], *path: str) -> float:
    values = []
    for result in results:
        value: Any = result
        for name in path:
            value = value[name]
        values.append(value)
    return float(np.mean(values))


def regime_table(by_key: dict[Key, list[dict[str, Any]]]) -> list[str]:
    """A row for each objective and temperature, the best first."""
    head = (
        "| objective | T | rate | avg@8 [95%] | greedy | tuned decode "
        "| KL(p, q) | KL(q, p) | entropy | clipped | s a step |"
    )
    lines = [head, "|---|---|---|---|---|---|---|---|---|---|---|"]
    rows = []
    for (name, temperature), results in by_key.items():
        scores = matrix(results)
        low, high = interval(resampled_means(scores))
        numbers = [mean_of(results, each) for each in ("forward_kl", "reverse_kl", "entropy")]
        rows.append(
            (
                -scores.mean(),
                f"| {name} | {temperature:g} | {results[0]['job']['rate']:g} "
                f"| {scores.mean():.3f} [{low:.3f}, {high:.3f}] | {matrix(results, 'greedy').mean():.3f} "
                f"| {matrix(results, 'tuned').mean():.3f} | {numbers[0]:.3f} | {numbers[1]:.3f} | {numbers[2]:.3f} "
                f"| {mean_of(results, 'training', 'clipped_share'):.2f} "
                f"| {mean_of(results, 'training', 'seconds_a_step'):.3f} |",
            )
        )
    return lines + [text for _, text in sorted(rows)]


def at_temperature_1(by_key: dict[Key, list[dict[str, Any]]]) -> dict[str, list[dict[str, Any]]]:
    """Each objective at temperature 1."""
    return {name: results for (name, temperature), results in by_key.items() if temperature == 1.0}


def comparisons(regime: str, by_key: dict[Key, list[dict[str, Any]]]) -> list[str]:
    """HPD against those named in advance, at temperature 1, Holm's correction over them; then win, tie, loss of all."""
    at_one = at_temperature_1(by_key)
    named = [(first, second) for first, second in COMPARED if first in at_one and second in at_one]
    found = [compare(matrix(at_one[first]), matrix(at_one[second])) for first, second in named]
    lines = ["| comparison | difference [95%] | p, Holm |", "|---|---|---|"]
    for (first, second), each, p in zip(named, found, holm([each["p"] for each in found]), strict=True):
        lines.append(
            f"| {first} - {second} | {each['difference']:+.3f} [{each['low']:+.3f}, {each['high']:+.3f}] | {p:.3f} |"
        )
    for reference in ("hpd", "fkl"):
        if reference not in at_one:
            continue
        verdicts: dict[str, list[str]] = defaultdict(list)
        for name, results in at_one.items():
            if name != reference:
                each = compare(matrix(results), matrix(at_one[reference]))
                verdict = "better" if each["low"] > 0 else "worse" if each["high"] < 0 else "no difference seen"
                verdicts[verdict].append(name)
        lines += ["", f"Against `{reference}` at temperature 1, without correction:"]
        lines += [f"- {verdict}: {', '.join(sorted(names))}" for verdict, names in sorted(verdicts.items())]
    return lines


def draw(regime: str, by_key: dict[Key, list[dict[str, Any]]], file: Path) -> None:
    """Accuracy with intervals, and entropy and KL over training, at temperature 1."""
    at_one = at_temperature_1(by_key)
    order = sorted(at_one, key=lambda name: matrix(at_one[name]).mean())
    figure, axes = plt.subplots(1, 3, figsize=(13, 4.2), constrained_layout=True)
    for place, name in enumerate(order):
        scores = matrix(at_one[name])
        low, high = interval(resampled_means(scores))
        axes[0].plot([low, high], [place, place], color="tab:blue")
        axes[0].plot(scores.mean(), place, "o", color="tab:blue")
    axes[0].set_yticks(range(len(order)), order)
    axes[0].set_title(f"avg@8 at temperature 0.7, 95% interval ({regime})", fontsize=10)
    for axis, measure in ((axes[1], "entropy"), (axes[2], "reverse_kl_k1")):
        for name in order[-6:]:
            curves = [result["training"] for result in at_one[name] if measure in result["training"]]
            if curves:
                axis.plot(curves[0]["step"], np.mean([curve[measure] for curve in curves], axis=0), label=name)
        axis.set_xlabel("step")
        axis.set_title(
            {"entropy": "entropy on demonstrations", "reverse_kl_k1": "KL(q, p), one sample"}[measure], fontsize=10
        )
        if axis.lines:
            axis.legend(fontsize=7)
    figure.savefig(file, dpi=110)
    plt.close(figure)


def write_report(results: Path, out: Path) -> None:
    """``out/evidence.md`` and a picture for each regime."""
    out.mkdir(parents=True, exist_ok=True)
    lines: list[str] = []
    for regime, by_key in read(results).items():
        setting, seeds = REGIMES[regime], {len(each) for each in by_key.values()}
        lines += [
            f"## {regime}",
            "",
            f"{setting.demonstrations} demonstrations, {setting.steps} steps, "
            f"{'after ' + str(setting.warm_steps) + ' supervised steps' if setting.warm_steps else 'from scratch'}; "
            f"{'/'.join(map(str, sorted(seeds)))} seeds.",
            "",
            f"![{regime}]({regime}.png)",
            "",
            *regime_table(by_key),
            "",
            *comparisons(regime, by_key),
            "",
        ]
        draw(regime, by_key, out / f"{regime}.png")
    (out / "evidence.md").write_text("\n".join(lines))
    print(f"Report: {out / 'evidence.md'}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "settle_it" / "run" / "results")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "settle_it" / "run" / "report")
    arguments = parser.parse_args()
    write_report(arguments.results, arguments.out)


if __name__ == "__main__":
    main()
