"""The curves of one or several runs: a picture, and a page of HTML that needs nothing else.

    hpd-verl report RUN... [--names NAME...] [--out report]

RUN is what verl's file logger wrote (trainer.logger=[console,file]), or a run's folder with it. Writes report.png and
report.html. docs/metrics.md says what each metric is. Needs matplotlib: pip install 'hpd-verl[report]'.
"""

import argparse
import html
import io
import json
import math
import os
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

try:
    import matplotlib
    from matplotlib import pyplot as plt
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator
except ImportError:
    sys.exit("Error: matplotlib is not installed; pip install 'hpd-verl[report]', or matplotlib itself")

matplotlib.use("Agg")
matplotlib.rcParams["text.parse_math"] = False  # a run's name may hold dollars

GROUPS: dict[str, tuple[str, ...]] = {
    "Accuracy": (r"val-core/.*", "hpd/rollout_score"),
    "Loss": (
        "hpd/loss",
        "train/loss",
        "val/hpd/loss",
        "val/loss",
        "hpd/student_nll",
        "val/hpd/student_nll",
        "hpd/teacher_nll",
    ),
    "KL": (r"(val/)?hpd/reverse_kl_k1", r"(val/)?hpd/reverse_kl", r"(val/)?hpd/forward_kl"),
    "Entropy": ("actor/entropy",),
    "Weights": (
        *("hpd/label_weight_mean", "hpd/sampled_weight_mean", "hpd/label_gap_mean", "hpd/forward_fraction"),
        *("hpd/reinforced_fraction", "hpd/suppressed_fraction", "hpd/sampled_equals_label_fraction"),
    ),
    "Gradient and learning rate": ("actor/grad_norm", "train/grad_norm", "actor/lr", "train/lr"),
    "Batch and store": (
        *("hpd/response_tokens", "response_length/mean", "hpd/on_policy_fraction", "hpd/truncated_demonstrations"),
        "hpd/teacher_cache_hit_fraction",
    ),
    "Throughput": ("perf/throughput", "perf/mfu/actor", "actor/mfu"),
    "Time": ("timing_s/step", "timing_s/teacher", "timing_s/student", "timing_s/gen", "timing_s/update_actor"),
    "Memory": ("perf/max_memory_allocated_gb", "perf/cpu_memory_used_gb"),
}
"""Metrics by what they are about, as patterns of whole names; what a run did not log is left out."""
PICTURE = (
    *(r"val-core/.*", "hpd/loss", "train/loss", "hpd/reverse_kl_k1", "hpd/student_nll", "actor/entropy"),
    *("hpd/label_weight_mean", "hpd/sampled_weight_mean", "actor/grad_norm", "perf/throughput", "timing_s/step"),
)
"""Metrics of the picture."""
HIGHER_IS_BETTER = re.compile(r"val-core/.*|hpd/rollout_score|perf/throughput|perf/mfu/actor|actor/mfu")
LOWER_IS_BETTER = re.compile(r"(val/)?hpd/(student_nll|(reverse|forward)_kl.*)|(train|val)/loss|timing_s/.*")
"""Not ``hpd/loss``, whose weights move with the student."""
COLORS = ("#1b87c9", "#e07b00", "#12a173", "#c9549b", "#8f7ce0", "#a58a00", "#c94b4b", "#6f8a99")
"""Of the runs in their order: legible on white and on black."""
_POINTS = 500
"""Of a curve at most, which keeps the page small; of more steps, the range of values is drawn behind the mean."""
_FIGURES = 60
"""On a page at most; the metrics beyond it are in its table."""
_IN_PICTURE = 24
"""Figures in the picture at most."""
_LAST_STEP = 2**53
"""Beyond all steps; a line with a larger one is damaged."""
_INK = "#010203"
"""Stands for the page's own colour of text in the figures of the page."""


# ------------------------------ runs ------------------------------


@dataclass
class Run:
    """What a run logged."""

    name: str
    metrics: dict[str, dict[int, float]] = field(default_factory=dict)
    """Values by name and step; NaN where one was not finite, which the logger writes as null."""
    notes: list[str] = field(default_factory=list)
    """What was found on the way that the reader should know."""

    @property
    def steps(self) -> int:
        """The last training step."""
        return max((step for values in self.metrics.values() for step in values), default=0)


