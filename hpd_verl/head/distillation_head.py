"""Output layer, sampled tokens, objectives and gradients in one sweep, without the [tokens, vocabulary] logits.

``distillation_head`` takes the student's last hidden states and its output layer, and returns the loss with the
per-token quantities that metrics are made of. Gradients are computed in the same sweep, while a chunk's probabilities
exist; backward only scales them. What keeps it close to the cost of its matrix products:

- The gradient of a position's logits is ``(w_y + w_a) q - w_y onehot(y) - w_a onehot(a)``. The factor, the
  normalisation of q and the one-hots never touch the vocabulary-sized matrix: they go to the [tokens, hidden] side of
  the two gradient products.
- The teacher costs one dot product a token: its hidden state and the log-sum-exp of its logits (``HiddenFeatures``)
  give log p of any token. An objective over the vocabulary makes one product with the teacher's weight instead.
- Products are made for a chunk of tokens (``chunk_size``), everything else for as many rows as a CPU's cache holds, so
  that no float32 copy of a chunk exists. Each logit is exponentiated once.
- With ``compiled``, the elementwise work of objectives over tokens is fused by ``torch.compile``: what an accelerator
  pays for is reading and writing the chunk, which then happens a few times instead of a dozen.

    features = teacher_features(teacher_hidden, teacher_head, labels, temperature=1.0)
    objectives = RowObjectives.of("hpd", forward_coef=0.5)
    out = distillation_head(hidden, head, labels, uniforms, scale, is_rollout, features, objectives)
    out.loss.backward()

Floating results are float32, or float64 where the student's weight is float64.
"""

import math
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from hpd_verl.head.compiling import maybe_compiled
from hpd_verl.head.features import HiddenFeatures, TeacherFeatures, log_softmax
from hpd_verl.head.gradients import Gradients
from hpd_verl.head.output_head import (
    OutputHead,
    Products,
    Scratch,
    chunks,
    default_chunk_size,
    label_logits,
    steps,
    take,
)
from hpd_verl.head.sampling import BlockDraws, block_masses, block_tokens, draw_blocks, draw_tokens
from hpd_verl.head.token_weights import token_weights
from hpd_verl.objectives import LOG_ZERO, RowObjectives, TokenLogProbs, VocabularyLogProbs


@dataclass(frozen=True)
class HeadOutput:
    """Results for n tokens with K sampled tokens each. All but the loss are detached; tokens of scale 0 hold zeros."""

    loss: Tensor
    """Scalar: sum of token_scale * token_losses, differentiable in hidden, weight and bias."""
    label_log_probs: Tensor
    """log q(y), [n]."""
    teacher_label_log_probs: Tensor | None
    """log p(y), [n]; None without teacher."""
    entropy: Tensor
    """The student's entropy in nats, [n]."""
    sampled: Tensor
    """The tokens that the student samples, int64 [n, K]."""
    sampled_log_probs: Tensor
    """log q(a), [n, K]."""
    teacher_sampled_log_probs: Tensor | None
    """log p(a), [n, K]; None without teacher."""
    label_weights: Tensor
    """[n]: of the label, by objectives over tokens and over the vocabulary together."""
    sampled_weights: Tensor
    """[n, K]: of the sampled tokens, by objectives over tokens."""
    token_losses: Tensor
    """[n], before token_scale: ``-w log q`` of objectives over tokens, the value of those over the vocabulary."""
    forward_kl: Tensor | None
    """KL(p || q), [n], with exact_kl."""
    reverse_kl: Tensor | None
    """KL(q || p), [n], with exact_kl."""


