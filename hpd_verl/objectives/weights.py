"""The maths of HPD and its siblings: per-token log-probs in, per-token weights out. Pure torch.

Every method is a weighted log-likelihood (paper eq. 9): ``loss = -sum_t w(v_t) log q(v_t)`` with detached weights,
``q`` the student and ``p`` the teacher. An objective is a function from log-probs to the weights of two tokens a
position: the label ``y`` that stands there, and the token ``a`` that the student samples at the same prefix.
A full-vocabulary objective (``FULL_VOCABULARY_OBJECTIVES``) gives every token of the vocabulary a weight instead.

    from hpd_verl.objectives.weights import OBJECTIVES, TokenLogProbs
    weights = OBJECTIVES["hpd"](TokenLogProbs(...), forward_coef=1.0)
    loss = -(weights.label * log_q_label + weights.sampled * log_q_sampled).sum() / num_response_tokens

Source: "Hybrid Policy Distillation for LLMs", arXiv 2604.20244; equation numbers are its.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

LOG_ZERO = -1000.0
"""Stands for the logarithm of a probability of exactly zero, so that weights stay finite."""


@dataclass(frozen=True)
class TokenLogProbs:
    """Log-probs of the two tokens of each position, at the distillation temperature. All of one shape."""

    student_label: Tensor
    """log q(y), floating."""
    teacher_label: Tensor
    """log p(y), floating."""
    student_sampled: Tensor
    """log q(a), floating."""
    teacher_sampled: Tensor
    """log p(a), floating."""
    sampled_is_label: Tensor
    """a == y, bool."""


@dataclass(frozen=True)
class TokenWeights:
    """Detached weights of log q(y) and log q(a), each of the log-probs' shape and dtype."""

    label: Tensor
    sampled: Tensor


@dataclass(frozen=True)
class VocabularyLogProbs:
    """Log-probs of the whole vocabulary at each position, at the distillation temperature."""

    student: Tensor
    """log q, floating [n, V]."""
    teacher: Tensor
    """log p, floating [n, V]."""
    labels: Tensor
    """y, int64 [n]."""


@dataclass(frozen=True)
class VocabularyWeights:
    """Detached weights of log q(v) for all v; the loss of a position has the gradient of -sum_v w(v) log q(v)."""

    weights: Tensor
    """[n, V]. A multiple of q(v) added to all weights of a position changes no gradient, and is left out."""
    value: Tensor
    """[n], the loss itself: the divergence, or for hpd_exact the weighted log-likelihood."""


Objective = Callable[..., Any]
"""``objective(log_probs: TokenLogProbs, **coefficients: float | bool) -> TokenWeights``, or for a full-vocabulary
objective ``objective(log_probs: VocabularyLogProbs, **coefficients: float | bool) -> VocabularyWeights``."""

OBJECTIVES: dict[str, Objective] = {}
"""Objective by its configured name (``algorithm.hpd.objective``)."""


def register_objective(name: str) -> Callable[[Objective], Objective]:
    """Decorator that adds an objective to ``OBJECTIVES``; its weights are computed without autograd."""

    def decorate(objective: Objective) -> Objective:
        if name in OBJECTIVES:
            raise ValueError(f"objective {name!r} is already registered")
        OBJECTIVES[name] = torch.no_grad()(objective)
        return OBJECTIVES[name]

    return decorate


def gap(student: Tensor, teacher: Tensor) -> Tensor:
    """``q(v) (log p(v) - log q(v))``, the negative reverse-KL integrand (paper 5.1).

    Args:
        student, teacher: log q(v) and log p(v), any equal shape.

    Returns:
        Tensor of that shape; 0 where q(v) = 0 (its limit), finite where only p(v) = 0 (see ``LOG_ZERO``).
    """
    difference = teacher.masked_fill(teacher == -math.inf, LOG_ZERO) - student
    return torch.where(student == -math.inf, 0.0, student.exp() * difference)


def _label_only(weights: Tensor) -> TokenWeights:
    return TokenWeights(label=weights, sampled=torch.zeros_like(weights))


