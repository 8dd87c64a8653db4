"""Where records come from: JSON lines, JSON and parquet files, or a data set of the Hugging Face hub, as a stream.

Each record comes with its file and line for error messages. No file is held in memory.
"""

import gzip
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

import pyarrow as pa
import pyarrow.parquet as pq

ENDINGS = (".jsonl", ".jsonl.gz", ".json", ".parquet")
PIECE = 1 << 20
"""Characters or bytes that are read at once."""
Place = tuple[str, Any]
"""``(where, record)``; the record is a ValueError where it could not be read."""


@dataclass(frozen=True)
class Source:
    """A public data set.

    Args:
        dataset: its name on the hub.
        splits: split to write -> its name on the hub, with which the names of its files begin too.
        required: columns that every record holds as a text that is not blank.
        config: its configuration on the hub.
        unnamed: splits that a file of another name holds; a script that names several chooses by the record.
        other_columns: columns of other shapes that every record holds.
    """

    dataset: str
    splits: Mapping[str, str]
    required: Sequence[str] = ()
    config: str | None = None
    unnamed: Sequence[str] = ()
    other_columns: Sequence[str] = field(default=())


def _ending(path: Path) -> str | None:
    return next((ending for ending in ENDINGS if path.name.endswith(ending)), None)


def _is_of_split(path: Path, name: str) -> bool:
    """``train.jsonl``, ``train-00000-of-00010.parquet``, and ``train_sft-...`` for the split train_sft."""
    rest = path.name.removeprefix(name)
    return rest != path.name and (rest in ENDINGS or (rest.startswith("-") and _ending(path) is not None))


def find_files(paths: Sequence[Path], source: Source) -> dict[str, list[Path]]:
    """Split -> its files, in the order of their names.

    Args:
        paths: files, and folders that are searched with their sub-folders.
        source: whose splits.

    Raises:
        ValueError: no such path, a file of another kind, no file for any split, or a split's files in several folders.
    """
    named: list[Path] = []
    for path in paths:
        if path.is_dir():
            named += sorted(file for file in path.rglob("*") if file.is_file() and _ending(file))
        elif not path.is_file():
            raise ValueError(f"{path}: no such file or folder")
        elif _ending(path) is None:
            raise ValueError(f"{path}: none of {', '.join(ENDINGS)}")
        else:
            named.append(path)
    found: dict[str, list[Path]] = {split: [] for split in source.splits}
    for file in named:
        own = [split for split, name in source.splits.items() if _is_of_split(file, name)]
        # What else lies in a folder may be anything; a file that was named is meant.
        for split in own or (source.unnamed or list(source.splits)[:1] if file in paths else ()):
            found[split].append(file)
    for path in paths:
        for split, files in found.items():
            folders = sorted({str(file.parent) for file in files if path in file.parents})
            if len(folders) > 1:
                raise ValueError(
                    f"{path}: files of the split {split} are in {len(folders)} folders, {' and '.join(folders[:3])}; "
                    "as a rule these are configurations of one set: give the folder that is meant"
                )
    if not any(found.values()):
        names = ", ".join(f"{name}.jsonl or {name}-*.parquet" for name in source.splits.values())
        raise ValueError(f"{paths[0]}: no file of the data set, looked for {names}; or name the files themselves")
    return found


def _after_space(text: str, place: int) -> int:
    while place < len(text) and text[place].isspace():
        place += 1
    return place


def _read_list(text: str, rest: TextIO, path: Path) -> Iterator[Place]:
    """The items of a JSON list, of which ``text`` has been read.

    Raises:
        ValueError: the list is torn or no JSON, or something follows it.
    """
    decoder, number, place, mark = json.JSONDecoder(), 0, text.index("[") + 1, ","
    while mark == ",":
        place = _after_space(text, place)
        try:
            if number == 0 and text.startswith("]", place):
                mark, place = "]", place + 1
                break
            item, end = decoder.raw_decode(text, place)
            end = _after_space(text, end)
            mark = text[end]  # before that it is not known whether the item goes on
        except (json.JSONDecodeError, IndexError) as error:
            more = rest.read(max(PIECE, len(text) - place))
            if not more:
                reason = error.msg if isinstance(error, json.JSONDecodeError) else "the list has no end"
                raise ValueError(f"{path}, item {number + 1}: not JSON: {reason}") from None
            text, place = text[place:] + more, 0
            continue
        number += 1
        yield f"{path}, item {number}", item
        place = end + 1
    if mark != "]" or text[place:].strip() or any(map(str.strip, rest)):
        raise ValueError(f"{path}, after item {number}: not JSON: expected a comma, or one end of the list")


