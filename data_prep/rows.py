"""Shared by the scripts of this folder: records in, rows of verl's columns plus ``demonstration`` out, as a stream.

A script is a function from a record to a row. It raises ValueError on an unusable record and returns None for a record
of another split::

    def convert(record: dict[str, Any], split: str, index: int) -> dict[str, Any] | None:
        return build_row(...)

    if __name__ == "__main__":
        run(__doc__, SOURCE, convert)
"""

import argparse
import contextlib
import functools
import heapq
import json
import logging
import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from data_prep.sources import Place, Source, find_files, read
from hpd_verl.tools.rows import percentiles, unfinished

logger = logging.getLogger("data_prep")

Row = dict[str, Any]
Convert = Callable[[dict[str, Any], str, int], Row | None]

MATH_SYSTEM_PROMPT = "Please reason step by step, and put your final answer within \\boxed{}."
MATH_REWARD = "lighteval/MATH"
r"""``data_source`` for which verl compares the content of the last \boxed{}, without further packages."""
ROWS_PER_GROUP = 1024
"""Rows held in memory before they are written."""

REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")
"""Fields of a message for its reasoning, by the sets' names."""
KEPT_KEYS = (*REASONING_KEYS, "tool_calls", "tool_call_id", "name")
"""Fields of a message that are written in addition to role and content; all are texts, ``tool_calls`` in JSON."""


def build_row(
    *,
    data_source: str,
    prompt: list[dict[str, str]],
    demonstration: str | list[dict[str, str]] | None,
    ability: str,
    ground_truth: str,
    split: str,
    index: int,
    **extra_info: Any,
) -> Row:
    """One row.

    Args:
        data_source: verl chooses the reward function by it.
        prompt: chat list that ends with the user's turn, or a tool's.
        demonstration: the answer that HPD learns from, without the turn's end token, or its message if that holds
            more than text; None if the set has none.
        ability: kind of task, such as "math".
        ground_truth: what the reward function compares an answer with.
        split: "train" or "test".
        index: number of the row in its split.
        **extra_info: more to carry along, of one type for all rows.
    """
    return {
        "data_source": data_source,
        "prompt": prompt,
        "demonstration": demonstration,
        "ability": ability,
        "reward_model": {"style": "rule", "ground_truth": ground_truth},
        "extra_info": {"split": split, "index": index, **extra_info},
    }


def math_prompt(problem: str) -> list[dict[str, str]]:
    r"""System prompt that asks for \boxed{}, and the problem."""
    return [{"role": "system", "content": MATH_SYSTEM_PROMPT}, {"role": "user", "content": problem.strip()}]


def text_of(record: dict[str, Any], *keys: str) -> str:
    """The first of these columns that holds a text or a number; a whole float is written without ``.0``.

    Raises:
        ValueError: none does.
    """
    for key in keys:
        value = record.get(key)
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, str | int | float) and not isinstance(value, bool) and str(value).strip():
            return str(value).strip()
    raise ValueError(f"no text in {' or '.join(map(repr, keys))}, there are {', '.join(record) or 'none'}")


def split_messages(
    messages: Any, key: str, left_out: set[str] | None = None, reasoning_key: str | None = None
) -> tuple[list[dict[str, str]], str | list[dict[str, str]]]:
    """Prompt and demonstration of a conversation: all before its last message, and that message.

    Args:
        messages: the conversation.
        key: its column, for errors.
        left_out: collects the fields of messages that are not among ``KEPT_KEYS``; without it they are refused.
        reasoning_key: field that reasoning is written into; the set's own if None.

    Returns:
        The demonstration is a text, or a list of its message if that also holds reasoning or tool calls.

    Raises:
        ValueError: not a list of messages of texts, or not the assistant's after the user's or a tool's at its end.
    """
    if not isinstance(messages, list) or len(messages) < 2:
        raise ValueError(f"{key!r} is {repr(messages)[:80]}, expected a list of two messages or more")
    turns = []
    for number, message in enumerate(messages, start=1):
        role, content = (message.get("role"), message.get("content")) if isinstance(message, dict) else (None, None)
        more = (
            _kept(message, f"{key!r}, message {number}", left_out, reasoning_key) if isinstance(message, dict) else {}
        )
        content = "" if content is None and "tool_calls" in more else content
        is_text = isinstance(content, str) and (bool(content.strip()) or "tool_calls" in more)
        if not (isinstance(role, str) and role.strip() and is_text):
            raise ValueError(f"{key!r}, message {number} is {repr(message)[:80]}, expected texts as role and content")
        turns.append({"role": role, "content": str(content), **more})
    if turns[-1]["role"] != "assistant" or turns[-2]["role"] not in ("user", "tool"):
        roles = ", ".join(turn["role"] for turn in turns)
        raise ValueError(f"{key!r} has the roles {roles}, expected user and assistant at the end")
    return turns[:-1], turns[-1]["content"] if turns[-1].keys() == {"role", "content"} else [turns[-1]]


