"""What the teacher reads in place of a row's prompt: a column of its own, or a template over the row's columns."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor

from hpd_verl.data.chat_template import Messages, begins_answer
from hpd_verl.data.demonstration import PromptTokenizer, Tools
from hpd_verl.data.row import DEMONSTRATION

KEY_SETTING = "data.teacher_prompt_key"
KEY = "teacher_prompt"
"""The setting's default."""
TEMPLATE_SETTING = "data.teacher_prompt_template"
LENGTH_SETTING = "data.max_teacher_prompt_length"

_PLACEHOLDER = re.compile(r"\{\{|\}\}|\{(\w+)\}")
_ANSWER, _REWARD = "answer", "reward_model"


def placeholders(template: str) -> list[str]:
    """The names in braces, each once; ``{{`` and ``}}`` are braces of the text."""
    return list(dict.fromkeys(match[1] for match in _PLACEHOLDER.finditer(template) if match[1]))


def max_teacher_prompt_length(data: DictConfig) -> int:
    """Tokens of the longest prompt of the teacher."""
    own = data.get("max_teacher_prompt_length")
    return int(data.max_prompt_length if own is None else own)


@dataclass(frozen=True)
class TeacherPrompts:
    """Where the teacher's prompts come from."""

    key: str
    """Column of chat lists."""
    template: str | None
    """Text of the last user message, for rows without the column; its other messages are the prompt's."""
    prompt_key: str

    @classmethod
    def of(cls, data: DictConfig) -> "TeacherPrompts":
        """Of verl's ``data`` node."""
        template = data.get("teacher_prompt_template")
        return cls(data.get("teacher_prompt_key", KEY), template, data.get("prompt_key", "prompt"))

    def are_used(self, columns: Sequence[str]) -> bool:
        """Whether rows of these columns have a prompt for the teacher."""
        return self.template is not None or self.key in columns

    def reads(self, columns: Sequence[str]) -> list[str]:
        """The columns that are read, of those that are there."""
        named = {self.key, *([] if self.template is None else placeholders(self.template))}
        if _ANSWER in named:
            named.add(_REWARD)
        return [name for name in columns if name in named]

    def missing(self, columns: Sequence[str]) -> list[str]:
        """Names in the template that no column has."""
        known = {*columns, "prompt", *([_ANSWER] if _REWARD in columns else [])}
        return [name for name in placeholders(self.template or "") if name not in known]

    def messages(self, row: Mapping[str, Any]) -> Any:
        """The row's prompt for the teacher, not checked: the column's value or, where it is null, of the template.

        Raises:
            ValueError: the template has no value for a placeholder; the message does not name the row.
        """
        value = row.get(self.key)
        return value if value is not None or self.template is None else self._filled(row)

    def _filled(self, row: Mapping[str, Any]) -> Messages:
        assert self.template is not None
        prompt = list(row[self.prompt_key])
        users = [index for index, message in enumerate(prompt) if message.get("role") == "user"]
        if not users:
            raise ValueError(f"{TEMPLATE_SETTING}: the prompt has no user message, in whose place it stands")
        values = {"prompt": prompt[users[-1]]["content"]}
        values |= {name: _text(row, name) for name in placeholders(self.template) if name not in values}
        braces = {"{{": "{", "}}": "}"}
        text = _PLACEHOLDER.sub(lambda match: braces.get(match[0]) or values[match[1]], self.template)
        prompt[users[-1]] = {**prompt[users[-1]], "content": text}
        return prompt

    def check(self, row: Mapping[str, Any], messages: Messages) -> None:
        """Check that a well-formed chat can stand in the prompt's place.

        Raises:
            ValueError: it cannot; the message does not name the row.
        """
        if not any(str(message["content"]).strip() or message.get("tool_calls") for message in messages):
            raise ValueError(f"{self.key} has no text; write what the teacher shall read")
        own, of_teacher = begins_answer(row[self.prompt_key]), begins_answer(messages)
        if own != of_teacher:
            raise ValueError(
                f"{self.key if of_teacher else self.prompt_key} ends with a message of the assistant, which begins the "
                f"answer, and {self.prompt_key if of_teacher else self.key} does not; end both alike"
            )


def _text(row: Mapping[str, Any], name: str) -> str:
    """A column's text.

    Raises:
        ValueError: the row has none.
    """
    value = row.get(name)
    if name == _ANSWER and value is None:
        reward = row.get(_REWARD)
        value = reward.get("ground_truth") if isinstance(reward, Mapping) else None
    if name == DEMONSTRATION and isinstance(value, Sequence) and not isinstance(value, str) and len(value) == 1:
        value = value[0].get("content")
    if isinstance(value, int | float) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, str) or not value.strip():
        found = "null" if value is None else "empty" if isinstance(value, str) else type(value).__name__
        raise ValueError(f"{name} is {found}, and {TEMPLATE_SETTING} has {{{name}}}; give every row a text")
    return value


class TeacherPromptTokenizer:
    """Tokenises the teacher's prompts as the student's are.

    Args:
        prompts: with the student's chat template.
        max_length: tokens; longer prompts lose their start.
        embedded: rows of the student's embedding.
    """

    def __init__(self, prompts: PromptTokenizer, max_length: int, embedded: int) -> None:
        self._prompts = prompts
        self._max_length = max_length
        self._embedded = embedded

    def encode(self, messages: Messages, where: str, tools: Tools = None) -> tuple[Tensor, bool]:
        """int64 [tokens], and whether the start was cut off.

        Raises:
            ValueError: naming the row, where the chat template cannot write it.
        """
        try:
            ids = self._prompts.encode(messages, tools)
        except ValueError as error:
            raise ValueError(f"{where}: the teacher's prompt: {error}") from error
        if max(ids) >= self._embedded:
            raise ValueError(
                f"{where}: the teacher's prompt holds token {max(ids)}, and the model's embedding has {self._embedded} "
                "rows; take it out"
            )
        return torch.tensor(ids[-self._max_length :], dtype=torch.int64), len(ids) > self._max_length
