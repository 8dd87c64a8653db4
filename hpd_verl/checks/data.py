"""Data and student together: whether the chat template writes the rows, and enough prompts fit the lengths."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from omegaconf import DictConfig, OmegaConf
from transformers import PreTrainedTokenizerBase

from hpd_verl.config import HPDConfig
from hpd_verl.data.chat_template import begins_answer
from hpd_verl.data.demonstration import DemonstrationTokenizer, PromptTokenizer, demonstration_of, has_demonstration
from hpd_verl.data.files import DataFile
from hpd_verl.data.row import DEMONSTRATION, TOOLS, as_written, tools_of
from hpd_verl.data.teacher_prompt import LENGTH_SETTING, max_teacher_prompt_length
from hpd_verl.errors import one_line

_TOKENISED_DEMONSTRATIONS = 64
"""Number of first rows whose demonstrations are tokenised; more if fewer fit than are needed."""

_ROWS_OF_A_KIND = 2
"""So many rows of each kind that is more than texts are tokenised."""


def template_kwargs(data: DictConfig) -> dict[str, Any]:
    """verl's ``data.apply_chat_template_kwargs`` as a plain dict."""
    node = data.get("apply_chat_template_kwargs")
    container = OmegaConf.to_container(node, resolve=True) if isinstance(node, DictConfig) else node
    return {str(key): value for key, value in dict(container or {}).items()}  # type: ignore[arg-type]


def check_prompts_fit(
    setting: str,
    files: Sequence[DataFile],
    tokenizer: PreTrainedTokenizerBase,
    data: DictConfig,
    hpd: HPDConfig,
    needed_rows: int,
    max_samples: int,
) -> None:
    """Check that the chat template writes the rows, and that enough stay once overlong prompts are filtered out.

    Tokenises only as many rows as needed, and the first rows of each kind beyond plain text (a reasoning field, tool
    calls, tools, prompts that begin the answer). Without filtering, overlong prompts lose their beginning, so one that
    fits is enough.

    Args:
        setting: data.train_files or data.val_files.
        files: all of the setting's files.
        tokenizer: the student's.
        data: verl's ``data`` node.
        hpd: the algorithm's settings.
        needed_rows: rows that must stay, at least.
        max_samples: only so many rows are used, from the first on; all if not above 0.

    Raises:
        ValueError: too few rows stay, or the chat template cannot write a row.
    """
    limit, filters = data.max_prompt_length, data.get("filter_overlong_prompts", True)
    drops = hpd.overlong_demonstration == "drop" and setting == "data.train_files"
    rows = _Rows(tokenizer, template_kwargs(data), data.max_response_length, data.get("prompt_key", "prompt"))
    of_teacher = _TeacherLengths(max_teacher_prompt_length(data), filters)
    needed = needed_rows if filters or drops else 1
    seen = fitting = refused = 0
    shortest: int | None = None
    first_refusal = ""
    for file in files:
        for index, row in rows.of(file):
            if fitting >= needed or (0 < max_samples <= seen):
                break
            seen += 1
            try:
                length = rows.prompt_length(row)
            except Exception as error:  # templates are programs: any error of Jinja or of what they call
                refusal = rows.refusal(file, index, "the prompt", error)
                if not filters:
                    raise ValueError(refusal) from error
                refused, first_refusal = refused + 1, first_refusal or refusal  # it will be left out, and counted
                continue
            shortest = length if shortest is None else min(shortest, length)
            if filters and length > limit:
                continue
            try:
                fits = of_teacher.take(rows.teacher_prompt_length(file, row))
            except Exception as error:  # as above
                raise ValueError(rows.refusal(file, index, "the teacher's prompt", error)) from error
            if filters and not fits:
                continue
            looks = file.rules.reads_demonstrations and (drops or seen <= _TOKENISED_DEMONSTRATIONS)
            answer = rows.response_length(file, index, row) if looks else 0
            if drops and answer > data.max_response_length:
                continue
            fitting += filters or drops or (length <= limit and fits)
    if fitting < needed and refused and shortest is None:
        raise ValueError(first_refusal)
    if fitting < needed and drops and shortest is not None and shortest <= limit:
        raise ValueError(
            f"data.max_response_length={data.max_response_length}: algorithm.hpd.overlong_demonstration=drop keeps "
            f"{fitting} of {seen} rows of {setting}, {needed} are needed; raise it, or truncate"
        )
    if fitting < needed and of_teacher.overlong and shortest is not None and shortest <= limit:
        raise ValueError(of_teacher.refusal(setting, seen, needed))
    if fitting < needed:
        what = f"stay, {needed} are needed" if filters else "fit, the others would lose their beginning"
        others = f"; {refused} are refused, the first, {first_refusal}" if refused else ""
        raise ValueError(
            f"data.max_prompt_length={limit}: {fitting} of {seen} prompts of {setting} {what} (the shortest has "
            f"{shortest} tokens); raise it{others}"
        )
    rows.check_kinds(files, filters, max_samples)