def distillation_head(
    hidden: Tensor,
    head: OutputHead,
    labels: Tensor,
    uniforms: Tensor,
    token_scale: Tensor,
    is_rollout: Tensor,
    teacher: TeacherFeatures | None,
    objectives: RowObjectives,
    temperature: float = 1.0,
    chunk_size: int | None = None,
    exact_kl: bool = False,
    compiled: bool = False,
) -> HeadOutput:
    """Loss of objectives at n tokens, its gradients, and what metrics are made of.

    Without autograd (``torch.no_grad``, or nothing that requires a gradient) no gradient is computed. A NaN of student
    or teacher comes out as NaN in the loss and in the tokens concerned.

    Args:
        hidden: floating [n, d], the input of the student's output layer.
        head: the student's output layer.
        labels: int64 [n], in the student's vocabulary.
        uniforms: float64 [n, K] in [0, 1), a number for each of K tokens to sample (``sampling.counter_uniform``). K is
            at least 1 where an objective weighs the sampled token; else they are for metrics, and K = 0 skips them.
        token_scale: floating [n], factor of each token's loss in the sum, e.g. 1 / (response tokens of the global
            batch). Tokens of scale 0 are skipped: no cost, no gradient, zeros in all outputs.
        is_rollout: bool [n], True where the label is the student's own.
        teacher: its features; None if no objective needs a teacher.
        objectives: what is optimised.
        temperature: the student's distillation temperature.
        chunk_size: tokens whose logits exist at once; changes memory, not the result. None chooses by the device.
        exact_kl: also compute both KL divergences, from the teacher's whole distribution.
        compiled: fuse the elementwise work of objectives over tokens by ``torch.compile``: the same within rounding.

    Raises:
        ValueError: a teacher is missing or has a larger vocabulary, no sampled token where it is weighed, or
            exact_kl is asked of a teacher whose distribution is known in part.
    """
    _check(uniforms, head, teacher, objectives, exact_kl)
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
            objectives,
            temperature,
            chunk_size,
            exact_kl,
            compiled,
        )
        return _spread(part, active, len(hidden))
    tokens = _Tokens(labels, uniforms, token_scale, is_rollout)
    gradients = Gradients(hidden, head)
    with torch.no_grad():
        sweep = _Sweep(hidden, head, tokens, teacher, objectives, temperature, chunk_size, exact_kl, gradients)
        output = sweep.over_vocabulary() if objectives.over_vocabulary or exact_kl else sweep.over_tokens(compiled)
    return replace(output, loss=gradients.attach(output.loss, hidden))


def _check(
    uniforms: Tensor, head: OutputHead, teacher: TeacherFeatures | None, objectives: RowObjectives, exact_kl: bool
) -> None:
    if objectives.weighs_sample and uniforms.shape[1] == 0:
        sampling = objectives.names(lambda bound: bound.weighs_sample)
        raise ValueError(f"{sampling}: weighs the sampled token, uniforms has no numbers to draw it with")
    if teacher is None:
        needing = objectives.names(lambda bound: bound.objective.needs_teacher)
        if needing or exact_kl:
            raise ValueError(f"{needing or 'exact_kl'}: give the teacher's features")
        return
    if teacher.vocabulary_size > head.vocabulary_size:
        raise ValueError(
            f"vocabulary_size is {head.vocabulary_size} of the student and {teacher.vocabulary_size} of the teacher: "
            "cut the teacher's to the student's"
        )
    if exact_kl and not isinstance(teacher, HiddenFeatures):
        raise ValueError("exact_kl: needs the teacher's hidden states, top-k features hold a part of p")


def _spread(part: HeadOutput, active: Tensor, count: int) -> HeadOutput:
    """The output for all tokens from that for the active ones."""
    spread: dict[str, Any] = {"loss": part.loss}
    for name, value in vars(part).items():
        if name != "loss" and value is not None:
            value = value.new_zeros(count, *value.shape[1:]).index_copy_(0, active, value)
        spread[name] = value
    return HeadOutput(**spread)


@dataclass(frozen=True)
class _Tokens:
    """The arguments of ``distillation_head`` with an entry a token, beside the models'."""

    labels: Tensor
    uniforms: Tensor
    scale: Tensor
    is_rollout: Tensor


