"""UltraFeedback (dialogue, MIT licence): prompts, with the best-rated answer as demonstration.

Reads column messages of HuggingFaceH4/ultrafeedback_binarized, splits train_sft and test_sft, or others by
--hub_splits, such as train_gen and test_gen. HPD's paper replaces the answers by the teacher's. There is no ground
truth.

    python -m data_prep.ultrafeedback --local_dataset_path ~/data/ultrafeedback_binarized/data \\
        --local_save_dir ~/data/ultrafeedback
"""

import argparse
from dataclasses import replace
from typing import Any

from data_prep.rows import Convert, Row, build_row, run, split_messages
from data_prep.sources import Source

SOURCE = Source(
    "HuggingFaceH4/ultrafeedback_binarized",
    {"train": "train_sft", "test": "test_sft"},
    unnamed=("train",),
    other_columns=("messages",),
)


def convert(record: dict[str, Any], split: str, index: int) -> Row:
    """One row from one record."""
    prompt, demonstration = split_messages(record["messages"], "messages")
    return build_row(
        data_source="ultrafeedback",
        prompt=prompt,
        demonstration=demonstration,
        ability="dialogue",
        ground_truth="",
        split=split,
        index=index,
        problem_id=str(record.get("prompt_id") or ""),
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flag of this script."""
    names = list(SOURCE.splits.values())
    parser.add_argument("--hub_splits", nargs=2, default=names, metavar=("TRAIN", "TEST"), help="the splits to read")


def configure(args: argparse.Namespace) -> tuple[Source, Convert]:
    """The source with these splits."""
    return replace(SOURCE, splits=dict(zip(SOURCE.splits, args.hub_splits, strict=True))), convert


if __name__ == "__main__":
    run(__doc__, SOURCE, convert, add_arguments, configure)
