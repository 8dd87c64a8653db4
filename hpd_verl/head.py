"""Output layer, draws, objective and gradients in one sweep over tokens, without the [tokens, vocabulary] logits.

``distillation_head`` takes the student's last hidden states and its output layer, and returns the loss with the
per-token quantities that metrics are made of. Gradients are computed in the same sweep, while a chunk's probabilities
exist; backward only scales them. What keeps it close to the cost of its matrix products:

- The gradient of a position's logits is ``(w_y + w_a) q - w_y onehot(y) - w_a onehot(a)``. The factor and the one-hots
  never touch the vocabulary-sized matrix: they go to the [tokens, hidden] side of the two gradient products.
- The teacher costs one dot product a token: its hidden state and the log-sum-exp of its logits (``TeacherFeatures``)
  give log p of any token. Only a full-vocabulary objective computes its logits again.
- Products are made for a chunk of tokens (``token_chunk_size``), everything else for as many rows as a CPU's cache
  holds, so that no float32 copy of a chunk exists.

    features = teacher_features(teacher_hidden, teacher_head, labels, temperature=1.0, chunk_size=512)
    out = distillation_head(hidden, head, labels, uniforms, scale, is_rollout, features, teacher_head, HPDConfig())
    out.loss.backward()

Floating results are float32, or float64 where the student's weight is float64.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from hpd_verl.config import HPDConfig
from hpd_verl.objectives import (
    FULL_VOCABULARY_OBJECTIVES,
    LOG_ZERO,
    OBJECTIVES,
    TEACHERLESS_OBJECTIVES,
    TokenLogProbs,
    VocabularyLogProbs,
)
from hpd_verl.sampling import sample_from
from hpd_verl.token_weights import row_objectives, token_weights

_CACHED_ELEMENTS = 1 << 18  # elements of the vocabulary-sized intermediates that a CPU works on at a time
_WEIGHT_ROWS = 8192  # rows of a low-precision weight gradient that are added to the float32 one at a time


@dataclass(frozen=True)
class OutputHead:
    """An output layer: ``logits = scale * (hidden @ weight.T + bias)``, then ``soft_cap * tanh(logits / soft_cap)``.

    Raises:
        ValueError: ``vocabulary_size`` is not a number of the weight's rows.
    """

    weight: Tensor
    """[V_full, d], floating; the matrix products are made in its dtype."""
    vocabulary_size: int
    """V: the first V rows are used, those that student and teacher share."""
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

    def scores(self, products: Tensor, bias: Tensor | None, temperature: float) -> tuple[Tensor, Tensor | None]:
        """Logits over temperature, from products of hidden states and weight rows.

        Args:
            products: floating, any shape.
            bias: the bias of the products' tokens, broadcastable to them; None without bias.
            temperature: the distillation temperature.

        Returns:
            The scores and, with a soft cap, the derivative of the capping; of the products' shape and ``dtype``.
        """
        scores = products.to(self.dtype)
        if bias is not None:
            scores = scores + bias
        if self.scale != 1.0:
            scores = scores * self.scale
        slope = None
        if self.soft_cap is not None:
            capped = torch.tanh(scores / self.soft_cap)
            slope = 1 - capped.square()
            scores = capped * self.soft_cap
        return (scores if temperature == 1.0 else scores / temperature), slope

    def all_scores(self, products: Tensor, temperature: float) -> tuple[Tensor, Tensor | None]:
        """``scores`` of products [n, V] with all of the vocabulary."""
        return self.scores(products, None if self.bias is None else self.bias[: self.vocabulary_size], temperature)


@dataclass(frozen=True)
class TeacherFeatures:
    """What the objectives need to know of the teacher at n tokens, at the distillation temperature.

    Either ``hidden`` and ``log_mass`` or ``top_tokens`` and ``top_log_probs`` are given.

    Raises:
        ValueError: neither or both of the forms, or half of one.
    """

    label_log_probs: Tensor
    """log p(y), [n], float32 or float64."""
    hidden: Tensor | None = None
    """[n, d_t], floating: the input of the teacher's output layer."""
    log_mass: Tensor | None = None
    """[n], float32 or float64: log-sum-exp of the teacher's logits over temperature over the shared vocabulary."""
    top_tokens: Tensor | None = None
    """[n, K], integer: the teacher's most likely tokens."""
    top_log_probs: Tensor | None = None
    """[n, K], floating: their log-probs. The remaining mass is spread evenly over the V - K other tokens."""

    def __post_init__(self) -> None:
        given = [value is not None for value in (self.hidden, self.log_mass, self.top_tokens, self.top_log_probs)]
        if given not in ([True, True, False, False], [False, False, True, True]):
            raise ValueError("TeacherFeatures needs hidden and log_mass, or top_tokens and top_log_probs")

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
            tokens: int64 [n, M].
            head: the teacher's output layer; of the top-k form only ``vocabulary_size`` is used.
            temperature: that of the features.

        Returns:
            [n, M], of the head's ``dtype``.
        """
        if self.hidden is not None and self.log_mass is not None:
            hidden = self.hidden.to(head.weight.dtype).to(head.dtype)
            rows = head.weight[tokens].to(head.dtype)
            products = (rows @ hidden.unsqueeze(2)).squeeze(2).to(head.weight.dtype)  # rounded as the logits are
            scores, _ = head.scores(products, None if head.bias is None else head.bias[tokens], temperature)
            return scores - self.log_mass.unsqueeze(1)
        assert self.top_tokens is not None
        assert self.top_log_probs is not None
        matches = self.top_tokens.unsqueeze(1) == tokens.unsqueeze(2)
        top = self.top_log_probs.to(head.dtype)
        found = top.gather(1, matches.int().argmax(-1))
        return torch.where(matches.any(-1), found, self._other_log_prob(top, head.vocabulary_size))

    def all_log_probs(self, products: Tensor | None, head: OutputHead, temperature: float) -> Tensor:
        """log p of the whole vocabulary, [n, V]; of the hidden form from its products with the teacher's weight."""
        if self.log_mass is not None:
            assert products is not None
            scores, _ = head.all_scores(products, temperature)
            return scores - self.log_mass.unsqueeze(1)
        assert self.top_tokens is not None
        assert self.top_log_probs is not None
        top = self.top_log_probs.to(head.dtype)
        others = self._other_log_prob(top, head.vocabulary_size)
        return others.repeat(1, head.vocabulary_size).scatter_(1, self.top_tokens.long(), top)

    @staticmethod
    def _other_log_prob(top_log_probs: Tensor, vocabulary_size: int) -> Tensor:
        """log p of each token outside the top K, [n, 1]."""
        others = max(1, vocabulary_size - top_log_probs.shape[1])
        remaining = -torch.expm1(top_log_probs.logsumexp(-1, keepdim=True))
        return (remaining.clamp_min(0) / others).log()


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