def metric_files(path: Path) -> list[Path]:
    """The files of a run, in the order of their writing.

    In a folder, ``metrics*.jsonl`` are the parts of one run, by their names; or there is one other ``.jsonl``.

    Raises:
        ValueError: there is none, or it is not clear which.
    """
    if not path.is_dir():
        if not path.is_file():
            raise ValueError(f"RUN={path}: no such file; give what verl's file logger wrote, or its folder")
        return [path]
    parts = sorted(path.glob("metrics*.jsonl")) or sorted(path.glob("*.jsonl")) or sorted(path.glob("*/*.jsonl"))
    if not parts:
        raise ValueError(
            f"RUN={path}: no .jsonl in it; train with trainer.logger=[console,file] and VERL_FILE_LOGGER_PATH there"
        )
    if len(parts) > 1 and not parts[0].name.startswith("metrics"):
        names = ", ".join(str(part.relative_to(path)) for part in parts[:6])
        raise ValueError(f"RUN={path}: {len(parts)} files there ({names}); name the one to show")
    return parts


def _entry(line: str) -> tuple[int, dict[str, Any]] | None:
    """Step and metrics of a line; None if it is not one of verl's logger."""
    try:
        content = json.loads(line)
        step = int(content["step"])
        return (step, dict(content["data"])) if 0 <= step < _LAST_STEP else None
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return None


def _trains(metrics: Mapping[str, float]) -> bool:
    """Whether these are of a training step, and not of a validation alone."""
    return any(not name.startswith("val") for name in metrics)


def _finite(value: float | None) -> float:
    """A logged number as a float; NaN if it is not finite, as it is where it was logged as null."""
    try:
        return float(value) if value is not None and math.isfinite(value) else math.nan
    except OverflowError:  # of a whole number
        return math.nan


def read_run(path: Path, name: str) -> Run:
    """Read a run's metrics.

    A step before the last one is of a resumed run, and what had been logged after it is given up. A line of validation
    alone, as of ``trainer.val_before_train``, adds to its step; any other one takes the step's place. Lines that cannot
    be read are left out and counted, as a last one that a killed run left.

    Raises:
        ValueError: there is nothing to show.
    """
    run, files = Run(name), metric_files(path)
    steps: dict[int, dict[str, float]] = {}  # in the order of the steps
    resumed, replaced, torn = 0, 0, 0
    for file in files:
        lines = file.read_bytes().decode(errors="replace").rstrip("\n").split("\n")
        for number, line in enumerate(lines):
            entry = _entry(line)
            if entry is None:
                if line.strip() and number == len(lines) - 1:
                    run.notes.append(f"{file.name}: the last line is torn, left out")
                else:
                    torn += bool(line.strip())
                continue
            step, data = entry
            last = next(reversed(steps), -1)
            values = {
                metric: _finite(value)
                for metric, value in data.items()
                if value is None or (isinstance(value, int | float) and not isinstance(value, bool))
            }
            if step < last:
                resumed += 1
                while last > step:
                    replaced += _trains(steps.pop(last))
                    last = next(reversed(steps), -1)
                if last == step and _trains(values):
                    replaced += _trains(steps.pop(step))
            steps.setdefault(step, {}).update(values)
    gaps = 0
    for step, values in steps.items():
        for metric, value in values.items():
            gaps += math.isnan(value)
            run.metrics.setdefault(metric, {})[step] = value
    if not run.metrics:
        raise ValueError(f"RUN={path}: no line of verl's file logger in it, {{'step': ..., 'data': {{...}}}}")
    if resumed:
        run.notes.append(f"resumed {resumed} times; {replaced} steps were logged again, the last counts")
    if torn:
        run.notes.append(f"{torn} lines could not be read, left out")
    if gaps:
        run.notes.append(f"{gaps} values are not finite: gaps, with a mark below")
    return run


def read_runs(paths: Sequence[Path], names: Sequence[str] | None = None) -> list[Run]:
    """Read several runs; their names are given, or what their paths differ in.

    Raises:
        ValueError: a run has nothing to show, or names are too few or twice the same.
    """
    if names and len(names) != len(paths):
        raise ValueError(f"--names: {len(names)} names for {len(paths)} runs; give one each")
    chosen = list(names) if names else _names(paths)
    twice = {name for name in chosen if chosen.count(name) > 1}
    if twice:
        raise ValueError(f"--names={min(twice)}: twice the same name; give each run its own")
    return [read_run(path, name) for path, name in zip(paths, chosen, strict=True)]


def _names(paths: Sequence[Path]) -> list[str]:
    whole = [path.absolute().parts for path in paths]
    for length in range(1, max(map(len, whole)) + 1):
        names = ["/".join(parts[-length:]).removesuffix(".jsonl") for parts in whole]
        if len(set(names)) == len(names):
            return names
    return [str(path) for path in paths]