def texts_of_rows(files: Sequence[DataFile], prompt_key: str) -> Iterator[tuple[str, str]]:
    """The chat columns of all rows as text, each with the row's name."""
    for file in files:
        wanted = [prompt_key, TOOLS, *([DEMONSTRATION] if file.rules.reads_demonstrations else [])]
        if file.rules.teacher_prompts is not None:
            wanted += file.rules.teacher_prompts.reads(file.schema.names)
        start = 0
        for batch, rows in file.batches([name for name in file.schema.names if name in wanted]):
            for index, row in enumerate(rows, start):
                yield file.row_name(index), "\n".join(_texts(list(row.values())))
            start += len(batch)


def _texts(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value]
    items = value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else ()
    return [text for item in items for text in _texts(item)]


class _TeacherLengths:
    """Lengths of the teacher's prompts that were looked at."""

    def __init__(self, limit: int, filters: bool) -> None:
        self.limit = limit
        self.filters = filters
        self.overlong = 0
        self.shortest: int | None = None

    def take(self, length: int) -> bool:
        """Count one; whether it fits."""
        self.shortest = length if self.shortest is None else min(self.shortest, length)
        self.overlong += length > self.limit
        return length <= self.limit

    def refusal(self, setting: str, seen: int, needed: int) -> str:
        what = f"are left out, {needed} rows are needed" if self.filters else "lose their beginning, and none fits"
        return (
            f"{LENGTH_SETTING}={self.limit}: of {seen} rows of {setting} {self.overlong} prompts of the teacher {what} "
            f"(the shortest has {self.shortest} tokens); raise it"
        )


