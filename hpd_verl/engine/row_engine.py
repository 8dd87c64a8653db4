"""verl's FSDP engine, in which rows of a micro-batch do not affect each other."""

from contextlib import nullcontext
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor
from verl.utils import tensordict_utils as tu
from verl.utils.device import get_device_id, get_device_name
from verl.workers.engine import EngineRegistry
from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead

from hpd_verl.engine import micro_batches
from hpd_verl.engine.replica import rope_switch
from hpd_verl.engine.row_layout import packed_inputs, padded_inputs, trial_rows

ROWS_MODEL_TYPE = "hpd_rows_language_model"
"""``model_type`` of the engine in verl's registry."""

_LENGTHS = (9, 13, 6)
"""Tokens of the rows that the loaded model is tried with."""
_MOVES_AT_MOST = {torch.float32: 1e-4}
_MOVES_AT_MOST_ROUNDED = 5e-2
"""Relative change of a token's logits. What leaks moves them by the order of 1; rounding may depend on other rows where
experts share out their tokens."""


@EngineRegistry.register(model_type=ROWS_MODEL_TYPE, backend=["fsdp", "fsdp2"], device=["cuda", "npu"])
class RowEngine(FSDPEngineWithLMHead):
    """Fills micro-batches so that rows may share them, and tries once that they may."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.model_config.model_type = "language_model"  # the name by which verl builds the module
        self.rope_switch = rope_switch(self.model_config.hf_config)

    def initialize(self) -> None:
        """verl's call to load the model.

        Raises:
            ValueError: a row's logits depend on the row beside it.
        """
        super().initialize()
        if self.rows_share and not self.use_ulysses_sp:  # whose ranks hold a part of the rows each
            with self.eval_mode(), self._autocast():
                self._check_rows()

    @property
    def rows_share(self) -> bool:
        """Whether a micro-batch may hold more than one row."""
        config = self.engine_config
        sizes = (config.micro_batch_size_per_gpu, config.infer_micro_batch_size_per_gpu)
        return config.use_dynamic_bsz or any(size not in (None, 1) for size in sizes)

    @property
    def compute_dtype(self) -> torch.dtype:
        """Dtype of the model's matrix products."""
        return self._autocast_dtype

    def _autocast(self) -> Any:
        if self.compute_dtype == torch.float32:
            return nullcontext()
        return torch.autocast(device_type=get_device_name(), dtype=self.compute_dtype)

    @torch.no_grad()
    def _check_rows(self) -> None:
        """Change one row: the others must stay. The model is the real one, on its device, in its dtype."""
        make = packed_inputs if self.use_remove_padding else padded_inputs
        vocabulary = self.model_config.hf_config.get_text_config().vocab_size
        context = getattr(self.model_config.hf_config.get_text_config(), "max_position_embeddings", None) or 2**20
        lengths = [min(length, context) for length in _LENGTHS]
        rows, other = (trial_rows(lengths, vocabulary, seed) for seed in (0, 1))
        before, after = (self._trial(make, [first, *rows[1:]]) for first in (rows[0], other[0]))
        moved = ((after - before).norm(dim=-1) / before.norm(dim=-1)).max().item()
        limit = _MOVES_AT_MOST.get(self.compute_dtype, _MOVES_AT_MOST_ROUNDED)
        if moved > limit:  # not where it is NaN: the first step refuses that and names the rows
            how = "packed" if self.use_remove_padding else "padded"
            raise ValueError(
                f"use_remove_padding={self.use_remove_padding}: a row moves the logits of the rows it is {how} "
                f"with, by {moved:.2g}, in {self.model_config.path} with its attention "
                f"{self.model_config.override_config.get('attn_implementation')}; choose another, or padded rows"
            )

    def _trial(self, make: Any, rows: list[Tensor]) -> Tensor:
        """Logits [tokens, vocabulary] of all rows but the first."""
        inputs, is_token = make(rows)
        inputs = {name: value if value is None else value.to(get_device_id()) for name, value in inputs.items()}
        logits = self.module(**inputs, use_cache=False).logits[is_token.to(get_device_id())]
        return logits[len(rows[0]) :].float()

    def forward_backward_batch(self, data: TensorDict, loss_function: Any, forward_only: bool = False) -> Any:
        if self.rope_switch is not None:
            tu.assign_non_tensor(data, **{micro_batches.SWITCH: self.rope_switch})
        return super().forward_backward_batch(data, loss_function, forward_only)
