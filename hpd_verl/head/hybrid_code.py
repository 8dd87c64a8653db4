"""A token of the teacher in a tenth of the bytes: a coarse hidden state, and what it gets wrong of the likely tokens.

The coarse state c gives the shape of the distribution, log p(v) = logit_c(v) - shift, with the shift that gives all
tokens outside the K most likely ones their exact mass together. The K have a residual each on top, in 8 bits; together
they too have their exact mass. A token's bytes, in this order:

    codes        ``bits`` for each value of the rotated state, 8 values together, padded with zeros to blocks of 64
    scales       a byte for each block of 64: its step is 2^(exponent - byte / 16)
    exponent     a byte, plus 128
    low, step    float32 and bfloat16: residual = low + step * byte
    residuals    K bytes
    tokens       the K tokens' numbers: whole bytes first, then the bits left over, of 8 tokens together

The state is rotated in blocks of 64 by a Hadamard matrix with fixed random signs, which spreads outliers. 8 values
together are a point of the lattice E8, which is 8% finer than the integers' for the same bits: all integers of an even
sum, or all of them a half more. Nearest in what it does to logits: with G the covariance of the output layer's rows
(one over the vocabulary, so that no data is needed and equal states have equal bytes), the error e costs e G e'. Eight
values are rounded at a time, the last first, and the values before them take up the error (nearest plane of Babai, as
GPTQ rounds weights). ``benchmarks/store_forms.py`` compares this with other forms.
"""

import hashlib
import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from hpd_verl.head.output_head import OutputHead, Products, chunks, default_chunk_size, steps, take

BLOCK = 64
"""Values with one scale, rotated together."""
BITS = 4
"""Of a value."""
GROUP = 8
"""Values rounded together: the dimension of the lattice."""
_SCALE_STEPS = 16  # of the scales in an octave
_DAMPING = 1e-3  # of the metric, in its mean: directions that no logit depends on
_OUTER = 4  # blocks whose errors reach the values before them in one product


@dataclass(frozen=True)
class EncodedTokens:
    """n tokens."""

    packed: Tensor
    """uint8 [n, bytes]."""
    shift: Tensor
    """[n], of the output layer's ``dtype``; NaN where the state or a logit is NaN or infinite."""
    label_log_probs: Tensor
    """log p(y), [n], of the same dtype, exact; NaN likewise."""


@dataclass(frozen=True)
class DecodedTokens:
    """What n tokens' bytes say."""

    hidden: Tensor
    """[n, d], the coarse states, in the dtype of the output layer's weight."""
    top_tokens: Tensor
    """int64 [n, K]."""
    residuals: Tensor
    """[n, K]: what is added to the K tokens' log-probs by the coarse state."""