class _Rows:
    """Rows of files and their tokens."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, kwargs: Mapping[str, Any], max_response_length: int, key: str
    ) -> None:
        self._demonstrations = DemonstrationTokenizer(tokenizer, kwargs, max_response_length)
        self._prompts = PromptTokenizer(self._demonstrations.template)
        self._key = key

    def of(self, file: DataFile, unusual: bool = False) -> Iterator[tuple[int, dict[str, Any]]]:
        """Number and content of a file's rows; ``unusual``: only of batches that may hold more than texts."""
        wanted = [self._key, TOOLS, *([DEMONSTRATION] if file.rules.reads_demonstrations else [])]
        prompts = file.rules.teacher_prompts
        keys = (self._key,) if prompts is None else (self._key, prompts.key)
        wanted += [] if prompts is None else prompts.reads(file.schema.names)
        start = 0
        for batch, rows in file.batches([name for name in file.schema.names if name in wanted]):
            if not unusual or _may_be_unusual(batch, self._key):
                for index, row in enumerate(rows, start):
                    yield index, as_written(row, rows.features, *keys)
            start += len(batch)

    def prompt_length(self, row: Mapping[str, Any]) -> int:
        return len(self._prompts.encode(row[self._key], tools_of(row.get(TOOLS))))

    def teacher_prompt_length(self, file: DataFile, row: Mapping[str, Any]) -> int:
        """0 where the teacher reads the prompt itself."""
        prompts = file.rules.teacher_prompts
        if prompts is None or not prompts.are_used(file.schema.names):
            return 0
        return len(self._prompts.encode(prompts.messages(row), tools_of(row.get(TOOLS))))

    def response_length(self, file: DataFile, index: int, row: Mapping[str, Any]) -> int:
        """Tokens of the row's demonstration, 0 without one.

        Raises:
            ValueError: no response could be it; the message names the row.
        """
        value, tools = row.get(DEMONSTRATION), tools_of(row.get(TOOLS))
        try:
            if not has_demonstration(value):
                self._demonstrations.template.with_tools(tools).check_prompt(row[self._key])
                return 0
            return self._demonstrations.length(row[self._key], demonstration_of(value, "row"), tools)
        except Exception as error:  # templates are programs: any error of Jinja or of what they call
            raise ValueError(self.refusal(file, index, "the row", error)) from error

    @staticmethod
    def refusal(file: DataFile, index: int, what: str, error: Exception) -> str:
        said = one_line(error)
        if not isinstance(error, ValueError):
            said = f"the student's chat template fails at {what}: {type(error).__name__}: {said}"
        return f"{file.row_name(index)}: {said}{'; change its messages' if 'rejects the chat' in said else ''}"

    def check_kinds(self, files: Sequence[DataFile], filters: bool, max_samples: int) -> None:
        """Tokenise the first rows of each kind that is more than texts.

        Raises:
            ValueError: the template cannot write one; the message names the row.
        """
        counts: dict[Any, int] = {}
        before = 0
        for file in files:
            for index, row in self.of(file, unusual=True):
                if 0 < max_samples <= before + index:
                    return
                kind = _kind(row[self._key], row.get(TOOLS), row.get(DEMONSTRATION))
                counts[kind] = counts.get(kind, 0) + 1
                if kind is None or counts[kind] > _ROWS_OF_A_KIND:
                    continue
                try:
                    self.prompt_length(row)
                except Exception as error:  # as above
                    if filters:  # left out, and counted
                        continue
                    raise ValueError(self.refusal(file, index, "the prompt", error)) from error
                self.response_length(file, index, row)
            before += file.rows


def _kind(prompt: Any, tools: Any, demonstration: Any) -> Any:
    """The kinds of content in a row beyond text of other roles than the assistant; None if nothing."""

    def keys(message: Mapping[str, Any]) -> frozenset[str]:
        return frozenset(key for key, value in message.items() if key not in ("role", "content") and value)

    in_prompt = frozenset[str]().union(*map(keys, prompt))
    of_answer = frozenset[str]() if not isinstance(demonstration, list) else keys(demonstration[0])
    found = (begins_answer(prompt), in_prompt, bool(tools), of_answer)
    return found if any(found) else None


def _may_be_unusual(batch: pa.RecordBatch, prompt_key: str) -> bool:
    """Whether rows may hold more than texts of other roles than the assistant, by the columns' types."""
    for name in batch.schema.names:
        column = batch.column(name)
        if name == TOOLS and column.null_count < len(column):
            return True
        if name == prompt_key or (name == DEMONSTRATION and pa.types.is_nested(column.type)):
            is_chat = pa.types.is_list(column.type) and pa.types.is_struct(column.type.value_type)
            if not is_chat or {field.name for field in column.type.value_type} != {"role", "content"}:
                return True
    prompts = batch.column(prompt_key)
    last_roles = pc.struct_field(prompts.values, "role").take(pc.subtract(prompts.offsets[1:].cast(pa.int64()), 1))
    return bool(pc.any(pc.equal(last_roles, "assistant")).as_py())
