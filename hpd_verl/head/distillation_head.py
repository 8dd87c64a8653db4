"""Output layer, draws, objective and gradients in one sweep over tokens, without the [tokens, vocabulary] logits.

``distillation_head`` takes the student's last hidden states and its output layer, and returns the loss with the
per-token quantities that metrics are made of. Gradients are computed in the same sweep, while a chunk's probabilities
exist; backward only scales them. What keeps it close to the cost of its matrix products:

- The gradient of a position's logits is ``(w_y + w_a) q - w_y onehot(y) - w_a onehot(a)``. The factor, the
  normalisation of q and the one-hots never touch the vocabulary-sized matrix: they go to the [tokens, hidden] side of
  the two gradient products.
- The teacher costs one dot product a token: its hidden state and the log-sum-exp of its logits (``TeacherFeatures``)
  give log p of any token. Only a full-vocabulary objective computes its logits again.
- Products are made for a chunk of tokens (``token_chunk_size``), everything else for as many rows as a CPU's cache
  holds, so that no float32 copy of a chunk exists. Each logit is exponentiated once.
- With ``compiled``, the elementwise work on a chunk is fused by ``torch.compile``: what an accelerator pays for is
  reading and writing the chunk, which then happens a few times instead of a dozen.

    features = teacher_features(teacher_hidden, teacher_head, labels, temperature=1.0, chunk_size=512)
    out = distillation_head(hidden, head, labels, uniforms, scale, is_rollout, features, teacher_head, HPDConfig())
    out.loss.backward()

Floating results are float32, or float64 where the student's weight is float64.
"""

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from hpd_verl.config import HPDConfig
from hpd_verl.head.sampling import BlockDraws, block_masses, block_tokens, draw_blocks, draw_tokens
from hpd_verl.head.token_weights import row_objectives, token_weights
from hpd_verl.objectives.weights import (
    FULL_VOCABULARY_OBJECTIVES,
    LOG_ZERO,
    OBJECTIVES,
    TEACHERLESS_OBJECTIVES,
    TokenLogProbs,
    VocabularyLogProbs,
)

_CPU_STEP = 1 << 17  # elements of [rows, vocabulary] worked on at a time: what a CPU's cache holds
_STEP = 1 << 25  # the same on other devices
_CPU_CHUNK = 1024  # tokens of a chunk, where no size is set
_CHUNK = 8192  # the same on other devices: a low-precision weight gradient is added up once a chunk
_WEIGHT_ROWS = 4096  # rows of a low-precision weight gradient that are added to the float32 one at a time


@dataclass(frozen=True)
class OutputHead:
    """An output layer: ``logits = scale * (hidden @ weight.T + bias)``, then ``soft_cap * tanh(logits / soft_cap)``.

    Raises:
        ValueError: ``vocabulary_size`` is not a number of the weight's rows.
    """

    weight: Tensor
    """[V_full, d], floating; the matrix products are made in its dtype."""
    vocabulary_size: int
    """V: the first V rows are used: all of the student's; of the teacher's those that the student has too."""
    bias: Tensor | None = None
    """[V_full] or None."""
    scale: float = 1.0
    """Factor of the logits."""
    soft_cap: float | None = None
    """Bound of the logits' absolute value."""

    def __post_init__(self) -> None:
        if not 1 <= self.vocabulary_size <= len(self.weight):
            raise ValueError(f"vocabulary_size={self.vocabulary_size}: the weight has {len(self.weight)} rows")

    @property
    def dtype(self) -> torch.dtype:
        """dtype of everything but the matrix products."""
        return torch.float64 if self.weight.dtype == torch.float64 else torch.float32

    @property
    def used_weight(self) -> Tensor:
        """[V, d]"""
        return self.weight[: self.vocabulary_size]

    def logits(
        self, products: Tensor, temperature: float, tokens: Tensor | None = None, out: Tensor | None = None
    ) -> Tensor:
        """Logits over temperature.

        Args:
            products: hidden states times weight rows, of any dtype: [n, V], or [n, M] of chosen tokens.
            temperature: the distillation temperature.
            tokens: int64 [n, M], the chosen tokens; None for the whole vocabulary.
            out: of the products' shape and this head's ``dtype``, memory to use.

        Returns:
            Of the products' shape, of this head's ``dtype``: the products themselves where nothing changes them.
        """
        bias = self.bias
        if bias is not None:
            bias = bias[: self.vocabulary_size] if tokens is None else bias[tokens]
        plain = bias is None and self.soft_cap is None and self.scale == temperature == 1.0
        if plain and products.dtype == self.dtype:
            return products
        logits = products.to(self.dtype, copy=True) if out is None else out.copy_(products)
        if bias is not None:
            logits.add_(bias)
        if self.scale != 1.0:
            logits.mul_(self.scale)
        if self.soft_cap is not None:
            logits.div_(self.soft_cap).tanh_().mul_(self.soft_cap)
        if temperature != 1.0:
            logits.div_(temperature)
        return logits

    def token_logits(self, hidden: Tensor, tokens: Tensor, temperature: float) -> Tensor:
        """Logits over temperature of chosen tokens [n, M], for hidden states [n, d] of the weight's dtype; [n, M]."""
        products = (self.weight[tokens].to(self.dtype) @ hidden.to(self.dtype).unsqueeze(2)).squeeze(2)
        # Rounded as in the product with the whole weight.
        return self.logits(products.to(self.weight.dtype), temperature, tokens)

    def slope(self, logits: Tensor, temperature: float) -> Tensor | None:
        """Derivative of the soft cap at logits over temperature, of their shape; None without one."""
        return None if self.soft_cap is None else 1 - (logits * (temperature / self.soft_cap)).square()


