"""Output layer, sampled tokens, objectives and gradients in one sweep, without the [tokens, vocabulary] logits.

``distillation_head`` takes the student's last hidden states and its output layer, and returns the loss with the
per-token quantities that metrics are made of. Gradients are computed in the same sweep, while a chunk's probabilities
exist; backward only scales them. What keeps it close to the cost of its matrix products:

- All that is computed of a chunk of products, [tokens, vocabulary], is one body of two passes (``bodies.py``), for
  every objective. Compiled, they are a few kernels that load a logit three times and store it once; uncompiled they run
  on as many rows as a CPU's cache holds, so that no float32 copy of a chunk exists.
- Between the passes there are tensors of [tokens] only: draws, and weights of the label and of sampled tokens.
- The gradient of a position's logits is ``(w_y + w_a) q - w_y onehot(y) - w_a onehot(a)`` for objectives over tokens.
  The factor and the one-hots never touch the vocabulary-sized matrix: they go to the [tokens, hidden] side of the two
  gradient products.
- The teacher then costs one dot product a token: its hidden state and the log-sum-exp of its logits
  (``HiddenFeatures``) give log p of any token. An objective over the vocabulary makes one product with the teacher's
  weight instead.

    features = teacher_features(teacher_hidden, teacher_head, labels, temperature=1.0)
    objectives = RowObjectives.of("hpd", forward_coef=0.5)
    out = distillation_head(hidden, head, labels, uniforms, scale, is_rollout, features, objectives)
    out.loss.backward()

Floating results are float32, or float64 where the student's weight is float64.
"""

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from hpd_verl.head.bodies import Biases, Form, Rows, Statistics, Sums, parts_of
from hpd_verl.head.features import (
    HiddenFeatures,
    TeacherFeatures,
    TeacherProducts,
    WholeDistribution,
    log_sums_exp,
)
from hpd_verl.head.gradients import Gradients
from hpd_verl.head.output_head import (
    OutputHead,
    Products,
    chunks,
    default_chunk_size,
    keep_freed_memory,
    label_logits,
    steps,
)
from hpd_verl.head.passes import Passes
from hpd_verl.head.prefix import PrefixSums
from hpd_verl.head.sampling import BlockDraws, block_tokens, draw_blocks, draw_tokens
from hpd_verl.head.token_weights import token_weights
from hpd_verl.objectives import LOG_ZERO, RowObjectives, TokenContext, TokenLogProbs


@dataclass(frozen=True)
class HeadOutput:
    """Results for n tokens and the K sampled of each, 1 or 0. All but the loss are detached; of scale 0: zeros."""

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
    context: TokenContext | None = None,
    row: Tensor | None = None,
) -> HeadOutput:
    """Loss of objectives at n tokens, its gradients, and what metrics are made of.

    Without autograd (``torch.no_grad``, or nothing that requires a gradient) no gradient is computed. A NaN of student
    or teacher comes out as NaN in the loss and in the tokens concerned.

    Args:
        hidden: floating [n, d], the input of the student's output layer.
        head: the student's output layer.
        labels: int64 [n], in the student's vocabulary.
        uniforms: float64 [n, K] in [0, 1), what a token is sampled with (``sampling.counter_uniform``). K is 1 where an
            objective weighs the sampled token; else that is for metrics, and K = 0 skips it.
        token_scale: floating [n], factor of each token's loss in the sum, e.g. 1 / (response tokens of the global
            batch). Tokens of scale 0 are skipped: no cost, no gradient, zeros in all outputs.
        is_rollout: bool [n], True where the label is the student's own.
        teacher: its features; None if no objective needs a teacher.
        objectives: what is optimised.
        temperature: the student's distillation temperature.
        chunk_size: tokens whose logits exist at once; changes memory, not the result. None chooses by the device.
        exact_kl: also compute both KL divergences, from the teacher's whole distribution.
        compiled: fuse what is computed of the logits by ``torch.compile``: the same within rounding.
        context: what objectives need of each token, but for sums over earlier tokens, which are taken here, over
            tokens that count; None where they need nothing.
        row: int64 [n], the row of each token, whose tokens stand together and in order; for those sums.

    Raises:
        ValueError: a teacher is missing or has a larger vocabulary, no sampled token where it is weighed or more than
            one, the context does not hold what an objective needs, or exact_kl is asked of a teacher whose distribution
            is known in part.
    """
    _check(uniforms, head, teacher, objectives, exact_kl)
    _check_context(objectives, context, row)
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
            None if context is None else context.at(active),
            None if row is None else row[active],
        )
        return _spread(part, active, len(hidden))
    tokens = _Tokens(labels, uniforms, token_scale, is_rollout, context, row)
    gradients = Gradients(hidden, head)
    with torch.no_grad():
        sweep = _Sweep(
            hidden, head, tokens, teacher, objectives, temperature, chunk_size, exact_kl, compiled, gradients
        )
        output = sweep.run()
    return replace(output, loss=gradients.attach(output.loss, hidden))


