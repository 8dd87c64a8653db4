"""The curves of one or several runs beside each other: one PNG.

    hpd-verl report RUN... [--names NAME...] [--metrics PATTERN...] [--out report.png]

RUN is the file of verl's file logger (trainer.logger=[console,file]), or a folder with it. docs/metrics.md says what
each metric is. For live curves add wandb, tensorboard or trackio to trainer.logger.
Needs matplotlib: pip install 'hpd-verl[report]'.
"""

import argparse
import json
import math
import os
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

try:
    import matplotlib
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.ticker import MaxNLocator
except ImportError:
    sys.exit("Error: matplotlib is not installed; pip install 'hpd-verl[report]', or matplotlib itself")

matplotlib.rcParams["text.parse_math"] = False  # a run's name may hold dollars

PICTURE = (
    *(r"val-core/.*", "hpd/loss", "train/loss", "hpd/reverse_kl_k1", "hpd/student_nll", "actor/entropy"),
    *("hpd/label_weight_mean", "hpd/sampled_weight_mean", "actor/grad_norm", "perf/throughput", "timing_s/step"),
)
"""Metrics that are drawn unless others are asked for, as patterns of whole names."""
COLORS = ("#1b87c9", "#e07b00", "#12a173", "#c9549b", "#8f7ce0", "#a58a00", "#c94b4b", "#6f8a99")
"""Of the runs in their order."""
_MOST_FIGURES = 24
_LAST_STEP = 2**53
"""Beyond all steps; a line with a larger one is damaged."""


@dataclass
class Run:
    """What a run logged."""

    name: str
    metrics: dict[str, dict[int, float]] = field(default_factory=dict)
    """Values by name and step; NaN where one was not finite, which the logger writes as null."""
    notes: list[str] = field(default_factory=list)
    """What was found on the way that the reader should know."""


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


def _entry(line: str) -> tuple[int, dict[str, float]] | None:
    """Step and numbers of a line; None if it is not one of verl's logger."""
    try:
        content = json.loads(line)
        step, data = int(content["step"]), dict(content["data"])
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return None
    numbers = {
        name: _finite(value)
        for name, value in data.items()
        if value is None or (isinstance(value, int | float) and not isinstance(value, bool))
    }
    return (step, numbers) if 0 <= step < _LAST_STEP else None


def _finite(value: float | None) -> float:
    """A logged number as a float; NaN if it is not finite, as it is where it was logged as null."""
    try:
        return float(value) if value is not None and math.isfinite(value) else math.nan
    except OverflowError:  # of a whole number
        return math.nan


def _trains(metrics: Mapping[str, float]) -> bool:
    """Whether these are of a training step, and not of a validation alone."""
    return any(not name.startswith("val") for name in metrics)


def read_run(path: Path, name: str) -> Run:
    """Read a run's metrics.

    A step before the last one is of a resumed run, and what had been logged after it is given up. A line of validation
    alone, as of ``trainer.val_before_train``, adds to its step; any other one takes the step's place. Lines that cannot
    be read are left out and counted, as a last one that a killed run left.

    Raises:
        ValueError: there is nothing to show.
    """
    run = Run(name)
    steps: dict[int, dict[str, float]] = {}  # in the order of the steps
    resumed, replaced, damaged = 0, 0, 0
    for file in metric_files(path):
        for line in file.read_bytes().decode(errors="replace").split("\n"):
            entry = _entry(line)
            if entry is None:
                damaged += bool(line.strip())
                continue
            step, numbers = entry
            if step < next(reversed(steps), -1):
                resumed += 1
                while (last := next(reversed(steps), -1)) > step or (last == step and _trains(numbers)):
                    replaced += _trains(steps.pop(last))
            steps.setdefault(step, {}).update(numbers)
    for step, numbers in steps.items():
        for metric, value in numbers.items():
            run.metrics.setdefault(metric, {})[step] = value
    if not run.metrics:
        raise ValueError(f"RUN={path}: no line of verl's file logger in it, {{'step': ..., 'data': {{...}}}}")
    gaps = sum(math.isnan(value) for values in run.metrics.values() for value in values.values())
    if resumed:
        run.notes.append(f"resumed {resumed} times; {replaced} steps were logged again, the last counts")
    if damaged:
        run.notes.append(f"{damaged} lines could not be read, left out")
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