@register_objective("hpd")
def hpd(
    log_probs: TokenLogProbs,
    forward_coef: float = 1.0,
    reverse_coef: float = 1.0,
    reinforce_coef: float = 1.0,
    student_sampling: bool = True,
) -> TokenWeights:
    """Hybrid Policy Distillation (paper eq. 14-15).

    Where the student over-estimates the label (gap(y) < 0) only reverse KL acts; elsewhere forward KL joins it, and
    is reinforced where the student under-estimates the label while it over-estimates its own sample.

    Args:
        log_probs: see ``TokenLogProbs``.
        forward_coef: factor of the forward-KL weight p(y).
        reverse_coef: factor of gap(y) and gap(a).
        reinforce_coef: factor of the additional p(y) of reinforced labels.
        student_sampling: False drops the sampled token and with it the reinforcement (the paper's first ablation).
    """
    label_gap = gap(log_probs.student_label, log_probs.teacher_label)
    sampled_gap = gap(log_probs.student_sampled, log_probs.teacher_sampled)
    teacher_prob = log_probs.teacher_label.exp()

    label = reverse_coef * label_gap + torch.where(label_gap >= 0, forward_coef * teacher_prob, 0.0)
    if not student_sampling:
        return _label_only(label)
    reinforced = (label_gap > 0) & (sampled_gap < 0)
    label = label + torch.where(reinforced, reinforce_coef * teacher_prob, 0.0)
    # A sample that is the label itself is already weighted as the label; a NaN is kept, for the caller to see.
    suppressed = ~(sampled_gap >= 0) & ~log_probs.sampled_is_label
    return TokenWeights(label=label, sampled=torch.where(suppressed, reverse_coef * sampled_gap, 0.0))


@register_objective("sft")
def sft(log_probs: TokenLogProbs) -> TokenWeights:
    """Supervised fine-tuning: weight 1 (paper table 1)."""
    return _label_only(torch.ones_like(log_probs.student_label))


@register_objective("seqkd")
def seqkd(log_probs: TokenLogProbs) -> TokenWeights:
    """Forward KL on the label: weight p(y) (paper table 1)."""
    return _label_only(log_probs.teacher_label.exp())


@register_objective("rkl")
def rkl(log_probs: TokenLogProbs) -> TokenWeights:
    """Reverse KL on the label: weight gap(y) (paper 5.1)."""
    return _label_only(gap(log_probs.student_label, log_probs.teacher_label))


@register_objective("jsd")
def jsd(log_probs: TokenLogProbs) -> TokenWeights:
    """Jensen-Shannon divergence on the label: weight q(y) (log m(y) - log q(y)) / 2, m = (p + q) / 2 (paper app. C)."""
    mixture = torch.logaddexp(log_probs.teacher_label, log_probs.student_label) - math.log(2)
    return _label_only(gap(log_probs.student_label, mixture) / 2)


@register_objective("opd")
def opd(log_probs: TokenLogProbs) -> TokenWeights:
    """On-policy distillation: weight log p(y) - log q(y), for labels that the student drew itself."""
    teacher = log_probs.teacher_label.masked_fill(log_probs.teacher_label == -math.inf, LOG_ZERO)
    return _label_only(teacher - log_probs.student_label)


# Full-vocabulary objectives. For a divergence sum_v f(q(v); p(v)) the weight is w(v) = -q(v) df/dq(v).


def _finite(log_probs: Tensor) -> Tensor:
    return log_probs.clamp_min(LOG_ZERO)


def _log_mixture(first: Tensor, second: Tensor, share: float) -> Tensor:
    """log(share * exp(first) + (1 - share) * exp(second)) of finite log-probs."""
    log_share = math.log(share) if share else -math.inf
    return torch.logaddexp(first + log_share, second + math.log1p(-share))


@register_objective("hpd_exact")
def hpd_exact(
    log_probs: VocabularyLogProbs,
    forward_coef: float = 1.0,
    reverse_coef: float = 1.0,
    reinforce_coef: float = 1.0,
    student_sampling: bool = True,
) -> VocabularyWeights:
    """HPD with the sampled token replaced by its expectation: the same mean gradient, no sampling noise.

    With a ~ q, ``E[w_a grad log q(a)]`` is the sum over v != y with gap(v) < 0 of q(v) gap(v) grad log q(v), and
    the reinforcement of the label is multiplied by the student's mass on those tokens.

    Args:
        log_probs: see ``VocabularyLogProbs``.
        forward_coef, reverse_coef, reinforce_coef, student_sampling: see ``hpd``.
    """
    labels = log_probs.labels.unsqueeze(1)
    gaps = gap(log_probs.student, log_probs.teacher)
    label_gap = gaps.gather(1, labels)
    teacher_prob = log_probs.teacher.gather(1, labels).exp()

    label = reverse_coef * label_gap + torch.where(label_gap >= 0, forward_coef * teacher_prob, 0.0)
    if student_sampling:
        # Tokens that the student over-estimates, their probability of being sampled; NaN stays.
        drawn = torch.where(gaps >= 0, 0.0, log_probs.student.exp()).scatter_(1, labels, 0.0)
        reinforced = torch.where(label_gap > 0, drawn.sum(-1, keepdim=True), 0.0)
        label = label + reinforce_coef * teacher_prob * reinforced
        weights = drawn.mul_(gaps).mul_(reverse_coef)
    else:
        weights = torch.zeros_like(gaps)
    weights.scatter_(1, labels, label)
    impossible = (weights == 0) & (log_probs.student == -math.inf)
    value = -torch.where(impossible, 0.0, weights * log_probs.student).sum(-1)
    return VocabularyWeights(weights, value)


