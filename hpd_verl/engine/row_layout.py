"""Packed or padded rows, and the attention under which rows of a micro-batch do not affect each other."""

import functools
import importlib.util
import itertools
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig
from verl.utils.device import get_device_name

from hpd_verl.engine import attention
from hpd_verl.engine.replica import Replica, rope_switch

LENGTHS = (9, 150, 6, 70)
"""Tokens of the rows that a replica is tried with: above its windows and chunks, and not their multiples."""

TOLERANCE = 3e-4
"""Relative difference of a token's logits. Right ones differ by rounding (Gemma 4, of which 30 layers are tried, by
1.5e-4), wrong ones by 2e-2 and more."""

FLASH = "flash_attention_2"

_WITHOUT_EFFECT = {"attn_implementation", "bos_token_id", "eos_token_id", "pad_token_id"}
"""Settings of a configuration that do not affect a model's computation."""


@dataclass(frozen=True)
class RowLayout:
    """The attention, and whether a micro-batch's rows share one sequence."""

    attention: str
    packed: bool

    def __str__(self) -> str:
        return f"{self.attention} on {'packed' if self.packed else 'padded'} rows"


@dataclass(frozen=True)
class Tried:
    """Results of the layouts tried on a model."""

    right: RowLayout | None
    """The first that computes each row as it is alone."""
    wrong: dict[RowLayout, str]
    """The layouts before it, and their errors."""


def layouts(attentions: Sequence[str], packing: bool | None) -> Iterator[RowLayout]:
    """Layouts to try, the fastest first.

    Args:
        attentions: to choose from, the fastest first.
        packing: whether rows share a sequence; None where either is fine.
    """
    # Eager attention on packed rows holds scores of [heads, tokens, tokens]: on padded ones, of each row alone.
    late = "eager" if attentions[0] != "eager" else ""
    if packing is not False:
        yield from (RowLayout(name, True) for name in attentions if name != late)
    if packing is not True:
        yield from (RowLayout(name, False) for name in attentions)
    if packing is not False:
        yield from (RowLayout(name, True) for name in attentions if name == late)


def default_attentions(shares_sequences_out: bool) -> list[str]:
    """Attentions to choose from where none is set, the fastest first.

    Args:
        shares_sequences_out: Ulysses sequence parallelism, which flash attention and ``packed_attention`` know.
    """
    flash = [FLASH] if get_device_name() != "cpu" and importlib.util.find_spec("flash_attn") else []
    return [*flash, attention.NAME, *([] if shares_sequences_out else ["sdpa", "eager"])]


def try_layouts(
    config: PretrainedConfig,
    candidates: Sequence[RowLayout],
    longest_row: int,
    rows_share: bool = True,
    shares_sequences_out: bool = False,
    trust_remote_code: bool = False,
) -> Tried:
    """Find the first layout by which a replica of a model computes each row as it does alone by eager attention.

    Args:
        config: the model's.
        candidates: layouts, the preferred first.
        longest_row: tokens.
        rows_share: a micro-batch may hold more than one row.
        shares_sequences_out: Ulysses sequence parallelism.
        trust_remote_code: the model's code comes with it.

    Raises:
        Exception: transformers cannot make a model of this configuration, or run it.
        MemoryError: a replica of this model would be large too.
    """
    asked = (longest_row, rows_share, shares_sequences_out, trust_remote_code)
    return _try_layouts(_Key(config), tuple(candidates), *asked)


class _Key:
    """A configuration that is the same as another of the same content."""

    def __init__(self, config: PretrainedConfig) -> None:
        self.config = config
        content = {name: value for name, value in config.to_dict().items() if name not in _WITHOUT_EFFECT}
        self.text = type(config).__name__ + json.dumps(content, sort_keys=True, default=str)

    def __hash__(self) -> int:
        return hash(self.text)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Key) and self.text == other.text


