"""Attention of packed sequences on a CPU: ``attn_implementation=packed_sdpa``.

torch's sdpa needs a mask of [tokens, tokens] to keep packed sequences apart, whose cost grows with the square of the
pack; this one calls it once per sequence. It also serves verl's Ulysses sequence parallelism, which verl itself builds
into flash attention only: with plain sdpa each rank would see its own part of a sequence alone.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed
from torch import Tensor, nn
from transformers import PretrainedConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from verl.utils.ulysses import (
    gather_heads_scatter_seq,
    gather_seq_scatter_heads,
    get_ulysses_sequence_parallel_group,
    get_ulysses_sequence_parallel_world_size,
)

from hpd_verl.config import Refused
from hpd_verl.import_hooks import replace

NAME = "packed_sdpa"


def _sequence_lengths(position_ids: Tensor) -> list[int]:
    """Lengths of packed sequences: each starts at position 0.

    Args:
        position_ids: int64 [1, tokens].
    """
    starts = torch.nonzero(position_ids.flatten() == 0).flatten()
    end = torch.tensor([position_ids.numel()], device=starts.device)
    return torch.cat([starts, end]).diff().tolist()


def _window_mask(length: int, window: int | None, device: torch.device) -> Tensor | None:
    """bool [length, length] of a causal window; None where the window sees everything."""
    if window is None or length <= window:
        return None
    visible = torch.ones(length, length, dtype=torch.bool, device=device)
    return visible.tril().triu(1 - window)


def packed_sdpa(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """transformers' attention interface; without a mask, ``position_ids`` tell the packed sequences apart.

    Args:
        module: the attention layer.
        query: [1, heads, tokens, head size]; with a mask, [rows, ...].
        key, value: the same with the number of key-value heads.
        attention_mask: None for packed sequences; otherwise plain sdpa with this mask.
        kwargs: of transformers, ``position_ids`` int64 [1, tokens] among them.

    Returns:
        ``([1, tokens, heads, head size], None)``.

    Raises:
        Refused: the model's attention does not hand on ``position_ids``.
        ValueError: a padded batch meets Ulysses.
    """
    ranks = get_ulysses_sequence_parallel_world_size()
    packed = attention_mask is None and query.shape[0] == 1 and query.shape[2] == key.shape[2]
    if not packed:
        if ranks > 1:
            raise ValueError("Ulysses sequence parallelism needs actor_rollout_ref.model.use_remove_padding=true")
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    position_ids = kwargs.get("position_ids")
    if position_ids is None:
        raise Refused(  # main_ppo has the same below actor_rollout_ref
            f"model.override_config.attn_implementation={NAME}: {type(module).__name__} does not hand on position_ids; "
            "choose sdpa or eager, with model.use_remove_padding=false"
        )
    if ranks > 1:  # all tokens of some heads, in place of some tokens of all heads
        if key.shape[1] < ranks:
            key, value = (part.repeat_interleave(ranks // part.shape[1], dim=1) for part in (key, value))
        query, key, value = (gather_seq_scatter_heads(part, seq_dim=2, head_dim=1) for part in (query, key, value))
        parts = [torch.empty_like(position_ids) for _ in range(ranks)]
        torch.distributed.all_gather(parts, position_ids.contiguous(), group=get_ulysses_sequence_parallel_group())
        position_ids = torch.cat(parts, dim=-1)

    lengths = _sequence_lengths(position_ids)
    outputs = []
    for q, k, v in zip(*(part.split(lengths, dim=2) for part in (query, key, value)), strict=True):
        mask = _window_mask(q.shape[2], kwargs.get("sliding_window"), q.device)
        outputs.append(_one_sequence(module, q, k, v, mask, kwargs))
    output = torch.cat(outputs, dim=1)
    if ranks > 1:
        output = gather_heads_scatter_seq(output, seq_dim=1, head_dim=2)
    return output, None


def _one_sequence(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, kwargs: dict[str, Any]
) -> Tensor:
    return nn.functional.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask,
        dropout_p=kwargs.get("dropout", 0.0),
        scale=kwargs.get("scaling"),
        is_causal=mask is None,
        enable_gqa=query.shape[1] != key.shape[1],
    ).transpose(1, 2)


def packed_mask(*args: Any, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor | None:
    """transformers' mask interface: no mask, unless a batch is padded."""
    return None if attention_mask is None else sdpa_mask(*args, attention_mask=attention_mask, **kwargs)


def _loads_anywhere(original: Callable[..., Any]) -> Callable[..., Any]:
    """verl writes the attention's name into saved configurations, which would then load only where it is registered."""

    def to_dict(self: PretrainedConfig) -> dict[str, Any]:
        config = original(self)
        if config.get("attn_implementation") == NAME:
            del config["attn_implementation"]
        return config

    return to_dict


ALL_ATTENTION_FUNCTIONS.register(NAME, packed_sdpa)
ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, packed_mask)
replace(PretrainedConfig, "to_dict", _loads_anywhere)