def logged(runs: Sequence[Run], patterns: Sequence[str]) -> list[str]:
    """The metrics that some run logged, in the order of the patterns of their names."""
    names = sorted({name for run in runs for name in run.metrics})
    found = [name for pattern in patterns for name in names if re.fullmatch(pattern, name)]
    return list(dict.fromkeys(found))


# ------------------------------ figures ------------------------------


def smoothed(values: list[float]) -> list[float]:
    """Of many values the mean of each with its neighbours, a fiftieth of all; NaN where the value itself is."""
    reach = len(values) // 100
    if reach == 0:
        return values
    whole = np.asarray(values)
    finite = np.isfinite(whole)
    sums, counts = (np.concatenate([[0.0], np.cumsum(each)]) for each in (np.where(finite, whole, 0.0), finite))
    places = np.arange(len(whole))
    start, end = np.maximum(places - reach, 0), np.minimum(places + reach + 1, len(whole))
    means = (sums[end] - sums[start]) / np.maximum(counts[end] - counts[start], 1)
    return np.where(finite, means, math.nan).tolist()


def _range(values: list[float]) -> tuple[float, float]:
    finite = [value for value in values if math.isfinite(value)]
    return (min(finite), max(finite)) if finite else (math.nan, math.nan)


def draw_metric(axes: Axes, runs: Sequence[Run], metric: str, references: Mapping[str, float] | None = None) -> None:
    """Draw one metric of all runs over the training steps; of many, the values thin and their moving mean above.

    Args:
        axes: where.
        runs: those that did not log it are left out.
        metric: its name.
        references: horizontal lines by their names.
    """
    for number, run in enumerate(runs):
        values = run.metrics.get(metric)
        if not values:
            continue
        steps = sorted(values)
        color = COLORS[number % len(COLORS)]
        style = ("-", "--", ":")[number // len(COLORS) % 3]
        marker = "o" if len(steps) <= 20 else None
        drawn = [values[step] for step in steps]
        smooth = smoothed(drawn)
        stride = math.ceil(len(steps) / _POINTS)
        if stride > 1:
            low, high = zip(
                *(_range(drawn[start : start + stride]) for start in range(0, len(drawn), stride)), strict=True
            )
            axes.fill_between(steps[::stride], low, high, color=color, alpha=0.3 / len(runs), linewidth=0)
        elif smooth is not drawn:
            axes.plot(steps, drawn, color=color, linewidth=0.7, alpha=0.3)
        look: Any = {"color": color, "linestyle": style, "marker": marker, "markersize": 3, "linewidth": 1.5}
        axes.plot(steps[::stride], smooth[::stride], label=run.name, **look)
        gaps = [step for step in steps if math.isnan(values[step])]
        axes.plot(gaps, [0.02] * len(gaps), "|", color="#d62728", markersize=9, transform=axes.get_xaxis_transform())
    for name, value in (references or {}).items():
        axes.axhline(value, linestyle="--", linewidth=1, color="#8a8a8a", label=name)
    axes.set_title(metric, fontsize=10 if len(metric) < 34 else 8)
    axes.set_xlabel("training step", fontsize=8)
    axes.tick_params(labelsize=8)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(x=0.02)


def draw_picture(
    runs: Sequence[Run],
    file: Path,
    metrics: Sequence[str] | None = None,
    references: Mapping[str, Mapping[str, float]] | None = None,
) -> None:
    """Draw metrics of all runs into a PNG.

    Args:
        runs: one or several.
        file: the picture.
        metrics: patterns of names; None for ``PICTURE``.
        references: horizontal lines by metric and name.
    """
    shown = logged(runs, metrics or PICTURE)[:_IN_PICTURE] or logged(runs, [".*"])[:12]
    columns = len(shown) if len(shown) <= 5 else 4
    rows = math.ceil(len(shown) / columns)
    legend = 0.3 * math.ceil(len(runs) / 4) if len(runs) > 1 else 0.0
    figure = plt.figure(figsize=(3.7 * columns, 2.8 * rows + legend + 0.2), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False)
    for number, axes in enumerate(grid.flat):
        if number >= len(shown):
            axes.set_visible(False)
            continue
        lines = (references or {}).get(shown[number])
        draw_metric(axes, runs, shown[number], lines)
        if lines:
            axes.legend(fontsize=8)
    if len(runs) > 1:
        handles = [
            plt.Line2D([], [], color=COLORS[n % len(COLORS)], label=run.name.lstrip("_")) for n, run in enumerate(runs)
        ]
        figure.legend(handles=handles, loc="outside upper left", ncols=4, fontsize=9, frameon=False)
    _write(file, _bytes_of(figure, "png", dpi=120))


def _bytes_of(figure: Figure, kind: str, **options: Any) -> bytes:
    stream = io.BytesIO()
    figure.savefig(stream, format=kind, metadata={"Date": None} if kind == "svg" else None, **options)
    plt.close(figure)
    return stream.getvalue()


def _svg(runs: Sequence[Run], metric: str) -> str:
    """A figure in the page: text in the page's font and colour."""
    style: Any = {
        **{"svg.fonttype": "none", "font.family": "sans-serif", "text.color": _INK, "axes.labelcolor": _INK},
        **{"axes.edgecolor": _INK, "xtick.color": _INK, "ytick.color": _INK, "svg.hashsalt": metric},
    }
    with matplotlib.rc_context(style):
        figure = plt.figure(figsize=(4.2, 2.7), layout="constrained")
        draw_metric(figure.subplots(), runs, metric)
        text = _bytes_of(figure, "svg", transparent=True).decode()
    text = text[text.index("<svg") :].replace(_INK, "currentColor")
    text = re.sub(r"font: ([^;\"]*)'sans-serif'[^;\"]*", r"font: \1sans-serif", text)
    # Names of parts are looked up in the whole page: each figure gets its own.
    own = re.sub(r"\W", "_", metric)
    text = re.sub(r'(id="|url\(#|href="#)', rf"\g<1>{own}-", text)
    label = html.escape(f"{metric} by training step. {_in_words(runs, metric)}", quote=True)
    return re.sub(
        r'^<svg [^>]*?viewBox="([^"]*)"[^>]*>', rf'<svg role="img" aria-label="{label}" viewBox="\1">', text, count=1
    )


# ------------------------------ numbers ------------------------------


@dataclass(frozen=True)
class Summary:
    """A metric of a run in four numbers; ``best`` is None where neither more nor less is better."""

    first: float
    last: float
    best: float | None
    best_step: int | None


def summarize(values: Mapping[int, float], metric: str) -> Summary | None:
    """First, last and best of the finite values; None without any."""
    finite = {step: value for step, value in sorted(values.items()) if math.isfinite(value)}
    if not finite:
        return None
    first, last = next(iter(finite.values())), list(finite.values())[-1]
    if HIGHER_IS_BETTER.fullmatch(metric):
        best = max(finite, key=lambda step: finite[step])
    elif LOWER_IS_BETTER.fullmatch(metric):
        best = min(finite, key=lambda step: finite[step])
    else:
        return Summary(first, last, None, None)
    return Summary(first, last, finite[best], best)


def number(value: float) -> str:
    """A number in at most five significant digits."""
    return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.4g}"


