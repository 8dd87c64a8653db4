"""From a demonstration's text to the response tokens a rollout of the same answer would have."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from verl.utils.tokenizer.continuous_token import ContinuousTokenBuilder
from verl.utils.tokenizer.continuous_token_wiring import (
    create_continuous_token_builder,
    get_continuous_token_builder_class,
    infer_continuous_token_model_family,
)
from verl.workers.config import HFModelConfig

from hpd_verl.data import fields
from hpd_verl.data.chat_template import ChatTemplate, Messages

logger = logging.getLogger(__name__)


def demonstration_text(value: Any, where: str) -> str:
    """The demonstration's text, from a string or from a chat list of one assistant message.

    Args:
        value: the row's ``demonstration``.
        where: names the row in the error.

    Raises:
        ValueError: null, empty or of another form.
    """
    if isinstance(value, str):
        text = value
    elif isinstance(value, Sequence) and len(value) == 1 and isinstance(value[0], Mapping):
        if value[0].get("role") != "assistant" or not isinstance(value[0].get("content"), str):
            raise ValueError(f"{where}: a chat demonstration is [{{role: assistant, content: ..}}], found {value[0]}")
        text = value[0]["content"]
    elif value is None:
        text = ""
    else:
        raise ValueError(
            f"{where}: demonstration is {type(value).__name__}, expected a string or a chat of one assistant message"
        )
    if not text.strip():
        raise ValueError(
            f"{where}: demonstration is {'null' if value is None else 'empty'}, expected the answer's text"
        )
    return text


def has_demonstration(value: Any) -> bool:
    """Whether a row holds a demonstration at all; one of a wrong form counts, so that it is reported."""
    if isinstance(value, Sequence) and len(value) == 1 and isinstance(value[0], Mapping):
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

    def _whole(self, messages: Messages, text: str) -> tuple[list[int], bool]:
        """The response tokens of the whole demonstration, and whether its opening reasoning tag is left out."""
        chat, escaped_text = self.template.escape(messages, text)
        escaped = chat is not messages
        if escaped:
            self.template.answer(messages, text)  # some templates refuse texts with control tokens
        answer = self.template.answer(chat, escaped_text)
        prompt = self.template.encode(chat, answer.prompt, escaped)
        ids = self.template.encode(chat, answer.prompt + answer.text, escaped)
        # Where prompt and answer would share a token, a rollout still starts after the prompt's own tokens.
        starts = ids[: len(prompt)] == prompt
        ids = ids[len(prompt) :] if starts else self.template.encode(chat, answer.text, escaped)
        if not answer.end.written:
            ids = [*ids, answer.end.token]
        if ids.index(answer.end.token) < len(ids) - 1:
            token = self.template.tokenizer.convert_ids_to_tokens(answer.end.token)
            raise ValueError(f"the demonstration holds {token!r}, at which rollouts stop; remove it from its text")
        return ids, answer.reopened

    def length(self, messages: Messages, text: str) -> int:
        """Response tokens of the whole demonstration, its turn's end included."""
        return len(self._whole(messages, text)[0])

    def encode(self, messages: Messages, text: str) -> TokenisedDemonstration:
        """Tokenise one demonstration.

        Args:
            messages: the prompt's chat list.
            text: the demonstration.

        Raises:
            ValueError: no rollout could be this demonstration; the message does not name the row.
        """
        ids, reopened = self._whole(messages, text)
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
        build: verl's ``build_initial_tokens`` for the student.
    """

    def __init__(self, template: ChatTemplate, build: Callable[[list[Any]], list[int]]) -> None:
        self._template = template
        self._build = build

    def encode(self, messages: Messages) -> list[int]:
        """verl's own tokens, except that control tokens in the text of a message are text."""
        escaped, _ = self._template.escape(messages)
        if escaped is messages:
            return self._build(list(messages))
        return self._template.encode(escaped, self._template.prompt(escaped), escaped=True)


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
        # The builder of verl's agent loops, so that demonstrations and rollouts get the same prompt.
        builder = create_continuous_token_builder(
            model.tokenizer,
            hf_model_type=prompt_family(model.tokenizer, model.hf_config.model_type),
            chat_template_kwargs=dict(template_kwargs),
            mm_processor_kwargs={},
            processor=None,
        )
        self._prompts = PromptTokenizer(self._demonstrations.template, builder.build_initial_tokens)
        self._max_prompt_length = max_prompt_length

    def build(self, messages: Messages, text: str, where: str) -> tuple[dict[str, Tensor], dict[str, bool]]:
        """Tokenise one row.

        Args:
            messages: the prompt's chat list.
            text: the demonstration.
            where: names the row in errors and warnings.

        Returns:
            ``(tensors, flags)``: prompts [P], responses, response_mask, loss_mask [R], input_ids and position_ids
            [P + R], all int64; ``TRUNCATED``, ``REOPENED`` and ``TRUNCATED_PROMPT``.

        Raises:
            ValueError: naming the row, where no rollout could be this demonstration.
        """
        try:
            demonstration = self._demonstrations.encode(messages, text)
            prompt = self._prompts.encode(messages)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
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
