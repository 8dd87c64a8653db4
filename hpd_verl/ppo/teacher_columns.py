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
from hpd_verl.data.chat_template import ChatTemplate
from hpd_verl.data.dataset import TEACHER_CHAT
from hpd_verl.data.demonstration import PromptTokenizer
from hpd_verl.data.row import TOOLS, tools_of
from hpd_verl.data.teacher_prompt import TeacherPromptTokenizer, max_teacher_prompt_length


class TeacherColumns:
    """Fields of the sequences of a step, by the prompts that they answer.

    Args:
        prompts: tokenises the teacher's prompts.
        hpd: the algorithm's settings.
    """

    def __init__(self, prompts: TeacherPromptTokenizer, hpd: HPDConfig) -> None:
        self._prompts = prompts
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
        return cls(TeacherPromptTokenizer(prompts, max_teacher_prompt_length(config.data), embedded), hpd)

    def take(self, batch: TensorDict, uids: Sequence[str]) -> None:
        """Take from the data set's rows what concerns the teacher; ``uids`` are the rows' names.

        Raises:
            ValueError: no teacher has a row's name, or the chat template cannot write a prompt.
        """
        self._rows, self._truncated = {uid: {} for uid in uids}, set()
        if TEACHER_CHAT in batch:
            tools = list(batch[TOOLS]) if TOOLS in batch else [None] * len(uids)
            chats = list(batch[TEACHER_CHAT])
            del batch[TEACHER_CHAT]
            for uid, chat, of_row in zip(uids, chats, tools, strict=True):
                ids, is_cut = self._prompts.encode(json.loads(chat), f"row {uid}", tools_of(of_row))
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

    @property
    def names(self) -> list[str]:
        """The fields that the rows have."""
        return list(next(iter(self._rows.values()), {}))

    def of_row(self, key: str) -> dict[str, Tensor]:
        """The fields of a sequence of the step."""
        return self._rows[_uid(key)]

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
