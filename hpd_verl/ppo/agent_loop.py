"""The student's own rollouts: verl's single-turn agent loop, with the prompts and the turn's end of demonstrations."""

from typing import Any

from verl.experimental.agent_loop.agent_loop import AgentLoopOutput, register
from verl.experimental.agent_loop.single_turn_agent_loop import SingleTurnAgentLoop

from hpd_verl.data.chat_template import ChatTemplate
from hpd_verl.data.demonstration import PromptTokenizer, prompt_family
from hpd_verl.data.fields import ON_POLICY, TRUNCATED_PROMPT


@register("hpd")
class HPDAgentLoop(SingleTurnAgentLoop):
    """One answer of the student to one prompt, in training and validation. verl makes one object per answer."""

    def __init__(self, *args: Any, tokenizer: Any, hf_model_type: str | None = None, **kwargs: Any) -> None:
        if kwargs.get("processor") is None:
            hf_model_type = prompt_family(tokenizer, hf_model_type)
        super().__init__(*args, tokenizer=tokenizer, hf_model_type=hf_model_type, **kwargs)
        self.template = ChatTemplate(self.tokenizer, self.apply_chat_template_kwargs)
        self.prompts = PromptTokenizer(self.template, self.continuous_token_builder.build_initial_tokens)
        self.truncated_prompt = False

    async def ct_build_initial_tokens(self, messages: list[dict[str, Any]], **kwargs: Any) -> list[int]:
        if any(kwargs.get(kind) for kind in ("images", "videos", "audios", "tools")):
            return await super().ct_build_initial_tokens(messages, **kwargs)
        prompt = await self.loop.run_in_executor(None, self.prompts.encode, messages)
        return self._cap_text_prompt_length(prompt)

    def _cap_text_prompt_length(self, prompt_ids: list[int]) -> list[int]:
        capped = super()._cap_text_prompt_length(prompt_ids)
        self.truncated_prompt = len(capped) < len(prompt_ids)
        return capped

    async def run(self, sampling_params: dict[str, Any], priority: int = 0, **kwargs: Any) -> AgentLoopOutput:
        # A base model may know another end than its chat template's, the one that demonstrations teach it.
        end = self.template.turn_end(list(kwargs["raw_prompt"]))
        sampling_params = {**sampling_params, "stop_token_ids": [end.token]}
        output = await super().run(sampling_params, priority=priority, **kwargs)
        output.extra_fields[TRUNCATED_PROMPT] = self.truncated_prompt
        if ON_POLICY in kwargs and not self.config.algorithm.hpd.score_rollouts:
            output.reward_score = 0.0  # a training row: verl then asks no reward function
        return output