class HybridCode:
    """Encodes and decodes the tokens of one teacher.

    Args:
        head: the teacher's output layer.
        temperature: of its distribution.
        top_k: K, tokens with a residual each; at most the vocabulary.
        bits: of a value of the state, 2 to 7.
    """

    def __init__(self, head: OutputHead, temperature: float, top_k: int, bits: int = BITS) -> None:
        assert 2 <= bits <= 7, "8 values are packed through one int64"
        assert top_k >= 1
        self.head = head
        self.temperature = temperature
        self.bits = bits
        self.top_k = min(top_k, head.vocabulary_size)
        self.hidden_size = head.weight.shape[1]
        self.blocks = math.ceil(self.hidden_size / BLOCK)
        self.width = self.blocks * BLOCK
        self.index_bits = (head.vocabulary_size - 1).bit_length()

    @property
    def token_bytes(self) -> int:
        """Bytes of a token."""
        return token_bytes(self.hidden_size, self.head.vocabulary_size, self.top_k, self.bits)

    # Encoding

    @torch.no_grad()
    def encode(self, hidden: Tensor, labels: Tensor, chunk_size: int | None = None) -> EncodedTokens:
        """Encode tokens: two products with the output layer, and width^2 multiplications a token to round the state.

        Args:
            hidden: floating [n, d], the input of the output layer.
            labels: int64 [n], tokens that the teacher has.
            chunk_size: tokens whose logits exist at once; memory only. None chooses by the device.
        """
        head, device = self.head, hidden.device
        packed = torch.empty(len(hidden), self.token_bytes, dtype=torch.uint8, device=device)
        shift = torch.empty(len(hidden), dtype=head.dtype, device=device)
        label_log_probs = torch.empty_like(shift)
        chunk_size = default_chunk_size(chunk_size, device)
        exact = Products(hidden, head, chunk_size)
        for chunk in chunks(len(hidden), chunk_size):
            matrix = exact[chunk]
            state, coarse = self._encode_states(hidden[chunk])
            packed[chunk, : state.shape[1]] = state
            by_coarse = coarse @ head.used_weight.T
            for rows in steps(matrix):
                tokens = slice(chunk.start + rows.start, chunk.start + rows.stop)
                log_probs = torch.log_softmax(head.logits(matrix[rows], self.temperature), -1)
                label_log_probs[tokens] = take(log_probs, labels[tokens])
                shift[tokens], top = self._encode_top(log_probs, head.logits(by_coarse[rows], self.temperature))
                packed[tokens, state.shape[1] :] = top
        whole = hidden.isfinite().all(-1) & ~label_log_probs.isnan()
        return EncodedTokens(packed, torch.where(whole, shift, math.nan), torch.where(whole, label_log_probs, math.nan))

    def _encode_states(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Bytes [n, ...] of states [n, d], and the coarse states in the dtype of the weight."""
        dtype = self.head.dtype
        rotated = self._rotate(hidden.to(dtype).nan_to_num(0.0, 0.0, 0.0))
        largest = rotated.view(-1, self.blocks, BLOCK).abs().amax(-1) / 2 ** (self.bits - 1)
        exponent = torch.frexp(largest.amax(-1, keepdim=True)).exponent.clamp(-100, 127)
        finer = ((exponent - largest.log2()) * _SCALE_STEPS).floor().clamp(0, 255)
        stored = (finer.to(torch.uint8), (exponent + 128).to(torch.uint8))
        scales = self._scales(*stored)
        levels = self._nearest_plane(rotated, scales.repeat_interleave(BLOCK, 1))
        coarse = self._state(levels, scales).to(self.head.weight.dtype)
        return torch.cat([self._pack_levels(levels), *stored], 1), coarse

    def _encode_top(self, log_probs: Tensor, by_coarse: Tensor) -> tuple[Tensor, Tensor]:
        """Shift [n] and bytes [n, ...] of log-probs and the coarse states' logits, [n, V] each."""
        exact, tokens = log_probs.topk(self.top_k, -1)
        of_tokens = by_coarse.gather(1, tokens)
        # In the logarithm: what remains of 1 would cancel where the K tokens hold nearly everything.
        others = _of_others(log_probs, tokens)
        shift = torch.where(others == -math.inf, by_coarse.logsumexp(-1), _of_others(by_coarse, tokens) - others)
        of_tokens = of_tokens - shift.unsqueeze(1)
        # A bias of -inf makes a token impossible in both.
        low, step, residuals = _in_8_bits(torch.where(exact == -math.inf, 0.0, exact - of_tokens))
        found = (of_tokens + low + step * residuals).logsumexp(-1, keepdim=True)
        low = low + (exact.logsumexp(-1, keepdim=True) - found)
        whole, left = divmod(self.index_bits, 8)
        parts = [
            low.float().view(torch.uint8),
            step.bfloat16().view(torch.uint8),
            residuals.nan_to_num().to(torch.uint8),
            *((tokens >> (8 * byte) & 255).to(torch.uint8) for byte in range(whole)),
            _pack(tokens >> (8 * whole), left),
        ]
        return shift, torch.cat(parts, 1)

    def _scales(self, finer: Tensor, exponent: Tensor) -> Tensor:
        """[n, blocks]"""
        dtype = self.head.dtype
        return torch.exp2(exponent.to(dtype) - 128 - finer.to(dtype) / _SCALE_STEPS)

    def _nearest_plane(self, states: Tensor, scales: Tensor) -> Tensor:
        """Levels of rotated states, [n, width]."""
        coupling = self._coupling
        levels, errors = torch.empty_like(states), torch.zeros_like(states)
        for stop in range(self.width, 0, -_OUTER * BLOCK):
            start = max(0, stop - _OUTER * BLOCK)
            inside = states[:, start:stop] + errors[:, stop:] @ coupling[start:stop, stop:].T
            for first in range(stop - GROUP, start - 1, -GROUP):
                group = slice(first, first + GROUP)
                step = scales[:, first : first + 1]
                levels[:, group] = self._nearest(inside[:, first - start : first - start + GROUP] / step)
                error = states[:, group] - levels[:, group] * step
                errors[:, group] = error
                inside[:, : first - start].addmm_(error, coupling[start:first, group].T)
        return levels

    def _nearest(self, values: Tensor) -> Tensor:
        """Levels of a group, [n, 8], in steps."""
        return nearest_e8(values, self.bits)

    @cached_property
    def _coupling(self) -> Tensor:
        """By how much a group's values move for an error of the values after them: [width, width].

        With G = R' R, R upper triangular, e G e' is the sum of |R_gg (e_g + R_gg^-1 R_g,after e_after)|^2 over groups.

        Raises:
            ValueError: the weight holds NaN or infinity.
        """
        metric, width = self._metric(), self.width
        if not metric.isfinite().all():
            raise ValueError("the teacher's output layer holds NaN or infinity")
        damping = _DAMPING * metric.diagonal().mean()
        metric.diagonal().add_(damping if damping > 0 else 1.0)
        upper = torch.linalg.cholesky(metric, upper=True)
        groups = upper.view(width // GROUP, GROUP, width)
        own = groups.unflatten(2, (-1, GROUP)).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
        return torch.linalg.solve_triangular(own, groups, upper=True).reshape(width, width).to(self.head.dtype)

    def _metric(self) -> Tensor:
        """G, float64 [width, width], of rotated states."""
        weight, width = self.head.used_weight.detach(), self.width
        second = weight.new_zeros(width, width, dtype=torch.float64)
        mean = weight.new_zeros(width, dtype=torch.float64)
        for rows in chunks(len(weight), 1 << 14):
            rotated = self._rotate(weight[rows].to(self.head.dtype))
            second += rotated.T @ rotated
            mean += rotated.sum(0, dtype=torch.float64)
        return second / len(weight) - torch.outer(mean, mean) / len(weight) ** 2

    # Decoding

    def decode(self, packed: Tensor) -> DecodedTokens:
        """Decode uint8 [n, bytes].

        Raises:
            ValueError: a token has another number of bytes.
        """
        if packed.shape[1] != self.token_bytes:
            raise ValueError(f"a token of this code has {self.token_bytes} bytes, not {packed.shape[1]}")
        whole, left = divmod(self.index_bits, 8)
        sizes = [self.width * self.bits // 8, self.blocks, 1, 4, 2, *[self.top_k] * (1 + whole)]
        codes, finer, exponent, low, step, residuals, *low_bytes, high = packed.split(
            [*sizes, packed.shape[1] - sum(sizes)], 1
        )
        hidden = self._state(self._unpack_levels(codes), self._scales(finer, exponent))
        tokens = _unpack(high, left, self.top_k) << (8 * whole)
        for byte, values in enumerate(low_bytes):
            tokens += values.long() << (8 * byte)
        dtype = self.head.dtype
        # Copies, which are aligned.
        low, step = (each.clone(memory_format=torch.contiguous_format) for each in (low, step))
        low, step = low.view(torch.float32), step.view(torch.bfloat16)
        return DecodedTokens(
            hidden.to(self.head.weight.dtype), tokens, low.to(dtype) + step.to(dtype) * residuals.to(dtype)
        )

    def _state(self, levels: Tensor, scales: Tensor) -> Tensor:
        """The coarse states [n, d] of levels [n, width] and scales [n, blocks]."""
        scaled = levels.view(len(levels), self.blocks, BLOCK) * scales.unsqueeze(2)
        return (scaled @ self._hadamard.T).flatten(1)[:, : self.hidden_size] * self._signs[: self.hidden_size]

    def _rotate(self, states: Tensor) -> Tensor:
        """[n, width] from [n, d]."""
        signed = states * self._signs[: self.hidden_size]
        padded = torch.nn.functional.pad(signed, (0, self.width - self.hidden_size))
        return (padded.view(len(padded), self.blocks, BLOCK) @ self._hadamard).flatten(1)

    @cached_property
    def _hadamard(self) -> Tensor:
        matrix = torch.ones(1, 1, dtype=self.head.dtype)
        for _ in range(BLOCK.bit_length() - 1):
            matrix = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=matrix.dtype), matrix)
        return (matrix / math.sqrt(BLOCK)).to(self.head.weight.device)

    @cached_property
    def _signs(self) -> Tensor:
        """1 or -1, [width]; part of the code, so made of a hash and not of a generator of torch's."""
        blocks = [hashlib.sha256(f"sign {block}".encode()).digest()[: BLOCK // 8] for block in range(self.blocks)]
        bits = [byte >> bit & 1 for byte in b"".join(blocks) for bit in range(8)]
        return torch.tensor(bits, dtype=self.head.dtype, device=self.head.weight.device).mul_(-2).add_(1)

    def _pack_levels(self, levels: Tensor) -> Tensor:
        """Bytes [n, width * bits / 8]. The last of 8 has an even sum to make and so a bit to spare, for the half."""
        groups = levels.unflatten(1, (-1, GROUP))
        whole = groups.floor()
        codes = whole.long() + 2 ** (self.bits - 1)
        codes[:, :, -1] = (codes[:, :, -1] & ~1) | (groups[:, :, 0] != whole[:, :, 0])
        return _pack(codes.flatten(1), self.bits)

    def _unpack_levels(self, packed: Tensor) -> Tensor:
        codes = _unpack(packed, self.bits, self.width).unflatten(1, (-1, GROUP))
        half = codes[:, :, -1:] & 1
        odd = codes[:, :, :-1].sum(-1, keepdim=True) & 1
        codes = torch.cat([codes[:, :, :-1], (codes[:, :, -1:] & ~1) | odd], 2)
        levels = (codes - 2 ** (self.bits - 1)).to(self.head.dtype) + 0.5 * half
        return levels.flatten(1)


def token_bytes(hidden_size: int, vocabulary_size: int, top_k: int, bits: int = BITS) -> int:
    """Bytes of an encoded token.

    Args:
        hidden_size: d.
        vocabulary_size: the tokens' numbers are below it.
        top_k: tokens with a residual.
        bits: of a value of the state.
    """
    top_k = min(top_k, vocabulary_size)
    blocks = math.ceil(hidden_size / BLOCK)
    whole, left = divmod((vocabulary_size - 1).bit_length(), 8)
    return blocks * BLOCK * bits // 8 + blocks + 1 + 4 + 2 + top_k * (1 + whole) + math.ceil(top_k / 8) * left


def nearest_e8(values: Tensor, bits: int) -> Tensor:
    """The nearest point of E8 within the box of ``bits``, floating [n, 8] of [n, 8].

    The box holds the integers from -2^(bits - 1) to 2^(bits - 1) - 1, and each of them a half more.
    """
    whole = _nearest_even(values, bits)
    halves = _nearest_even(values - 0.5, bits) + 0.5
    is_whole = (values - whole).square().sum(-1) <= (values - halves).square().sum(-1)
    return torch.where(is_whole.unsqueeze(1), whole, halves)


def _nearest_even(values: Tensor, bits: int) -> Tensor:
    """The nearest integers within the box whose sum is even: where it is odd, one moves that lies nearest to another.

    At the edge of the box there is one way to move only, so that for values outside it may not be the very nearest.
    """
    lowest, highest = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    nearest = values.round().clamp_(lowest, highest)
    over = values - nearest
    move = torch.where(over < 0, -1.0, 1.0)
    moved = nearest + move
    move = torch.where(moved > highest, -1.0, torch.where(moved < lowest, 1.0, move))
    # |over - move|^2 - |over|^2 is 1 - 2 move over.
    chosen = (move * over).argmax(-1, keepdim=True)
    odd = (nearest.sum(-1, keepdim=True) % 2) != 0
    return torch.where(odd, nearest.scatter_add(1, chosen, move.gather(1, chosen).to(nearest.dtype)), nearest)


def _of_others(values: Tensor, tokens: Tensor) -> Tensor:
    """Log-sum-exp [n] of [n, V] over all but the tokens [n, K]."""
    return values.scatter(1, tokens, -math.inf).logsumexp(-1)


def _in_8_bits(values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``(low, step, numbers)`` such that low + step * number, 0 to 255, are the values, [n, K], within half a step."""
    low, high = values.amin(-1, keepdim=True), values.amax(-1, keepdim=True)
    # Rounded up, so that 255 steps reach the highest value.
    step = ((high - low) / 255 * (1 + 2**-7)).bfloat16().to(values.dtype)
    step = torch.where(step > 0, step, 1.0)
    return low, step, ((values - low) / step).round().clamp_(0, 255)


def _pack(numbers: Tensor, width: int) -> Tensor:
    """Bytes [n, ceil(M / 8) * width] of int64 [n, M] below 2^width, width at most 7, the lowest bits first."""
    numbers = torch.nn.functional.pad(numbers, (0, -numbers.shape[1] % 8)).unflatten(1, (-1, 8))
    places = torch.arange(8, device=numbers.device)
    words = (numbers << (places * width)).sum(-1, keepdim=True)
    return (words >> (places[:width] * 8) & 255).to(torch.uint8).flatten(1)


def _unpack(packed: Tensor, width: int, count: int) -> Tensor:
    """The first ``count`` numbers, int64 [n, count]."""
    if width == 0:
        return torch.zeros(len(packed), count, dtype=torch.int64, device=packed.device)
    places = torch.arange(8, device=packed.device)
    groups = packed.reshape(len(packed), packed.shape[1] // width, width).long()
    words = (groups << (places[:width] * 8)).sum(-1, keepdim=True)
    return ((words >> (places * width)) & (2**width - 1)).flatten(1)[:, :count]