def _kept(
    message: Mapping[str, Any], where: str, left_out: set[str] | None, reasoning_key: str | None
) -> dict[str, str]:
    """The fields of a message other than role and content, as texts."""
    found = {}
    for key, value in message.items():
        if key in ("role", "content") or value is None or value in ("", [], {}):
            continue
        if key == "tool_calls" and isinstance(value, list):
            found[key] = json.dumps(value, ensure_ascii=False)
        elif key in KEPT_KEYS and isinstance(value, str) and (key != "name" or message.get("role") == "tool"):
            found[reasoning_key or key if key in REASONING_KEYS else key] = value
        elif left_out is not None:
            left_out.add(key)
        else:
            raise ValueError(f"{where} holds {key!r} in addition to role and content, which would be lost")
    return found


@dataclass
class Tally:
    """Counts of a split's records by result."""

    rows: int = 0
    left_out: int = 0
    bad: int = 0
    first_bad: str = ""
    prompt: Counter[int] = field(default_factory=Counter)
    """Lengths, with how many rows have each."""
    demonstration: Counter[int] = field(default_factory=Counter)


def convert_records(
    places: Iterable[Place], split: str, convert: Convert, tally: Tally, skip_bad_rows: bool = False
) -> Iterator[Row]:
    """The rows of these records; their indices count the rows.

    Raises:
        ValueError: a record that cannot be used, by its place, unless ``skip_bad_rows``.
    """
    index = 0
    for where, record in places:
        try:
            if isinstance(record, ValueError):
                raise record
            row = convert(record, split, index)
        except ValueError as error:
            if not skip_bad_rows:
                raise ValueError(f"{where}: {error}") from error
            tally.bad += 1
            tally.first_bad = tally.first_bad or f"{where}: {error}"
            continue
        if row is None:
            tally.left_out += 1
            continue
        index += 1
        yield row


def draw(rows: Iterable[Row], max_rows: int, seed: int) -> Iterator[Row]:
    """``max_rows`` of these at random, in their order, each set of rows equally likely; holds no more in memory."""
    generator = random.Random(seed)
    kept: list[tuple[float, int, Row]] = []
    for number, row in enumerate(rows):
        item = (-generator.random(), -number, row)
        if len(kept) < max_rows:
            heapq.heappush(kept, item)
        else:
            heapq.heappushpop(kept, item)
    for _, _, row in sorted(kept, key=lambda item: -item[1]):
        yield row


@dataclass(frozen=True)
class _Columns:
    """Columns and fields of the rows so far."""

    in_prompts: frozenset[str] = frozenset()
    """Fields of the prompts' messages other than role and content."""
    in_answers: frozenset[str] | None = None
    """Fields of the demonstrations; None while all are texts."""
    tools: bool = False

    def with_row(self, row: Row) -> "_Columns":
        in_prompts, in_answers = self.in_prompts.union(*row["prompt"]) - {"role", "content"}, self.in_answers
        if isinstance(row["demonstration"], list):
            in_answers = (in_answers or frozenset()).union(*row["demonstration"]) - {"role", "content"}
        return _Columns(in_prompts, in_answers, self.tools or row.get("tools") is not None)

    def schema(self, extra_info: pa.DataType) -> pa.Schema:
        """verl's columns and ``demonstration``."""
        reward = pa.struct([("style", pa.string()), ("ground_truth", pa.string())])
        answer = pa.string() if self.in_answers is None else _messages(self.in_answers)
        columns = [("data_source", pa.string()), ("prompt", _messages(self.in_prompts)), ("demonstration", answer)]
        columns += [("tools", pa.string())] if self.tools else []
        return pa.schema([*columns, ("ability", pa.string()), ("reward_model", reward), ("extra_info", extra_info)])

    def fitted(self, row: Row) -> Row:
        """A row of these columns."""
        answer = row["demonstration"]
        if self.in_answers is not None and isinstance(answer, str):
            answer = [{"role": "assistant", "content": answer}]
        return {**row, "demonstration": answer}


def _messages(fields: Iterable[str]) -> pa.DataType:
    names = ["role", "content", *(key for key in KEPT_KEYS if key in fields)]
    return pa.list_(pa.struct([(name, pa.string()) for name in names]))


