"""The responses of a batch: demonstrations or rollouts, per row."""

from typing import Any

import torch
import transfer_queue as tq
from omegaconf import DictConfig
from tensordict import NonTensorData, NonTensorStack, TensorDict
from verl.trainer.ppo.v1.agent_loop_tq import AgentLoopManagerTQ
from verl.utils.config import omega_conf_to_dataclass
from verl.utils.ray_utils import auto_await
from verl.utils.tensordict_utils import index_select_tensor_dict, list_of_dict_to_tensordict
from verl.workers.config import HFModelConfig

from hpd_verl.config import HPDConfig
from hpd_verl.data.dataset import DEMONSTRATION
from hpd_verl.data.demonstration import SequenceBuilder, demonstration_of
from hpd_verl.data.fields import ON_POLICY, ROLLOUT_LOG_PROBS
from hpd_verl.data.row import TOOLS, tools_of
from hpd_verl.run.choices import needs_rollout_server


def _row(batch: TensorDict, index: int) -> dict[str, Any]:
    """One row of a batch as verl's agent loop workers see it."""
    row: dict[str, Any] = {}
    for key, value in batch.items():
        if isinstance(value, NonTensorStack):
            row[key] = value[index].data
        elif isinstance(value, NonTensorData):
            row[key] = value.data
        else:
            row[key] = value[index]
    return row


class HPDAgentLoopManager(AgentLoopManagerTQ):
    """Writes demonstrations to TransferQueue itself and hands the other rows to verl's agent loop workers.

    The workers exist only if something is ever generated.
    """

    @classmethod
    @auto_await
    async def create(cls, *args: Any, **kwargs: Any) -> "HPDAgentLoopManager":
        """Create the manager, with agent loop workers where the run has a rollout server."""
        manager = cls(*args, **kwargs)
        if manager._has_server:
            await manager._init_agent_loop_workers()
        return manager

    def __init__(self, config: DictConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        self.config = config
        self._has_server = needs_rollout_server(config, HPDConfig.from_config(config.algorithm.hpd))
        model: HFModelConfig = omega_conf_to_dataclass(config.actor_rollout_ref.model)
        self._sequences = SequenceBuilder(
            model,
            config.data.get("apply_chat_template_kwargs", {}),
            config.actor_rollout_ref.rollout.prompt_length,
            config.actor_rollout_ref.rollout.response_length,
        )

    def generate_sequences(self, prompts: TensorDict) -> None:
        """Produce the responses of a batch; returns as soon as rollouts have started.

        Args:
            prompts: rows of the data set; training rows carry ``ON_POLICY``.
        """
        if ON_POLICY not in prompts:  # validation: the student answers every row
            super().generate_sequences(prompts)
            return
        on_policy = [bool(flag) for flag in prompts[ON_POLICY]]
        rollouts = [index for index, flag in enumerate(on_policy) if flag]
        demonstrations = [index for index, flag in enumerate(on_policy) if not flag]
        if rollouts:  # first, so that they run while the demonstrations are tokenised
            super().generate_sequences(index_select_tensor_dict(prompts, rollouts))
        if demonstrations:
            self._put_demonstrations([_row(prompts, index) for index in demonstrations])

    def demonstrations(self, prompts: TensorDict) -> dict[str, dict[str, Any]]:
        """The fields of the demonstrations among training rows, by the rows' uids; nothing is written."""
        rows = [_row(prompts, index) for index, flag in enumerate(prompts[ON_POLICY]) if not flag]
        return {row["uid"]: self._sequence(row)[0] for row in rows}

    def _put_demonstrations(self, rows: list[dict[str, Any]]) -> None:
        keys, fields, tags = [], [], []
        for row in rows:
            key = f"{row['uid']}_0_0"  # session 0, output 0
            field, flags = self._sequence(row)
            prompt_len, response_len = len(field["prompts"]), len(field["responses"])
            step = int(row["global_steps"])
            keys.append(key)
            fields.append(field)
            tags.append(
                {
                    "status": "success",
                    "prompt_len": prompt_len,
                    "response_len": response_len,
                    "seq_len": prompt_len + response_len,
                    "global_steps": step,
                    "min_global_steps": step,
                    "max_global_steps": step,
                    **flags,
                }
            )
        tq.kv_batch_put(keys=keys, partition_id="train", fields=list_of_dict_to_tensordict(fields), tags=tags)
        finished = [{"status": "finished"}] * len(rows)
        tq.kv_batch_put(keys=[row["uid"] for row in rows], partition_id="train", tags=finished)

    def _sequence(self, row: dict[str, Any]) -> tuple[dict[str, Any], dict[str, bool]]:
        """The fields verl's agent loop workers write for a sequence, and the flags of its demonstration."""
        where = f"row {row['uid']} (index {row.get('index')})"
        answer = demonstration_of(row.get(DEMONSTRATION), where)
        tensors, flags = self._sequences.build(list(row["raw_prompt"]), answer, where, tools_of(row.get(TOOLS)))
        sequence = {
            **row,
            **tensors,
            "session_id": 0,
            "rm_scores": torch.zeros(len(tensors["responses"])),
            "num_turns": 2,
            "multi_modal_inputs": {},
            "extra_fields": {},
        }
        if self._has_server and self.config.actor_rollout_ref.rollout.calculate_log_probs:
            sequence[ROLLOUT_LOG_PROBS] = torch.zeros(len(tensors["responses"]))  # masked out where it is read
        return sequence, flags