def _check(
    uniforms: Tensor, head: OutputHead, teacher: TeacherFeatures | None, objectives: RowObjectives, exact_kl: bool
) -> None:
    if uniforms.shape[1] > 1:
        raise ValueError(f"uniforms: {uniforms.shape[1]} numbers a token, and one token is sampled at a position")
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


def _check_context(objectives: RowObjectives, context: TokenContext | None, row: Tensor | None) -> None:
    missing = (context or TokenContext()).missing(objectives.needs)
    if "prefix" in objectives.needs and row is None:
        missing = sorted({*missing, "prefix"})
    if missing:
        needing = objectives.names(lambda bound: bool(bound.objective.needs & set(missing)))
        raise ValueError(f"{needing}: needs {', '.join(missing)}, which the context does not hold")


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
    context: TokenContext | None
    row: Tensor | None


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
        compiled: bool,
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
        over_vocabulary = objectives.over_vocabulary
        self.whole: WholeDistribution | None = None
        if teacher is not None and (over_vocabulary or exact_kl):
            self.whole = teacher.whole_distribution(self.chunk_size)
        self.form = Form(
            student=head.scaling(temperature),
            teacher=None if self.whole is None else self.whole.scaling,
            parts=tuple(parts_of(mixture) for mixture, _ in self.mixtures) if over_vocabulary else (),
            exact_kl=exact_kl,
        )
        biases = Biases(head.used_bias, None if self.whole is None else self.whole.bias)
        self.passes = Passes(self.form, biases, compiled)
        self.has_token_parts = any(mixture.over("token") for mixture, _ in self.mixtures)
        self.has_one_hots = self.has_token_parts
        self.output = self._empty_output(exact_kl)
        self.vocabulary_needs = frozenset[str]().union(
            *(part.objective.needs for parts in self.form.parts for part in parts)
        )
        self.context = None if tokens.context is None else tokens.context.to(head.dtype)
        self.prefix: PrefixSums | None = None
        if "prefix" in objectives.needs:
            assert self.context is not None
            self.prefix = PrefixSums()
            self.context = self.context._replace(
                prefix_teacher=torch.full_like(self.output.entropy, math.nan),
                prefix_behaviour=torch.full_like(self.output.entropy, math.nan),
            )

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

    def run(self) -> HeadOutput:
        """The output, its loss detached."""
        output, draws = self.output, self.tokens.uniforms.shape[1]
        keep_freed_memory(self.tokens.labels.device)
        for chunk in chunks(len(self.tokens.labels), self.chunk_size):
            matrix = self.products[chunk]
            if self.whole is not None:
                self.whole.start(chunk)
            one_hots = output.entropy.new_zeros(len(matrix), 1 + draws)
            few = self.whole is not None and self.whole.fills_memory
            for rows in steps(matrix, whole=self.passes.compiled and not few):
                tokens = slice(chunk.start + rows.start, chunk.start + rows.stop)
                self._take_rows(tokens, matrix[rows], one_hots[rows])
            if not self.form.parts:
                if self.teacher is not None and self.whole is None:
                    self._teacher_of_tokens(chunk, self.teacher[chunk])
                self._sum_prefixes(chunk)
                one_hots = self._weigh_tokens(chunk)
            self._add_gradients(chunk, matrix, one_hots)
        output.loss.copy_((output.token_losses.double() * self.tokens.scale.double()).sum())
        return output

    def _take_rows(self, tokens: slice, matrix: Tensor, one_hots: Tensor) -> None:
        """Both passes over products [n, V], which become gradients, and what is between them."""
        output, labels = self.output, self.tokens.labels[tokens]
        rows = Rows(
            student=matrix,
            labels=labels,
            is_rollout=self.tokens.is_rollout[tokens],
            student_label=label_logits(matrix, self.head, labels, self.temperature),
        )
        if self.whole is not None:
            rows = self._with_teacher(rows, tokens, self.whole)
        if self.vocabulary_needs:
            assert self.context is not None
            if "prefix" in self.vocabulary_needs:
                rows = self._with_label_log_probs(rows, tokens)
                self._sum_prefixes(tokens)
            rows = rows._replace(context=self.context.only(self.vocabulary_needs).at(tokens))
        sums, kept = self.passes.read(rows)
        output.label_log_probs[tokens] = rows.student_label - sums.student.log_sum_exp
        output.entropy[tokens] = sums.student.entropy
        self._draw(tokens, matrix, sums.student)
        if self.whole is not None:
            assert rows.teacher is not None
            assert sums.teacher_log_sum_exp is not None
            self._teacher_of_distribution(tokens, rows, sums.teacher_log_sum_exp)
        if output.forward_kl is not None and output.reverse_kl is not None:
            assert sums.forward_kl is not None
            assert sums.reverse_kl is not None
            output.forward_kl[tokens], output.reverse_kl[tokens] = sums.forward_kl, sums.reverse_kl
        rows = rows._replace(student_log_sum_exp=sums.student.log_sum_exp, teacher_log_sum_exp=sums.teacher_log_sum_exp)
        if self.form.parts:
            if "prefix" not in self.vocabulary_needs:
                self._sum_prefixes(tokens)
            rows = rows._replace(total=self._weigh_vocabulary(tokens, sums, one_hots))
        if self.gradients.needed:
            self.passes.write(rows, kept)

    def _with_teacher(self, rows: Rows, tokens: slice, whole: WholeDistribution) -> Rows:
        """The rows with the teacher's side: products, label, and what objectives want to know beforehand."""
        assert self.teacher is not None
        products, normaliser = whole.rows(tokens), whole.log_sum_exp(tokens)
        teacher = TeacherProducts(products, whole.scaling, whole.bias, normaliser, self.passes.compiled)
        statistics = tuple(tuple(part.row_statistic(teacher) for part in parts) for parts in self.form.parts)
        return rows._replace(
            teacher=products,
            teacher_label=teacher.logits(rows.labels.unsqueeze(1)).squeeze(1),
            teacher_log_sum_exp=teacher.known_log_sum_exp,
            row_statistics=statistics,
        )

    def _with_label_log_probs(self, rows: Rows, tokens: slice) -> Rows:
        """Fill in the outputs of the labels' log-probs, which objectives need before the first pass over the products:
        one more load of each."""
        compiled, biases = self.passes.compiled, self.passes.biases
        normaliser = log_sums_exp(rows.student, self.form.student, biases.student, compiled)
        self.output.label_log_probs[tokens] = rows.student_label - normaliser
        if self.whole is None:
            return rows
        assert rows.teacher is not None
        known = rows.teacher_log_sum_exp
        if known is None:
            known = log_sums_exp(rows.teacher, self.whole.scaling, self.whole.bias, compiled)
        self._teacher_of_label(tokens, rows, known)
        return rows._replace(teacher_log_sum_exp=known)

    def _sum_prefixes(self, tokens: slice) -> None:
        """Fill in the context's sums over earlier tokens, by the labels' log-probs."""
        if self.prefix is None:
            return
        context, output = self.context, self.output
        assert context is not None
        assert self.tokens.row is not None
        student = output.label_log_probs[tokens].clamp_min(LOG_ZERO)
        unknown = torch.full_like(student, math.nan)
        teacher = output.teacher_label_log_probs
        values = [
            unknown if teacher is None else teacher[tokens].clamp_min(LOG_ZERO) - student,
            unknown if context.behaviour is None else student - context.behaviour[tokens].clamp_min(LOG_ZERO),
        ]
        sums = self.prefix.take(self.tokens.row[tokens], torch.stack(values, 1)).to(student.dtype)
        context.prefix_teacher[tokens], context.prefix_behaviour[tokens] = sums.unbind(1)

    def _draw(self, tokens: slice, matrix: Tensor, student: Statistics) -> None:
        """Tokens that the student samples, from its products [n, V]."""
        output, uniforms = self.output, self.tokens.uniforms[tokens]
        if not uniforms.shape[1]:
            return
        block, target = draw_blocks(student.masses, uniforms)
        inside, beyond = block_tokens(block, self.head.vocabulary_size)
        chosen = inside.flatten(1)
        logits = self.head.logits(matrix.gather(1, chosen), self.temperature, chosen)
        masses = (logits - student.log_sum_exp.unsqueeze(1)).exp_().view_as(inside).masked_fill_(beyond, 0.0)
        output.sampled[tokens], sampled = draw_tokens(BlockDraws(block, target, masses), self.head.vocabulary_size)
        output.sampled_log_probs[tokens] = sampled.log()

    def _teacher_of_distribution(self, tokens: slice, rows: Rows, normaliser: Tensor) -> None:
        """The teacher's log-probs of labels and sampled tokens, from its products [n, V]."""
        output, whole = self.output, self.whole
        assert whole is not None
        assert rows.teacher is not None
        assert output.teacher_sampled_log_probs is not None
        self._teacher_of_label(tokens, rows, normaliser)
        logits = TeacherProducts(rows.teacher, whole.scaling, whole.bias).logits(output.sampled[tokens])
        output.teacher_sampled_log_probs[tokens] = (logits - normaliser.unsqueeze(1)).clamp_min_(LOG_ZERO)

    def _teacher_of_label(self, tokens: slice, rows: Rows, normaliser: Tensor) -> None:
        assert rows.teacher_label is not None
        assert self.output.teacher_label_log_probs is not None
        assert self.teacher is not None
        known = self.teacher[tokens].tensors.get("label_log_probs")  # exact, also where the distribution is not
        if known is None:
            known = (rows.teacher_label - normaliser).clamp_min_(LOG_ZERO)
        self.output.teacher_label_log_probs[tokens] = known

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

    def _weigh_vocabulary(self, tokens: slice, sums: Sums, one_hots: Tensor) -> Tensor:
        """Sum of all weights, [n]; fills in those of one-hots, [n, 1 + K], and the outputs of weights and losses."""
        output = self.output
        assert sums.total is not None
        assert sums.value is not None
        assert sums.label_weight is not None
        total = sums.total
        if self.has_token_parts:
            one_hots.copy_(self._weigh_tokens(tokens))
            total = total + one_hots.sum(1)
        else:
            for each in (output.label_weights, output.sampled_weights, output.token_losses):
                each[tokens] = 0
        if sums.label is not None:
            one_hots[:, 0] += sums.label
            self.has_one_hots = True
        output.label_weights[tokens] += sums.label_weight
        output.token_losses[tokens] += sums.value
        return total

    def _weigh_tokens(self, tokens: slice) -> Tensor:
        """Weights [n, 1 + K] of labels and sampled tokens by the objectives over tokens; fills in those outputs."""
        output = self.output
        log_probs = self._token_log_probs(tokens)
        context = None if self.context is None else self.context.at(tokens)
        found = token_weights(log_probs, [(mixture, rows[tokens]) for mixture, rows in self.mixtures], context)
        weights = torch.stack([found.label, found.sampled], 1)[:, : 1 + output.sampled.shape[1]]
        output.label_weights[tokens] = found.label
        output.sampled_weights[tokens] = weights[:, 1:]
        output.token_losses[tokens] = found.loss(log_probs)
        return weights

    def _token_log_probs(self, tokens: slice) -> TokenLogProbs:
        """The input of objectives over tokens; without a sampled token, it is the label.

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
            return TokenLogProbs(label, teacher_label, label, teacher_label, torch.ones_like(label, dtype=torch.bool))
        sampled_log_probs = output.sampled_log_probs[tokens].squeeze(1)
        return TokenLogProbs(
            label, teacher_label, sampled_log_probs, teacher_sampled.squeeze(1), sampled.squeeze(1) == labels
        )

    def _add_gradients(self, chunk: slice, matrix: Tensor, one_hots: Tensor) -> None:
        """Take in the gradient of products that ``write`` has left, [n, V], less one-hots [n, 1 + K] of labels and
        sampled tokens, times the tokens' scale."""
        if not self.gradients.needed:
            return
        head, hidden = self.head, self.products.hidden[chunk]
        scale = self.tokens.scale[chunk].to(head.dtype) * (head.scale / self.temperature)
        factors = scale if self.form.parts else scale * one_hots.sum(1)
        chosen = torch.cat([self.tokens.labels[chunk].unsqueeze(1), self.output.sampled[chunk]], 1)
        if not self.has_one_hots:
            chosen, one_hots = chosen[:, :0], one_hots[:, :0]
        elif not self.has_token_parts:
            chosen, one_hots = chosen[:, :1], one_hots[:, :1]
        if head.soft_cap is not None and chosen.shape[1]:
            slope = self.form.student.slope(head.token_logits(hidden, chosen, self.temperature))
            assert slope is not None
            one_hots = one_hots * slope
        self.gradients.add(chunk, hidden, matrix, factors, chosen, one_hots * scale.unsqueeze(1))
