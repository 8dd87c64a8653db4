"""Checks of data files and their rows: formats that verl reads, prompts as chats of text, form of demonstrations.

Files are read in batches, needed columns only. Batches of the plain layout, [{role: string, content: string}] and
string, are checked by null counts and lengths, others row by row.
"""

import json
import logging
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import date, time
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from datasets.data_files import resolve_pattern
from omegaconf import DictConfig

from hpd_verl.config import HPDConfig
from hpd_verl.data.chat_template import Messages
from hpd_verl.data.demonstration import NO_TEXT, check_tool_calls, demonstration_of, has_demonstration, no_text
from hpd_verl.data.json_depth import DEEPEST, too_deep
from hpd_verl.data.row import DEMONSTRATION, TOOLS, tools_of
from hpd_verl.data.teacher_prompt import KEY, KEY_SETTING, TEMPLATE_SETTING, TeacherPrompts
from hpd_verl.errors import one_line

logger = logging.getLogger(__name__)

_BATCH_ROWS = 4096
_JSON_SUFFIXES = (".json", ".jsonl")


@dataclass(frozen=True)
class RowRules:
    """Requirements of a row.

    Attributes:
        prompt_key: column of the chat list.
        media_keys: columns of images, videos and audio, which must be empty.
        reads_demonstrations: demonstrations, if present, must have the right form.
        needs_demonstrations: every row must have one.
        numbers: columns that must hold a number in every row.
        teacher_prompts: what the teacher reads in place of the prompt; None where no teacher sees the rows.
        teachers: names, of several teachers, that may stand in ``teacher_key``; none where there is one teacher.
        teacher_key: column of the row's teacher.
    """

    prompt_key: str
    media_keys: tuple[str, ...]
    reads_demonstrations: bool
    needs_demonstrations: bool
    numbers: tuple[str, ...] = ()
    teacher_prompts: TeacherPrompts | None = None
    teachers: tuple[str, ...] = ()
    teacher_key: str = "data_source"

    @classmethod
    def of(cls, data: DictConfig, hpd: HPDConfig, is_train: bool) -> "RowRules":
        """The rules of verl's ``data`` node and the algorithm's settings."""
        rollouts_only = hpd.schedule.lowest == 1.0
        return cls(
            prompt_key=data.get("prompt_key", "prompt"),
            media_keys=tuple(data.get(f"{kind}_key", f"{kind}s") for kind in ("image", "video", "audio")),
            reads_demonstrations=is_train and not (rollouts_only and hpd.overlong_demonstration == "truncate"),
            needs_demonstrations=is_train and not rollouts_only and hpd.missing_demonstration == "error",
            numbers=tuple(hpd.row_columns) if is_train else (),
            teacher_prompts=TeacherPrompts.of(data) if is_train else None,
            teachers=tuple(hpd.teachers or ()) if is_train else (),
            teacher_key=hpd.teacher_key,
        )

    def columns(self, names: Sequence[str]) -> list[str]:
        """The columns to read, of those in the file."""
        wanted = [self.prompt_key, TOOLS, *self.media_keys, *self.numbers]
        if self.reads_demonstrations:
            wanted.append(DEMONSTRATION)
        if self.teacher_prompts is not None:
            wanted += self.teacher_prompts.reads(names)
        if self.teachers:
            wanted.append(self.teacher_key)
        return [name for name in names if name in wanted]


_NO_ROWS = "the file has no rows; write it again, or leave it out"

_WHY_NEEDED = (
    "; every row needs a demonstration where algorithm.hpd.on_policy_fraction < 1, unless "
    "algorithm.hpd.missing_demonstration=rollout lets the student answer"
)


def is_remote(path: str) -> bool:
    """Whether verl or datasets would have to fetch the path, as from hdfs:// or s3://."""
    return "://" in path


def _check_content(content: Any, where: str) -> None:
    if isinstance(content, str):
        return
    if content is None:
        raise ValueError(f"{where}'s content is null; write its text, or '' beside tool calls")
    if isinstance(content, date | time):
        raise ValueError(f"{where}'s content is {no_text(content)}")
    if isinstance(content, Sequence):
        raise ValueError(f"{where}'s content is a list of parts (multi-modal); HPD trains on text: write one string")
    raise ValueError(f"{where}'s content is {type(content).__name__}; write a string")