class _Sweep:
    """One sweep over tokens that all count: fills the output, its loss detached, and the gradients."""

    def __init__(
        self,
        hidden: Tensor,
        head: OutputHead,
        tokens: _Tokens,
        teacher: TeacherFeatures | None,
        objectives: RowObjectives,
        temperature: float,
        chunk_size: int | None,
        exact_kl: bool,
        gradients: Gradients,
    ) -> None:
        self.head = head
        self.tokens = tokens
        self.teacher = teacher
        self.temperature = temperature
        self.gradients = gradients
        self.mixtures = objectives.by_row(tokens.is_rollout)
        self.chunk_size = default_chunk_size(chunk_size, hidden.device)
        self.products = Products(hidden, head, self.chunk_size)
        self.whole = None
        if teacher is not None and (objectives.over_vocabulary or exact_kl):
            self.whole = teacher.whole_distribution(head.vocabulary_size, self.chunk_size)
        self.output = self._empty_output(exact_kl)

    def _empty_output(self, exact_kl: bool) -> HeadOutput:
        device = self.tokens.labels.device
        n, draws = self.tokens.uniforms.shape

        def empty(*shape: int) -> Tensor:
            return torch.empty(shape, dtype=self.head.dtype, device=device)

        return HeadOutput(
            loss=empty(),
            label_log_probs=empty(n),
            teacher_label_log_probs=None if self.teacher is None else empty(n),
            entropy=empty(n),
            sampled=torch.empty(n, draws, dtype=torch.int64, device=device),
            sampled_log_probs=empty(n, draws),
            teacher_sampled_log_probs=None if self.teacher is None else empty(n, draws),
            label_weights=empty(n),
            sampled_weights=empty(n, draws),
            token_losses=empty(n),
            forward_kl=empty(n) if exact_kl else None,
            reverse_kl=empty(n) if exact_kl else None,
        )

    def over_tokens(self, compiled: bool) -> HeadOutput:
        """The sweep where nothing needs the teacher's whole distribution."""
        head, output, temperature = self.head, self.output, self.temperature
        labels, uniforms = self.tokens.labels, self.tokens.uniforms
        scratch = None if compiled else Scratch(self.products.buffer, head.dtype, count=2)
        for chunk in chunks(len(labels), self.chunk_size):
            matrix = self.products[chunk]
            logits = label_logits(matrix, head, labels[chunk], temperature)
            sums, narrowed = [], []
            for rows in steps(matrix, compiled):
                tokens = slice(chunk.start + rows.start, chunk.start + rows.stop)
                buffers = None if scratch is None else scratch.rows(rows.stop - rows.start)
                exps = None if buffers is None else buffers[1]
                sums.append(_Sums(*maybe_compiled(_sums, compiled)(matrix[rows], head, temperature, buffers)))
                if uniforms.shape[1]:
                    narrowed.append(_narrow(matrix[rows], exps, sums[-1], uniforms[tokens], head, temperature))
                if self.gradients.needed:
                    # From here on the matrix holds exps, which the mass normalises in the gradients' factors.
                    maybe_compiled(_exponentiate, compiled)(matrix[rows], head, temperature, sums[-1].top, exps)
            mass = torch.cat([each.masses.sum(-1, dtype=torch.float64) for each in sums])
            log_mass = mass.log().to(head.dtype)
            output.label_log_probs[chunk] = logits - torch.cat([each.top for each in sums]) - log_mass
            output.entropy[chunk] = log_mass - torch.cat([each.weighted for each in sums]) / mass
            if narrowed:
                output.sampled[chunk], sampled_masses = draw_tokens(_concatenate(narrowed), head.vocabulary_size)
                output.sampled_log_probs[chunk] = sampled_masses.log() - log_mass.unsqueeze(1)
            if self.teacher is not None:
                self._teacher_of_tokens(chunk, self.teacher[chunk])
            weights = self._weigh_tokens(chunk)
            self._add_gradients(chunk, matrix, weights, weights.sum(1) / mass.to(head.dtype))
        return self._with_loss()

    def over_vocabulary(self) -> HeadOutput:
        """The sweep with the whole distributions of student and teacher, of a step's rows at a time."""
        head, output = self.head, self.output
        scratch = Scratch(self.products.buffer, head.dtype, count=3)
        over_tokens = any(mixture.over("token") for mixture, _ in self.mixtures)
        for chunk in chunks(len(self.tokens.labels), self.chunk_size):
            matrix = self.products[chunk]
            if self.whole is not None:
                self.whole.start(chunk)
            weighted = []
            for rows in steps(matrix):
                tokens = slice(chunk.start + rows.start, chunk.start + rows.stop)
                student, probs, spare = scratch.rows(rows.stop - rows.start)
                logits = head.logits(matrix[rows], self.temperature, out=student)
                slope = head.slope(logits, self.temperature)
                log_softmax(logits, student, probs)
                if self.whole is not None:
                    teacher, teacher_probs = self.whole.rows(tokens)
                else:
                    teacher = teacher_probs = student.new_full((), math.nan).expand_as(student)
                self._student_of_tokens(tokens, student, probs)
                # An impossible token has a finite logarithm from here on: its terms are 0.
                student.clamp_min_(LOG_ZERO)
                output.entropy[tokens] = -torch.mul(probs, student, out=spare).sum(-1)
                both = VocabularyLogProbs(student, teacher, self.tokens.labels[tokens], probs, teacher_probs)
                if self.whole is not None:
                    self._teacher_of_distribution(tokens, teacher)
                if output.forward_kl is not None and output.reverse_kl is not None:
                    difference = torch.sub(teacher, student, out=spare)
                    output.reverse_kl[tokens] = -(difference * probs).sum(-1)
                    output.forward_kl[tokens] = difference.mul_(teacher_probs).sum(-1)
                total = torch.zeros_like(output.entropy[tokens])
                if over_tokens:
                    weighted.append(self._weigh_tokens(tokens))
                    total = weighted[-1].sum(1)
                else:
                    for name in ("label_weights", "sampled_weights", "token_losses"):
                        getattr(output, name)[tokens] = 0
                weights = self._weigh_vocabulary(tokens, both)
                if self.gradients.needed:
                    if weights is not None:
                        total = total + weights.sum(-1)
                    gradient = torch.mul(probs, total.unsqueeze(1), out=spare)
                    gradient = gradient if weights is None else gradient.sub_(weights)
                    matrix[rows] = gradient if slope is None else gradient.mul_(slope)
            one_hots = torch.cat(weighted) if over_tokens else None
            self._add_gradients(chunk, matrix, one_hots, torch.ones_like(output.entropy[chunk]))
        return self._with_loss()

    def _student_of_tokens(self, tokens: slice, log_probs: Tensor, probs: Tensor) -> None:
        """Sampled tokens, and the student's log-probs of them and of labels, from its distributions [n, V]."""
        output, uniforms = self.output, self.tokens.uniforms[tokens]
        output.label_log_probs[tokens] = take(log_probs, self.tokens.labels[tokens])
        if uniforms.shape[1]:
            draws = _narrow_masses(probs, block_masses(probs), uniforms, self.head.vocabulary_size)
            output.sampled[tokens], _ = draw_tokens(draws, self.head.vocabulary_size)
            output.sampled_log_probs[tokens] = log_probs.gather(1, output.sampled[tokens])

    def _teacher_of_distribution(self, tokens: slice, log_probs: Tensor) -> None:
        """The teacher's log-probs of labels and sampled tokens, from its distributions [n, V]."""
        output = self.output
        assert output.teacher_label_log_probs is not None
        assert output.teacher_sampled_log_probs is not None
        assert self.teacher is not None
        known = self.teacher[tokens].tensors.get("label_log_probs")  # exact, also where the distribution is not
        output.teacher_label_log_probs[tokens] = take(log_probs, self.tokens.labels[tokens]) if known is None else known
        output.teacher_sampled_log_probs[tokens] = log_probs.gather(1, output.sampled[tokens])

    def _teacher_of_tokens(self, tokens: slice, teacher: TeacherFeatures) -> None:
        """The teacher's log-probs of labels and sampled tokens."""
        output, labels = self.output, self.tokens.labels[tokens]
        assert output.teacher_label_log_probs is not None
        assert output.teacher_sampled_log_probs is not None
        known = teacher.tensors.get("label_log_probs")
        output.teacher_label_log_probs[tokens] = (
            teacher.log_probs(labels.unsqueeze(1)).squeeze(1) if known is None else known
        )
        output.teacher_sampled_log_probs[tokens] = teacher.log_probs(output.sampled[tokens])

    def _weigh_tokens(self, tokens: slice) -> Tensor:
        """Weights [n, 1 + K] of labels and sampled tokens by the objectives over tokens; fills in those outputs."""
        output = self.output
        label_weights, sampled_weights = token_weights(
            self._token_log_probs(tokens), [(mixture, rows[tokens]) for mixture, rows in self.mixtures]
        )
        draws = output.sampled.shape[1]
        weights = torch.stack([label_weights, *sampled_weights[:draws]], 1)
        log_probs = torch.cat([output.label_log_probs[tokens].unsqueeze(1), output.sampled_log_probs[tokens]], 1)
        # A token that is impossible and has no weight adds nothing.
        terms = torch.where((weights == 0) & (log_probs == -math.inf), 0.0, weights * log_probs)
        output.label_weights[tokens] = label_weights
        output.sampled_weights[tokens] = weights[:, 1:]
        output.token_losses[tokens] = -terms.sum(1)
        return weights

    def _token_log_probs(self, tokens: slice) -> list[TokenLogProbs]:
        """The input of objectives over tokens for each sampled token; without any, one entry in which it is the label.

        Without teacher its log-probs are NaN.
        """
        output, labels = self.output, self.tokens.labels[tokens]
        label, sampled = output.label_log_probs[tokens], output.sampled[tokens]
        teacher_label, teacher_sampled = output.teacher_label_log_probs, output.teacher_sampled_log_probs
        if teacher_label is None or teacher_sampled is None:
            teacher_label = torch.full_like(output.label_log_probs, math.nan)
            teacher_sampled = torch.full_like(output.sampled_log_probs, math.nan)
        teacher_label, teacher_sampled = teacher_label[tokens], teacher_sampled[tokens]
        if sampled.shape[1] == 0:
            return [TokenLogProbs(label, teacher_label, label, teacher_label, torch.ones_like(label, dtype=torch.bool))]
        return [
            TokenLogProbs(
                label,
                teacher_label,
                output.sampled_log_probs[tokens, draw],
                teacher_sampled[:, draw],
                sampled[:, draw] == labels,
            )
            for draw in range(sampled.shape[1])
        ]

    def _weigh_vocabulary(self, tokens: slice, both: VocabularyLogProbs) -> Tensor | None:
        """Weights [n, V] by the objectives over the vocabulary, None without one; adds their values to the losses."""
        total: Tensor | None = None
        for mixture, rows in self.mixtures:
            here = rows[tokens] if len(self.mixtures) > 1 else None
            for bound, factor in mixture.over("vocabulary"):
                result = bound(both)
                weights = result.weights if factor == 1 else result.weights * factor
                value = result.value if factor == 1 else result.value * factor
                if here is not None:
                    weights, value = torch.where(here.unsqueeze(1), weights, 0.0), torch.where(here, value, 0.0)
                self.output.token_losses[tokens] += value
                total = weights if total is None else total + weights
        if total is not None:
            self.output.label_weights[tokens] += take(total, both.labels)
        return total

    def _add_gradients(self, chunk: slice, matrix: Tensor, weights: Tensor | None, factors: Tensor) -> None:
        """Take in ``factors * matrix - weights onehots`` of labels and sampled tokens, times the tokens' scale."""
        if not self.gradients.needed:
            return
        head, hidden = self.head, self.products.hidden[chunk]
        scale = self.tokens.scale[chunk].to(head.dtype) * (head.scale / self.temperature)
        chosen = torch.cat([self.tokens.labels[chunk].unsqueeze(1), self.output.sampled[chunk]], 1)
        if weights is None:
            chosen, weights = chosen[:, :0], factors.new_empty(len(factors), 0)
        elif head.soft_cap is not None:
            slope = head.slope(head.token_logits(hidden, chosen, self.temperature), self.temperature)
            assert slope is not None
            weights = weights * slope
        self.gradients.add(chunk, hidden, matrix, factors * scale, chosen, weights * scale.unsqueeze(1))

    def _with_loss(self) -> HeadOutput:
        self.output.loss.copy_((self.output.token_losses.double() * self.tokens.scale.double()).sum())
        return self.output


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
    products: Tensor, head: OutputHead, temperature: float, scratch: list[Tensor] | None
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