@dataclass(frozen=True)
class TeacherFeatures:
    """What the objectives need to know of the teacher at n tokens, at the distillation temperature.

    Either ``hidden`` and ``log_mass`` or ``top_tokens``, ``top_log_probs`` and ``rest_log_prob`` are given. Tokens of
    the student beyond the vocabulary of the teacher's head have probability 0 (``LOG_ZERO``).

    Raises:
        ValueError: neither or both of the forms, or half of one.
    """

    label_log_probs: Tensor
    """log p(y), [n], float32 or float64; ``LOG_ZERO`` for a label beyond the teacher's vocabulary."""
    hidden: Tensor | None = None
    """[n, d_t], floating: the input of the teacher's output layer."""
    log_mass: Tensor | None = None
    """[n], float32 or float64: log-sum-exp of the teacher's logits over temperature, over its head's vocabulary."""
    top_tokens: Tensor | None = None
    """[n, K], integer: the teacher's most likely tokens."""
    top_log_probs: Tensor | None = None
    """[n, K], floating: their log-probs."""
    rest_log_prob: Tensor | None = None
    """[n], float32 or float64: log-prob of all other tokens together. It is spread evenly over them."""

    def __post_init__(self) -> None:
        hidden = [value is not None for value in (self.hidden, self.log_mass)]
        top = [value is not None for value in (self.top_tokens, self.top_log_probs, self.rest_log_prob)]
        if not (all(hidden) and not any(top)) and not (all(top) and not any(hidden)):
            raise ValueError(
                "TeacherFeatures needs hidden and log_mass, or top_tokens, top_log_probs and rest_log_prob"
            )

    @classmethod
    def cat(cls, parts: Sequence["TeacherFeatures"]) -> "TeacherFeatures":
        """The features of all parts' tokens, in order; the parts are of one form."""
        named: dict[str, Any] = {field.name: [getattr(part, field.name) for part in parts] for field in fields(cls)}
        joined: dict[str, Any] = {}
        for name, values in named.items():
            joined[name] = None if values[0] is None else torch.cat(values)
        return cls(**joined)

    def __getitem__(self, rows: slice | Tensor) -> "TeacherFeatures":
        """The features of some tokens: a slice, an index or a mask."""
        parts: dict[str, Any] = {field.name: getattr(self, field.name) for field in fields(self)}
        for name, part in parts.items():
            parts[name] = None if part is None else part[rows]
        return TeacherFeatures(**parts)

    def log_probs(self, tokens: Tensor, head: OutputHead, temperature: float) -> Tensor:
        """log p of chosen tokens.

        Args:
            tokens: int64 [n, M], of the student's vocabulary.
            head: the teacher's output layer; of the top-k form only ``vocabulary_size`` is used.
            temperature: that of the features.

        Returns:
            [n, M], of the head's ``dtype``.
        """
        known = tokens < head.vocabulary_size
        if self.hidden is not None and self.log_mass is not None:
            within = tokens.clamp_max(head.vocabulary_size - 1)
            logits = head.token_logits(self.hidden.to(head.weight.dtype), within, temperature)
            return torch.where(known, logits - self.log_mass.unsqueeze(1), LOG_ZERO)
        assert self.top_tokens is not None
        assert self.top_log_probs is not None
        matches = self.top_tokens.unsqueeze(1) == tokens.unsqueeze(2)
        found = self.top_log_probs.to(head.dtype).gather(1, matches.int().argmax(-1))
        others = self._other_log_prob(head).expand_as(found)
        return torch.where(known, torch.where(matches.any(-1), found, others), LOG_ZERO)

    def all_log_probs(
        self, products: Tensor | None, head: OutputHead, temperature: float, vocabulary_size: int
    ) -> Tensor:
        """log p of the student's whole vocabulary, [n, vocabulary_size], of the head's ``dtype``.

        Args:
            products: [n, V] with the teacher's weight, needed of the hidden form.
            head: the teacher's output layer.
            temperature: that of the features.
            vocabulary_size: of the student's output layer, at least the teacher's V.
        """
        if self.log_mass is not None:
            assert products is not None
            log_probs = head.logits(products, temperature) - self.log_mass.unsqueeze(1)
        else:
            assert self.top_tokens is not None
            assert self.top_log_probs is not None
            log_probs = self._other_log_prob(head).repeat(1, head.vocabulary_size)
            log_probs.scatter_(1, self.top_tokens.long(), self.top_log_probs.to(head.dtype))
        beyond = vocabulary_size - head.vocabulary_size
        return F.pad(log_probs, (0, beyond), value=LOG_ZERO) if beyond else log_probs

    def _other_log_prob(self, head: OutputHead) -> Tensor:
        """log p of each token outside the top K, [n, 1]."""
        assert self.top_tokens is not None
        assert self.rest_log_prob is not None
        others = max(1, head.vocabulary_size - self.top_tokens.shape[1])
        return (self.rest_log_prob.to(head.dtype) - math.log(others)).unsqueeze(1)