def check_prompt(prompt: Any, where: str, column: str = "prompt") -> None:
    """Check that a prompt is a chat list of messages with text.

    Args:
        prompt: the value.
        where: names the row.
        column: names the value.

    Raises:
        ValueError: it is not; ``where`` names the row.
    """
    is_chat = isinstance(prompt, Sequence) and not isinstance(prompt, str) and len(prompt) > 0
    if not is_chat or not all(isinstance(turn, Mapping) and {"role", "content"} <= turn.keys() for turn in prompt):
        if is_chat:
            found = "a list without role and content in every message"
        elif isinstance(prompt, Sequence) and not isinstance(prompt, str):
            found = "an empty list"
        else:
            found = "null" if prompt is None else type(prompt).__name__
        raise ValueError(f"{where}: {column} is {found}, expected a chat list [{{role: user, content: text}}, ...]")
    for number, turn in enumerate(prompt):
        if not isinstance(turn["role"], str):
            raise ValueError(f"{where}: message {number} of the prompt has role {turn['role']!r}; write a string")
        named = f"{where}: message {number} of the prompt ({turn['role']})"
        _check_content(turn["content"], named)
        check_tool_calls(turn, named)


def check_row(row: Mapping[str, Any], rules: RowRules, where: str) -> None:
    """Check one row, of the columns that the rules read.

    Raises:
        ValueError: what is wrong with it; ``where`` names the row.
    """
    check_prompt(row[rules.prompt_key], where)
    try:
        tools_of(row.get(TOOLS))
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    for key in rules.media_keys:
        if row.get(key) is not None and len(row[key]) > 0:
            raise ValueError(f"{where}: {key} is not empty; HPD trains on text: remove such rows")
    _check_teacher(row, rules, where)
    if not rules.reads_demonstrations:
        return
    value = row.get(DEMONSTRATION)
    if has_demonstration(value) or rules.needs_demonstrations:
        try:
            demonstration_of(value, where)
        except ValueError as error:
            raise ValueError(f"{error}{'' if has_demonstration(value) else _WHY_NEEDED}") from None


def _check_teacher(row: Mapping[str, Any], rules: RowRules, where: str) -> None:
    """Check which teacher scores a row, and what it reads.

    Raises:
        ValueError: no such teacher, or no chat in the prompt's place; ``where`` names the row.
    """
    if rules.teachers:
        named = row.get(rules.teacher_key)
        if named not in rules.teachers:
            raise ValueError(
                f"{where}: {rules.teacher_key}={named}: no such teacher; algorithm.hpd.teachers has "
                f"{', '.join(rules.teachers)}"
            )
    prompts = rules.teacher_prompts
    if prompts is not None and prompts.are_used(list(row)):
        teacher_chat(row, prompts, where)


def teacher_chat(row: Mapping[str, Any], prompts: TeacherPrompts, where: str) -> Messages:
    """What the teacher reads in place of a row's prompt.

    Raises:
        ValueError: it is no chat that can stand in the prompt's place; ``where`` names the row.
    """
    try:
        chat = prompts.messages(row)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    check_prompt(chat, where, prompts.key)
    try:
        prompts.check(row, chat)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    return chat


def _is_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def _are_objects(kind: pa.DataType) -> bool:
    """Whether a column's values are lists of objects."""
    return (pa.types.is_list(kind) or pa.types.is_large_list(kind)) and pa.types.is_struct(kind.value_type)


def _messages(chats: pa.Array) -> pa.Array | None:
    """All messages of a column of chats, if every chat has one and every message a role and a content of text."""
    if not _are_objects(chats.type):
        return None
    turns = chats.type.value_type
    if any(turns.get_field_index(name) < 0 or not _is_text(turns.field(name).type) for name in ("role", "content")):
        return None
    if turns.get_field_index("tool_calls") >= 0 and not _are_objects(turns.field("tool_calls").type):
        return None
    messages = chats.flatten()
    if chats.null_count or messages.null_count or pc.min(pc.list_value_length(chats)).as_py() < 1:
        return None
    if any(pc.struct_field(messages, name).null_count for name in ("role", "content")):
        return None
    return messages