@register_objective("fkl")
def fkl(log_probs: VocabularyLogProbs) -> VocabularyWeights:
    """Forward KL divergence KL(p || q): weight p(v) (Hinton et al. 2015, arXiv 1503.02531)."""
    teacher_probs = log_probs.teacher.exp()
    value = (teacher_probs * (_finite(log_probs.teacher) - _finite(log_probs.student))).sum(-1)
    return VocabularyWeights(teacher_probs, value)


@register_objective("rkl_exact")
def rkl_exact(log_probs: VocabularyLogProbs) -> VocabularyWeights:
    """Reverse KL divergence KL(q || p): weight gap(v) (MiniLLM, Gu et al. 2024, arXiv 2306.08543)."""
    gaps = gap(log_probs.student, log_probs.teacher)
    return VocabularyWeights(gaps, -gaps.sum(-1))


@register_objective("jsd_exact")
def jsd_exact(log_probs: VocabularyLogProbs, beta: float = 0.5) -> VocabularyWeights:
    """Generalised Jensen-Shannon divergence (GKD, Agarwal et al. 2024, arXiv 2306.13649).

    ``beta KL(p || m) + (1 - beta) KL(q || m)`` with m = beta p + (1 - beta) q; weight
    (1 - beta) q(v) (log m(v) - log q(v)).

    Args:
        log_probs: see ``VocabularyLogProbs``.
        beta: share of the teacher in the mixture, in (0, 1).
    """
    student, teacher = _finite(log_probs.student), _finite(log_probs.teacher)
    mixture = _log_mixture(teacher, student, beta)
    weights = (1 - beta) * student.exp() * (mixture - student)
    value = (beta * teacher.exp() * (teacher - mixture) - weights).sum(-1)
    return VocabularyWeights(weights, value)


@register_objective("skew_fkl")
def skew_fkl(log_probs: VocabularyLogProbs, skew: float = 0.1) -> VocabularyWeights:
    """Skew KL divergence KL(p || m), m = skew p + (1 - skew) q (DistiLLM, Ko et al. 2024, arXiv 2402.03898).

    Weight (1 - skew) p(v) q(v) / m(v).

    Args:
        log_probs: see ``VocabularyLogProbs``.
        skew: share of the teacher in the mixture, in [0, 1); 0 is fkl.
    """
    student, teacher = _finite(log_probs.student), _finite(log_probs.teacher)
    mixture = _log_mixture(teacher, student, skew)
    teacher_probs = teacher.exp()
    weights = (1 - skew) * teacher_probs * (student - mixture).exp()
    return VocabularyWeights(weights, (teacher_probs * (teacher - mixture)).sum(-1))


@register_objective("skew_rkl")
def skew_rkl(log_probs: VocabularyLogProbs, skew: float = 0.1) -> VocabularyWeights:
    """Skew reverse KL divergence KL(q || m), m = skew q + (1 - skew) p (DistiLLM, Ko et al. 2024, arXiv 2402.03898).

    Weight q(v) (log m(v) - log q(v) + skew q(v) / m(v)).

    Args:
        log_probs: see ``VocabularyLogProbs``.
        skew: share of the student in the mixture, in [0, 1); 0 is rkl_exact.
    """
    student, teacher = _finite(log_probs.student), _finite(log_probs.teacher)
    mixture = _log_mixture(student, teacher, skew)
    probs = student.exp()
    negative = probs * (mixture - student)
    weights = negative + skew * probs * (student - mixture).exp() if skew else negative
    return VocabularyWeights(weights, -negative.sum(-1))