def write_parquet(rows: Iterable[Row], path: Path) -> None:
    """Write rows as they come, under another name: ``path`` itself is left as it is.

    Raises:
        ValueError: a row whose types are not the first row's, or a file that cannot be written.
    """
    columns, extra_info = _Columns(), pa.null()
    writer: pq.ParquetWriter | None = None
    group: list[Row] = []

    def write_group() -> None:
        nonlocal columns, extra_info, writer
        wanted = functools.reduce(_Columns.with_row, group, columns)
        with _names(path):
            if writer is None:
                extra_info = pa.struct(pa.Table.from_pylist([group[0]["extra_info"]]).schema)
                writer = pq.ParquetWriter(unfinished(path), wanted.schema(extra_info))
            elif wanted != columns:  # a field that no row had before
                writer.close()
                writer = _widened(path, wanted, extra_info)
            columns = wanted
            writer.write_table(pa.Table.from_pylist([columns.fitted(row) for row in group], schema=writer.schema))
        group.clear()

    try:
        for row in rows:
            group.append(row)
            if len(group) == ROWS_PER_GROUP:
                write_group()
        if group:
            write_group()
    finally:
        if writer is not None:
            with _names(path):
                writer.close()


def _widened(path: Path, columns: _Columns, extra_info: pa.DataType) -> pq.ParquetWriter:
    """Write what is there again with more columns; a writer of what follows."""
    before = path.with_suffix(".narrow")
    unfinished(path).replace(before)
    writer = pq.ParquetWriter(unfinished(path), columns.schema(extra_info))
    try:
        with pq.ParquetFile(before) as file:
            for index in range(file.num_row_groups):
                rows = [columns.fitted(row) for row in file.read_row_group(index).to_pylist()]
                writer.write_table(pa.Table.from_pylist(rows, schema=writer.schema))
    finally:
        before.unlink()
    return writer


@contextlib.contextmanager
def _names(path: Path) -> Iterator[None]:
    """pyarrow's errors of writing with the file's name, which they lack."""
    try:
        yield
    except OSError as error:
        said = " ".join(str(error).split())[:300]
        raise ValueError(f"{path}: cannot be written: {said}; make room and give the same command again") from error
    except (pa.ArrowException, TypeError) as error:
        raise ValueError(f"{path.name}: a row does not fit the rows before it: {error}") from error


class Lengths:
    """Measures prompts and demonstrations: in tokens of a tokenizer with its chat template, else in characters.

    Raises:
        ValueError: no such tokenizer, or one without a chat template.
    """

    def __init__(self, tokenizer: str | None) -> None:
        self.unit, self._tokenizer = "characters", None
        if tokenizer is None:
            return
        from transformers import AutoTokenizer

        try:
            self._tokenizer = AutoTokenizer.from_pretrained(tokenizer)
        except (OSError, ValueError) as error:
            raise ValueError(f"--tokenizer {tokenizer}: {' '.join(str(error).split())[:300]}") from error
        if not self._tokenizer.chat_template:
            raise ValueError(f"--tokenizer {tokenizer}: it has no chat template")
        self.unit = "tokens"

    def add(self, row: Row, tally: Tally) -> None:
        """Count one row."""
        prompt, demonstration = row["prompt"], row["demonstration"]
        if isinstance(demonstration, list):
            demonstration = "".join(value for key, value in demonstration[0].items() if key != "role")
        if self._tokenizer is None:
            tally.prompt[sum(len(message["content"]) for message in prompt)] += 1
        else:
            tools = json.loads(row["tools"]) if row.get("tools") else None
            parsed = [
                message | {"tool_calls": json.loads(message["tool_calls"])} if "tool_calls" in message else message
                for message in prompt
            ]
            text = self._tokenizer.apply_chat_template(parsed, tools=tools, add_generation_prompt=True, tokenize=False)
            tally.prompt[len(self._tokenizer(text, add_special_tokens=False)["input_ids"])] += 1
            if demonstration is not None:
                demonstration = self._tokenizer(demonstration, add_special_tokens=False)["input_ids"]
        if demonstration is not None:
            tally.demonstration[len(demonstration)] += 1


def _parser(description: str, source: Source) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    origin = parser.add_mutually_exclusive_group()
    origin.add_argument("--dataset", default=source.dataset, help="its name on the hub (%(default)s)")
    origin.add_argument("--local_dataset_path", type=Path, nargs="+", help="its files, or the folder that holds them")
    parser.add_argument("--local_save_dir", type=Path, required=True, help="folder for the parquet files")
    parser.add_argument("--data_source", help="column data_source, by which verl chooses the reward function")
    parser.add_argument("--max_rows", type=int, help="rows a split: the first ones, or drawn with --seed")
    parser.add_argument("--seed", type=int, help="seed of the draw of --max_rows and --test_fraction")
    parser.add_argument("--test_fraction", type=float, help="share of the training rows to split off as test")
    parser.add_argument("--skip_bad_rows", action="store_true", help="count unreadable rows and continue")
    parser.add_argument("--tokenizer", help="count lengths in its tokens instead of characters")
    return parser


