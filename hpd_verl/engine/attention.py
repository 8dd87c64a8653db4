"""Attention of packed sequences by torch alone: ``attn_implementation=packed_attention``.

torch's sdpa needs a mask of [tokens, tokens] for packed sequences, whose cost grows with the square of the pack; this
calls it once per sequence. It supports soft caps and sinks, which sdpa does not, and Ulysses sequence parallelism,
which verl builds into flash attention only.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed
from torch import Tensor, nn
from transformers import PretrainedConfig
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from verl.utils.ulysses import (
    gather_heads_scatter_seq,
    gather_seq_scatter_heads,
    get_ulysses_sequence_parallel_group,
    get_ulysses_sequence_parallel_world_size,
)

from hpd_verl.run.replacing import replace

NAME = "packed_attention"
FORMER_NAME = "packed_sdpa"
"""The same. Models that do not take sdpa refuse every name with "sdpa" in it."""
AS_FLASH = "packed_attention_by_layer"
"""The same, told no more than flash attention's varlen kernels are: what the layer itself hands on, and no mask."""
NO_ATTENTION = "packed_attention_to_itself"
"""Each token sees itself alone, by which a trial finds what else of a model mixes tokens."""

MaskFunction = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""transformers' mask: (batch, head, query, key) indices, int64 that broadcast, to bool."""


class PackedMask:
    """The parameters of one packed row's [tokens, tokens] mask; passed in place of the mask.

    Args:
        function: says which keys a query sees.
        length: tokens of the pack.
        device: of the tokens.
    """

    def __init__(self, function: MaskFunction, length: int, device: torch.device) -> None:
        self.function = function
        self.length = length
        self.device = device
        self._starts: Tensor | None = None
        self._blocks: dict[tuple[int, int], Tensor | None] = {}
        self._is_causal: bool | None = None

    def _sees(self, query: Tensor, key: Tensor) -> Tensor:
        zero = torch.zeros((), dtype=torch.int64, device=self.device)
        return self.function(zero, zero, query, key)

    @property
    def starts(self) -> Tensor:
        """bool [tokens], the tokens that do not see the one before them: starts of sequences, and of chunks."""
        if self._starts is None:
            later = torch.arange(1, self.length, device=self.device)
            seen = self._sees(later, later - 1).expand(later.shape)
            self._starts = torch.cat([torch.ones(1, dtype=torch.bool, device=self.device), ~seen])
        return self._starts

    def is_causal(self, lengths: list[int]) -> bool:
        """Whether every token sees its sequence from the first one on: no window or chunk cuts any."""
        if self._is_causal is None:
            sizes = torch.tensor(lengths, device=self.device)
            first = (sizes.cumsum(0) - sizes).repeat_interleave(sizes)
            self._is_causal = bool(self._sees(torch.arange(self.length, device=self.device), first).all())
        return self._is_causal

    def block(self, start: int, length: int) -> Tensor | None:
        """bool [length, length], the mask within one sequence; None if it is plainly causal."""
        if (start, length) not in self._blocks:
            tokens = torch.arange(start, start + length, device=self.device)
            mask = self._sees(tokens[:, None], tokens[None, :]).expand(length, length)
            is_causal = torch.equal(mask, torch.ones_like(mask).tril())
            self._blocks[start, length] = None if is_causal else mask
        return self._blocks[start, length]


def _window_mask(length: int, window: int | None, device: torch.device) -> Tensor | None:
    """bool [length, length] of a causal window; None where the window sees everything."""
    if window is None or length <= window:
        return None
    visible = torch.ones(length, length, dtype=torch.bool, device=device)
    return visible.tril().triu(1 - window)


