"""From a demonstration's text to the response tokens a rollout of the same answer would have."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date, time
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from verl.utils.tokenizer.continuous_token import ContinuousTokenBuilder
from verl.utils.tokenizer.continuous_token_wiring import (
    get_continuous_token_builder_class,
    infer_continuous_token_model_family,
)
from verl.workers.config import HFModelConfig

from hpd_verl.data import fields
from hpd_verl.data.chat_template import ChatTemplate, Message, Messages
from hpd_verl.data.row import parsed

logger = logging.getLogger(__name__)

Tools = Sequence[Mapping[str, Any]] | None
"""JSON schemas of the tools that a row offers."""


def demonstration_of(value: Any, where: str) -> str | Message:
    """A row's demonstration: its text, or its message if that holds more than text.

    Args:
        value: the row's ``demonstration``, a string or a chat list of one assistant message. Beside ``content`` the
            message may hold what the chat template knows, as ``reasoning_content`` and ``tool_calls``.
        where: names the row in the error.

    Raises:
        ValueError: null, empty or of another form.
    """
    answer: str | Message = ""
    if isinstance(value, str):
        answer = value
    elif isinstance(value, Sequence) and len(value) == 1 and isinstance(value[0], Mapping):
        message = value[0]
        if message.get("role") == "assistant" and message.get("content", "") is None:
            raise ValueError(f"{where}: the demonstration's content is null; write its text, or '' beside tool calls")
        if message.get("role") != "assistant" or not isinstance(message.get("content"), str):
            raise ValueError(f"{where}: a chat demonstration is [{{role: assistant, content: ..}}], found {message}")
        check_tool_calls(message, f"{where}: the demonstration")
        answer = message if _fields(message) else message["content"]
    elif isinstance(value, date | time):
        raise ValueError(f"{where}: demonstration is {no_text(value)}")
    elif value is not None:
        raise ValueError(
            f"{where}: demonstration is {type(value).__name__}, expected a string or a chat of one assistant message"
        )
    if isinstance(answer, str) and not answer.strip():
        raise ValueError(
            f"{where}: demonstration is {'null' if value is None else 'empty'}, expected the answer's text"
        )
    return answer


def _fields(message: Message) -> list[str]:
    """The non-empty keys of a message other than its text."""
    return [key for key, value in message.items() if key not in ("role", "content") and value]


def check_tool_calls(message: Message, where: str) -> None:
    """Check the form of a message's tool calls.

    Raises:
        ValueError: they are no list of objects; ``where`` names the message.
    """
    calls = message.get("tool_calls")
    calls = parsed(calls) if isinstance(calls, str) else calls
    is_list = isinstance(calls, Sequence) and not isinstance(calls, str)
    if calls is not None and not (is_list and all(isinstance(call, Mapping) for call in calls)):
        raise ValueError(f"{where}'s tool_calls is {type(calls).__name__}, expected a list of objects or its JSON text")


NO_TEXT = "a date ("
"""How ``no_text`` begins."""


def no_text(value: Any) -> str:
    """Error text for a date in place of a text, and the remedy."""
    return (
        f"{NO_TEXT}{value}), expected a string; write the column as text, in a parquet file: where all are like "
        "2026-01-31, readers of JSON take texts for dates"
    )


def has_demonstration(value: Any) -> bool:
    """Whether a row holds a demonstration at all; one of a wrong form counts, so that it is reported."""
    if isinstance(value, Sequence) and len(value) == 1 and isinstance(value[0], Mapping):
        if _fields(value[0]):
            return True
        value = value[0].get("content")
    return bool(value.strip()) if isinstance(value, str) else value is not None


@dataclass(frozen=True)
class TokenisedDemonstration:
    """The response of a demonstration."""

    ids: list[int]
    truncated: bool
    """Cut at the maximum length; the response then has no turn's end."""
    reopened: bool
    """The demonstration's opening reasoning tag is left out, since the prompt ends with it."""


class DemonstrationTokenizer:
    """Tokenises demonstrations with the student's chat template.

    Args:
        tokenizer: the student's.
        template_kwargs: verl's ``data.apply_chat_template_kwargs``.
        max_length: verl's ``data.max_response_length``, tokens, the turn's end included.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template_kwargs: Mapping[str, Any], max_length: int) -> None:
        self.template = ChatTemplate(tokenizer, template_kwargs)
        self.max_length = max_length

    def _whole(self, messages: Messages, answer: str | Message, tools: Tools) -> tuple[list[int], bool]:
        """All response tokens of the demonstration, and whether its opening reasoning tag is left out."""
        template = self.template.with_tools(tools)
        chat, escaped_answer, escaped = template.escape(messages, answer)
        if chat is not messages:
            template.answer(messages, answer)  # some templates refuse texts with control tokens
        found = template.answer(chat, escaped_answer)
        prompt = template.encode(chat, found.prompt, escaped)
        ids = template.encode(chat, found.prompt + found.text, escaped)
        # Where prompt and answer would share a token, a rollout still starts after the prompt's own tokens.
        starts = ids[: len(prompt)] == prompt
        ids = ids[len(prompt) :] if starts else template.encode(chat, found.text, escaped)
        if not found.end.written:
            ids = [*ids, found.end.token]
        if ids.index(found.end.token) < len(ids) - 1:
            token = template.tokenizer.convert_ids_to_tokens(found.end.token)
            raise ValueError(f"the demonstration holds {token!r}, at which rollouts stop; remove it from its text")
        return ids, found.reopened

    def length(self, messages: Messages, answer: str | Message, tools: Tools = None) -> int:
        """Number of response tokens of the uncut demonstration, with the turn's end."""
        return len(self._whole(messages, answer, tools)[0])

    def encode(self, messages: Messages, answer: str | Message, tools: Tools = None) -> TokenisedDemonstration:
        """Tokenise one demonstration.

        Args:
            messages: the prompt's chat list.
            answer: the demonstration, of ``demonstration_of``.
            tools: JSON schemas of the row's tools.

        Raises:
            ValueError: no rollout could be this demonstration; the message does not name the row.
        """
        ids, reopened = self._whole(messages, answer, tools)
        return TokenisedDemonstration(ids[: self.max_length], len(ids) > self.max_length, reopened)


