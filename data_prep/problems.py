"""Shared by maths test sets that are published under several names: one split, called train or test."""

import argparse
from dataclasses import replace
from typing import Any

from data_prep.rows import MATH_REWARD, Convert, Row, build_row, math_prompt, run, text_of
from data_prep.sources import Source


def problem_row(record: dict[str, Any], split: str, index: int, answer: str) -> Row:
    """The row of a problem with this answer and its solution, if any, as demonstration."""
    has_solution = any(isinstance(record.get(key), str) and record[key].strip() for key in ("solution", "Solution"))
    return build_row(
        data_source=MATH_REWARD,
        prompt=math_prompt(text_of(record, "problem", "Problem", "question")),
        demonstration=text_of(record, "solution", "Solution") if has_solution else None,
        ability="math",
        ground_truth=answer,
        split=split,
        index=index,
        problem_id=str(next((record[key] for key in ("id", "ID", "problem_idx") if record.get(key) is not None), "")),
    )


def run_problems(description: str, source: Source, convert: Convert) -> None:
    """As ``run``, with a flag for the split's name on the hub."""

    def add_arguments(parser: argparse.ArgumentParser) -> None:
        (name,) = source.splits.values()
        parser.add_argument("--hub_split", default=name, help="the split's name there (%(default)s)")

    def configure(args: argparse.Namespace) -> tuple[Source, Convert]:
        return replace(source, splits={"test": args.hub_split}), convert

    run(description, source, convert, add_arguments, configure)
