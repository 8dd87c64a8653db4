"""verl's FSDP engine for losses computed from hidden states instead of logits."""

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor, nn
from verl.utils import tensordict_utils as tu
from verl.utils.device import get_device_id, get_device_name
from verl.workers.engine import EngineRegistry

from hpd_verl.engine import families
from hpd_verl.engine.causal_lm import check_head, offer_head, output_head
from hpd_verl.engine.row_engine import RowEngine
from hpd_verl.engine.sequence_parallel import SequenceGroup
from hpd_verl.head.output_head import OutputHead

families.register()

MODEL_TYPE = "hpd_language_model"
"""``model_type`` of the engine in verl's registry."""


class HeadLoss(ABC):
    """A loss function of the engine that takes hidden states.

    Under Ulysses it gets those of its rank's part of the packed tokens, and may ask ``SequenceGroup.current``. Its loss
    and metrics are then of that part, scaled by ``dp_size`` as if each rank were a data-parallel one.
    """

    @abstractmethod
    def from_hidden(self, hidden: Tensor, head: OutputHead, data: TensorDict) -> tuple[Tensor, dict[str, Any]]:
        """Loss and metrics of a micro-batch.

        Args:
            hidden: [tokens, d], the input of the output layer at every token of the micro-batch, or of the part.
            head: the output layer.
            data: the micro-batch, nested tensors, whole on each rank.
        """


@EngineRegistry.register(model_type=MODEL_TYPE, backend=["fsdp", "fsdp2"], device=["cuda", "npu"])
class HeadEngine(RowEngine):
    """Hands hidden states to a ``HeadLoss``; every other loss function gets what verl's engine gives it."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.vocabulary_size: int | None = None

    def _build_fsdp_module(self, module: nn.Module) -> nn.Module:
        # Before verl's wrapping: its offloading of activations counts the calls of each sharded layer's forward.
        offer_head(module)
        return super()._build_fsdp_module(module)

    def use_head(self, vocabulary_size: int | None = None) -> None:
        """Say how many logits losses use, and refuse a model whose output layer is not understood.

        Args:
            vocabulary_size: number of logits that the loss uses; None for all.

        Raises:
            ValueError: see ``causal_lm.check_head``.
        """
        self.vocabulary_size = vocabulary_size
        with self.eval_mode(), self._autocast():
            check_head(self.module)

    def warm_up(self, run: Callable[[OutputHead], None]) -> None:
        """Run something with the output layer under the settings of a step, which compiled code is made for.

        Args:
            run: of the layer, whose weight may be sharded but has the dtype of a step.
        """
        layer = output_head(self.module, self.vocabulary_size)
        weight = torch.empty(len(layer.weight), 1, dtype=self.compute_dtype, device=get_device_id())
        with self._autocast(), torch.autocast(device_type=get_device_name(), enabled=False):
            run(dataclasses.replace(layer, weight=weight))

    @property
    def compiles(self) -> bool:
        """Whether elementwise work is fused by ``torch.compile``, verl's setting of the engine."""
        return bool(self.engine_config.use_torch_compile)

    def forward_step(self, micro_batch: TensorDict, loss_function: Any, forward_only: bool) -> Any:
        if not isinstance(loss_function, HeadLoss):
            return super().forward_step(micro_batch, loss_function=loss_function, forward_only=forward_only)
        micro_batch = micro_batch.to(get_device_id())
        inputs, _ = self.prepare_model_inputs(micro_batch=micro_batch)
        sharing = SequenceGroup.of(self.ulysses_parallel_group)
        if sharing.size > 1:  # FSDP averages gradients over all ranks
            tu.assign_non_tensor(micro_batch, dp_size=micro_batch["dp_size"] * sharing.size)

        def head(hidden: Tensor, layer: OutputHead) -> Any:
            layer = dataclasses.replace(layer, vocabulary_size=self.vocabulary_size or layer.vocabulary_size)
            with torch.autocast(device_type=get_device_name(), enabled=False):
                hidden = self._tokens(hidden, micro_batch).to(layer.weight.dtype)
                return loss_function.from_hidden(hidden, layer, micro_batch)

        with self._autocast():
            loss, metrics = self.module(**inputs, use_cache=False, head=head)
        value = loss.detach().item()
        if sharing.size > 1:
            value, metrics = sharing.average(loss, metrics)
        return loss, {"model_output": {}, "loss": value, "metrics": metrics}

    @staticmethod
    def _tokens(hidden: Tensor, micro_batch: TensorDict) -> Tensor:
        """[rows, tokens, d] as the model returns it to [total tokens, d] without padding."""
        if tu.get_non_tensor_data(data=micro_batch, key="use_remove_padding", default=True):
            return hidden.squeeze(0)
        lengths = micro_batch["input_ids"].offsets().diff()
        return hidden[torch.arange(hidden.shape[1], device=hidden.device) < lengths.unsqueeze(1)]
