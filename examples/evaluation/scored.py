"""Shared by maths and code: a reward function scores every answer from 0 to 1."""

import argparse
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from tqdm import tqdm

from examples.evaluation.results import (
    Row,
    answers_of,
    estimate_dict,
    item_of,
    read_rows,
    refused_share,
    truncated_share,
)
from hpd_verl.tools.generation import Answer
from hpd_verl.tools.intervals import avg_at_k, bootstrap, pass_at_k

Score = Callable[[Row, Answer], tuple[float, str]]
"""From a problem and an answer to its score, and a line that says why."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of scoring."""
    parser.add_argument("--pass_at", type=int, nargs="*", default=[], help="k of pass@k; --n by default")
    parser.add_argument(
        "--workers", type=int, default=os.cpu_count() or 1, help="answers scored at a time (%(default)s)"
    )


def evaluate(args: argparse.Namespace, score: Score) -> dict[str, Any]:
    """Answers, their scores and the estimates.

    Raises:
        ValueError: flags or rows that do not fit; also what generating and scoring raise.
    """
    ks = sorted(set(args.pass_at) or {args.n})
    for k in ks:
        pass_at_k(args.n, 0, k)
    if args.workers < 1:
        raise ValueError(f"--workers={args.workers}: expected 1 or more")
    rows = read_rows(args.data, args.max_rows, needs=["ground_truth"])
    answers, model = answers_of(args, rows)
    pairs = [(row, answer) for row, group in zip(rows, answers, strict=True) for answer in group]
    with ThreadPoolExecutor(args.workers) as pool:
        scored = pool.map(lambda pair: score(*pair), pairs)
        found = list(tqdm(scored, total=len(pairs), desc="scores", unit=" answers", disable=None))
    items = []
    for number, (row, group) in enumerate(zip(rows, answers, strict=True)):
        part = found[number * args.n : (number + 1) * args.n]
        items.append(item_of(row, group, [value for value, _ in part], notes=[note for _, note in part]))
    return {"model": model, "summary": summary(items, ks, args.bootstrap_seed), "items": items}


def summary(items: Sequence[dict[str, Any]], ks: Sequence[int], seed: int) -> dict[str, Any]:
    """Estimates over all problems, and the mean score of each data set if there are several."""
    n = len(items[0]["scores"])
    right = [sum(score == 1.0 for score in item["scores"]) for item in items]
    found: dict[str, Any] = {
        f"avg@{n}": estimate_dict(bootstrap([avg_at_k(item["scores"]) for item in items], seed)),
        **{
            f"pass@{k}": estimate_dict(bootstrap([pass_at_k(n, count, k) for count in right], seed))
            for k in ks
            if not n == k == 1  # pass@1 of one answer is avg@1
        },
    }
    sources = sorted({item["data_source"] for item in items})
    if len(sources) > 1:
        for source in sources:
            values = [avg_at_k(item["scores"]) for item in items if item["data_source"] == source]
            found[f"avg@{n} {source}"] = estimate_dict(bootstrap(values, seed))
    return found | {"truncated": truncated_share(items), **refused_share(items)}
