"""verl's data set, with rows checked at reading and overlong demonstrations dropped or rejected."""

import functools
import hashlib
import json
import logging
from collections.abc import Iterator
from typing import Any

import datasets
from verl.utils.dataset.rl_dataset import RLHFDataset

from hpd_verl.config import HPDConfig
from hpd_verl.data import fields
from hpd_verl.data.chat_template import ChatTemplate
from hpd_verl.data.demonstration import DemonstrationTokenizer, PromptTokenizer, demonstration_of, has_demonstration
from hpd_verl.data.files import RowRules, as_list, check_files, is_remote, local_files
from hpd_verl.data.row import DEMONSTRATION, TOOLS, as_written, tools_of
from hpd_verl.data.teacher_prompt import LENGTH_SETTING, TeacherPrompts, max_teacher_prompt_length

__all__ = ["DEMONSTRATION", "HPDDataset"]

TEACHER_CHAT = "hpd_teacher_chat"
"""Field of a row: the chat that the teacher reads, as JSON text."""

logger = logging.getLogger(__name__)


class HPDDataset(RLHFDataset):
    """Rows of verl's columns, ``tools`` and, for training, ``demonstration``: a string or a chat list of one assistant
    message.

    ``config`` is verl's ``data`` node; its ``hpd`` holds ``algorithm.hpd``, and ``files_are_checked`` whether the files
    have been checked, by a run's start: all but remote ones are then only read. Files are parquet, json or jsonl.

    Raises:
        ValueError: at construction, naming file and row: a file that cannot be read, no prompt or one that is not a
            chat list of text; for training, a demonstration of a wrong form, none where one is needed, or an overlong
            one with ``overlong_demonstration=error``.
    """

    dataframe: datasets.Dataset

    dropped_demonstrations = 0
    """Rows left out because of ``overlong_demonstration=drop``."""

    def _read_files_and_tokenize(self) -> None:
        # verl tells no one which split a data set is for; the validation rows need no demonstration.
        self.is_train = list(self.original_data_files) == as_list(self.config.train_files)
        setting = "data.train_files" if self.is_train else "data.val_files"
        hpd = HPDConfig.from_config(self.config.hpd)
        self.row_columns = hpd.row_columns if self.is_train else []
        if self.config.get("files_are_checked", False) and not any(map(is_remote, self.original_data_files)):
            for file in self.data_files:  # this may be another machine
                local_files(setting, file)
        else:
            check_files(setting, self.data_files, RowRules.of(self.config, hpd, self.is_train))
        self.teacher_prompts = TeacherPrompts.of(self.config)
        self.teachers = list(self.config.hpd.get("teachers") or ()) if self.is_train else []
        self.teacher_key = str(self.config.hpd.get("teacher_key", "data_source"))
        super()._read_files_and_tokenize()
        if self.is_train and self.config.hpd.overlong_demonstration != "truncate":
            self._handle_overlong()

    def row(self, index: int) -> dict[str, Any]:
        """A row by its number, its chat columns as they were written."""
        return self._as_written(self.dataframe[index])

    def rows(self) -> Iterator[dict[str, Any]]:
        """All of them."""
        return map(self._as_written, self.dataframe)

    def numbers(self, index: int) -> dict[str, float]:
        """What objectives need of a row's columns, by ``fields.row_number``."""
        if not self.row_columns:
            return {}
        row = self.dataframe[index]
        return {fields.row_number(name): float(row[name]) for name in self.row_columns}

    def _as_written(self, row: dict[str, Any]) -> dict[str, Any]:
        return as_written(row, self.dataframe.features, self.prompt_key, self.teacher_prompts.key)

    @property
    def has_teacher_prompts(self) -> bool:
        """Whether the teacher reads something else than the student; no teacher reads validation rows of main_ppo."""
        return self.is_train and self.teacher_prompts.are_used(self.dataframe.column_names)

    @functools.cached_property
    def fingerprint(self) -> dict[str, Any]:
        """Number of the rows and a hash of 1,024 of them, evenly spread: equal where the rows and their order are."""
        total = len(self.dataframe)
        looked_at = min(total, 1024)
        digest = hashlib.sha256()
        for number in range(looked_at):
            row = self.row(number * total // looked_at)
            chat = [row.get(name) for name in (self.prompt_key, DEMONSTRATION, TOOLS)]
            if self.has_teacher_prompts:
                chat.append(self.teacher_prompts.messages(row))
            if self.row_columns:
                chat.append(self.numbers(number * total // looked_at))
            digest.update(json.dumps(chat, sort_keys=True, default=str).encode())
        return {"rows": total, "sha256": digest.hexdigest()}

    def __getitem__(self, item: int) -> dict[str, Any]:
        row = self._as_written(super().__getitem__(item))
        row["raw_prompt"] = row[self.prompt_key]
        if self.has_teacher_prompts:  # as text, as the tools are
            row[TEACHER_CHAT] = json.dumps(self.teacher_prompts.messages(row))
            row.pop(self.teacher_prompts.key, None)
        if TOOLS in row:  # as text, of which a batch holds one a row whatever their number
            row[TOOLS] = json.dumps(tools_of(row[TOOLS]))
        return row | self.numbers(item)  # verl gives some columns, as index, another content

    def maybe_filter_out_long_prompts(self, dataframe: datasets.Dataset) -> datasets.Dataset:
        """The rows whose prompt is short enough, by the tokens it is trained with; verl's would count others."""
        if not self.filter_overlong_prompts:
            return dataframe
        prompts = PromptTokenizer(ChatTemplate(self.tokenizer, self.apply_chat_template_kwargs))
        features, key, of_teacher, names = (
            dataframe.features,
            self.prompt_key,
            self.teacher_prompts,
            dataframe.column_names,
        )
        reads_teachers = self.is_train and of_teacher.are_used(names)

        def measure(row: dict[str, Any]) -> dict[str, Any]:
            written = as_written(row, features, key, of_teacher.key)
            tools = tools_of(written.get(TOOLS))
            try:
                chat = of_teacher.messages(written) if reads_teachers else None
                return {
                    "tokens": len(prompts.encode(written[key], tools)),
                    "of_teacher": 0 if chat is None else len(prompts.encode(chat, tools)),
                    "refusal": "",
                }
            except ValueError as error:
                return {"tokens": -1, "of_teacher": -1, "refusal": str(error)}

        read = {key, TOOLS, *(of_teacher.reads(names) if reads_teachers else [])}
        columns = dataframe.select_columns([name for name in names if name in read])
        found = columns.map(
            measure, remove_columns=columns.column_names, num_proc=self.num_workers, desc="measuring the prompts"
        )
        lengths, of_teachers = found["tokens"], found["of_teacher"]
        fitting = [index for index, length in enumerate(lengths) if 0 <= length <= self.max_prompt_length]
        limit = max_teacher_prompt_length(self.config)
        kept = [index for index in fitting if of_teachers[index] <= limit]
        refused = [index for index, length in enumerate(lengths) if length < 0]
        if refused:
            logger.warning(
                "dropped %d of %d rows, whose prompts the chat template rejects; the first, row %d: %s",
                len(refused),
                len(dataframe),
                refused[0],
                found[refused[0]]["refusal"],
            )
        logger.info(
            "dropped %d of %d rows, whose prompts are longer than data.max_prompt_length=%d",
            len(dataframe) - len(fitting) - len(refused),
            len(dataframe),
            self.max_prompt_length,
        )
        if reads_teachers:
            logger.info(
                "%d more are left out, the teacher's prompts are longer than %s=%d",
                len(fitting) - len(kept),
                LENGTH_SETTING,
                limit,
            )
        return dataframe.select(kept)

    def _handle_overlong(self) -> None:
        limit = self.config.max_response_length
        tokenizer = DemonstrationTokenizer(
            self.tokenizer, self.config.get("apply_chat_template_kwargs", {}), max_length=limit
        )
        kept = []
        for index, row in enumerate(self.rows()):
            if has_demonstration(row.get(DEMONSTRATION)):
                length = tokenizer.length(
                    row[self.prompt_key],
                    demonstration_of(row[DEMONSTRATION], f"training row {index}"),
                    tools_of(row.get(TOOLS)),
                )
                if length > limit and self.config.hpd.overlong_demonstration == "error":
                    raise ValueError(
                        f"training row {index}: demonstration has {length} tokens, data.max_response_length={limit}; "
                        "raise the limit, or set algorithm.hpd.overlong_demonstration to truncate or drop"
                    )
                if length > limit:
                    continue
            kept.append(index)
        self.dropped_demonstrations = len(self.dataframe) - len(kept)
        self.dataframe = self.dataframe.select(kept)
        logger.info(
            "dropped %d rows with a demonstration over %d tokens, kept %d",
            self.dropped_demonstrations,
            limit,
            len(kept),
        )
