"""What is computed of the products of student and teacher, [n, V] each, in two passes over them.

``read`` sums over each row; from its results draws and weights of single tokens follow, on tensors of [n]; ``write``
then puts the gradient in the place of the student's products. Both are pure functions of tensors and a ``Form``:
``torch.compile`` makes each of them a few kernels, which load a logit twice in ``read`` and once in ``write`` and take
no memory of [n, V]. Uncompiled, the same functions run on a few rows at a time, and ``write`` takes over what ``read``
computed.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from hpd_verl.head.output_head import Scaling, take
from hpd_verl.head.sampling import BLOCK, block_masses, blocks
from hpd_verl.objectives import LOG_ZERO, Mixture, Objective, TeacherRows, TokenContext, VocabularyLogProbs

_HELD = 64  # logits that a compiled kernel holds at once; of longer parts it loads each twice


class Part(NamedTuple):
    """An objective over the vocabulary, with its parameters' values and its factor in a mixture."""

    objective: Objective
    arguments: tuple[tuple[str, Any], ...]
    factor: float

    def row_statistic(self, teacher: TeacherRows) -> Tensor | None:
        """What the function must know of each row beforehand, [n, 1]; None for most."""
        statistic = self.objective.row_statistic
        return None if statistic is None else statistic(teacher, **dict(self.arguments))


def parts_of(mixture: Mixture) -> tuple[Part, ...]:
    """The parts over the vocabulary."""
    return tuple(
        Part(bound.objective, tuple(bound.arguments.items()), factor) for bound, factor in mixture.over("vocabulary")
    )


@dataclass(frozen=True)
class Form:
    """What the passes are made for; hashable."""

    student: Scaling
    teacher: Scaling | None = None
    """None where nothing needs the teacher's whole distribution."""
    parts: tuple[tuple[Part, ...], ...] = ()
    """Objectives over the vocabulary of all rows, or of demonstrations and of rollouts; none: the gradient is that of
    one token's log-prob."""
    exact_kl: bool = False

    @property
    def whole(self) -> bool:
        """Whether whole distributions are needed."""
        return bool(self.parts) or self.exact_kl


class Rows(NamedTuple):
    """The tensors of a pass with an entry a token."""

    student: Tensor
    """Products, [n, V]; ``write`` overwrites them."""
    labels: Tensor
    """int64 [n]."""
    is_rollout: Tensor
    """bool [n]."""
    student_label: Tensor
    """Logits over temperature of the labels, [n]."""
    teacher: Tensor | None = None
    """Products, [n, V of the teacher]."""
    teacher_label: Tensor | None = None
    """Logits over temperature of the labels, [n], -inf beyond the teacher's vocabulary."""
    teacher_log_sum_exp: Tensor | None = None
    """[n]; None in ``read``: computed."""
    student_log_sum_exp: Tensor | None = None
    """[n]; in ``write``."""
    row_statistics: tuple[tuple[Tensor | None, ...], ...] = ()
    """[n, 1] of the parts that have one."""
    context: TokenContext | None = None
    """[n]; what objectives over the vocabulary need."""
    total: Tensor | None = None
    """[n]; in ``write``, with objectives over the vocabulary: the sum of all weights, of single tokens too."""


class Biases(NamedTuple):
    """The output layers' biases, [V]."""

    student: Tensor | None = None
    teacher: Tensor | None = None


class Statistics(NamedTuple):
    """Of a row's logits."""

    log_sum_exp: Tensor
    """[n]"""
    entropy: Tensor
    """[n]"""
    masses: Tensor
    """Probabilities of the vocabulary's blocks, [n, blocks]; see ``sampling.blocks``."""


class Sums(NamedTuple):
    """What ``read`` finds of each row."""

    student: Statistics
    teacher_log_sum_exp: Tensor | None
    """[n]"""
    value: Tensor | None
    """The objectives' values, [n]; this and the next three are None without objectives over the vocabulary."""
    total: Tensor | None
    """Sum of all weights, [n]."""
    label: Tensor | None
    """The label's weight that is kept apart from the others, [n]; None where no objective has one."""
    label_weight: Tensor | None
    """The label's whole weight, [n]."""
    forward_kl: Tensor | None
    reverse_kl: Tensor | None


class Weighed(NamedTuple):
    """The sum of all objectives' results."""

    weights: Tensor
    """[n, V]"""
    value: Tensor
    """[n]"""
    label: Tensor | None
    """[n]"""


class Kept(NamedTuple):
    """What ``read`` leaves for ``write``."""

    probs: Tensor
    """q, [n, V]"""
    weighed: Weighed | None


class Distribution(NamedTuple):
    """Of one model."""

    log_sum_exp: Tensor
    """[n]"""
    log_probs: Tensor
    """[n, V], at least ``LOG_ZERO``."""
    probs: Tensor
    """[n, V]"""
    masses: Tensor | None
    """Probabilities of the vocabulary's blocks, [n, blocks], where the log-sum-exp was not known."""