def _in_words(runs: Sequence[Run], metric: str) -> str:
    said = []
    for run in runs:
        summary = summarize(run.metrics.get(metric, {}), metric)
        if summary is not None:
            said.append(f"{run.name}: from {number(summary.first)} to {number(summary.last)}")
    return "; ".join(said) + "." if said else "No finite value."


# ------------------------------ the page ------------------------------

_STYLE = """
:root { color-scheme: light dark; --line: #d5d9de; --soft: #5b6570; --back: #ffffff; --text: #1a1f24; --card: #f7f8fa; }
@media (prefers-color-scheme: dark) {
  :root { --line: #343b43; --soft: #a3adb8; --back: #14181c; --text: #e6eaee; --card: #1b2026; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 78rem; padding: 1rem; background: var(--back); color: var(--text);
  font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; margin: .5rem 0; }
h2 { font-size: 1.15rem; margin: 2rem 0 .5rem; border-bottom: 1px solid var(--line); padding-bottom: .2rem; }
ul.runs { list-style: none; padding: .3rem 0; margin: .5rem 0; position: sticky; top: 0; background: var(--back); }
ul.runs li { margin: .2rem 0; }
ul.runs small { display: block; color: var(--soft); padding-left: 1.4rem; }
.dot { display: inline-block; width: .8rem; height: .8rem; border-radius: 50%; margin-right: .5rem; }
.figures { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 22rem), 1fr)); gap: .75rem; }
figure { margin: 0; padding: .5rem; background: var(--card); border: 1px solid var(--line); border-radius: .5rem; }
figure svg { width: 100%; height: auto; display: block; }
table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums;
  width: 100%; max-width: 50rem; }
th, td { padding: .25rem .5rem; text-align: right; border-bottom: 1px solid var(--line); vertical-align: top; }
th:first-child, td:first-child { text-align: left; padding-left: 0; overflow-wrap: anywhere; }
td small { color: var(--soft); display: block; }
td .dot { width: .6rem; height: .6rem; margin-right: .35rem; }
footer { margin: 2rem 0 1rem; color: var(--soft); font-size: .85rem; }
"""


