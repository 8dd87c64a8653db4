"""From a demonstration's text to the response tokens a rollout of the same answer would have."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from verl.utils.tokenizer.continuous_token_wiring import create_continuous_token_builder
from verl.workers.config import HFModelConfig

_PROBE = "demonstration"


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


def turn_end_token(tokenizer: PreTrainedTokenizerBase, **template_kwargs: Any) -> int:
    """The token that ends an assistant's turn: what the chat template writes after its content, or the EOS.

    Raises:
        ValueError: the template writes no special token there and the tokenizer has no EOS.
    """
    chat = [{"role": "user", "content": "question"}, {"role": "assistant", "content": _PROBE}]
    rendered = tokenizer.apply_chat_template(chat, tokenize=False, **template_kwargs)
    tail = tokenizer.encode(rendered[rendered.rindex(_PROBE) + len(_PROBE) :], add_special_tokens=False)
    if tail and tail[0] in tokenizer.all_special_ids:
        return tail[0]
    if tokenizer.eos_token_id is None:
        raise ValueError(
            "actor_rollout_ref.model.path: the student's chat template ends a turn without a special token and its "
            "tokenizer has no eos_token; set one of them"
        )
    return tokenizer.eos_token_id


class DemonstrationTokenizer:
    """Tokenises demonstrations with the student's chat template.

    Args:
        tokenizer: the student's.
        template_kwargs: verl's ``data.apply_chat_template_kwargs``.
        max_length: verl's ``data.max_response_length``, tokens, the turn's end included.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template_kwargs: Mapping[str, Any], max_length: int) -> None:
        self.tokenizer = tokenizer
        self.template_kwargs = dict(template_kwargs)
        self.max_length = max_length
        self.turn_end = turn_end_token(tokenizer, **self.template_kwargs)

    def _body(self, messages: list[dict[str, Any]], text: str) -> str:
        """What the template writes between the generation prompt and the turn's end."""

        def render(chat: list[dict[str, Any]], **kwargs: Any) -> str:
            return self.tokenizer.apply_chat_template(chat, tokenize=False, **kwargs, **self.template_kwargs)

        prompt = render(messages, add_generation_prompt=True)
        full = render([*messages, {"role": "assistant", "content": text}])
        content = text.strip()
        if full.startswith(prompt) and content in full[len(prompt) :]:
            answer = full[len(prompt) :]
            return answer[: answer.rindex(content) + len(content)]
        # The template rewrites answers (some drop the reasoning of earlier turns): take the text as it is.
        return text

    def length(self, messages: list[dict[str, Any]], text: str) -> int:
        """Response tokens of the whole demonstration, its turn's end included."""
        return len(self.tokenizer.encode(self._body(messages, text), add_special_tokens=False)) + 1

    def encode(self, messages: list[dict[str, Any]], text: str) -> tuple[list[int], bool]:
        """Tokenise one demonstration.

        Args:
            messages: the prompt's chat list.
            text: the demonstration.

        Returns:
            ``(response token ids, truncated)``; a truncated response has no turn's end.
        """
        ids = self.tokenizer.encode(self._body(messages, text), add_special_tokens=False)
        if len(ids) + 1 > self.max_length:
            return ids[: self.max_length], True
        return [*ids, self.turn_end], False


class SequenceBuilder:
    """Prompt and demonstration as the sequence that a rollout of the same answer would be.

    Args:
        model: the student.
        template_kwargs: verl's ``data.apply_chat_template_kwargs``.
        max_prompt_length, max_response_length: verl's ``data`` settings, tokens. Prompts keep their end.
    """

    def __init__(
        self, model: HFModelConfig, template_kwargs: Mapping[str, Any], max_prompt_length: int, max_response_length: int
    ) -> None:
        if model.custom_chat_template is not None:
            model.tokenizer.chat_template = model.custom_chat_template
        # The builder of verl's agent loops, so that demonstrations and rollouts get the same prompt.
        self._prompts = create_continuous_token_builder(
            model.tokenizer,
            hf_model_type=model.hf_config.model_type,
            chat_template_kwargs=dict(template_kwargs),
            mm_processor_kwargs={},
            processor=None,
        )
        self._max_prompt_length = max_prompt_length
        self._demonstrations = DemonstrationTokenizer(model.tokenizer, template_kwargs, max_response_length)

    def build(self, messages: list[dict[str, Any]], text: str) -> tuple[dict[str, Tensor], bool]:
        """Tokenise one row.

        Returns:
            ``(tensors, truncated)``: prompts [P], responses, response_mask, loss_mask [R], input_ids and position_ids
            [P + R], all int64, and whether the demonstration was truncated.
        """
        response, truncated = self._demonstrations.encode(messages, text)
        prompt = self._prompts.build_initial_tokens(messages)
        prompts = torch.tensor(prompt[-self._max_prompt_length :], dtype=torch.int64)
        responses = torch.tensor(response, dtype=torch.int64)
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
        return tensors, truncated