@functools.cache
def _try_layouts(
    key: _Key,
    candidates: tuple[RowLayout, ...],
    longest_row: int,
    rows_share: bool,
    shares_sequences_out: bool,
    trust_remote_code: bool,
) -> Tried:
    replica = Replica(key.config, longest_row, trust_remote_code)
    # Rows on either side of a rope's switch never share a micro-batch.
    longest = min(longest_row, rope_switch(key.config) or longest_row)
    lengths = [min(length, longest) for length in LENGTHS]
    draws = [trial_rows(lengths, replica.config.vocab_size, seed) for seed in (0, 1)]
    expected = [_alone(replica.model("eager"), rows) for rows in draws]
    wrong: dict[RowLayout, str] = {}
    for layout in candidates:
        name = layout.attention
        if layout.packed and (name.startswith("flash") or shares_sequences_out):
            name = attention.AS_FLASH  # a CPU has no kernel of it; this one is told the same
        try:
            model = replica.model(name)
            if layout.attention.startswith("flash") and not model._supports_flash_attn:
                raise ValueError(f"{type(model).__name__} has no flash attention")
            off = 0.0
            for rows, right in zip(draws, expected, strict=True):
                found = _together(model, rows, layout.packed) if rows_share else _alone(model, rows)
                off = max(off, _distance(found, right))
                if off > TOLERANCE:
                    break
        except Exception as error:  # whatever a model file or an attention raises at what it does not take
            wrong[layout] = f"{type(error).__name__}: {' '.join(str(error).split())}"
            continue
        if off > TOLERANCE:
            wrong[layout] = f"logits are off by {off:.1g}"
        elif shares_sequences_out and (why := _not_in_parts(replica, draws[0])):
            wrong[layout] = why
        else:
            return Tried(layout, wrong)
    return Tried(None, wrong)


def _not_in_parts(replica: Replica, rows: Sequence[Tensor]) -> str | None:
    """Why ranks with a part of a pack each do not compute what one rank does; None where they do.

    Ulysses gathers tokens for attention alone. So, with attention to itself only, a part must be what it is in the
    whole.
    """
    try:
        model = replica.model(attention.NO_ATTENTION)
        inputs, _ = packed_inputs(rows)
        tokens = sum(map(len, rows))
        cuts = [0, tokens // 2, tokens]  # within a row
        whole, *parts = (
            _logits(model, {name: value if value is None else value[:, start:stop] for name, value in inputs.items()})
            for start, stop in ((0, tokens), *itertools.pairwise(cuts))
        )
    except Exception as error:  # as above
        return f"{type(error).__name__}: {' '.join(str(error).split())}"
    off = _distance(torch.cat(parts, dim=1), whole)
    if off <= TOLERANCE:
        return None
    return f"its layers mix tokens outside attention, which is all that Ulysses gathers (logits are off by {off:.1g})"


def trial_rows(lengths: Sequence[int], vocabulary_size: int, seed: int) -> list[Tensor]:
    """Rows int64 [tokens], of tokens at random."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(vocabulary_size, (length,), generator=generator) for length in lengths]


def packed_inputs(rows: Sequence[Tensor]) -> tuple[dict[str, Tensor | None], Tensor]:
    """Rows in one sequence, as verl's engine packs them.

    Returns:
        The model's inputs, and bool [1, tokens], which of them are the rows'.
    """
    ids = torch.cat(list(rows))[None]
    positions = torch.cat([torch.arange(len(row)) for row in rows])[None]
    inputs = {"input_ids": ids, "attention_mask": None, "position_ids": positions}
    return inputs, torch.ones_like(ids, dtype=torch.bool)


def padded_inputs(rows: Sequence[Tensor]) -> tuple[dict[str, Tensor | None], Tensor]:
    """Rows in a batch, as verl's engine pads them.

    Returns:
        The model's inputs, and bool [rows, tokens], which of them are the rows'.
    """

    def pad(parts: Sequence[Tensor]) -> Tensor:
        return torch.nn.utils.rnn.pad_sequence(list(parts), batch_first=True)

    mask = pad([torch.ones_like(row) for row in rows])
    positions = pad([torch.arange(len(row)) for row in rows])
    return {"input_ids": pad(rows), "attention_mask": mask, "position_ids": positions}, mask.bool()


def _together(model: nn.Module, rows: Sequence[Tensor], packed: bool) -> Tensor:
    """Logits [tokens, vocabulary] of rows in one micro-batch."""
    inputs, is_token = (packed_inputs if packed else padded_inputs)(rows)
    return _logits(model, inputs)[is_token]


@torch.no_grad()
def _logits(model: nn.Module, inputs: dict[str, Tensor | None]) -> Tensor:
    """[rows, tokens, vocabulary]."""
    found: Tensor = model(**inputs, use_cache=False).logits
    return found


def _alone(model: nn.Module, rows: Sequence[Tensor]) -> Tensor:
    """The same of each row by itself."""
    return torch.cat([_together(model, [row], packed=True) for row in rows])


def _distance(found: Tensor, expected: Tensor) -> float:
    """The largest difference of a token's logits, relative to their norm; infinity if they are not finite."""
    off = ((found - expected).norm(dim=-1) / expected.norm(dim=-1)).max().item()
    return off if math.isfinite(off) else math.inf