def _are_demonstrations(column: pa.Array, may_be_missing: bool) -> bool:
    """Whether a column surely holds demonstrations: texts, or chats of one assistant message."""
    if not _is_text(column.type):
        messages = _messages(column)
        if messages is None or len(messages) != len(column):
            return False
        if not pc.all(pc.equal(pc.struct_field(messages, "role"), "assistant")).as_py():
            return False
        column = pc.struct_field(messages, "content")
    if may_be_missing:
        return True
    return column.null_count == 0 and not pc.any(pc.equal(pc.utf8_length(pc.utf8_trim_whitespace(column)), 0)).as_py()


def _is_plain(batch: pa.RecordBatch, rules: RowRules) -> bool:
    """Whether the texts of a batch are certainly right; false: look at its rows."""
    prompts = _messages(batch.column(rules.prompt_key))
    if prompts is None or not _are_plain_for_teachers(batch, prompts, rules):
        return False
    if TOOLS in batch.schema.names:
        tools = batch.column(TOOLS)
        if tools.null_count < len(tools) and not (_are_objects(tools.type) and tools.flatten().null_count == 0):
            return False
    if not rules.reads_demonstrations:
        return True
    if DEMONSTRATION not in batch.schema.names:
        return not rules.needs_demonstrations
    return _are_demonstrations(batch.column(DEMONSTRATION), may_be_missing=not rules.needs_demonstrations)


def _are_plain_for_teachers(batch: pa.RecordBatch, prompts: pa.Array, rules: RowRules) -> bool:
    """Whether surely all rows have a teacher, and a chat for it where they have one of their own."""
    names = batch.schema.names
    if rules.teachers:
        if rules.teacher_key not in names:
            return False
        known = pc.is_in(batch.column(rules.teacher_key).cast(pa.string()), pa.array(rules.teachers))
        if not pc.all(known).as_py():
            return False
    if rules.teacher_prompts is None or not rules.teacher_prompts.are_used(names):
        return True
    if rules.teacher_prompts.template is not None:
        return False
    messages = _messages(batch.column(rules.teacher_prompts.key))
    if (
        messages is None
        or pc.any(pc.equal(pc.utf8_length(pc.utf8_trim_whitespace(pc.struct_field(messages, "content"))), 0)).as_py()
    ):
        return False
    return not any(
        pc.any(pc.equal(pc.struct_field(chats, "role"), "assistant")).as_py() for chats in (prompts, messages)
    )


def _first_with_media(column: pa.Array) -> int | None:
    """The first row whose column of images, videos or audio is not empty."""
    kind = column.type
    filled = pc.is_valid(column)
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        filled = pc.greater(pc.fill_null(pc.list_value_length(column), 0), 0)
    index = pc.index(filled, True).as_py()
    return None if index < 0 else index


def _first_that_is_no_number(column: pa.Array) -> int | None:
    """The first row whose column is no finite number; true and false count as 1 and 0."""
    kind = column.type
    if not (pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)):
        return 0
    index = pc.index(pc.fill_null(pc.is_finite(column.cast(pa.float64())), False), False).as_py()
    return None if index < 0 else index


def _check_batch(
    batch: pa.RecordBatch, rows: datasets.Dataset, rules: RowRules, start: int, row_name: Callable[[int], str]
) -> None:
    for key in set(rules.media_keys) & set(batch.schema.names):
        index = _first_with_media(batch.column(key))
        if index is not None:
            raise ValueError(f"{row_name(start + index)}: {key} is not empty; HPD trains on text: remove such rows")
    for key in rules.numbers:
        index = _first_that_is_no_number(batch.column(key))
        if index is not None:
            found = " ".join(str(batch.column(key)[index].as_py()).split())[:80]
            raise ValueError(f"{row_name(start + index)}: {key} is {found}; an objective needs a finite number there")
    if _is_plain(batch, rules):
        return
    columns = rows.remove_columns([key for key in rules.media_keys if key in rows.column_names])[:]
    for index in range(len(batch)):
        row = {name: values[index] for name, values in columns.items()}
        try:
            check_row(row, rules, "row")
        except ValueError:
            check_row(row, rules, row_name(start + index))
            raise


