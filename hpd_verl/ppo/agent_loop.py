"""The student's own rollouts: verl's single-turn agent loop, with the prompts and the turn's end of demonstrations."""

import hashlib
from collections.abc import Mapping
from typing import Any

from verl.experimental.agent_loop.agent_loop import AgentLoopOutput, register
from verl.experimental.agent_loop.single_turn_agent_loop import SingleTurnAgentLoop

from hpd_verl.data.chat_template import ChatTemplate
from hpd_verl.data.demonstration import PromptTokenizer, prompt_family
from hpd_verl.data.fields import ON_POLICY, TRUNCATED_PROMPT
from hpd_verl.data.row import TOOLS, tools_of


def answer_seed(seed: int, row: Mapping[str, Any]) -> int:
    """Seed of one answer's tokens, from 0 to 2^63 - 1: the same in every run, another for each answer.

    Args:
        seed: the run's.
        row: what verl's agent loop gets of the prompt; a training row's number within its step is in its ``uid``, a
            validation row's ``uid`` is another in every run.
    """
    names = ("uid",) if ON_POLICY in row else ("data_source", "index", "raw_prompt")
    words = [seed, row["session_id"], *(row.get(name) for name in names)]
    return int.from_bytes(hashlib.blake2b(repr(words).encode(), digest_size=8).digest()) >> 1


@register("hpd")
class HPDAgentLoop(SingleTurnAgentLoop):
    """One answer of the student to one prompt, in training and validation. verl makes one object per answer."""

    def __init__(self, *args: Any, tokenizer: Any, hf_model_type: str | None = None, **kwargs: Any) -> None:
        if kwargs.get("processor") is None:
            hf_model_type = prompt_family(tokenizer, hf_model_type)
        super().__init__(*args, tokenizer=tokenizer, hf_model_type=hf_model_type, **kwargs)
        self.template = ChatTemplate(self.tokenizer, self.apply_chat_template_kwargs)
        self.prompts = PromptTokenizer(self.template)
        self.tools: list[dict[str, Any]] | None = None
        self.truncated_prompt = False

    async def ct_build_initial_tokens(self, messages: list[dict[str, Any]], **kwargs: Any) -> list[int]:
        if any(kwargs.get(kind) for kind in ("images", "videos", "audios", "tools")):
            return await super().ct_build_initial_tokens(messages, **kwargs)
        prompt = await self.loop.run_in_executor(None, self.prompts.encode, messages, self.tools)
        return self._cap_text_prompt_length(prompt)

    def _cap_text_prompt_length(self, prompt_ids: list[int]) -> list[int]:
        capped = super()._cap_text_prompt_length(prompt_ids)
        self.truncated_prompt = len(capped) < len(prompt_ids)
        return capped

    async def run(self, sampling_params: dict[str, Any], priority: int = 0, **kwargs: Any) -> AgentLoopOutput:
        # A base model may have another EOS than its chat template's, which demonstrations teach it.
        self.tools = tools_of(kwargs.get(TOOLS))
        end = self.template.with_tools(self.tools).turn_end(list(kwargs["raw_prompt"]))
        sampling_params = {**sampling_params, "stop_token_ids": [end.token]}
        if self.rollout_config.get("name") == "vllm":
            sampling_params["seed"] = answer_seed(self.config.algorithm.hpd.seed, kwargs)
        output = await super().run(sampling_params, priority=priority, **kwargs)
        output.extra_fields[TRUNCATED_PROMPT] = self.truncated_prompt
        if ON_POLICY in kwargs and not self.config.algorithm.hpd.score_rollouts:
            output.reward_score = 0.0  # a training row: verl then asks no reward function
        return output