def statistics(scaling: Scaling, products: Tensor, bias: Tensor | None) -> Statistics:
    """Log-sum-exp, entropy and block masses of the rows of products [n, V], to be compiled.

    Part by part of a row, so that one load of a logit serves all three. A NaN in a row is one in its results; an
    impossible token, of logit -inf, adds nothing.
    """
    each = [_of_parts(part) for part in blocks(scaling.logits(products, bias), _HELD)]
    top, mass, weighted = (torch.cat(parts, 1) for parts in zip(*each, strict=True))
    highest = top.amax(-1, keepdim=True)
    # Not further below than an impossible token: its mass is 0, and 0 times -inf would be NaN.
    relative = (top - highest).clamp_min(LOG_ZERO)
    factor = relative.exp()
    mass = mass * factor
    total = mass.sum(-1, keepdim=True, dtype=torch.float64)
    log_total = total.log().to(mass.dtype)
    total = total.to(mass.dtype)
    mean = (weighted * factor + mass * relative).sum(-1, keepdim=True) / total
    parts = BLOCK // _HELD
    masses = F.pad(mass, (0, -mass.shape[1] % parts)).unflatten(1, (-1, parts)).sum(-1)
    return Statistics((highest + log_total).squeeze(1), (log_total - mean).squeeze(1), masses / total)