def _is_json_array(file: str) -> bool:
    with open(file, "rb") as stream:
        return stream.read(64).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"[")


def _line_of_row(file: str, index: int) -> int | None:
    if _is_json_array(file):
        return None
    with open(file, "rb") as stream:
        filled = (number for number, line in enumerate(stream, 1) if line.strip())
        return next((number for row, number in enumerate(filled) if row == index), None)


def _check_json(file: str, name: str, rules: RowRules) -> None:
    """Look for what is wrong with a JSON file that ``datasets`` cannot read.

    Raises:
        ValueError: the first line that is not an object of JSON, or whose row the rules refuse.
    """
    try:
        if _is_json_array(file):
            with open(file, encoding="utf-8-sig") as stream:
                rows = json.load(stream, object_pairs_hook=_without_duplicates)
            numbered = [(f"row {index}", row) for index, row in enumerate(rows)]
        else:
            numbered = None
    except json.JSONDecodeError as error:
        raise ValueError(f"{name}: line {error.lineno} is not JSON ({error.msg}); write the file again") from None
    except _DuplicateKeyError as error:
        raise ValueError(f"{name}: {error}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{name}: not UTF-8 text ({error.reason} at byte {error.start}); write it again") from None
    is_empty = True
    for where, row in numbered if numbered is not None else _json_lines(file, name):
        is_empty = False
        if not isinstance(row, Mapping):
            raise ValueError(f"{name}: {where} is {type(row).__name__}, expected an object with the columns")
        if (half := _lone_surrogate(row)) is not None:
            raise ValueError(
                f"{name}: {where} holds {half}, a lone surrogate: half of a character, from cut text; remove it"
            )
        if rules.prompt_key not in row:
            raise ValueError(f"{name}: {where} has no {rules.prompt_key!r} (data.prompt_key)")
        check_row(row, rules, f"{name}: {where}")
    if is_empty:
        raise ValueError(f"{name}: {_NO_ROWS}")


_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
"""As JSON writes one, alone or in a pair."""


def _may_hold_surrogates(file: str) -> bool:
    with open(file, "rb") as stream:
        end = b""
        while block := stream.read(1 << 24):
            if _SURROGATE.search(end + block):
                return True
            end = block[-5:]
    return False


def _lone_surrogate(value: Any) -> str | None:
    """The first half of a character in a decoded value, as JSON writes it."""
    if isinstance(value, str):
        found = None if value.isascii() else re.search("[\ud800-\udfff]", value)
        return None if found is None else f"\\u{ord(found[0]):04x}"
    if isinstance(value, Mapping):
        value = [*value.keys(), *value.values()]
    return next(filter(None, map(_lone_surrogate, value)), None) if isinstance(value, list) else None