def _read_json(path: Path) -> Iterator[Place]:
    number, begun = 0, False
    with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as lines:
        try:
            for number, line in enumerate(lines, start=1):
                if not line.strip():
                    continue
                if path.suffix == ".json" and not begun and line.lstrip().startswith("["):
                    yield from _read_list(line, lines, path)
                    return
                begun = True
                try:
                    record = json.loads(line)
                except (json.JSONDecodeError, RecursionError) as error:
                    record = ValueError(f"not JSON: {error}")
                yield f"{path}, line {number}", record
        except (EOFError, OSError, UnicodeDecodeError) as error:
            raise ValueError(f"{path}, after line {number}: cannot be read: {error}") from None


def _without_fillers(value: Any) -> Any:
    """A column's value without null keys: where one row's object has a key, Arrow gives it to all, as null."""
    if isinstance(value, dict):
        return {key: _without_fillers(item) for key, item in value.items() if item is not None}
    return [_without_fillers(item) for item in value] if isinstance(value, list) else value


def _read_parquet(path: Path) -> Iterator[Place]:
    try:
        # As it is by default, pyarrow keeps what it has read of the file.
        with pq.ParquetFile(path, pre_buffer=False, buffer_size=PIECE) as file:
            number = 0
            for batch in file.iter_batches(batch_size=256):
                for record in batch.to_pylist():
                    number += 1
                    yield f"{path}, row {number}", {key: _without_fillers(value) for key, value in record.items()}
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path}: cannot be read as parquet: {error}") from None


def _read_hub(dataset: str, config: str | None, split: str) -> Iterator[Place]:
    import datasets
    import httpx
    import huggingface_hub

    give_files = "give its files by --local_dataset_path"
    if datasets.config.HF_HUB_OFFLINE:
        raise ValueError(f"--dataset {dataset}: the hub is switched off by HF_HUB_OFFLINE; {give_files}")
    huggingface_hub.utils.logging.set_verbosity_error()  # its retries come to one line, below
    datasets.config.STREAMING_READ_MAX_RETRIES = 5  # by default it takes ten minutes to give a dead connection up
    try:
        rows = datasets.load_dataset(dataset, config, split=split, streaming=True)
        for number, record in enumerate(rows, start=1):
            yield f"{dataset}, {split} row {number}", {key: _without_fillers(item) for key, item in record.items()}
    except (OSError, ValueError, TypeError, httpx.HTTPError, pa.ArrowException) as error:
        reason = " ".join(str(error).split())[:300].rstrip(".")
        raise ValueError(f"--dataset {dataset}: {type(error).__name__}: {reason}; or {give_files}") from error


def checked(places: Iterator[Place], source: Source) -> Iterator[Place]:
    """The same records; one without the columns that the source requires comes as a ValueError that says so."""
    for where, record in places:
        if isinstance(record, ValueError):
            yield where, record
        elif not isinstance(record, dict):
            yield where, ValueError(f"a JSON {type(record).__name__}, expected an object")
        else:
            yield where, _fault(record, source) or record


def _fault(record: dict[str, Any], source: Source) -> ValueError | None:
    for key in (*source.required, *source.other_columns):
        if key not in record:
            return ValueError(f"no key {key!r}, there are {', '.join(record) or 'none'}")
    for key in source.required:
        value = record[key]
        if not isinstance(value, str) or not value.strip():
            return ValueError(f"{key!r} is {repr(value)[:80]}, expected a text")
    return None


def read(split: str, source: Source, files: Mapping[str, list[Path]] | None, dataset: str) -> Iterator[Place]:
    """The records of a split, from its files or, without files, from the hub.

    Yields:
        ``(where, record)``, where ``where`` is "file, line number" for errors.

    Raises:
        ValueError: what is wrong with a file as a whole, or with the hub.
    """
    if files is None:
        yield from checked(_read_hub(dataset, source.config, source.splits[split]), source)
        return
    for path in files[split]:
        yield from checked(_read_parquet(path) if path.suffix == ".parquet" else _read_json(path), source)
