"""What the scripts of this folder share: JSON lines in, rows of verl's columns plus ``demonstration`` out.

A script is a function from one record to one row, raising ValueError on a record it cannot use::

    def convert(record: dict[str, Any], split: str, index: int) -> dict[str, Any]:
        return build_row(...)

    if __name__ == "__main__":
        run(__doc__, SPLITS, REQUIRED, convert)
"""

import argparse
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

logger = logging.getLogger("data_prep")

Convert = Callable[[dict[str, Any], str, int], dict[str, Any]]


def read_jsonl(path: Path, required: Sequence[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The records of a JSON lines file; empty lines are skipped.

    Args:
        path: the file.
        required: keys that every record must hold, as strings that are not blank.

    Yields:
        ``(where, record)``, where ``where`` is "file, line number" for errors.

    Raises:
        ValueError: no such file, a line that is no JSON object, or a required key missing; names file and line.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            where = f"{path}, line {number}"
            try:
                record = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{where}: not JSON: {error}") from None
            if not isinstance(record, dict):
                raise ValueError(f"{where}: a JSON {type(record).__name__}, expected an object")
            for key in required:
                if key not in record:
                    raise ValueError(f"{where}: no key {key!r}, there are {', '.join(record) or 'none'}")
                if not isinstance(record[key], str) or not record[key].strip():
                    raise ValueError(f"{where}: {key!r} is {record[key]!r}, expected a text")
            yield where, record


def build_row(
    *,
    data_source: str,
    prompt: list[dict[str, str]],
    demonstration: str,
    ability: str,
    ground_truth: str,
    split: str,
    index: int,
    **extra_info: Any,
) -> dict[str, Any]:
    """One row.

    Args:
        data_source: verl chooses the reward function by it.
        prompt: chat list that ends with the user's turn.
        demonstration: the answer that HPD learns from, without the turn's end token.
        ability: kind of task, such as "math".
        ground_truth: what the reward function compares an answer with.
        split: "train" or "test".
        index: number of the row in its split.
        **extra_info: more to carry along.
    """
    return {
        "data_source": data_source,
        "prompt": prompt,
        "demonstration": demonstration,
        "ability": ability,
        "reward_model": {"style": "rule", "ground_truth": ground_truth},
        "extra_info": {"split": split, "index": index, **extra_info},
    }


def convert_jsonl(path: Path, required: Sequence[str], split: str, convert: Convert) -> list[dict[str, Any]]:
    """All rows of one file.

    Raises:
        ValueError: names file and line; also if the file has no rows at all.
    """
    rows: list[dict[str, Any]] = []
    for where, record in read_jsonl(path, required):
        try:
            rows.append(convert(record, split, len(rows)))
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
    if not rows:
        raise ValueError(f"{path}: no rows")
    return rows


def write_parquet(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Write rows; a file of that name is replaced only by a complete one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".unfinished")
    pq.write_table(pa.Table.from_pylist(list(rows)), unfinished)
    unfinished.replace(path)


def run(description: str, splits: Mapping[str, str], required: Sequence[str], convert: Convert) -> None:
    """The command line of a script: read every split, then write every split as ``<split>.parquet``.

    Args:
        description: the script's docstring, shown by --help.
        splits: name of a split -> its file in the folder of the data set.
        required: keys that every record must hold as texts.
        convert: from ``(record, split, index)`` to a row.

    Raises:
        SystemExit: bad data, told in one line; nothing has been written then.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--local_dataset_path", type=Path, required=True, help="folder of the data set")
    parser.add_argument("--local_save_dir", type=Path, required=True, help="folder for the parquet files")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")

    folder: Path = args.local_dataset_path.expanduser()
    out: Path = args.local_save_dir.expanduser()
    try:
        rows = {split: convert_jsonl(folder / file, required, split, convert) for split, file in splits.items()}
    except ValueError as error:
        raise SystemExit(f"Error: {error}") from error
    for split in splits:
        write_parquet(rows[split], out / f"{split}.parquet")
        logger.info("%s: %d rows -> %s", split, len(rows[split]), out / f"{split}.parquet")
