"""Compare results of several runs: a table, and a self-contained HTML page with pictures.

    python -m examples.evaluation.compare before.json after.json teacher.json --html report.html --png report.png

Each run is compared with the first of its kind on common problems: difference of the mean score, its bootstrap CI and
the p-value of a paired permutation test.
"""

import argparse
import base64
import html
import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

from examples.evaluation.results import aligned, read_result, shown, table, write_file
from hpd_verl.tools.intervals import Comparison, avg_at_k, compare

matplotlib.use("Agg")
import matplotlib.pyplot as plt

MEASURES = {"maths": "avg@k", "code": "avg@k", "dialogue": "preference, or ROUGE-L", "divergence": "reverse KL"}
"""Name of an item's scores, by kind."""
SHOWN_ITEMS = 200
"""Problems of a page, those that runs differ on first."""

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 72em; padding: 0 1em; color: #222; }
table { border-collapse: collapse; margin: 1em 0; }
th, td { border: 1px solid #ccc; padding: .3em .6em; text-align: left; }
th { background: #f3f3f3; } td.number { font-variant-numeric: tabular-nums; white-space: nowrap; }
.wide { overflow-x: auto; }
img { max-width: 100%; } pre { white-space: pre-wrap; overflow-wrap: anywhere; max-height: 24em; overflow: auto;
background: #f8f8f8; padding: .6em; } .right { color: #0a6b2d; } .wrong { color: #a11; }
"""


def pairs(results: Sequence[Mapping[str, Any]], seed: int = 0) -> list[tuple[str, str, str, Comparison | None]]:
    """Each run against the first of its kind: ``(kind, first, other, comparison)``.

    None where they share no problem.
    """
    found = []
    for number, result in enumerate(results):
        first = next(each for each in results if each["kind"] == result["kind"])
        if first is results[number]:
            continue
        scores = [
            {item["key"]: avg_at_k(item["scores"]) for item in each["items"] if item["scores"]}
            for each in (first, result)
        ]
        shared = [key for key in scores[0] if key in scores[1]]
        values = [[each[key] for key in shared] for each in scores]
        comparison = compare(values[0], values[1], seed) if shared else None
        found.append((str(result["kind"]), str(first["name"]), str(result["name"]), comparison))
    return found


def pair_lines(results: Sequence[Mapping[str, Any]], seed: int = 0) -> list[list[str]]:
    """``pairs`` as the lines of a table, its heading first."""
    lines = [["kind", "run", "against", "difference", "p", "shared problems"]]
    for kind, first, other, found in pairs(results, seed):
        if found is None:
            lines.append([kind, other, first, "-", "-", "0"])
        else:
            difference = f"{found.difference:+.3f} ({found.low:+.3f}, {found.high:+.3f})"
            lines.append([kind, other, first, difference, f"{found.p_value:.4f}", str(found.problems)])
    return lines


def picture(results: Sequence[Mapping[str, Any]]) -> bytes:
    """A PNG with a panel a metric that has intervals, a bar a run."""
    panels = list(
        dict.fromkeys(
            (str(result["kind"]), name)
            for result in results
            for name, value in result["summary"].items()
            if isinstance(value, Mapping)
        )
    )
    columns = min(3, max(1, len(panels)))
    rows = max(1, math.ceil(len(panels) / columns))
    kinds = [str(result["kind"]) for result in results]
    names = list(dict.fromkeys(str(result["name"]) for result in results))
    height = 1.2 + 0.4 * max(map(kinds.count, kinds))
    figure, axes = plt.subplots(
        rows, columns, figsize=(5.2 * columns, height * rows), layout="constrained", squeeze=False
    )
    colours = plt.get_cmap("tab10").colors  # type: ignore[attr-defined]
    for axis, panel in zip(axes.flat, [*panels, *[None] * (rows * columns - len(panels))], strict=True):
        if panel is None:
            axis.axis("off")
            continue
        kind, name = panel
        having = [
            result for result in results if result["kind"] == kind and isinstance(result["summary"].get(name), Mapping)
        ]
        for place, result in enumerate(having):
            colour = colours[names.index(str(result["name"])) % len(colours)]
            value = result["summary"][name]
            error = [[max(0.0, value["value"] - value["low"])], [max(0.0, value["high"] - value["value"])]]
            axis.barh(place, value["value"], xerr=error, color=colour, capsize=3, height=0.6)
        axis.set_yticks(range(len(having)), [_cut(str(result["name"]), 28) for result in having])
        axis.invert_yaxis()
        axis.set_title(f"{kind}: {_cut(name, 40)}", fontsize=10)
        axis.grid(axis="x", alpha=0.3)
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=120)
    plt.close(figure)
    return image.getvalue()


def page(results: Sequence[Mapping[str, Any]], image: bytes, seed: int = 0) -> str:
    """The HTML page."""
    parts = [
        "<!doctype html><html lang='en'><head><meta charset='utf-8'><title>Evaluation</title>",
        f"<style>{_STYLE}</style></head><body><h1>Evaluation</h1>",
        f"<img alt='metrics with intervals' src='data:image/png;base64,{base64.b64encode(image).decode()}'>",
    ]
    for kind in dict.fromkeys(str(result["kind"]) for result in results):
        own = [result for result in results if result["kind"] == kind]
        names = list(dict.fromkeys(name for result in own for name in result["summary"]))
        lines = [["run", *names], *([str(r["name"]), *(shown(r["summary"].get(n)) for n in names)] for r in own)]
        parts += [f"<h2>{_text(kind)}</h2>", _html_table(lines)]
        compared = pair_lines(own, seed)
        if len(compared) > 1:
            parts += [f"<p>In pairs, by {_text(MEASURES.get(kind, 'score'))}:</p>", _html_table(compared)]
        parts += _problems(own)
    parts.append("<h2>Settings</h2>")
    for result in results:
        settings = {**result.get("model", {}), **result["settings"]}
        parts.append(f"<details><summary>{_text(result['name'])} ({_text(result['kind'])})</summary>")
        parts.append(_html_table([["setting", "value"], *([name, str(value)] for name, value in settings.items())]))
        versions = ", ".join(f"{name} {version}" for name, version in result.get("versions", {}).items())
        parts.append(f"<p>{_text(versions)}</p></details>")
    return "".join([*parts, "</body></html>\n"])


def _problems(results: Sequence[Mapping[str, Any]]) -> list[str]:
    """Questions with every run's first answer, those first on which runs differ."""
    if not any("answers" in item for result in results for item in result["items"][:1]):
        return []
    by_key: dict[str, list[tuple[str, Mapping[str, Any]]]] = {}
    for result in results:
        for item in result["items"]:
            by_key.setdefault(item["key"], []).append((str(result["name"]), item))

    def spread(entries: list[tuple[str, Mapping[str, Any]]]) -> float:
        means = [avg_at_k(item["scores"]) for _, item in entries if item["scores"]]
        return max(means) - min(means) if means else 0.0

    ordered = sorted(by_key.values(), key=spread, reverse=True)
    parts = [f"<p>{min(SHOWN_ITEMS, len(ordered))} of {len(ordered)} problems, those that runs differ on first:</p>"]
    for entries in ordered[:SHOWN_ITEMS]:
        question = str(entries[0][1].get("question", ""))
        means = ", ".join(f"{name} {avg_at_k(item['scores']):.2f}" for name, item in entries if item["scores"])
        parts.append(f"<details><summary>{_text(_cut(question, 100))} <small>{_text(means)}</small></summary>")
        parts.append(f"<pre>{_text(question)}</pre>")
        for name, item in entries:
            right = bool(item["scores"]) and item["scores"][0] == 1.0
            parts.append(f"<p class='{'right' if right else 'wrong'}'>{_text(name)}</p>")
            answer = item["answers"][0] if item.get("answers") else "no answer"
            parts.append(f"<pre>{_text(_cut(answer, 4000))}</pre>")
        parts.append("</details>")
    return parts


def _html_table(lines: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{_text(cell)}</th>" for cell in lines[0])
    body = "".join(f"<tr>{''.join(f'<td class=number>{_text(cell)}</td>' for cell in line)}</tr>" for line in lines[1:])
    return f"<div class=wide><table><tr>{head}</tr>{body}</table></div>"


def _text(value: Any) -> str:
    return html.escape(str(value).encode("utf-8", errors="replace").decode())


def _cut(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="+", help="result files; the first of a kind is the baseline")
    parser.add_argument("--html", type=Path, help="write a page")
    parser.add_argument("--png", type=Path, help="write its picture")
    parser.add_argument("--bootstrap_seed", type=int, default=0, help="seed of the confidence intervals (%(default)s)")
    args = parser.parse_args()
    try:
        results = [read_result(path) for path in args.results]
        names = [(result["kind"], str(result["name"])) for result in results]
        for path, result, name in zip(args.results, results, names, strict=True):
            if names.count(name) > 1:
                result["name"] = f"{name[1]} ({path.stem})"
        for kind in dict.fromkeys(result["kind"] for result in results):
            print(f"{kind}\n{table([result for result in results if result['kind'] == kind])}\n")
        lines = pair_lines(results, args.bootstrap_seed)
        if len(lines) > 1:
            print(aligned(lines))
        if args.html or args.png:
            image = picture(results)
            if args.png:
                write_file(image, args.png)
            if args.html:
                write_file(page(results, image, args.bootstrap_seed).encode(), args.html)
    except (ValueError, OSError) as error:
        raise SystemExit(f"Error: {' '.join(str(error).split())}") from error


if __name__ == "__main__":
    main()
