"""The student's own rollouts: verl's single-turn agent loop, stopping where demonstrations end."""

from typing import Any

from verl.experimental.agent_loop.agent_loop import AgentLoopOutput, register
from verl.experimental.agent_loop.single_turn_agent_loop import SingleTurnAgentLoop

from hpd_verl.batch import ON_POLICY
from hpd_verl.demonstration import turn_end_token


@register("hpd")
class HPDAgentLoop(SingleTurnAgentLoop):
    """One answer of the student to one prompt, in training and validation."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.turn_end = turn_end_token(self.tokenizer, **self.apply_chat_template_kwargs)

    async def run(self, sampling_params: dict[str, Any], priority: int = 0, **kwargs: Any) -> AgentLoopOutput:
        # A base model may know another end than its chat template's, the one that demonstrations teach it.
        sampling_params = {**sampling_params, "stop_token_ids": [self.turn_end]}
        output = await super().run(sampling_params, priority=priority, **kwargs)
        if ON_POLICY in kwargs and not self.config.algorithm.hpd.score_rollouts:
            output.reward_score = 0.0  # a training row: verl then asks no reward function
        return output