def _check(args: argparse.Namespace, source: Source) -> None:
    if args.max_rows is not None and args.max_rows < 1:
        raise ValueError(f"--max_rows is {args.max_rows}, expected 1 or more")
    if args.test_fraction is not None:
        if not 0 < args.test_fraction < 1:
            raise ValueError(f"--test_fraction is {args.test_fraction}, expected a number between 0 and 1")
        if list(source.splits) != ["train"]:
            raise ValueError(
                f"--test_fraction: the set has the splits {', '.join(source.splits)}, expected train alone"
            )
    if args.seed is not None and args.max_rows is None and args.test_fraction is None:
        raise ValueError("--seed draws the rows of --max_rows or --test_fraction, neither is given")


def _in_split(places: Iterable[Place], fraction: float, seed: int, test: bool) -> Iterator[Place]:
    generator = random.Random(seed)
    return (place for place in places if (generator.random() < fraction) == test)


def _prepare(args: argparse.Namespace, source: Source, convert: Convert, out: Path) -> None:
    lengths = Lengths(args.tokenizer)
    files = None
    if args.local_dataset_path:
        files = find_files([path.expanduser() for path in args.local_dataset_path], source)
        empty = [split for split, found in files.items() if not found]
        if empty:
            logger.info("no file of the split %s: not written", ", ".join(empty))
    fraction, seed = args.test_fraction, args.seed or 0
    splits = ["train", "test"] if fraction else [split for split in source.splits if files is None or files[split]]
    targets = {split: out / f"{split}.parquet" for split in splits}
    for path in [path for found in (files or {}).values() for path in found]:
        if path.resolve() in {target.resolve() for target in targets.values()}:
            raise ValueError(f"{path}: --local_save_dir would replace it by its own rows")

    tallies = {split: Tally() for split in splits}

    def rows(split: str) -> Iterator[Row]:
        tally = tallies[split]
        places: Iterable[Place] = read("train" if fraction else split, source, files, args.dataset)
        if fraction:
            places = _in_split(places, fraction, seed, test=split == "test")
        stream = convert_records(places, split, convert, tally, args.skip_bad_rows)
        if args.max_rows is not None and args.seed is not None:
            stream = draw(stream, args.max_rows, args.seed)
        # disable=None: no bar where nobody looks.
        for number, row in enumerate(tqdm(stream, desc=split, unit=" rows", disable=None)):
            if number == args.max_rows:
                break
            row["extra_info"]["index"] = number
            row["data_source"] = args.data_source or row["data_source"]
            lengths.add(row, tally)
            tally.rows += 1
            yield row

    try:
        for split, target in targets.items():
            write_parquet(rows(split), target)
            if not tallies[split].rows:
                bad = f", {tallies[split].bad} bad ones: {tallies[split].first_bad}" if tallies[split].bad else ""
                raise ValueError(f"{split}: no rows, {tallies[split].left_out} left out{bad}")
        for target in targets.values():
            unfinished(target).replace(target)
    finally:
        for target in targets.values():
            unfinished(target).unlink(missing_ok=True)
    for split, target in targets.items():
        _report(split, target, tallies[split], lengths.unit)


def _report(split: str, target: Path, tally: Tally, unit: str) -> None:
    logger.info("%s: %d rows -> %s", split, tally.rows, target)
    if tally.left_out:
        logger.info("  left out: %d", tally.left_out)
    if tally.bad:
        logger.info("  bad rows skipped: %d, the first: %s", tally.bad, tally.first_bad)
    for name, counted in (("prompt", tally.prompt), ("demonstration", tally.demonstration)):
        if counted:
            logger.info("  %s, %s: %s", name, unit, percentiles(counted))


def run(
    description: str,
    source: Source,
    convert: Convert | None,
    add_arguments: Callable[[argparse.ArgumentParser], None] | None = None,
    configure: Callable[[argparse.Namespace], tuple[Source, Convert]] | None = None,
) -> None:
    """The command line of a script: write every split as ``<split>.parquet``, all of them or none.

    Args:
        description: the script's docstring, shown by --help.
        source: the data set.
        convert: from ``(record, split, index)`` to a row; None if ``configure`` gives it.
        add_arguments: adds the script's own flags.
        configure: from the arguments to another source and function.

    Raises:
        SystemExit: bad data, told in one line; nothing has been written then.
    """
    parser = _parser(description, source)
    if add_arguments is not None:
        add_arguments(parser)
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("httpx").setLevel(logging.ERROR)
    out: Path = args.local_save_dir.expanduser()
    created = [folder for folder in (out, *out.parents) if not folder.exists()]
    try:
        if configure is not None:
            source, convert = configure(args)
        if convert is None:
            raise TypeError("neither convert nor configure")
        _check(args, source)
        out.mkdir(parents=True, exist_ok=True)
        _prepare(args, source, convert, out)
    except (ValueError, OSError) as error:
        for folder in created:
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()
        raise SystemExit(f"Error: {error}") from error