def _lengths(mask: PackedMask | None, position_ids: Tensor | None) -> list[int]:
    """Lengths of packed sequences: each starts at position 0, or where the mask has a start."""
    parts = [] if mask is None else [mask.starts]
    if position_ids is not None:
        parts.append(position_ids.flatten() == 0)
    starts = torch.nonzero(torch.stack(parts).any(0)).flatten()
    end = torch.tensor([len(parts[0])], device=starts.device)
    return torch.cat([starts, end]).diff().tolist()


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | PackedMask | None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface.

    Sequences of a pack are told apart by the mask, by ``position_ids``, or by both.

    Args:
        module: the attention layer.
        query: [1, heads, tokens, head size]; with a mask of tensors, [rows, ...].
        key, value: the same with the number of key-value heads.
        attention_mask: ``PackedMask`` or None for packed sequences; otherwise bool or float [rows, 1, tokens, tokens].
        kwargs: of transformers: ``position_ids`` int64 [1, tokens], ``sliding_window``, ``softcap``, ``s_aux`` (the
            logit of a sink for each head), ``scaling``, ``dropout``.

    Returns:
        ``([rows, tokens, heads, head size], None)``.

    Raises:
        ValueError: nothing tells where sequences start, or a padded batch, sinks or no positions meet Ulysses.
    """
    ranks = get_ulysses_sequence_parallel_world_size()
    if ranks > 1:
        _check_shared_out(module, attention_mask, kwargs)
    if isinstance(attention_mask, Tensor) or query.shape[0] != 1 or query.shape[2] != key.shape[2]:
        if kwargs.get("softcap") is None and kwargs.get("s_aux") is None:
            return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
        assert not isinstance(attention_mask, PackedMask)
        return _attend(query, key, value, attention_mask, kwargs), None
    mask, position_ids = attention_mask, kwargs.get("position_ids")
    if position_ids is None and mask is None:
        raise ValueError(
            f"attn_implementation={NAME}: {type(module).__name__} passes on neither position_ids nor a mask, which "
            "packed sequences need"
        )
    if ranks > 1:  # all tokens of some heads, in place of some tokens of all heads
        assert position_ids is not None
        mask = None  # of this rank's tokens alone
        if key.shape[1] < ranks:
            key, value = (part.repeat_interleave(ranks // part.shape[1], dim=1) for part in (key, value))
        query, key, value = (gather_seq_scatter_heads(part, seq_dim=2, head_dim=1) for part in (query, key, value))
        parts = [torch.empty_like(position_ids) for _ in range(ranks)]
        torch.distributed.all_gather(parts, position_ids.contiguous(), group=get_ulysses_sequence_parallel_group())
        position_ids = torch.cat(parts, dim=-1)

    lengths = _lengths(mask, position_ids)
    cuts = mask is not None and not mask.is_causal(lengths)
    outputs, start = [], 0
    for q, k, v in zip(*(part.split(lengths, dim=2) for part in (query, key, value)), strict=True):
        length = q.shape[2]
        window = _window_mask(length, kwargs.get("sliding_window"), q.device) if mask is None else None
        block = mask.block(start, length) if mask is not None and cuts else window
        outputs.append(_attend(q, k, v, block, kwargs))
        start += length
    output = torch.cat(outputs, dim=1)
    if ranks > 1:
        output = gather_heads_scatter_seq(output, seq_dim=1, head_dim=2)
    return output, None


def to_itself(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | PackedMask | None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface, each token's own value.

    Raises:
        ValueError: as ``packed_attention`` does under Ulysses.
    """
    _check_shared_out(module, attention_mask, kwargs)
    return repeat_kv(value, query.shape[1] // value.shape[1]).transpose(1, 2), None


def _check_shared_out(module: nn.Module, mask: Tensor | PackedMask | None, kwargs: dict[str, Any]) -> None:
    """Whether ranks with other tokens each can share out the heads of this layer."""
    if isinstance(mask, Tensor):
        raise ValueError(f"{type(module).__name__} has a mask of its rank's tokens, packed rows alone have none")
    if kwargs.get("position_ids") is None:
        raise ValueError(
            f"{type(module).__name__} hands on no position_ids, which would tell sequences apart under Ulysses"
        )
    if kwargs.get("s_aux") is not None:
        raise ValueError(f"{type(module).__name__} has attention sinks, which Ulysses would not share out by heads")


def _attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, kwargs: dict[str, Any]) -> Tensor:
    """Attention of rows, or of one sequence: [rows, tokens, heads, head size]. Without a mask it is causal."""
    if kwargs.get("softcap") is not None or kwargs.get("s_aux") is not None:
        return _attend_by_scores(query, key, value, mask, kwargs).transpose(1, 2)
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


def _attend_by_scores(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, kwargs: dict[str, Any]) -> Tensor:
    """Attention with a soft cap on its scores, or a sink that takes a share of each softmax, which sdpa has not."""
    groups = query.shape[1] // key.shape[1]
    key, value = repeat_kv(key, groups), repeat_kv(value, groups)
    scale, cap, sinks = kwargs.get("scaling") or query.shape[-1] ** -0.5, kwargs.get("softcap"), kwargs.get("s_aux")
    scores = query @ key.transpose(2, 3) * scale
    if cap is not None:
        scores = torch.tanh(scores / cap) * cap
    if mask is None:
        mask = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device).tril()
    # Finite, since a token of the padding may see nothing: its softmax must not spoil gradients.
    scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min) if mask.dtype == torch.bool else scores + mask
    total = scores.float().logsumexp(-1, keepdim=True)
    if sinks is not None:
        total = torch.logaddexp(total, sinks.float().reshape(1, -1, 1, 1))
    weights = (scores.float() - total).exp().to(value.dtype)
    return nn.functional.dropout(weights, kwargs.get("dropout", 0.0)) @ value


def packed_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    mask_function: MaskFunction,
    attention_mask: Tensor | None = None,
    device: torch.device | str = "cpu",
    **kwargs: Any,
) -> Tensor | PackedMask | None:
    """transformers' mask interface: a ``PackedMask`` for a packed row, sdpa's mask for a padded batch."""
    if attention_mask is None and batch_size == 1 and q_length == kv_length and not kwargs.get("use_vmap", False):
        return PackedMask(mask_function, q_length, torch.device(device))
    kwargs |= {"mask_function": mask_function, "attention_mask": attention_mask, "device": device}
    kwargs["allow_is_causal_skip"] = False  # a soft cap's scores need it
    return sdpa_mask(batch_size=batch_size, q_length=q_length, kv_length=kv_length, **kwargs)


def _mask_as_flash(*args: Any, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor | None:
    return None if attention_mask is None else sdpa_mask(*args, attention_mask=attention_mask, **kwargs)


def _loads_anywhere(original: Callable[..., Any]) -> Callable[..., Any]:
    """verl writes the attention's name into saved configurations, which would then need this package to load."""

    def to_dict(self: PretrainedConfig) -> dict[str, Any]:
        config = original(self)
        if config.get("attn_implementation") in (NAME, FORMER_NAME):
            del config["attn_implementation"]
        return config

    return to_dict


for _name, _attention, _mask in (
    (NAME, packed_attention, packed_mask),
    (FORMER_NAME, packed_attention, packed_mask),
    (AS_FLASH, packed_attention, _mask_as_flash),
    (NO_ATTENTION, to_itself, packed_mask),
):
    ALL_ATTENTION_FUNCTIONS.register(_name, _attention)
    ALL_MASK_ATTENTION_FUNCTIONS.register(_name, _mask)
replace(PretrainedConfig, "to_dict", _loads_anywhere)