def _narrow(
    products: Tensor, exps: Tensor | None, sums: _Sums, uniforms: Tensor, head: OutputHead, temperature: float
) -> BlockDraws:
    """Draws [n, K] narrowed down to blocks, from the sums of products [n, V] and, where they were kept, the exps."""
    if exps is not None:
        return _narrow_masses(exps, sums.masses, uniforms, head.vocabulary_size)
    block, target = draw_blocks(sums.masses, uniforms)
    tokens, beyond = block_tokens(block, head.vocabulary_size)
    inside = tokens.flatten(1)
    masses = torch.exp(head.logits(products.gather(1, inside), temperature, inside) - sums.top.unsqueeze(1))
    return BlockDraws(block, target, masses.view_as(tokens).masked_fill_(beyond, 0.0))


def _narrow_masses(masses: Tensor, sums: Tensor, uniforms: Tensor, vocabulary_size: int) -> BlockDraws:
    """Draws [n, K] narrowed down to blocks, from masses [n, V] and their sums over blocks."""
    block, target = draw_blocks(sums, uniforms)
    tokens, beyond = block_tokens(block, vocabulary_size)
    inside = masses.gather(1, tokens.flatten(1)).view_as(tokens)
    return BlockDraws(block, target, inside.masked_fill_(beyond, 0.0))


def _concatenate(draws: list[BlockDraws]) -> BlockDraws:
    return BlockDraws(
        **{part.name: torch.cat([getattr(each, part.name) for each in draws]) for part in fields(BlockDraws)}
    )