class _DuplicateKeyError(ValueError):
    pass


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object without duplicate keys."""
    for key, count in Counter(key for key, _ in pairs).items():
        if count > 1:
            raise _DuplicateKeyError(_duplicate(key, count))
    return dict(pairs)


def _duplicate(name: str, count: int) -> str:
    return f"{count} columns are named {name!r}; keep one"


def _check_duplicates(kind: pa.DataType | pa.Schema, path: str = "") -> None:
    """Check that no two columns, and no two keys of a nested object, have one name.

    Raises:
        ValueError: two have; the message does not name the file.
    """
    if isinstance(kind, pa.Schema) or pa.types.is_struct(kind):
        fields = list(kind)
        for name, count in Counter(field.name for field in fields).items():
            if count > 1:
                raise ValueError(_duplicate(path + name, count))
        for field in fields:
            _check_duplicates(field.type, f"{path}{field.name}.")
    elif pa.types.is_list(kind) or pa.types.is_large_list(kind):
        _check_duplicates(kind.value_type, path)


def _json_lines(file: str, name: str) -> Iterator[tuple[str, Any]]:
    index = 0
    with open(file, "rb") as stream:
        for number, line in enumerate(stream, 1):
            if not line.strip():
                continue
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip()
                row = json.loads(text, object_pairs_hook=_without_duplicates)
            except json.JSONDecodeError as error:
                raise ValueError(
                    f"{name}: line {number} is not JSON ({error.msg}, column {error.colno}); correct or remove it"
                ) from None
            except UnicodeDecodeError as error:
                raise ValueError(f"{name}: line {number} is not UTF-8 text ({error.reason}); write it again") from None
            except _DuplicateKeyError as error:
                raise ValueError(f"{name}: row {index} (line {number}): {error}") from None
            yield f"row {index} (line {number})", row
            index += 1


@contextmanager
def _quiet_datasets() -> Iterator[None]:
    """No progress bars and no log lines of ``datasets``, whose errors are told in one line here."""
    shows_bars, verbosity = not datasets.are_progress_bars_disabled(), datasets.logging.get_verbosity()
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        datasets.logging.set_verbosity(verbosity)
        if shows_bars:
            datasets.enable_progress_bars()


def local_files(setting: str, file: Any) -> list[str]:
    """The files that an entry of the setting stands for: one path, or a pattern.

    Raises:
        ValueError: there is none, or verl cannot read its kind.
    """
    if not isinstance(file, str) or not file:
        raise ValueError(f"{setting}={file}: not a file's path; give parquet, json or jsonl files")
    if file.startswith("~"):
        raise ValueError(f"{setting}={file}: the shell does not expand ~ after =; write the whole path, or $HOME")
    if Path(file).is_dir():
        raise ValueError(f"{setting}={file}: a folder; give its files, such as {file.rstrip('/')}/*.parquet")
    if not file.endswith((".parquet", *_JSON_SUFFIXES)):
        raise ValueError(f"{setting}={file}: verl reads names that end in .parquet, .json or .jsonl; convert it")
    if Path(file).is_file():
        return [file]
    try:
        found = resolve_pattern(file, base_path=str(Path.cwd())) if "*" in file or "?" in file or "[" in file else []
    except FileNotFoundError:
        found = []
    if not found:
        raise ValueError(f"{setting}={file}: no such file; give existing parquet, json or jsonl files")
    return sorted(found)


class DataFile:
    """A file of rows, its kind and columns checked at construction.

    Args:
        setting: names the file's setting in errors.
        file: a local file.
        rules: what rows must hold.

    Raises:
        ValueError: the file is not of its kind, has no rows, or lacks a column.
    """

    def __init__(self, setting: str, file: str, rules: RowRules) -> None:
        self.name = f"{setting}={file}"
        self.file = file
        self.rules = rules
        self._loaded: datasets.Dataset | None = None
        try:
            with open(file, "rb") as stream:
                is_empty = not stream.read(1)
        except OSError as error:
            raise ValueError(f"{self.name}: cannot be opened ({error.strerror}); give a readable file") from error
        if is_empty:
            raise ValueError(f"{self.name}: the file is empty (0 bytes); write it again, or leave it out")
        if file.endswith(".parquet"):
            try:
                with pq.ParquetFile(file) as parquet:
                    self.schema, self.rows = parquet.schema_arrow, parquet.metadata.num_rows
            except (pa.ArrowException, OSError) as error:
                raise ValueError(
                    f"{self.name}: not a complete parquet file ({one_line(error).rstrip('.')}); write it again"
                ) from error
        else:
            self._loaded = self._load_json()
            self.schema, self.rows = self._loaded.features.arrow_schema, len(self._loaded)
        if self.rows == 0:
            raise ValueError(f"{self.name}: {_NO_ROWS}")
        try:
            _check_duplicates(self.schema)
        except ValueError as error:
            raise ValueError(f"{self.name}: {error}") from None
        columns = ", ".join(self.schema.names)
        if rules.prompt_key not in self.schema.names:
            raise ValueError(
                f"{self.name}: no column {rules.prompt_key!r} (data.prompt_key), there are {columns}; add it or name it"
            )
        if rules.needs_demonstrations and DEMONSTRATION not in self.schema.names:
            raise ValueError(f"{self.name}: no column {DEMONSTRATION!r}, there are {columns}{_WHY_NEEDED}")
        for number in rules.numbers:
            if number not in self.schema.names:
                raise ValueError(
                    f"{self.name}: no column {number!r}, which an objective needs (row.{number}), there are {columns}; "
                    "add it"
                )
        if rules.teachers and rules.teacher_key not in self.schema.names:
            raise ValueError(
                f"{self.name}: no column {rules.teacher_key!r} (algorithm.hpd.teacher_key), there are {columns}; add "
                "it or name it"
            )
        prompts = rules.teacher_prompts
        if prompts is None:
            return
        if prompts.template is None and prompts.key not in (KEY, *self.schema.names):
            raise ValueError(
                f"{self.name}: no column {prompts.key!r} ({KEY_SETTING}), there are {columns}; add it or leave the "
                "setting out"
            )
        missing = prompts.missing(self.schema.names) if prompts.key not in self.schema.names else []
        if missing:
            raise ValueError(
                f"{TEMPLATE_SETTING}: {{{missing[0]}}} is no column of {self.file}, there are {columns}; correct it, "
                f"or write {{{{{missing[0]}}}}} for the text itself"
            )

    def _load_json(self) -> datasets.Dataset:
        line = too_deep(self.file, _is_json_array(self.file))
        if line is not None:
            raise ValueError(f"{self.name}: line {line} is nested more than {DEEPEST} deep; correct or remove it")
        if _may_hold_surrogates(self.file):  # half a character, which `datasets` leaves out of columns of several types
            _check_json(self.file, self.name, self.rules)
        try:
            with _quiet_datasets():
                return datasets.load_dataset("json", data_files=self.file)["train"]
        except Exception as error:  # of datasets, pyarrow or pandas: the file itself says more
            _check_json(self.file, self.name, self.rules)
            raise ValueError(
                f"{self.name}: cannot be read ({one_line(error.__cause__ or error)}); write its columns with one type "
                "in all rows, or as parquet"
            ) from error

    def row_name(self, index: int) -> str:
        """The row in errors, by its number from 0, and by its line in a file of JSON lines."""
        line = _line_of_row(self.file, index) if self.file.endswith(_JSON_SUFFIXES) else None
        return f"{self.name}: row {index}" if line is None else f"{self.name}: row {index} (line {line})"

    def batches(self, columns: Sequence[str]) -> Iterator[tuple[pa.RecordBatch, datasets.Dataset]]:
        """Some columns, batch by batch: as Arrow stores them, and as ``datasets`` decodes them."""
        if self._loaded is not None:
            selected = self._loaded.select_columns(list(columns))
            for start in range(0, self.rows, _BATCH_ROWS):
                rows = selected.select(range(start, min(start + _BATCH_ROWS, self.rows)))
                yield rows.with_format("arrow")[:].combine_chunks().to_batches()[0], rows
            return
        metadata = self.schema.metadata
        try:
            # As it is by default, pyarrow keeps what it has read of the file.
            with pq.ParquetFile(self.file, pre_buffer=False, buffer_size=1 << 20) as parquet:
                for batch in parquet.iter_batches(_BATCH_ROWS, columns=list(columns)):
                    table = pa.Table.from_batches([batch]).replace_schema_metadata(_of_columns(metadata, columns))
                    yield batch, _decoded(table)
        except (pa.ArrowException, OSError) as error:
            raise ValueError(f"{self.name}: cannot be read ({one_line(error)}); write it again") from error

    def check_rows(self) -> None:
        """Check every row.

        Raises:
            ValueError: the first row that the rules refuse, by its number.
        """
        start = 0
        for batch, rows in self.batches(self.rules.columns(self.schema.names)):
            try:
                _check_batch(batch, rows, self.rules, start, self.row_name)
            except ValueError as error:
                if self._loaded is None or NO_TEXT in str(error):
                    raise
                # Columns of several types change as `datasets` reads them: the file itself names the row that is wrong.
                _check_json(self.file, self.name, self.rules)
                raise ValueError(f"{error} (as `datasets` reads a column of several types; write one type)") from error
            start += len(batch)

    def sample(self) -> datasets.Dataset:
        """The first row with all columns, for comparing files."""
        if self._loaded is not None:
            return self._loaded.select([0])
        with pq.ParquetFile(self.file) as parquet:
            return _decoded(pa.Table.from_batches([next(parquet.iter_batches(1))], schema=self.schema))


def _decoded(table: pa.Table) -> datasets.Dataset:
    """A table as ``datasets`` decodes it, without the hash of all its values that would name it in a cache."""
    return datasets.Dataset(table, fingerprint="unused")


def _of_columns(metadata: Mapping[bytes, bytes] | None, columns: Sequence[str]) -> dict[bytes, bytes] | None:
    """The metadata of ``datasets`` about some columns of a parquet file."""
    if not metadata or b"huggingface" not in metadata:
        return None
    info = json.loads(metadata[b"huggingface"])
    features = {name: kind for name, kind in info.get("info", {}).get("features", {}).items() if name in columns}
    return {b"huggingface": json.dumps({"info": {"features": features}}).encode()}


def as_list(files: Any) -> list[Any]:
    """verl's file settings: one path or a list of them."""
    return [files] if files is None or isinstance(files, str) else list(files)


