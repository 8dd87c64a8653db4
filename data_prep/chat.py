"""Any set of conversations in the messages format: the last message, the assistant's, becomes the demonstration.

Each record holds a list of messages, ``{"role": ..., "content": ...}``, in the column --messages_key. The messages
before the last are the prompt. There is no ground truth. Reasoning (reasoning_content, reasoning, thinking), tool
calls and the column tools are kept; other fields are dropped with a note.

    python -m data_prep.chat --local_dataset_path ~/data/chats.jsonl --local_save_dir ~/data/chats --test_fraction 0.01
    python -m data_prep.chat --dataset HuggingFaceH4/no_robots --has_test_split --local_save_dir ~/data/no_robots
"""

import argparse
import json
import logging
from typing import Any

from data_prep.rows import REASONING_KEYS, Convert, Row, build_row, run, split_messages
from data_prep.sources import Source

logger = logging.getLogger("data_prep")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of this script."""
    parser.add_argument("--messages_key", default="messages", help="column of the conversations (%(default)s)")
    parser.add_argument("--ability", default="dialogue", help="column ability (%(default)s)")
    parser.add_argument("--reasoning_key", choices=REASONING_KEYS, help="write reasoning into this field of a message")
    parser.add_argument("--has_test_split", action="store_true", help="the set has the split test beside train")


def configure(args: argparse.Namespace) -> tuple[Source, Convert]:
    """The source and the function for these flags."""
    if not args.dataset and not args.local_dataset_path:
        raise ValueError("neither --dataset nor --local_dataset_path is given")
    key = args.messages_key
    left_out: set[str] = set()

    def convert(record: dict[str, Any], split: str, index: int) -> Row:
        known = set(left_out)
        prompt, demonstration = split_messages(record[key], key, left_out, args.reasoning_key)
        for name in left_out - known:
            logger.warning("messages hold %r, which is dropped", name)
        tools = record.get("tools") or None
        row = build_row(
            data_source="chat",
            prompt=prompt,
            demonstration=demonstration,
            ability=args.ability,
            ground_truth="",
            split=split,
            index=index,
        )
        if tools is not None:
            row["tools"] = tools if isinstance(tools, str) else json.dumps(tools, ensure_ascii=False)
        return row

    splits = {"train": "train", "test": "test"} if args.has_test_split else {"train": "train"}
    return Source(args.dataset, splits, unnamed=("train",), other_columns=(key,)), convert


if __name__ == "__main__":
    run(__doc__, Source("", {"train": "train"}), None, add_arguments, configure)