def smoothed(values: Sequence[float]) -> list[float]:
    """From 100 values on the mean of each with its neighbours, a fiftieth of all; NaN where the value itself is."""
    series = pd.Series(values, dtype=float)
    means = series.rolling(2 * (len(series) // 100) + 1, center=True, min_periods=1).mean()
    return means.where(series.notna()).tolist()


def draw_metric(axes: Axes, runs: Sequence[Run], metric: str, references: Mapping[str, float]) -> None:
    """Draw one metric of all runs over the training steps; from 100 on thin, under their moving mean.

    Args:
        axes: where.
        runs: those that did not log it are left out.
        metric: its name.
        references: horizontal lines by their names.
    """
    for number, run in enumerate(runs):
        values = dict(sorted(run.metrics.get(metric, {}).items()))
        color = COLORS[number % len(COLORS)]
        look: Any = {"color": color, "linestyle": ("-", "--", ":")[number // len(COLORS) % 3], "linewidth": 1.5}
        if len(values) <= 20:
            look |= {"marker": "o", "markersize": 3}
        if len(values) >= 100:
            axes.plot(list(values), list(values.values()), color=color, linewidth=0.7, alpha=0.3)
        axes.plot(list(values), smoothed(list(values.values())), **look)
        gaps = [step for step, value in values.items() if math.isnan(value)]
        axes.plot(gaps, [0.02] * len(gaps), "|", color="#d62728", markersize=9, transform=axes.get_xaxis_transform())
    for name, value in references.items():
        axes.axhline(value, linestyle="--", linewidth=1, color="#8a8a8a", label=name)
    if references:
        axes.legend(fontsize=8)
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
    metrics: Sequence[str] = PICTURE,
    references: Mapping[str, Mapping[str, float]] | None = None,
) -> None:
    """Draw metrics of all runs into a PNG.

    Args:
        runs: one or several.
        file: the picture.
        metrics: patterns of names; where no run logged one of them, all that there is, 12 at most.
        references: horizontal lines by metric and name.

    Raises:
        OSError: it cannot be written; what was there before stays.
    """
    shown = logged(runs, metrics)[:_MOST_FIGURES] or logged(runs, [".*"])[:12]
    columns = len(shown) if len(shown) <= 5 else 4
    rows = math.ceil(len(shown) / columns)
    legend = 0.3 * math.ceil(len(runs) / 4) if len(runs) > 1 else 0.0
    figure = Figure(figsize=(3.7 * columns, 2.8 * rows + legend + 0.2), layout="constrained")
    for number, metric in enumerate(shown, start=1):
        draw_metric(figure.add_subplot(rows, columns, number), runs, metric, (references or {}).get(metric, {}))
    if len(runs) > 1:
        handles = [Line2D([], [], color=COLORS[n % len(COLORS)], label=run.name) for n, run in enumerate(runs)]
        # Named here: a label that begins with "_" would be left out.
        names = [run.name for run in runs]
        figure.legend(handles, names, loc="outside upper left", ncols=4, fontsize=9, frameon=False)
    partial = file.with_name(f".{file.name}.{os.getpid()}.partial")
    try:
        figure.savefig(partial, format="png", dpi=120)
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
    parser.add_argument(
        "--metrics", nargs="+", default=PICTURE, metavar="PATTERN", help="what to draw, as 'hpd/.*' (the main ones)"
    )
    parser.add_argument("--out", type=Path, default=Path("report.png"), help="the picture, a .png file (%(default)s)")
    parsed = parser.parse_args(arguments)
    try:
        if parsed.out.suffix != ".png":
            raise ValueError(f"--out={parsed.out}: expected a file that ends with .png")
        runs = read_runs(parsed.runs, parsed.names)
        for pattern in parsed.metrics if parsed.metrics is not PICTURE else ():
            try:
                found = logged(runs, [pattern])
            except re.error as error:
                raise ValueError(
                    f"--metrics={pattern}: no pattern ({error}); give names, or hpd/.* for several"
                ) from None
            if not found:
                raise ValueError(f"--metrics={pattern}: no run logged it; docs/metrics.md lists what there is")
        draw_picture(runs, parsed.out, parsed.metrics)
    except (ValueError, OSError) as error:
        sys.exit(f"Error: {error}")
    for run in runs:
        for note in run.notes:
            print(f"{run.name}: {note}")
    print(parsed.out)


if __name__ == "__main__":
    main()