def _check_columns_agree(first: DataFile, other: DataFile) -> None:
    """Check that ``datasets`` can put the rows of two files together."""
    samples = first.sample(), other.sample()
    try:
        datasets.concatenate_datasets(list(samples))
    except (ValueError, pa.ArrowException) as error:
        types = [sample.features for sample in samples]
        differing = next((name for name in types[1] if name in types[0] and types[0][name] != types[1][name]), None)
        found = one_line(error) if differing is None else f"{differing} is {types[1][differing]}, {types[0][differing]}"
        raise ValueError(
            f"{other.name}: its columns do not fit those of {first.file} ({found} there); write both with the same "
            "types"
        ) from error


def _check_teacher_prompts_agree(files: Sequence[DataFile]) -> None:
    """Check that all files have a column of the teacher's prompts, or none has.

    Raises:
        ValueError: some have, and the others' rows would have null.
    """
    prompts = files[0].rules.teacher_prompts if files else None
    if prompts is None or prompts.template is not None:
        return
    having = [file for file in files if prompts.key in file.schema.names]
    lacking = next((file for file in files if file not in having), None)
    if having and lacking is not None:
        raise ValueError(
            f"{lacking.name}: no column {prompts.key!r}, which {having[0].file} has; add it, or take it out there"
        )


def check_files(setting: str, files: Any, rules: RowRules) -> list[DataFile]:
    """Check the files of a setting and every row in them; remote ones are left to the workers, with a line in the log.

    Args:
        setting: data.train_files or data.val_files.
        files: a path or a list of them; patterns with * are taken as ``datasets`` takes them.
        rules: what rows must hold.

    Returns:
        The files that could be looked at.

    Raises:
        ValueError: one sentence that names the file, and the row where it is one; what was found and what to do.
    """
    entries = as_list(files)
    if not entries:
        raise ValueError(f"{setting}={files}: no files; give parquet, json or jsonl files")
    remote = [entry for entry in entries if isinstance(entry, str) and is_remote(entry)]
    if remote:
        logger.info("%s: not checked before the run starts, because they are remote: %s", setting, ", ".join(remote))
    groups = [local_files(setting, entry) for entry in entries if entry not in remote]
    checked = [[DataFile(setting, file, rules) for file in group] for group in groups]
    for group in checked:
        for file in group:
            file.check_rows()
    for group in checked[1:]:
        _check_columns_agree(checked[0][0], group[0])
    _check_teacher_prompts_agree([file for group in checked for file in group])
    return [file for group in checked for file in group]
