"""verl's data set, with rows checked where they are read and overlong demonstrations dropped or refused."""

from collections.abc import Mapping, Sequence
from typing import Any

import datasets
from verl.utils.dataset.rl_dataset import RLHFDataset

from hpd_verl.demonstration import DemonstrationTokenizer, demonstration_text, has_demonstration

DEMONSTRATION = "demonstration"


def _check_prompt(prompt: Any, where: str) -> None:
    is_chat = isinstance(prompt, Sequence) and not isinstance(prompt, str) and len(prompt) > 0
    if is_chat and all(isinstance(turn, Mapping) and {"role", "content"} <= turn.keys() for turn in prompt):
        return
    found = type(prompt).__name__ if not is_chat else "a list without role and content in every message"
    raise ValueError(f"{where}: prompt is {found}, expected a chat list [{{role: user, content: text}}, ...]")


class HPDDataset(RLHFDataset):
    """Rows of verl's columns and, for training, ``demonstration``: a string or a chat list of one assistant message.

    ``config`` is verl's ``data`` node; its ``hpd`` holds ``algorithm.hpd``. Files are parquet, json or jsonl.

    Raises:
        ValueError: at construction, naming file and row: no prompt or one that is not a chat list; for training, no
            demonstration where one is needed, or an overlong one with ``overlong_demonstration=error``.
    """

    dataframe: datasets.Dataset

    dropped_demonstrations = 0
    """Rows left out because of ``overlong_demonstration=drop``."""

    def _read_files_and_tokenize(self) -> None:
        # verl tells no one which split a data set is for; the validation rows need no demonstration.
        train_files = self.config.train_files
        self.is_train = list(self.original_data_files) == (
            [train_files] if isinstance(train_files, str) else list(train_files)
        )
        for file in self.data_files:
            self._check_file(file)
        super()._read_files_and_tokenize()
        if self.is_train and self.config.hpd.overlong_demonstration != "truncate":
            self._handle_overlong()

    def _check_file(self, file: str) -> None:
        kind = "parquet" if file.endswith(".parquet") else "json"
        rows = datasets.load_dataset(kind, data_files=file)["train"]
        if self.prompt_key not in rows.column_names:
            raise ValueError(
                f"{file}: no column {self.prompt_key!r} (data.prompt_key); there are {', '.join(rows.column_names)}"
            )
        for index, prompt in enumerate(rows[self.prompt_key]):
            _check_prompt(prompt, f"{file}, row {index}")
        hpd = self.config.hpd
        if not self.is_train or hpd.on_policy_fraction == 1 or hpd.missing_demonstration == "rollout":
            return
        remedy = (
            "; every row needs one where algorithm.hpd.on_policy_fraction < 1, "
            "unless algorithm.hpd.missing_demonstration=rollout lets the student answer"
        )
        if DEMONSTRATION not in rows.column_names:
            raise ValueError(f"{file}: no column {DEMONSTRATION!r}, there are {', '.join(rows.column_names)}{remedy}")
        for index, value in enumerate(rows[DEMONSTRATION]):
            try:
                demonstration_text(value, f"{file}, row {index}")
            except ValueError as error:
                raise ValueError(f"{error}{remedy}") from None

    def _handle_overlong(self) -> None:
        limit = self.config.max_response_length
        tokenizer = DemonstrationTokenizer(
            self.tokenizer, self.config.get("apply_chat_template_kwargs", {}), max_length=limit
        )
        kept = []
        for index, row in enumerate(self.dataframe):
            if has_demonstration(row.get(DEMONSTRATION)):
                length = tokenizer.length(
                    row[self.prompt_key], demonstration_text(row[DEMONSTRATION], f"training row {index}")
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
        print(f"dropped {self.dropped_demonstrations} rows with a demonstration over {limit} tokens, kept {len(kept)}")