def _steps(matrix: Tensor) -> Iterator[slice]:
    """Rows of [n, V] to work on at a time: on a CPU as many as its cache holds, elsewhere all."""
    count, vocabulary = matrix.shape
    rows = max(1, _CACHED_ELEMENTS // vocabulary) if matrix.device.type == "cpu" else max(1, count)
    for start in range(0, count, rows):
        yield slice(start, min(start + rows, count))


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


def _take(matrix: Tensor, tokens: Tensor) -> Tensor:
    """One entry of each row: [n] from [n, V]."""
    return matrix.gather(1, tokens.unsqueeze(1)).squeeze(1)


@torch.no_grad()
def teacher_features(
    hidden: Tensor, head: OutputHead, labels: Tensor, temperature: float, chunk_size: int
) -> TeacherFeatures:
    """Features of the hidden form: one product with the teacher's weight, of which only a number a token is kept.

    Args:
        hidden: floating [n, d_t], the input of the teacher's output layer; kept as it is.
        head: the teacher's output layer.
        labels: int64 [n].
        temperature: the distillation temperature.
        chunk_size: tokens whose logits exist at once; memory only.
    """
    label_log_probs = torch.empty(len(hidden), dtype=head.dtype, device=hidden.device)
    log_mass = torch.empty_like(label_log_probs)
    products = _Products(hidden, head, chunk_size)
    for chunk in _chunks(len(hidden), chunk_size):
        matrix = products[chunk]
        for rows in _steps(matrix):
            tokens = slice(chunk.start + rows.start, chunk.start + rows.stop)
            scores, _ = head.all_scores(matrix[rows], temperature)
            log_mass[tokens] = scores.logsumexp(-1)
            label_log_probs[tokens] = _take(scores, labels[tokens]) - log_mass[tokens]
    return TeacherFeatures(label_log_probs, hidden=hidden.detach(), log_mass=log_mass)


@torch.no_grad()
def teacher_top_k(
    hidden: Tensor, head: OutputHead, labels: Tensor, temperature: float, chunk_size: int, k: int
) -> TeacherFeatures:
    """Features of the top-k form; arguments as of ``teacher_features``, and k, the number of tokens kept.

    Raises:
        ValueError: k is not from 1 to the vocabulary's size.
    """
    if not 1 <= k <= head.vocabulary_size:
        raise ValueError(f"k={k}: the vocabulary has {head.vocabulary_size} tokens")
    label_log_probs = torch.empty(len(hidden), dtype=head.dtype, device=hidden.device)
    top_log_probs = torch.empty(len(hidden), k, dtype=head.dtype, device=hidden.device)
    top_tokens = torch.empty(len(hidden), k, dtype=torch.int64, device=hidden.device)
    products = _Products(hidden, head, chunk_size)
    for chunk in _chunks(len(hidden), chunk_size):
        matrix = products[chunk]
        for rows in _steps(matrix):
            tokens = slice(chunk.start + rows.start, chunk.start + rows.stop)
            log_probs = torch.log_softmax(head.all_scores(matrix[rows], temperature)[0], -1)
            label_log_probs[tokens] = _take(log_probs, labels[tokens])
            top_log_probs[tokens], top_tokens[tokens] = log_probs.topk(k, -1)
    return TeacherFeatures(label_log_probs, top_tokens=top_tokens, top_log_probs=top_log_probs)


class _Gradients:
    """Gradients of the loss in hidden, weight and bias, each where it is needed, accumulated over chunks."""

    def __init__(self, hidden: Tensor, head: OutputHead) -> None:
        recording = torch.is_grad_enabled()
        self.head = head
        self.hidden = torch.empty_like(hidden) if recording and hidden.requires_grad else None
        self.weight = self._zeros(head.weight) if recording and head.weight.requires_grad else None
        self.bias = None
        if head.bias is not None and recording and head.bias.requires_grad:
            self.bias = self._zeros(head.bias)

    def _zeros(self, parameter: Tensor) -> Tensor:
        return torch.zeros(parameter.shape, dtype=self.head.dtype, device=parameter.device)

    @property
    def needed(self) -> bool:
        return not (self.hidden is None and self.weight is None and self.bias is None)

    def add(
        self, chunk: slice, hidden: Tensor, matrix: Tensor, factors: Tensor, tokens: Tensor, token_factors: Tensor
    ) -> None:
        """Take in the gradient ``factors * matrix - sum_k token_factors_k onehot(tokens_k)`` of the products.

        Args:
            chunk: the tokens' place in hidden.
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
            wide = hidden.to(dtype)
            scaled = (wide * factors.unsqueeze(1)).to(weight.dtype)
            self._add_product(matrix.T, scaled)
            for token, factor in zip(tokens.unbind(1), token_factors.unbind(1), strict=True):
                self.weight.index_add_(0, token, wide * -factor.unsqueeze(1))
        if self.bias is not None:
            for rows in _steps(matrix):
                self.bias[: matrix.shape[1]] += factors[rows] @ matrix[rows].to(dtype)
            self.bias.index_add_(0, tokens.flatten(), -token_factors.flatten())

    def _add_product(self, left: Tensor, right: Tensor) -> None:
        assert self.weight is not None
        if left.dtype == self.weight.dtype:
            self.weight[: len(left)].addmm_(left, right)
            return
        for rows in _chunks(len(left), _WEIGHT_ROWS):
            self.weight[rows] += (left[rows] @ right).to(self.weight.dtype)

    def attach(self, loss: Tensor, hidden: Tensor) -> Tensor:
        """The loss, with these gradients as its backward pass."""
        if not self.needed:
            return loss
        weight = None if self.weight is None else self.weight.to(self.head.weight.dtype)
        bias = None if self.bias is None or self.head.bias is None else self.bias.to(self.head.bias.dtype)
        return _LossWithGradients.apply(loss, hidden, self.head.weight, self.head.bias, self.hidden, weight, bias)


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
) -> HeadOutput:
    """Loss of the configured objectives at n tokens, its gradients, and what metrics are made of.

    Without autograd (``torch.no_grad``, or nothing that requires a gradient) no gradient is computed. A NaN of student
    or teacher comes out as NaN in the loss and in the tokens concerned.

    Args:
        hidden: floating [n, d], the input of the student's output layer.
        head: the student's output layer.
        labels: int64 [n], in the shared vocabulary.
        uniforms: float64 [n, K] in [0, 1), a number for each of K draws (``sampling.counter_uniform``). K is
            ``config.samples`` where that is not 0, else any number: draws are then only for metrics, K = 0 skips them.
        token_scale: floating [n], factor of each token's loss in the sum, e.g. 1 / (response tokens of the global
            batch). Tokens of scale 0 are skipped: no cost, no gradient, zeros in all outputs.
        is_rollout: bool [n], True where the label is the student's own.
        teacher: features at ``config.temperature``; None if the objectives need no teacher (sft).
        teacher_head: the teacher's output layer, with the student's ``vocabulary_size``; None without teacher.
        config: objectives, coefficients, temperature and ``token_chunk_size``, which changes memory, not the result.
        exact_kl: also compute both KL divergences, from the teacher's logits.

    Raises:
        ValueError: a teacher is missing or has another vocabulary, K is not ``config.samples``, or exact_kl is asked
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
        )
        return _spread(part, active, len(hidden))

    gradients = _Gradients(hidden, head)
    with torch.no_grad():
        output = _sweep(
            hidden, head, labels, uniforms, token_scale, is_rollout, teacher, teacher_head, config, exact_kl, gradients
        )
    return HeadOutput(**{**vars(output), "loss": gradients.attach(output.loss, hidden)})


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
        if teacher_head.vocabulary_size != head.vocabulary_size:
            raise ValueError(
                f"vocabulary_size is {head.vocabulary_size} of the student and {teacher_head.vocabulary_size} of the "
                "teacher: cut both to the vocabulary they share"
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
    # With a soft cap: its derivative at the label and the draws.
    slopes = None if head.soft_cap is None else empty(n, 1 + draws)

    products = _Products(hidden, head, config.token_chunk_size)
    teacher_products = None
    if whole_teacher and teacher is not None and teacher.hidden is not None and teacher_head is not None:
        teacher_products = _Products(teacher.hidden, teacher_head, config.token_chunk_size)

    for chunk in _chunks(n, config.token_chunk_size):
        matrix = products[chunk]
        teacher_matrix = None if teacher_products is None else teacher_products[chunk]
        for rows in _steps(matrix):
            tokens = slice(chunk.start + rows.start, chunk.start + rows.stop)
            scores, slope = head.all_scores(matrix[rows], temperature)
            log_probs = torch.log_softmax(scores, -1)
            del scores
            # Of the dtype of the products, the probabilities replace them.
            in_place = slope is None and not on_vocabulary and matrix.dtype == head.dtype
            probs = torch.exp(log_probs, out=matrix[rows]) if in_place else log_probs.exp()

            for draw, uniform in enumerate(uniforms[tokens].unbind(1)):
                output.sampled[tokens, draw] = sample_from(probs, uniform)
            output.label_log_probs[tokens] = _take(log_probs, labels[tokens])
            output.sampled_log_probs[tokens] = log_probs.gather(1, output.sampled[tokens])
            if slopes is not None and slope is not None:
                slopes[tokens] = slope.gather(1, torch.cat([labels[tokens].unsqueeze(1), output.sampled[tokens]], 1))

            gradient = probs
            if whole_teacher and teacher is not None and teacher_head is not None:
                teacher_log_probs = teacher[tokens].all_log_probs(
                    None if teacher_matrix is None else teacher_matrix[rows], teacher_head, temperature
                )
                both = VocabularyLogProbs(log_probs, teacher_log_probs, labels[tokens])
                if output.forward_kl is not None and output.reverse_kl is not None:
                    output.forward_kl[tokens] = OBJECTIVES["fkl"](both).value
                    output.reverse_kl[tokens] = OBJECTIVES["rkl_exact"](both).value
                for name, where in on_vocabulary:
                    result = OBJECTIVES[name](both, **config.coefficients(name))
                    here = where[tokens]
                    output.token_losses[tokens] = torch.where(here, result.value, output.token_losses[tokens])
                    output.label_weights[tokens] = torch.where(
                        here, _take(result.weights, labels[tokens]), output.label_weights[tokens]
                    )
                    total = result.weights.sum(-1, keepdim=True)
                    gradient = torch.where(here.unsqueeze(1), total * probs - result.weights, gradient)

            output.entropy[tokens] = -log_probs.clamp_min_(LOG_ZERO).mul_(probs).sum(-1)
            if gradients.needed and not in_place:
                matrix[rows] = gradient if slope is None else gradient * slope

        samples = _token_log_probs(output, chunk, labels, teacher, teacher_head, temperature)
        weighted = [(name, where[chunk]) for name, where in on_tokens]
        label_weights, sampled_weights = token_weights(samples, weighted, config)
        weights = torch.stack([label_weights, *sampled_weights[:draws]], 1)
        log_probs = torch.cat([output.label_log_probs[chunk].unsqueeze(1), output.sampled_log_probs[chunk]], 1)
        # A token that is impossible and has no weight adds nothing.
        terms = torch.where((weights == 0) & (log_probs == -math.inf), 0.0, weights * log_probs)
        factors = weights.sum(1)
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
            token_factors = weights if slopes is None else weights * slopes[chunk]
            gradients.add(
                chunk,
                products.hidden[chunk],
                matrix,
                factors * scale,
                torch.cat([labels[chunk].unsqueeze(1), output.sampled[chunk]], 1),
                token_factors * scale.unsqueeze(1),
            )

    output.loss.copy_((output.token_losses.double() * token_scale.double()).sum())
    return output


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
