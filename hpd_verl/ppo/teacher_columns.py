"""What the teacher is told of a batch's rows beside their tokens: prompts of its own, and which of several it is."""

import json
from collections.abc import Sequence

import torch
from omegaconf import DictConfig
from tensordict import TensorDict
from torch import Tensor
from verl.utils import tensordict_utils as tu
from verl.workers.config import HFModelConfig

from hpd_verl.checks.data import template_kwargs
from hpd_verl.config import PREFIX, HPDConfig
from hpd_verl.data import fields
from hpd_verl.data.chat_template import ChatTemplate, Messages
from hpd_verl.data.dataset import TEACHER_CHAT
from hpd_verl.data.demonstration import PromptTokenizer
from hpd_verl.data.files import teacher_chat
from hpd_verl.data.row import TOOLS, as_written, tools_of
from hpd_verl.data.teacher_prompt import (
    KEY_SETTING,
    TEMPLATE_SETTING,
    TeacherPrompts,
    TeacherPromptTokenizer,
    max_teacher_prompt_length,
)
from hpd_verl.errors import require


class TeacherColumns:
    """Fields of the sequences of a step, by the prompts that they answer.

    Args:
        prompts: tokenises the teacher's prompts.
        of_columns: where they are in rows of another data set than ``HPDDataset``.
        hpd: the algorithm's settings, with the pipeline that was chosen.
    """

    def __init__(self, prompts: TeacherPromptTokenizer, of_columns: TeacherPrompts, hpd: HPDConfig) -> None:
        self._prompts = prompts
        self._of_columns = of_columns
        self._hpd = hpd
        self._rows: dict[str, dict[str, Tensor]] = {}
        self._truncated: set[str] = set()

    @classmethod
    def of(cls, config: DictConfig, hpd: HPDConfig, student: HFModelConfig) -> "TeacherColumns":
        """Of a run."""
        if student.custom_chat_template is not None:
            student.tokenizer.chat_template = student.custom_chat_template
        prompts = PromptTokenizer(ChatTemplate(student.tokenizer, template_kwargs(config.data)))
        embedded = student.hf_config.get_text_config().vocab_size
        tokenizer = TeacherPromptTokenizer(prompts, max_teacher_prompt_length(config.data), embedded)
        return cls(tokenizer, TeacherPrompts.of(config.data), hpd)

    def take(self, batch: TensorDict, uids: Sequence[str]) -> None:
        """Take from the data set's rows what concerns the teacher; ``uids`` are the rows' names.

        Raises:
            ValueError: no teacher has a row's name, a row has no chat for the teacher, the chat template cannot write
                it, or the pipeline's teacher cannot read it.
        """
        self._rows, self._truncated = {uid: {} for uid in uids}, set()
        chats = self._chats(batch, uids)
        if chats is not None:
            staged = self._hpd.pipeline == "staged" and self._hpd.needs_teacher
            require(
                not staged,
                f"{PREFIX}.pipeline",
                self._hpd.pipeline,
                "its teacher reads the student's prompts, and the rows have prompts for the teacher "
                f"({KEY_SETTING}, {TEMPLATE_SETTING}); set {PREFIX}.pipeline=one_pass, or leave them out",
            )
            tools = list(batch[TOOLS]) if TOOLS in batch else [None] * len(uids)
            for uid, chat, of_row in zip(uids, chats, tools, strict=True):
                ids, is_cut = self._prompts.encode(chat, f"row {uid}", tools_of(of_row))
                self._rows[uid][fields.TEACHER_PROMPTS] = ids
                self._truncated |= {uid} if is_cut else set()
        if self._hpd.teachers is not None:
            names, key = list(self._hpd.teachers), self._hpd.teacher_key
            if key not in batch:
                raise ValueError(f"{PREFIX}.teacher_key={key}: the rows have no such column; add it, or name another")
            for uid, name in zip(uids, batch[key], strict=True):
                if name not in names:
                    raise ValueError(
                        f"row {uid}: {key}={name}: no such teacher; {PREFIX}.teachers has {', '.join(names)}"
                    )
                self._rows[uid][fields.TEACHER] = torch.tensor([names.index(name)])

    def _chats(self, batch: TensorDict, uids: Sequence[str]) -> list[Messages] | None:
        """What the teacher reads in place of the prompts; None where it reads those.

        Rows of ``HPDDataset`` carry it, checked. Rows of another class (``data.custom_cls``) have their columns.
        """
        if TEACHER_CHAT in batch:
            texts = list(batch[TEACHER_CHAT])
            del batch[TEACHER_CHAT]
            return [json.loads(text) for text in texts]
        prompts, columns = self._of_columns, [str(name) for name in batch.keys()]  # noqa: SIM118, of a TensorDict
        if not prompts.are_used(columns):
            return None
        values = {name: list(batch[name]) for name in prompts.reads(columns)}
        values[prompts.prompt_key] = list(batch["raw_prompt"])
        chats = []
        for number, uid in enumerate(uids):
            written = {name: each[number] for name, each in values.items()}
            row = as_written(written, {}, prompts.prompt_key, prompts.key)
            chats.append(teacher_chat(row, prompts, f"row {uid}"))
        if prompts.key in columns:
            del batch[prompts.key]
        return chats

    @property
    def names(self) -> list[str]:
        """The fields that the rows have."""
        return list(next(iter(self._rows.values()), {}))

    def of_keys(self, keys: Sequence[str]) -> dict[str, Tensor]:
        """The fields of sequences; those that verl pads with, which count for nothing, have the first row's."""
        first = next(iter(self._rows.values()), {})
        rows = [self._rows.get(_uid(key), first) for key in keys]
        found = {}
        for name in self.names:
            values = [row[name] for row in rows]
            is_prompt = name == fields.TEACHER_PROMPTS
            found[name] = tu.nested_tensor_from_tensor_list(values) if is_prompt else torch.stack(values)
        return found

    def truncated(self, keys: Sequence[str]) -> int:
        """Sequences whose teacher's prompt lost its start."""
        return sum(_uid(key) in self._truncated for key in keys)


def _uid(key: str) -> str:
    """The prompt of a sequence: its key is prompt, session and output."""
    return key.rsplit("_", 2)[0]