def _of_parts(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of logits [n, parts, size] the largest, the sum of ``exp(logit - largest)``, and of that times
    ``logit - largest``: [n, parts] each."""
    # A part of impossible tokens has a finite largest one, too.
    top = logits.amax(-1, keepdim=True).clamp_min(torch.finfo(logits.dtype).min)
    shifted = logits - top
    exps = shifted.exp()
    return top.squeeze(-1), exps.sum(-1), shifted.clamp_min_(LOG_ZERO).mul_(exps).sum(-1)


def _exponentials(logits: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Uncompiled: a row's largest logit [n, 1], logits [n, V] less it, their exponentials, and the sums of these over
    blocks, [n, blocks]."""
    top = logits.amax(-1, keepdim=True)
    shifted = logits - top
    exps = shifted.exp()
    return top, shifted, exps, block_masses(exps)


def log_sum_exp(scaling: Scaling, products: Tensor, bias: Tensor | None) -> Tensor:
    """Of the rows of products [n, V], as ``read`` finds it: a student that is its teacher has the same log-probs."""
    if torch.compiler.is_compiling():
        return statistics(scaling, products, bias).log_sum_exp
    top, _, _, masses = _exponentials(scaling.logits(products, bias))
    return top.squeeze(1) + masses.sum(-1, dtype=torch.float64).log().to(top.dtype)


def _distribution(scaling: Scaling, products: Tensor, bias: Tensor | None, normaliser: Tensor | None) -> Distribution:
    """Of products [n, V], with their log-sum-exp [n] where it is known."""
    logits = scaling.logits(products, bias)
    if normaliser is None and not torch.compiler.is_compiling():
        # Each logit is exponentiated once.
        top, log_probs, probs, masses = _exponentials(logits)
        total = masses.sum(-1, keepdim=True, dtype=torch.float64)
        log_total, total = total.log().to(top.dtype), total.to(top.dtype)
        log_probs.sub_(log_total).clamp_min_(LOG_ZERO)
        return Distribution((top + log_total).squeeze(1), log_probs, probs.div_(total), masses.div_(total))
    if normaliser is None:
        normaliser = log_sum_exp(scaling, products, bias)
    log_probs = (logits - normaliser.unsqueeze(1)).clamp_min_(LOG_ZERO)
    return Distribution(normaliser, log_probs, log_probs.exp(), None)


def read(form: Form, rows: Rows, biases: Biases) -> tuple[Sums, Kept | None]:
    """First pass: the rows' sums, and what an uncompiled ``write`` need not compute again."""
    student = None
    if torch.compiler.is_compiling():
        student = statistics(form.student, rows.student, biases.student)
        if not form.whole:
            return Sums(student, *[None] * 7), None
    own = _distribution(form.student, rows.student, biases.student, None if student is None else student.log_sum_exp)
    if student is None:
        assert own.masses is not None
        student = Statistics(own.log_sum_exp, -(own.probs * own.log_probs).sum(-1), own.masses)
        if not form.whole:
            return Sums(student, *[None] * 7), Kept(own.probs, None)
    teacher = _teacher(form, rows, biases)
    normaliser = None if teacher is None else teacher.log_sum_exp
    both = _both(rows, own, teacher)
    forward = reverse = None
    if form.exact_kl:
        difference = both.teacher - both.student
        reverse = -(difference * both.student_probs).sum(-1)
        forward = difference.mul_(both.teacher_probs).sum(-1)
    if not form.parts:
        return Sums(student, normaliser, None, None, None, None, forward, reverse), Kept(own.probs, None)
    weighed = _weigh(form, both, rows)
    total, label = weighed.weights.sum(-1), _entry(weighed.weights, rows.labels)
    if weighed.label is not None:
        total, label = total + weighed.label, label + weighed.label
    sums = Sums(student, normaliser, weighed.value, total, weighed.label, label, forward, reverse)
    return sums, Kept(own.probs, weighed)


def write(form: Form, rows: Rows, biases: Biases, kept: Kept | None = None) -> None:
    """Second pass: overwrite the student's products with the gradient of each row's loss in them.

    It is ``total * q - weights``, or without objectives over the vocabulary q, for the caller to multiply. The layer's
    scale over temperature and the weights of single tokens are the caller's to add.

    Args:
        form, biases: as of ``read``.
        rows: as of ``read``, with the log-sum-exps and the total.
        kept: of ``read``; None: computed again.
    """
    if kept is None:
        own = _distribution(form.student, rows.student, biases.student, rows.student_log_sum_exp)
        weighed = _weigh(form, _both(rows, own, _teacher(form, rows, biases)), rows) if form.parts else None
        kept = Kept(own.probs, weighed)
    gradient = kept.probs
    if kept.weighed is not None:
        assert rows.total is not None
        gradient = (kept.probs * rows.total.unsqueeze(1)).sub_(kept.weighed.weights)
    if form.student.soft_cap is not None:
        slope = form.student.slope(form.student.logits(rows.student, biases.student))
        assert slope is not None
        gradient = gradient * slope
    rows.student.copy_(gradient)


def _teacher(form: Form, rows: Rows, biases: Biases) -> Distribution | None:
    if form.teacher is None:
        return None
    assert rows.teacher is not None
    return _distribution(form.teacher, rows.teacher, biases.teacher, rows.teacher_log_sum_exp)


def _both(rows: Rows, own: Distribution, teacher: Distribution | None) -> VocabularyLogProbs:
    """What objectives read; without teacher NaN in place of its log-probs."""
    student_label = _label(rows.student_label, own)
    if teacher is None:
        none = own.log_probs.new_full((), torch.nan).expand_as(own.log_probs)
        return VocabularyLogProbs(own.log_probs, none, rows.labels, own.probs, none, student_label, none[:, :1])
    assert rows.teacher_label is not None
    log_probs, probs = teacher.log_probs, teacher.probs
    beyond = own.probs.shape[1] - probs.shape[1]
    if beyond:
        log_probs, probs = F.pad(log_probs, (0, beyond), value=LOG_ZERO), F.pad(probs, (0, beyond))
    teacher_label = _label(rows.teacher_label, teacher)
    return VocabularyLogProbs(own.log_probs, log_probs, rows.labels, own.probs, probs, student_label, teacher_label)


def _label(logits: Tensor, distribution: Distribution) -> Tensor:
    """The label's log-prob, [n, 1], by its logit [n]."""
    return (logits - distribution.log_sum_exp).clamp_min(LOG_ZERO).unsqueeze(1)


def _weigh(form: Form, both: VocabularyLogProbs, rows: Rows) -> Weighed:
    """The objectives' results, each in its own rows, added up."""
    total: Weighed | None = None
    for index, parts in enumerate(form.parts):
        here = None
        if len(form.parts) > 1:
            here = rows.is_rollout if index else ~rows.is_rollout
        statistics = rows.row_statistics[index] if rows.row_statistics else [None] * len(parts)
        for part, statistic in zip(parts, statistics, strict=True):
            read = both if statistic is None else replace(both, row_statistic=statistic)
            one = _of_part(part, read, rows.context, here)
            total = one if total is None else _added(total, one)
    assert total is not None
    return total


def _of_part(part: Part, both: VocabularyLogProbs, context: TokenContext | None, here: Tensor | None) -> Weighed:
    arguments: Mapping[str, Any] = dict(part.arguments)
    result = part.objective.weigh(both, context, **arguments)
    weighed = Weighed(result.weights, result.value, result.label)
    if part.factor != 1:
        label = None if weighed.label is None else weighed.label * part.factor
        weighed = Weighed(weighed.weights * part.factor, weighed.value * part.factor, label)
    if here is None:
        return weighed
    label = None if weighed.label is None else torch.where(here, weighed.label, 0.0)
    weights = torch.where(here.unsqueeze(1), weighed.weights, 0.0)
    return Weighed(weights, torch.where(here, weighed.value, 0.0), label)


def _entry(matrix: Tensor, tokens: Tensor) -> Tensor:
    """One entry of each row: [n] from [n, V] and int64 [n]."""
    if not torch.compiler.is_compiling():
        return take(matrix, tokens)
    # A gather would have the matrix written to memory first; a sum joins the other sums.
    return torch.where(torch.arange(matrix.shape[1], device=matrix.device) == tokens.unsqueeze(1), matrix, 0.0).sum(-1)


def _added(one: Weighed, other: Weighed) -> Weighed:
    label = one.label if other.label is None else other.label if one.label is None else one.label + other.label
    return Weighed(one.weights + other.weights, one.value + other.value, label)