@dataclass(frozen=True)
class HeadOutput:
    """Results for n tokens with K draws each. All but the loss are detached; tokens of scale 0 hold zeros."""

    loss: Tensor
    """Scalar: sum of token_scale * token_losses, differentiable in hidden, weight and bias."""
    label_log_probs: Tensor
    """log q(y), [n]."""
    entropy: Tensor
    """The student's entropy in nats, [n]."""
    sampled: Tensor
    """The student's draws, int64 [n, K]."""
    sampled_log_probs: Tensor
    """log q(a), [n, K]."""
    teacher_sampled_log_probs: Tensor | None
    """log p(a), [n, K]; None without teacher."""
    label_weights: Tensor
    """[n]."""
    sampled_weights: Tensor
    """[n, K]; 0 under a full-vocabulary objective."""
    token_losses: Tensor
    """[n], before token_scale; under a full-vocabulary objective its value."""
    forward_kl: Tensor | None
    """KL(p || q), [n], with exact_kl."""
    reverse_kl: Tensor | None
    """KL(q || p), [n], with exact_kl."""


def _step_rows(matrix: Tensor) -> int:
    """Rows of [n, V] to work on at a time."""
    elements = _CPU_STEP if matrix.device.type == "cpu" else _STEP
    return max(1, min(len(matrix), elements // matrix.shape[1]))


def _steps(matrix: Tensor) -> Iterator[slice]:
    return _chunks(len(matrix), _step_rows(matrix))


def _chunks(count: int, chunk_size: int) -> Iterator[slice]:
    for start in range(0, count, chunk_size):
        yield slice(start, min(start + chunk_size, count))


class _Products:
    """``hidden @ weight.T`` of one chunk after the other, in one buffer."""

    def __init__(self, hidden: Tensor, head: OutputHead, chunk_size: int) -> None:
        self.hidden = hidden.detach().to(head.weight.dtype)
        self.weight = head.used_weight.detach()
        self.buffer = self.weight.new_empty(min(chunk_size, len(hidden)), head.vocabulary_size)

    def __getitem__(self, rows: slice) -> Tensor:
        """[rows, V], valid until the next chunk's."""
        return torch.mm(self.hidden[rows], self.weight.T, out=self.buffer[: rows.stop - rows.start])


@dataclass(frozen=True)
class _Scratch:
    """Memory of a step's rows, used again and again: a CPU pays fresh memory with page faults."""

    logits: Tensor
    exps: Tensor

    @classmethod
    def of(cls, matrix: Tensor, dtype: torch.dtype) -> "_Scratch":
        """For the steps of a matrix [n, V]."""
        shape = (_step_rows(matrix), matrix.shape[1])
        return cls(matrix.new_empty(shape, dtype=dtype), matrix.new_empty(shape, dtype=dtype))

    def rows(self, count: int) -> tuple[Tensor, Tensor]:
        """[count, V] of each."""
        return self.logits[:count], self.exps[:count]


@dataclass(frozen=True)
class _Sums:
    """Sums of n positions over the vocabulary, of ``exps = exp(logits - top)``; all of the head's ``dtype``."""

    top: Tensor
    """The largest logit, [n]."""
    masses: Tensor
    """Sums of exps over blocks of the vocabulary, [n, blocks]."""
    weighted: Tensor
    """Sum of exps * (logits - top), [n]."""


def _sums(
    products: Tensor, head: OutputHead, temperature: float, scratch: tuple[Tensor, Tensor] | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The fields of ``_Sums`` of products [n, V]; the exps are left in the second scratch."""
    logits_out, exps_out = scratch or (None, None)
    logits = head.logits(products, temperature, out=logits_out)
    top = logits.amax(-1, keepdim=True)
    shifted = torch.sub(logits, top, out=logits_out)
    exps = torch.exp(shifted, out=exps_out)
    # An impossible token adds 0 * -inf to the weighted sum, and means 0; a NaN shows in the masses.
    return top.squeeze(1), block_masses(exps), torch.mul(exps, shifted, out=logits_out).nansum(-1)


def _exponentiate(products: Tensor, head: OutputHead, temperature: float, top: Tensor, exps: Tensor | None) -> None:
    """Replace products [n, V] by ``exps``, computed again where they were not kept, times the soft cap's slope."""
    if exps is None or head.soft_cap is not None:
        logits = head.logits(products, temperature)
        slope = head.slope(logits, temperature)
        exps = torch.exp(logits - top.unsqueeze(1)) if exps is None else exps
        exps = exps if slope is None else exps * slope
    products.copy_(exps)


def _log_sum_exp(products: Tensor, head: OutputHead, temperature: float, out: Tensor | None) -> Tensor:
    """log-sum-exp over the vocabulary, [n], of products [n, V]; ``out`` is memory of their shape."""
    logits = head.logits(products, temperature, out=out)
    top = logits.amax(-1, keepdim=True)
    shifted = torch.sub(logits, top, out=out)
    return top.squeeze(1) + torch.exp(shifted, out=out).sum(-1).log()


@functools.cache
def _fused(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function)


def _run(function: Callable[..., Any], compiled: bool) -> Callable[..., Any]:
    return _fused(function) if compiled else function


def _chunk_size(size: int | None, device: torch.device) -> int:
    """Tokens of a chunk, by the setting and the device."""
    return size or (_CPU_CHUNK if device.type == "cpu" else _CHUNK)


def _concatenate(draws: list[BlockDraws]) -> BlockDraws:
    return BlockDraws(
        **{part.name: torch.cat([getattr(each, part.name) for each in draws]) for part in fields(BlockDraws)}
    )


def _take(matrix: Tensor, tokens: Tensor) -> Tensor:
    """One entry of each row: [n] from [n, V]."""
    return matrix.gather(1, tokens.unsqueeze(1)).squeeze(1)


def _label_logits(matrix: Tensor, head: OutputHead, labels: Tensor, temperature: float) -> Tensor:
    """Logits over temperature of the labels, [n], from products [n, V]."""
    tokens = labels.unsqueeze(1)
    return head.logits(matrix.gather(1, tokens), temperature, tokens).squeeze(1)


@torch.no_grad()
def teacher_features(
    hidden: Tensor,
    head: OutputHead,
    labels: Tensor,
    temperature: float,
    chunk_size: int | None = None,
    compiled: bool = False,
) -> TeacherFeatures:
    """Features of the hidden form: one product with the teacher's weight, of which only a number a token is kept.

    Args:
        hidden: floating [n, d_t], the input of the teacher's output layer; kept as it is.
        head: the teacher's output layer.
        labels: int64 [n].
        temperature: the distillation temperature.
        chunk_size: tokens whose logits exist at once; memory only. None chooses by the device.
        compiled: fuse the elementwise work by ``torch.compile``.
    """
    label_log_probs = torch.empty(len(hidden), dtype=head.dtype, device=hidden.device)
    log_mass = torch.empty_like(label_log_probs)
    known = labels < head.vocabulary_size
    within = labels.clamp_max(head.vocabulary_size - 1)
    chunk_size = _chunk_size(chunk_size, hidden.device)
    products = _Products(hidden, head, chunk_size)
    scratch = None if compiled else _Scratch.of(products.buffer, head.dtype)
    for chunk in _chunks(len(hidden), chunk_size):
        matrix = products[chunk]
        label_log_probs[chunk] = _label_logits(matrix, head, within[chunk], temperature)
        for rows in _steps(matrix):
            tokens = slice(chunk.start + rows.start, chunk.start + rows.stop)
            out = None if scratch is None else scratch.logits[: rows.stop - rows.start]
            log_mass[tokens] = _run(_log_sum_exp, compiled)(matrix[rows], head, temperature, out)
    label_log_probs = torch.where(known, label_log_probs - log_mass, LOG_ZERO)
    return TeacherFeatures(label_log_probs, hidden=hidden.detach(), log_mass=log_mass)


@torch.no_grad()
def teacher_top_k(
    hidden: Tensor, head: OutputHead, labels: Tensor, temperature: float, chunk_size: int | None = None, *, k: int
) -> TeacherFeatures:
    """Features of the top-k form; arguments as of ``teacher_features``, and k, the number of tokens kept.

    Raises:
        ValueError: k is not from 1 to the vocabulary's size.
    """
    if not 1 <= k <= head.vocabulary_size:
        raise ValueError(f"k={k}: the vocabulary has {head.vocabulary_size} tokens")
    label_log_probs = torch.empty(len(hidden), dtype=head.dtype, device=hidden.device)
    rest_log_prob = torch.empty_like(label_log_probs)
    top_log_probs = torch.empty(len(hidden), k, dtype=head.dtype, device=hidden.device)
    top_tokens = torch.empty(len(hidden), k, dtype=torch.int64, device=hidden.device)
    known = labels < head.vocabulary_size
    within = labels.clamp_max(head.vocabulary_size - 1)
    chunk_size = _chunk_size(chunk_size, hidden.device)
    products = _Products(hidden, head, chunk_size)
    for chunk in _chunks(len(hidden), chunk_size):
        matrix = products[chunk]
        for rows in _steps(matrix):
            tokens = slice(chunk.start + rows.start, chunk.start + rows.stop)
            log_probs = torch.log_softmax(head.logits(matrix[rows], temperature), -1)
            label_log_probs[tokens] = _take(log_probs, within[tokens])
            top_log_probs[tokens], top_tokens[tokens] = log_probs.topk(k, -1)
            # In the logarithm: what remains of 1 would cancel where the top tokens hold nearly everything.
            rest_log_prob[tokens] = log_probs.scatter_(1, top_tokens[tokens], -math.inf).logsumexp(-1)
    return TeacherFeatures(
        label_log_probs=torch.where(known, label_log_probs, LOG_ZERO),
        top_tokens=top_tokens,
        top_log_probs=top_log_probs,
        rest_log_prob=rest_log_prob.clamp_min_(LOG_ZERO),
    )


class _Gradients:
    """Gradients of the loss in hidden, weight and bias, each where it is needed, from one chunk after the other."""

    def __init__(self, hidden: Tensor, head: OutputHead) -> None:
        recording = torch.is_grad_enabled()
        self.head = head
        self.count = len(hidden)
        self.hidden = torch.empty_like(hidden) if recording and hidden.requires_grad else None
        self.weight = torch.empty_like(head.weight) if recording and head.weight.requires_grad else None
        self.bias = None
        if head.bias is not None and recording and head.bias.requires_grad:
            self.bias = torch.zeros_like(head.bias, dtype=head.dtype)
        if self.weight is not None:
            # Rows in use are written by the first or the last chunk.
            self.weight[head.vocabulary_size if self.count else 0 :] = 0
        self._sum: Tensor | None = None  # of a low-precision weight's gradient over the chunks so far
        self._one_hots: list[tuple[Tensor, Tensor, Tensor]] = []  # what the sum does not hold yet

    @property
    def needed(self) -> bool:
        return not (self.hidden is None and self.weight is None and self.bias is None)

    def add(
        self, chunk: slice, hidden: Tensor, matrix: Tensor, factors: Tensor, tokens: Tensor, token_factors: Tensor
    ) -> None:
        """Take in the gradient ``factors * matrix - sum_k token_factors_k onehot(tokens_k)`` of the products.

        Args:
            chunk: the place of the n tokens in hidden; the last chunk ends where hidden does.
            hidden: [n, d], of the weight's dtype.
            matrix: [n, V], of the weight's dtype.
            factors: [n].
            tokens, token_factors: [n, M].
        """
        dtype, weight = self.head.dtype, self.head.used_weight.detach()
        if self.hidden is not None:
            gradient = (matrix @ weight).to(dtype).mul_(factors.unsqueeze(1))
            for token, factor in zip(tokens.unbind(1), token_factors.unbind(1), strict=True):
                gradient.addcmul_(weight[token].to(dtype), factor.unsqueeze(1), value=-1)
            self.hidden[chunk] = gradient
        if self.weight is not None:
            scaled = (hidden.to(dtype) * factors.unsqueeze(1)).to(weight.dtype)
            if weight.dtype == dtype:
                used = self.weight[: len(weight)]
                torch.addmm(used, matrix.T, scaled, beta=int(chunk.start > 0), out=used)
                for token, factor in zip(tokens.unbind(1), token_factors.unbind(1), strict=True):
                    self.weight.index_add_(0, token, hidden * -factor.unsqueeze(1))
            else:
                self._one_hots.append((tokens, token_factors, hidden))
                self._add_low_precision(matrix, scaled, first=chunk.start == 0, last=chunk.stop == self.count)
        if self.bias is not None:
            for rows in _steps(matrix):
                self.bias[: matrix.shape[1]].add_(factors[rows] @ matrix[rows].to(dtype))
            self.bias.index_add_(0, tokens.flatten(), -token_factors.flatten())

    def _add_low_precision(self, matrix: Tensor, scaled: Tensor, first: bool, last: bool) -> None:
        """Add ``matrix.T @ scaled`` of one chunk; after the last, the one-hots, in float32, and round once.

        A single chunk needs no float32 copy of the gradient: its product is in the weight's dtype already, and only the
        rows with one-hots change.
        """
        assert self.weight is not None
        used = self.weight[: matrix.shape[1]]
        if first and last:
            torch.mm(matrix.T, scaled, out=used)
        elif first:
            self._sum = torch.mm(matrix.T, scaled).to(self.head.dtype)
        else:
            assert self._sum is not None
            product = scaled.new_empty(min(len(used), _WEIGHT_ROWS), scaled.shape[1])
            for rows in _chunks(len(used), _WEIGHT_ROWS):
                self._sum[rows].add_(torch.mm(matrix[:, rows].T, scaled, out=product[: rows.stop - rows.start]))
        if last:
            total = used if self._sum is None else self._sum
            tokens = torch.cat([each.flatten() for each, _, _ in self._one_hots])
            values = torch.cat([each.flatten() for _, each, _ in self._one_hots])
            hidden = torch.cat([each for _, _, each in self._one_hots]).to(self.head.dtype)
            hidden = hidden.repeat_interleave(len(tokens) // len(hidden), dim=0)
            rows_in_use, place = tokens.unique(return_inverse=True)
            changed = total[rows_in_use].to(self.head.dtype)
            changed.index_add_(0, place, hidden * -values.unsqueeze(1))
            if self._sum is not None:
                used.copy_(self._sum)
            used[rows_in_use] = changed.to(used.dtype)

    def attach(self, loss: Tensor, hidden: Tensor) -> Tensor:
        """The loss, with these gradients as its backward pass."""
        if not self.needed:
            return loss
        bias = None if self.bias is None or self.head.bias is None else self.bias.to(self.head.bias.dtype)
        return _LossWithGradients.apply(loss, hidden, self.head.weight, self.head.bias, self.hidden, self.weight, bias)


class _LossWithGradients(torch.autograd.Function):
    """A loss whose gradients in three tensors are known."""

    @staticmethod
    def forward(
        ctx: Any,
        loss: Tensor,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        hidden_gradient: Tensor | None,
        weight_gradient: Tensor | None,
        bias_gradient: Tensor | None,
    ) -> Tensor:
        ctx.save_for_backward(hidden_gradient, weight_gradient, bias_gradient)
        return loss.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (factor,) = grad_outputs
        gradients = ctx.saved_tensors
        if factor.item() != 1.0:  # a pass over the weight's gradient is worth a look
            gradients = [None if each is None else each * factor.to(each.dtype) for each in gradients]
        return None, *gradients, None, None, None


def distillation_head(
    hidden: Tensor,
    head: OutputHead,
    labels: Tensor,
    uniforms: Tensor,
    token_scale: Tensor,
    is_rollout: Tensor,
    teacher: TeacherFeatures | None,
    teacher_head: OutputHead | None,
    config: HPDConfig,
    exact_kl: bool = False,
    compiled: bool = False,
) -> HeadOutput:
    """Loss of the configured objectives at n tokens, its gradients, and what metrics are made of.

    Without autograd (``torch.no_grad``, or nothing that requires a gradient) no gradient is computed. A NaN of student
    or teacher comes out as NaN in the loss and in the tokens concerned.

    Args:
        hidden: floating [n, d], the input of the student's output layer.
        head: the student's output layer.
        labels: int64 [n], in the student's vocabulary.
        uniforms: float64 [n, K] in [0, 1), a number for each of K draws (``sampling.counter_uniform``). K is
            ``config.samples`` where that is not 0, else any number: draws are then only for metrics, K = 0 skips them.
        token_scale: floating [n], factor of each token's loss in the sum, e.g. 1 / (response tokens of the global
            batch). Tokens of scale 0 are skipped: no cost, no gradient, zeros in all outputs.
        is_rollout: bool [n], True where the label is the student's own.
        teacher: features at ``config.temperature``; None if the objectives need no teacher (sft).
        teacher_head: the teacher's output layer; its vocabulary is the student's or the first part of it, beyond which
            p is 0. None without teacher.
        config: objectives, coefficients, temperature and ``token_chunk_size``, which changes memory, not the result.
        exact_kl: also compute both KL divergences, from the teacher's logits.
        compiled: fuse the elementwise work of token-level objectives by ``torch.compile``: the same within rounding.

    Raises:
        ValueError: a teacher is missing or has a larger vocabulary, K is not ``config.samples``, or exact_kl is asked
            of a teacher whose distribution is known in part.
    """
    _check(uniforms, head, teacher, teacher_head, config, exact_kl)
    active = (token_scale != 0).nonzero().squeeze(1)
    if len(active) < len(hidden):
        part = distillation_head(
            hidden[active],
            head,
            labels[active],
            uniforms[active],
            token_scale[active],
            is_rollout[active],
            None if teacher is None else teacher[active],
            teacher_head,
            config,
            exact_kl,
            compiled,
        )
        return _spread(part, active, len(hidden))

    gradients = _Gradients(hidden, head)
    with torch.no_grad():
        output = _sweep(
            hidden,
            head,
            labels,
            uniforms,
            token_scale,
            is_rollout,
            teacher,
            teacher_head,
            config,
            exact_kl,
            compiled,
            gradients,
        )
    return replace(output, loss=gradients.attach(output.loss, hidden))


def _check(
    uniforms: Tensor,
    head: OutputHead,
    teacher: TeacherFeatures | None,
    teacher_head: OutputHead | None,
    config: HPDConfig,
    exact_kl: bool,
) -> None:
    if config.samples not in (0, uniforms.shape[1]):
        raise ValueError(f"the objective needs {config.samples} draws a token, uniforms has {uniforms.shape[1]}")
    if teacher is None or teacher_head is None:
        needing = sorted(config.objectives - TEACHERLESS_OBJECTIVES)
        if needing or exact_kl or teacher is not None:
            raise ValueError(f"{', '.join(needing) or 'exact_kl'}: give the teacher's features and its output head")
    else:
        if teacher_head.vocabulary_size > head.vocabulary_size:
            raise ValueError(
                f"vocabulary_size is {head.vocabulary_size} of the student and {teacher_head.vocabulary_size} of the "
                "teacher: cut the teacher's to the student's"
            )
        if exact_kl and teacher.hidden is None:
            raise ValueError("exact_kl: needs the teacher's hidden states, top-k features hold a part of p")


def _spread(part: HeadOutput, active: Tensor, count: int) -> HeadOutput:
    """The output for all tokens from that for the active ones."""
    spread: dict[str, Any] = {"loss": part.loss}
    for name, value in vars(part).items():
        if name != "loss" and value is not None:
            value = value.new_zeros(count, *value.shape[1:]).index_copy_(0, active, value)
        spread[name] = value
    return HeadOutput(**spread)


def _sweep(
    hidden: Tensor,
    head: OutputHead,
    labels: Tensor,
    uniforms: Tensor,
    token_scale: Tensor,
    is_rollout: Tensor,
    teacher: TeacherFeatures | None,
    teacher_head: OutputHead | None,
    config: HPDConfig,
    exact_kl: bool,
    compiled: bool,
    gradients: _Gradients,
) -> HeadOutput:
    """``distillation_head`` of tokens that all count, with the loss detached and ``gradients`` filled."""
    n, draws = uniforms.shape
    temperature = config.temperature
    objectives = row_objectives(is_rollout, config)
    on_tokens = [(name, rows) for name, rows in objectives if name not in FULL_VOCABULARY_OBJECTIVES]
    on_vocabulary = [(name, rows) for name, rows in objectives if name in FULL_VOCABULARY_OBJECTIVES]
    whole_teacher = bool(on_vocabulary) or exact_kl

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=head.dtype, device=hidden.device)

    output = HeadOutput(
        loss=empty(),
        label_log_probs=empty(n),
        entropy=empty(n),
        sampled=torch.empty(n, draws, dtype=torch.int64, device=hidden.device),
        sampled_log_probs=empty(n, draws),
        teacher_sampled_log_probs=None if teacher is None else empty(n, draws),
        label_weights=empty(n),
        sampled_weights=empty(n, draws),
        token_losses=empty(n),
        forward_kl=empty(n) if exact_kl else None,
        reverse_kl=empty(n) if exact_kl else None,
    )
    chunk_size = _chunk_size(config.token_chunk_size, hidden.device)
    compiled = compiled and not whole_teacher
    products = _Products(hidden, head, chunk_size)
    scratch = None if compiled else _Scratch.of(products.buffer, head.dtype)
    teacher_products = None
    if whole_teacher and teacher is not None and teacher.hidden is not None and teacher_head is not None:
        teacher_products = _Products(teacher.hidden, teacher_head, chunk_size)

    for chunk in _chunks(n, chunk_size):
        matrix = products[chunk]
        teacher_matrix = None if teacher_products is None else teacher_products[chunk]
        label_logits = _label_logits(matrix, head, labels[chunk], temperature)
        sums, narrowed = [], []
        for rows in _steps(matrix):
            tokens = slice(chunk.start + rows.start, chunk.start + rows.stop)
            buffers = None if scratch is None else scratch.rows(rows.stop - rows.start)
            exps = None if buffers is None else buffers[1]
            sums.append(_Sums(*_run(_sums, compiled)(matrix[rows], head, temperature, buffers)))
            if draws:
                narrowed.append(_narrow(matrix[rows], exps, sums[-1], uniforms[tokens], head, temperature))
            if whole_teacher and teacher is not None and teacher_head is not None:
                assert buffers is not None
                assert exps is not None
                both = VocabularyLogProbs(
                    student=_log_probs(matrix[rows], sums[-1], head, temperature, out=buffers[0]),
                    teacher=teacher[tokens].all_log_probs(
                        None if teacher_matrix is None else teacher_matrix[rows],
                        teacher_head,
                        temperature,
                        head.vocabulary_size,
                    ),
                    labels=labels[tokens],
                )
                if output.forward_kl is not None and output.reverse_kl is not None:
                    output.forward_kl[tokens] = OBJECTIVES["fkl"](both).value
                    output.reverse_kl[tokens] = OBJECTIVES["rkl_exact"](both).value
                if on_vocabulary:
                    exps = torch.exp(both.student, out=buffers[1])
                for name, where in on_vocabulary:
                    result = OBJECTIVES[name](both, **config.coefficients(name))
                    here = where[tokens]
                    output.token_losses[tokens] = torch.where(here, result.value, output.token_losses[tokens])
                    output.label_weights[tokens] = torch.where(
                        here, _take(result.weights, labels[tokens]), output.label_weights[tokens]
                    )
                    total = result.weights.sum(-1, keepdim=True)
                    exps = torch.where(here.unsqueeze(1), total * buffers[1] - result.weights, exps)
            if gradients.needed:
                _run(_exponentiate, compiled)(matrix[rows], head, temperature, sums[-1].top, exps)

        mass = torch.cat([each.masses.sum(-1, dtype=torch.float64) for each in sums])
        log_mass = mass.log().to(head.dtype)
        output.label_log_probs[chunk] = label_logits - torch.cat([each.top for each in sums]) - log_mass
        output.entropy[chunk] = log_mass - torch.cat([each.weighted for each in sums]) / mass
        if draws:
            output.sampled[chunk], sampled_masses = draw_tokens(_concatenate(narrowed), head.vocabulary_size)
            output.sampled_log_probs[chunk] = sampled_masses.log() - log_mass.unsqueeze(1)
        samples = _token_log_probs(output, chunk, labels, teacher, teacher_head, temperature)
        weighted = [(name, where[chunk]) for name, where in on_tokens]
        label_weights, sampled_weights = token_weights(samples, weighted, config)
        weights = torch.stack([label_weights, *sampled_weights[:draws]], 1)
        log_probs = torch.cat([output.label_log_probs[chunk].unsqueeze(1), output.sampled_log_probs[chunk]], 1)
        # A token that is impossible and has no weight adds nothing.
        terms = torch.where((weights == 0) & (log_probs == -math.inf), 0.0, weights * log_probs)
        # The matrix holds probabilities where an objective needs them all, else exps, which the mass normalises.
        factors = weights.sum(1) if on_vocabulary else weights.sum(1) / mass.to(head.dtype)
        losses = -terms.sum(1)
        for _, where in on_vocabulary:
            here = where[chunk]
            losses = torch.where(here, output.token_losses[chunk], losses)
            factors = torch.where(here, 1.0, factors)
            label_weights = torch.where(here, output.label_weights[chunk], label_weights)
        output.label_weights[chunk] = label_weights
        output.sampled_weights[chunk] = weights[:, 1:]
        output.token_losses[chunk] = losses

        if gradients.needed:
            scale = token_scale[chunk].to(head.dtype) * (head.scale / temperature)
            chosen = torch.cat([labels[chunk].unsqueeze(1), output.sampled[chunk]], 1)
            if head.soft_cap is not None:
                slope = head.slope(head.token_logits(products.hidden[chunk], chosen, temperature), temperature)
                assert slope is not None
                weights = weights * slope
            gradients.add(chunk, products.hidden[chunk], matrix, factors * scale, chosen, weights * scale.unsqueeze(1))

    output.loss.copy_((output.token_losses.double() * token_scale.double()).sum())
    return output


def _narrow(
    products: Tensor, exps: Tensor | None, sums: _Sums, uniforms: Tensor, head: OutputHead, temperature: float
) -> BlockDraws:
    """Draws [n, K] narrowed down to blocks, from the sums of products [n, V] and, where they were kept, the exps."""
    block, target = draw_blocks(sums.masses, uniforms)
    tokens, beyond = block_tokens(block, head.vocabulary_size)
    inside = tokens.flatten(1)
    if exps is not None:
        masses = exps.gather(1, inside)
    else:
        masses = torch.exp(head.logits(products.gather(1, inside), temperature, inside) - sums.top.unsqueeze(1))
    return BlockDraws(block, target, masses.view_as(tokens).masked_fill_(beyond, 0.0))


def _log_probs(products: Tensor, sums: _Sums, head: OutputHead, temperature: float, out: Tensor) -> Tensor:
    """Log-probs of the whole vocabulary [n, V], in the memory of ``out``."""
    log_sum_exp = sums.top + sums.masses.sum(-1, dtype=torch.float64).log().to(sums.top.dtype)
    return torch.sub(head.logits(products, temperature, out=out), log_sum_exp.unsqueeze(1), out=out)


def _token_log_probs(
    output: HeadOutput,
    chunk: slice,
    labels: Tensor,
    teacher: TeacherFeatures | None,
    teacher_head: OutputHead | None,
    temperature: float,
) -> list[TokenLogProbs]:
    """The token-level objectives' input for each draw; without draws one entry, in which the label is the sample.

    Also fills ``teacher_sampled_log_probs``. Without teacher its log-probs are NaN.
    """
    label, sampled = output.label_log_probs[chunk], output.sampled[chunk]
    if teacher is None or teacher_head is None or output.teacher_sampled_log_probs is None:
        teacher_label = torch.full_like(label, math.nan)
        teacher_sampled = teacher_label.unsqueeze(1).expand(sampled.shape)
    else:
        teacher_label = teacher.label_log_probs[chunk].to(label.dtype)
        teacher_sampled = teacher[chunk].log_probs(sampled, teacher_head, temperature).to(label.dtype)
        output.teacher_sampled_log_probs[chunk] = teacher_sampled
    if sampled.shape[1] == 0:
        return [TokenLogProbs(label, teacher_label, label, teacher_label, torch.ones_like(label, dtype=torch.bool))]
    return [
        TokenLogProbs(
            label,
            teacher_label,
            output.sampled_log_probs[chunk, draw],
            teacher_sampled[:, draw],
            sampled[:, draw] == labels[chunk],
        )
        for draw in range(sampled.shape[1])
    ]