def _head_mask(probs: Tensor, mass: float) -> Tensor:
    """The fewest most likely tokens of each row that hold ``mass``, and those as likely as the last; bool [n, V]."""
    count = min(64, probs.shape[1])
    while True:
        top = probs.topk(count, dim=-1).values
        held = top.cumsum(-1)
        if count == probs.shape[1] or bool((held[:, -1] >= mass).all()):
            least = torch.where(held - top < mass, top, math.inf).amin(-1, keepdim=True)
            return probs >= least
        count = min(8 * count, probs.shape[1])


@register_objective("akl")
def akl(log_probs: VocabularyLogProbs, mu: float = 0.5) -> VocabularyWeights:
    """Adaptive KL divergence (Wu et al. 2024, "Rethinking Kullback-Leibler Divergence in Knowledge Distillation for
    Large Language Models", arXiv 2404.02657).

    ``h KL(p || q) + (1 - h) KL(q || p)``, h the share of the head in sum_v |p(v) - q(v)|, detached. The head is the
    teacher's fewest most likely tokens that hold the mass mu, with those as likely as the last of them. Where p == q,
    h is 1/2.

    Args:
        log_probs: see ``VocabularyLogProbs``.
        mu: the teacher's mass in the head, in (0, 1).
    """
    forward, reverse = fkl(log_probs), rkl_exact(log_probs)
    teacher_probs = forward.weights
    distance = (teacher_probs - log_probs.student.exp()).abs()
    total = distance.sum(-1)
    in_head = distance.mul_(_head_mask(teacher_probs, mu)).sum(-1)
    share = torch.where(total == 0, 0.5, in_head / total)
    weights = torch.lerp(reverse.weights, forward.weights, share.unsqueeze(1))
    return VocabularyWeights(weights, torch.lerp(reverse.value, forward.value, share))


@register_objective("abkd")
def abkd(log_probs: VocabularyLogProbs, alpha: float = 0.2, beta: float = 0.7) -> VocabularyWeights:
    """Alpha-beta divergence (ABKD, Wang et al. 2025, arXiv 2505.04560).

    ``-1 / (alpha beta) sum_v [p^alpha q^beta - alpha / (alpha + beta) p^(alpha + beta) - beta / (alpha + beta)
    q^(alpha + beta)]``; weight q^beta (p^alpha - q^alpha) / alpha. The defaults are the paper's for language models;
    (1, beta -> 0) is forward KL, (alpha -> 0, 1) reverse KL.

    Args:
        log_probs: see ``VocabularyLogProbs``.
        alpha, beta: above 0.
    """
    student, teacher, total = log_probs.student, log_probs.teacher, alpha + beta
    student_beta = (beta * student).exp()
    weights = student_beta * ((alpha * teacher).exp() - (alpha * student).exp()) / alpha
    # The sum above, with p^alpha q^beta - q^(alpha + beta) = alpha w taken out.
    remainder = ((total * teacher).exp() - (total * student).exp()) / total
    return VocabularyWeights(weights, (remainder - weights).sum(-1) / beta)


@register_objective("todi")
def todi(log_probs: VocabularyLogProbs) -> VocabularyWeights:
    """Token-wise distillation (ToDi, Jung et al. 2025, arXiv 2505.16297).

    ``sum_v [a p (log p - log q) + (1 - a) q (log q - log p)]`` with a(v) = sigmoid(log p(v) - log q(v)), detached;
    weight a p + (1 - a) (gap - q).
    """
    student, teacher = _finite(log_probs.student), _finite(log_probs.teacher)
    difference = teacher - student
    share = difference.sigmoid()
    forward = share * teacher.exp()
    reverse = (1 - share) * student.exp()
    return VocabularyWeights(forward + reverse * (difference - 1), ((forward - reverse) * difference).sum(-1))


FULL_VOCABULARY_OBJECTIVES = frozenset(
    {"hpd_exact", "fkl", "rkl_exact", "jsd_exact", "skew_fkl", "skew_rkl", "akl", "abkd", "todi"}
)
"""Objectives that weigh the whole vocabulary: ``VocabularyLogProbs`` to ``VocabularyWeights``."""

TEACHERLESS_OBJECTIVES = frozenset({"sft"})
"""Objectives that no teacher is needed for."""

SAMPLING_OBJECTIVES = frozenset({"hpd"})
"""Objectives that weigh the sampled token."""

LIKELIHOOD_OBJECTIVES = frozenset({"sft", "seqkd"})
"""Objectives on the label whose weights do not depend on the student: no importance ratio applies to them."""
