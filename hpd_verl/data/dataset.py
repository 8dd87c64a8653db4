"""verl's data set, with rows checked where they are read and overlong demonstrations dropped or refused."""

import logging

import datasets
from verl.utils.dataset.rl_dataset import RLHFDataset

from hpd_verl.config import HPDConfig
from hpd_verl.data.demonstration import DemonstrationTokenizer, demonstration_text, has_demonstration
from hpd_verl.data.files import DEMONSTRATION, RowRules, as_list, check_files

__all__ = ["DEMONSTRATION", "HPDDataset"]

logger = logging.getLogger(__name__)


class HPDDataset(RLHFDataset):
    """Rows of verl's columns and, for training, ``demonstration``: a string or a chat list of one assistant message.

    ``config`` is verl's ``data`` node; its ``hpd`` holds ``algorithm.hpd``. Files are parquet, json or jsonl.

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
        check_files(
            setting,
            self.data_files,
            RowRules.of(self.config, HPDConfig.from_config(self.config.hpd), self.is_train),
        )
        super()._read_files_and_tokenize()
        if self.is_train and self.config.hpd.overlong_demonstration != "truncate":
            self._handle_overlong()

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
        logger.info(
            "dropped %d rows with a demonstration over %d tokens, kept %d",
            self.dropped_demonstrations,
            limit,
            len(kept),
        )
