"""Student sampling and log-probs of chosen tokens, from logits, chunk by chunk over tokens.

A draw is a pure function of (seed, step, row, position): one counter-based uniform a token and an inverse-CDF search.
How a batch is split into micro-batches, packed, sharded over ranks or resumed does not change it.
Nothing of size [tokens, vocab] is allocated in float32 beyond one chunk of tokens, except the gradient of the logits,
which has the logits' dtype.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_MASK_64 = (1 << 64) - 1
_CHUNK_SIZE = 1024  # tokens per chunk, where no size is given
BLOCK = 256  # vocabulary entries per block of the two-level inverse-CDF search


def _signed(value: int) -> int:
    """The int64 with the low 64 bits of ``value``."""
    value &= _MASK_64
    return value - (1 << 64) if value >> 63 else value


def _shift_right(value: Tensor, bits: int) -> Tensor:
    """Logical right shift of int64 (torch's is arithmetic)."""
    return (value >> bits) & ((1 << (64 - bits)) - 1)


def _mix(value: Tensor) -> Tensor:
    """The finaliser of SplitMix64: a bijection of int64 in which every input bit affects every output bit."""
    value = (value ^ _shift_right(value, 30)) * _signed(0xBF58476D1CE4E5B9)
    value = (value ^ _shift_right(value, 27)) * _signed(0x94D049BB133111EB)
    return value ^ _shift_right(value, 31)


def counter_uniform(seed: int, step: int, row: Tensor, position: Tensor) -> Tensor:
    """One uniform number a token, a pure function of its counters.

    Args:
        seed: seed of the run.
        step: training step.
        row: int64 [n], the row of the batch each token belongs to.
        position: int64 [n], the token's position in its row.

    Returns:
        float64 [n] in [0, 1), on the device of ``row``.
    """
    state = torch.zeros_like(row)
    for counter in (seed, step, 0, row, position):
        if isinstance(counter, int):
            counter = torch.full_like(row, _signed(counter))
        state = _mix(state + counter + _signed(0x9E3779B97F4A7C15))
    return _shift_right(state, 11).to(torch.float64) * 2.0**-53


def _chunks(logits: Tensor, chunk_size: int | None) -> Iterator[tuple[slice, Tensor]]:
    """Slices of rows with their logits in float32 (float64 stays float64)."""
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    size = chunk_size or _CHUNK_SIZE
    for start in range(0, logits.shape[0], size):
        rows = slice(start, start + size)
        yield rows, logits[rows].to(dtype)


def blocks(values: Tensor, size: int = BLOCK) -> list[Tensor]:
    """The vocabulary's blocks of values [n, V]: a view of [n, blocks, size], and of a shorter last block."""
    whole = values.shape[1] // size * size
    views = [values[:, :whole].unflatten(1, (-1, size))] if whole else []
    return views + [values[:, whole:].unsqueeze(1)] * (whole < values.shape[1])


def block_masses(values: Tensor) -> Tensor:
    """Sums of non-negative values over blocks of the vocabulary, the last of which may be shorter.

    Args:
        values: floating [n, V].

    Returns:
        [n, blocks], of the values' dtype.
    """
    return torch.cat([block.sum(-1) for block in blocks(values)], 1)


@dataclass(frozen=True)
class BlockDraws:
    """Draws narrowed down to a block of the vocabulary, for n rows with K draws each."""

    block: Tensor
    """int64 [n, K]."""
    target: Tensor
    """float64 [n, K]: the cumulative mass to exceed inside the block."""
    masses: Tensor
    """floating [n, K, block size]: masses of the block's tokens, 0 beyond the vocabulary."""


def draw_blocks(masses: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
    """First level of an inverse-CDF draw: the block in which the cumulative mass exceeds the target.

    Args:
        masses: floating [n, blocks], of ``block_masses``; each row with positive mass, of any sum.
        uniforms: float64 [n, K] in [0, 1), K >= 1.

    Returns:
        ``(block int64 [n, K], target float64 [n, K])``, see ``BlockDraws``.
    """
    cumulative = masses.cumsum(-1, dtype=torch.float64)
    target = uniforms * cumulative[:, -1:]
    block = torch.searchsorted(cumulative, target, right=True).clamp_max_(masses.shape[1] - 1)
    return block, target - F.pad(cumulative, (1, 0)).gather(1, block)


def block_tokens(block: Tensor, vocabulary_size: int) -> tuple[Tensor, Tensor]:
    """The tokens of blocks [n, K].

    Returns:
        ``(tokens, beyond)``, [n, K, block size] each: int64, within the vocabulary, and bool, True where the block
        reaches beyond it.
    """
    tokens = (block * BLOCK).unsqueeze(2) + torch.arange(BLOCK, device=block.device)
    return tokens.clamp_max(vocabulary_size - 1), tokens >= vocabulary_size


def draw_tokens(draws: BlockDraws, vocabulary_size: int) -> tuple[Tensor, Tensor]:
    """Second level: the first token of the block whose cumulative mass exceeds the target.

    Returns:
        ``(tokens, masses)``, int64 [n, K] and the tokens' masses.
    """
    within = draws.masses.cumsum(-1, dtype=torch.float64)
    # The two sums of a block may differ in the last bit: a target at its very end belongs to its last token with mass.
    target = draws.target.unsqueeze(2)
    target = torch.minimum(target, torch.nextafter(within[..., -1:], torch.zeros_like(target)))
    offset = torch.searchsorted(within, target, right=True).squeeze(2)
    first = draws.block * BLOCK
    tokens = (first + offset).clamp_max_(vocabulary_size - 1)
    # Only a row of NaN reaches the bounds.
    offset = (tokens - first).clamp_max_(BLOCK - 1)
    return tokens, draws.masses.gather(2, offset.unsqueeze(2)).squeeze(2)


def sample_from(probs: Tensor, uniform: Tensor) -> Tensor:
    """Inverse-CDF draw from each row of ``probs``: block sums first, then inside one block.

    Args:
        probs: floating [n, V], non-negative, each row with positive mass (need not sum to exactly 1).
        uniform: float64 [n] in [0, 1).

    Returns:
        int64 [n]: the first token whose cumulative mass exceeds ``uniform`` times the row's mass; any token where the
        row holds a NaN.
    """
    block, target = draw_blocks(block_masses(probs), uniform.unsqueeze(1))
    tokens, beyond = block_tokens(block, probs.shape[1])
    inside = probs.gather(1, tokens.flatten(1)).view_as(tokens).masked_fill_(beyond, 0.0)
    return draw_tokens(BlockDraws(block, target, inside), probs.shape[1])[0].squeeze(1)


@torch.no_grad()
def sample_tokens(
    logits: Tensor, labels: Tensor, uniforms: Tensor, chunk_size: int | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Draw a token from the student and take the log-probs needed of it, in one sweep.

    Args:
        logits: floating [n, V].
        labels: int64 [n].
        uniforms: float64 [n].
        chunk_size: tokens per chunk; changes memory, not the result.

    Returns:
        ``(label_log_probs, sampled, sampled_log_probs, entropy)``, float32
        (float64 for float64 logits).
    """
    outputs = []
    for rows, chunk in _chunks(logits, chunk_size):
        log_probs = torch.log_softmax(chunk, dim=-1)
        probs = log_probs.exp()
        sampled = sample_from(probs, uniforms[rows])
        entropy = -torch.where(probs > 0, probs * log_probs, 0.0).sum(-1)
        label, drawn = log_probs.gather(1, torch.stack([labels[rows], sampled], 1)).unbind(1)
        outputs.append((label, sampled, drawn, entropy))
    label_log_probs, sampled, sampled_log_probs, entropy = (torch.cat(parts) for parts in zip(*outputs, strict=True))
    return label_log_probs, sampled, sampled_log_probs, entropy


class _TokenLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, tokens: Tensor, chunk_size: int | None) -> Tensor:
        log_sum_exp = torch.cat([chunk.logsumexp(-1) for _, chunk in _chunks(logits, chunk_size)])
        ctx.save_for_backward(logits, tokens, log_sum_exp)
        ctx.chunk_size = chunk_size
        return logits.gather(1, tokens).to(log_sum_exp.dtype) - log_sum_exp.unsqueeze(1)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None]:
        logits, tokens, log_sum_exp = ctx.saved_tensors
        (grad_output,) = grad_outputs
        grad = torch.empty_like(logits)
        for rows, chunk in _chunks(logits, ctx.chunk_size):
            weights = grad_output[rows]
            chunk_grad = (chunk - log_sum_exp[rows].unsqueeze(1)).exp_().mul_(-weights.sum(-1, keepdim=True))
            grad[rows] = chunk_grad.scatter_add_(1, tokens[rows], weights.to(chunk_grad.dtype))
        return grad, None, None


def token_log_probs(logits: Tensor, tokens: Tensor, chunk_size: int | None = None) -> Tensor:
    """``log_softmax(logits).gather(1, tokens)`` without the [n, V] log-probs, differentiable in the logits.

    Args:
        logits: floating [n, V].
        tokens: int64 [n, M].
        chunk_size: tokens per chunk; changes memory, not the result.

    Returns:
        float32 [n, M] (float64 for float64 logits).
    """
    return _TokenLogProbs.apply(logits, tokens, chunk_size)