def _table(runs: Sequence[Run], metrics: Sequence[str]) -> list[str]:
    rows = []
    for metric in metrics:
        shown = html.escape(metric)  # once, above its first run
        for number_of_run, run in enumerate(runs):
            summary = summarize(run.metrics.get(metric, {}), metric)
            if summary is None:
                continue
            best = "" if summary.best is None else f"{number(summary.best)} <small>at {summary.best_step}</small>"
            cells = [number(summary.first), number(summary.last), best]
            name = f"<small>{_dot(number_of_run)}{html.escape(run.name)}</small>" if len(runs) > 1 else ""
            numbers = "".join(f"<td>{cell}</td>" for cell in cells)
            rows.append(f"<tr><td>{shown}{name}</td>{numbers}</tr>")
            shown = ""
    heads = "<tr><th>metric</th><th>first</th><th>last</th><th>best</th></tr>"
    return ["<table><thead>", heads, "</thead><tbody>", *rows, "</tbody></table>"]


def _dot(number_of_run: int) -> str:
    return f'<span class="dot" style="background:{COLORS[number_of_run % len(COLORS)]}"></span>'


def page(runs: Sequence[Run]) -> str:
    """The report as one page of HTML without anything from outside."""
    title = "Training report: " + ", ".join(run.name for run in runs)
    lines = [
        "<!DOCTYPE html>",
        '<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style></head><body><main>",
        "<h1>Training report</h1>",
        '<ul class="runs">',
    ]
    for count, run in enumerate(runs):
        notes = "".join(f"<small>{html.escape(note)}</small>" for note in run.notes)
        lines.append(f"<li>{_dot(count)}{html.escape(run.name)}, {run.steps:,} steps{notes}</li>")
    lines.append("</ul>")
    groups = {title: metrics for title, patterns in GROUPS.items() if (metrics := logged(runs, patterns))}
    if not groups:
        groups = {"Metrics": logged(runs, [".*"])}
    drawn, left = {}, _FIGURES
    for title, metrics in groups.items():
        drawn[title], left = metrics[:left], left - len(metrics[:left])
    total = sum(map(len, groups.values()))
    if total > _FIGURES:
        lines.append(f"<p>Figures of {_FIGURES} of {total} metrics; the others are under All numbers.</p>")
    short = logged(runs, PICTURE)
    lines += ["<h2>Summary</h2>", *_table(runs, short)] if short else []
    for title, metrics in drawn.items():
        if not metrics:
            continue
        lines += [f"<h2>{html.escape(title)}</h2>", '<div class="figures">']
        lines += [f"<figure>{_svg(runs, metric)}</figure>" for metric in metrics]
        lines.append("</div>")
    lines += ["<h2>All numbers</h2>", *_table(runs, [metric for metrics in groups.values() for metric in metrics])]
    lines.append("</main><footer>What each metric is: docs/metrics.md of hpd-verl.</footer></body></html>")
    return "\n".join(lines) + "\n"


def _write(file: Path, content: bytes) -> None:
    """Write a file that is whole or what it was before."""
    partial = file.with_name(f".{file.name}.{os.getpid()}.partial")
    try:
        partial.write_bytes(content)
        partial.replace(file)
    except OSError as error:
        raise OSError(
            error.errno, f"cannot write {file} ({error.strerror}); make room, or give another --out"
        ) from error
    finally:
        partial.unlink(missing_ok=True)


def main(arguments: list[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        prog="hpd-verl report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="metrics.jsonl, or a folder with it")
    parser.add_argument("--names", nargs="+", help="names of the runs, in order")
    parser.add_argument("--out", type=Path, default=Path("report"), help="path without suffix of OUT.png and OUT.html")
    parsed = parser.parse_args(arguments)
    picture, whole_page = (parsed.out.with_name(parsed.out.name + end) for end in (".png", ".html"))
    try:
        runs = read_runs(parsed.runs, parsed.names)
        draw_picture(runs, picture)
        _write(whole_page, page(runs).encode())
    except (ValueError, OSError) as error:
        sys.exit(f"Error: {error}")
    for run in runs:
        for note in run.notes:
            print(f"{run.name}: {note}")
    print(f"{picture}\n{whole_page}")


if __name__ == "__main__":
    main()