def prompt_family(tokenizer: PreTrainedTokenizerBase, model_type: str | None) -> str | None:
    """The ``model_type`` by which verl is asked for a builder of prompts; None for its builder of any family.

    verl's builders of some families ask for tokens that join later turns, and refuse tokenizers without them, as those
    of models that took over another family's. Prompts have one turn, which most of these builders write as any other's.
    """
    kind = get_continuous_token_builder_class(infer_continuous_token_model_family(hf_model_type=model_type))
    if kind.build_initial_tokens is not ContinuousTokenBuilder.build_initial_tokens:
        return model_type
    try:
        kind(tokenizer)
    except ValueError:
        return None
    return model_type


class PromptTokenizer:
    """Tokenises prompts, for demonstrations and rollouts alike.

    Args:
        template: the student's chat template.
    """

    def __init__(self, template: ChatTemplate) -> None:
        self._template = template

    def encode(self, messages: Messages, tools: Tools = None) -> list[int]:
        """The template's own tokens, except that control tokens in a text are text."""
        template = self._template.with_tools(tools)
        chat, _, escaped = template.escape(messages)
        return template.encode(chat, template.prompt(chat), escaped)


class SequenceBuilder:
    """Prompt and demonstration as the sequence that a rollout of the same answer would be.

    Args:
        model: the student.
        template_kwargs: verl's ``data.apply_chat_template_kwargs``.
        max_prompt_length, max_response_length: verl's ``data`` settings, tokens. Longer prompts lose their start, as in
            verl's rollouts.
    """

    def __init__(
        self, model: HFModelConfig, template_kwargs: Mapping[str, Any], max_prompt_length: int, max_response_length: int
    ) -> None:
        if model.custom_chat_template is not None:
            model.tokenizer.chat_template = model.custom_chat_template
        self._demonstrations = DemonstrationTokenizer(model.tokenizer, template_kwargs, max_response_length)
        self._prompts = PromptTokenizer(self._demonstrations.template)
        self._max_prompt_length = max_prompt_length
        self._embedded = model.hf_config.get_text_config().vocab_size

    @property
    def prompts(self) -> PromptTokenizer:
        """How prompts are tokenised."""
        return self._prompts

    @property
    def embedded(self) -> int:
        """Rows of the model's embedding."""
        return self._embedded

    def build(
        self, messages: Messages, answer: str | Message, where: str, tools: Tools = None
    ) -> tuple[dict[str, Tensor], dict[str, bool]]:
        """Tokenise one row.

        Args:
            messages: the prompt's chat list.
            answer: the demonstration, of ``demonstration_of``.
            where: names the row in errors and warnings.
            tools: JSON schemas of the row's tools.

        Returns:
            ``(tensors, flags)``: prompts [P], responses, response_mask, loss_mask [R], input_ids and position_ids
            [P + R], all int64; ``TRUNCATED``, ``REOPENED`` and ``TRUNCATED_PROMPT``.

        Raises:
            ValueError: naming the row, where no rollout could be this demonstration.
        """
        try:
            demonstration = self._demonstrations.encode(messages, answer, tools)
            prompt = self._prompts.encode(messages, tools)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
        if max(*prompt, *demonstration.ids) >= self._embedded:  # of rows that could not be looked at before the start
            raise ValueError(
                f"{where}: it holds token {max(*prompt, *demonstration.ids)}, but the model's embedding has "
                f"{self._embedded} rows; resize the embedding to the tokenizer, or remove the token"
            )
        truncated_prompt = len(prompt) > self._max_prompt_length
        if truncated_prompt:
            logger.warning(
                "%s: prompt of %d tokens, data.max_prompt_length=%d; its start is cut off",
                where,
                len(prompt),
                self._max_prompt_length,
            )
        prompts = torch.tensor(prompt[-self._max_prompt_length :], dtype=torch.int64)
        responses = torch.tensor(demonstration.ids, dtype=torch.int64)
        input_ids = torch.cat([prompts, responses])
        mask = torch.ones_like(responses)
        tensors = {
            "prompts": prompts,
            "responses": responses,
            "response_mask": mask,
            "loss_mask": mask,
            "input_ids": input_ids,
            "position_ids": torch.arange(len(input_ids)),
        }
        flags = {
            fields.TRUNCATED: demonstration.truncated,
            fields.REOPENED: demonstration.reopened,
            fields.TRUNCATED_PROMPT: truncated_prompt,
        }
        return tensors, flags
