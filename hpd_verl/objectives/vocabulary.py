"""Objectives over the whole vocabulary: a weight for every token, not for the label and a sampled token alone.

For a divergence ``sum_v f(q(v); p(v))`` the weight is ``w(v) = -q(v) df/dq(v)``. Those of other papers were
compared with their authors' published code, in value and gradient, but for symmetric_kl, tvd, and those from vopd on,
which follow their papers' formulas; where one differs, it says so.
"""

import math
from dataclasses import dataclass

import torch
from pydantic import Field
from torch import Tensor

from hpd_verl.objectives.context import TokenContext
from hpd_verl.objectives.log_probs import LOG_ZERO, TeacherRows, VocabularyLogProbs, VocabularyWeights
from hpd_verl.objectives.registry import ObjectiveParameters, objective
from hpd_verl.objectives.token import PAPER, HPDParameters

DISTILLM = "DistiLLM, Ko et al. 2024, arXiv 2402.03898"


def _gaps(log_probs: VocabularyLogProbs) -> Tensor:
    """q(v) (log p(v) - log q(v)), [n, V]; see ``log_probs.gap``."""
    return torch.sub(log_probs.teacher, log_probs.student).mul_(log_probs.student_probs)


def _mixture(first: Tensor, second: Tensor, share: float) -> Tensor:
    """share * first + (1 - share) * second of probabilities, [n, V]; where both are 0 a number that divides."""
    return torch.lerp(second, first, share).clamp_min_(torch.finfo(first.dtype).tiny)


@objective(
    "hpd_exact", over="vocabulary", parameters=HPDParameters, has_own_node=False, source=f"the expectation of {PAPER}"
)
def hpd_exact(
    log_probs: VocabularyLogProbs,
    forward_coef: float,
    reverse_coef: float,
    reinforce_coef: float,
    student_sampling: bool,
) -> VocabularyWeights:
    """HPD with the sampled token replaced by its expectation: the same mean gradient, no sampling noise.

    With a ~ q, ``E[w_a grad log q(a)]`` is the sum over v != y with gap(v) < 0 of q(v) gap(v) grad log q(v), and
    the reinforcement of the label is multiplied by the student's mass on those tokens.

    Args:
        log_probs: see ``VocabularyLogProbs``.
        forward_coef, reverse_coef, reinforce_coef, student_sampling: see ``HPDParameters``.
    """
    label_ratio = log_probs.teacher_label - log_probs.student_label
    student_prob, teacher_prob = log_probs.student_label.exp(), log_probs.teacher_label.exp()

    label = reverse_coef * student_prob * label_ratio + torch.where(label_ratio >= 0, forward_coef * teacher_prob, 0.0)
    if not student_sampling:
        weights = torch.zeros_like(log_probs.student)
        value = -(label * log_probs.student_label)
        return VocabularyWeights(weights, value.squeeze(1), label.squeeze(1))
    # Tokens that the student over-estimates, where log p - log q < 0, and their chance to be sampled, q. NaN stays.
    over = torch.sub(log_probs.teacher, log_probs.student).clamp_max_(0.0)
    drawn = over.sign().mul_(log_probs.student_probs).sum(-1, keepdim=True)
    weights = over.mul_(log_probs.student_probs).mul_(log_probs.student_probs).mul_(reverse_coef)
    value = -(weights * log_probs.student).sum(-1, keepdim=True)
    # The label is not sampled: what the sums and the weights have of it is taken back.
    label_over = label_ratio.clamp_max(0.0)
    drawn = drawn.neg() + label_over.sign() * student_prob
    label = label + reinforce_coef * teacher_prob * torch.where(label_ratio > 0, drawn, 0.0)
    label = label - reverse_coef * label_over * student_prob * student_prob
    value = value - label * log_probs.student_label
    return VocabularyWeights(weights, value.squeeze(1), label.squeeze(1))


def _fkl(log_probs: VocabularyLogProbs) -> VocabularyWeights:
    value = torch.sub(log_probs.teacher, log_probs.student).mul_(log_probs.teacher_probs).sum(-1)
    return VocabularyWeights(log_probs.teacher_probs, value)


@objective("fkl", over="vocabulary", source="Hinton et al. 2015, arXiv 1503.02531")
def fkl(log_probs: VocabularyLogProbs) -> VocabularyWeights:
    """Forward KL divergence KL(p || q): weight p(v)."""
    return _fkl(log_probs)


def _rkl(log_probs: VocabularyLogProbs) -> VocabularyWeights:
    gaps = _gaps(log_probs)
    return VocabularyWeights(gaps, -gaps.sum(-1))


@objective("rkl_exact", over="vocabulary", source="MiniLLM, Gu et al. 2024, arXiv 2306.08543")
def rkl_exact(log_probs: VocabularyLogProbs) -> VocabularyWeights:
    """Reverse KL divergence KL(q || p): weight gap(v)."""
    return _rkl(log_probs)


class SymmetricKLParameters(ObjectiveParameters):
    """Parameters of symmetric_kl."""

    reverse_share: float = Field(0.5, ge=0, le=1)
    """Share of the reverse KL divergence, from 0 to 1; DistiLLM's code has 0.9."""


@objective("symmetric_kl", over="vocabulary", parameters=SymmetricKLParameters, source=f"the code of {DISTILLM}")
def symmetric_kl(log_probs: VocabularyLogProbs, reverse_share: float) -> VocabularyWeights:
    """Both KL divergences: (1 - reverse_share) KL(p || q) + reverse_share KL(q || p)."""
    forward, reverse = _fkl(log_probs), _rkl(log_probs)
    value = torch.lerp(forward.value, reverse.value, reverse_share)
    return VocabularyWeights(torch.lerp(reverse.weights, forward.weights, 1 - reverse_share), value)


@objective("tvd", over="vocabulary", source=f"the code of {DISTILLM}")
def tvd(log_probs: VocabularyLogProbs) -> VocabularyWeights:
    """Total variation distance, half the sum of |p(v) - q(v)|: weight q(v) sign(p(v) - q(v)) / 2."""
    difference = torch.sub(log_probs.teacher_probs, log_probs.student_probs)
    value = difference.abs().sum(-1) / 2
    return VocabularyWeights(difference.sign_().mul_(log_probs.student_probs).div_(2), value)


class JSDParameters(ObjectiveParameters):
    """Parameters of jsd_exact."""

    beta: float = Field(0.5, gt=0, lt=1)
    """Share of the teacher in the mixture, above 0 and below 1."""


@objective(
    "jsd_exact", over="vocabulary", parameters=JSDParameters, source="GKD, Agarwal et al. 2024, arXiv 2306.13649"
)
def jsd_exact(log_probs: VocabularyLogProbs, beta: float) -> VocabularyWeights:
    """Generalised Jensen-Shannon divergence.

    ``beta KL(p || m) + (1 - beta) KL(q || m)`` with m = beta p + (1 - beta) q; weight
    (1 - beta) q(v) (log m(v) - log q(v)). It goes to 0 with beta, as beta KL(p || q), and with 1 - beta, as
    (1 - beta) KL(q || p): its limits are not the KL divergences that TRL puts in their place at 0 and 1.

    Args:
        log_probs: see ``VocabularyLogProbs``.
        beta: see ``JSDParameters``.
    """
    log_mixture = _mixture(log_probs.teacher_probs, log_probs.student_probs, beta).log_()
    forward = torch.sub(log_probs.teacher, log_mixture).mul_(log_probs.teacher_probs).sum(-1)
    weights = log_mixture.sub_(log_probs.student).mul_(log_probs.student_probs).mul_(1 - beta)
    return VocabularyWeights(weights, beta * forward - weights.sum(-1))


class SkewParameters(ObjectiveParameters):
    """Parameters of skew_fkl and skew_rkl."""

    skew: float = Field(0.1, ge=0, lt=1)
    """Share in the mixture of the distribution that the divergence starts from, of at least 0 and below 1."""


@objective("skew_fkl", over="vocabulary", parameters=SkewParameters, source=DISTILLM)
def skew_fkl(log_probs: VocabularyLogProbs, skew: float) -> VocabularyWeights:
    """Skew KL divergence KL(p || m), m = skew p + (1 - skew) q: weight (1 - skew) p(v) q(v) / m(v).

    Args:
        log_probs: see ``VocabularyLogProbs``.
        skew: share of the teacher in the mixture; with 0 it is fkl.
    """
    if skew == 0:  # the mixture is q, whose logarithm is known where q is too small for a number
        return _fkl(log_probs)
    mixture = _mixture(log_probs.teacher_probs, log_probs.student_probs, skew)
    weights = torch.div(log_probs.student_probs, mixture).mul_(log_probs.teacher_probs).mul_(1 - skew)
    value = mixture.log_().neg_().add_(log_probs.teacher).mul_(log_probs.teacher_probs).sum(-1)
    return VocabularyWeights(weights, value)


@objective("skew_rkl", over="vocabulary", parameters=SkewParameters, source=DISTILLM)
def skew_rkl(log_probs: VocabularyLogProbs, skew: float) -> VocabularyWeights:
    """Skew reverse KL divergence KL(q || m), m = skew q + (1 - skew) p.

    Weight q(v) (log m(v) - log q(v) + skew q(v) / m(v)).

    Args:
        log_probs: see ``VocabularyLogProbs``.
        skew: share of the student in the mixture; with 0 it is rkl_exact.
    """
    if skew == 0:
        return _rkl(log_probs)
    mixture = _mixture(log_probs.student_probs, log_probs.teacher_probs, skew)
    ratio = torch.div(log_probs.student_probs, mixture)
    weights = mixture.log_().sub_(log_probs.student).mul_(log_probs.student_probs)
    value = -weights.sum(-1)
    return VocabularyWeights(weights.addcmul_(ratio, log_probs.student_probs, value=skew), value)


class AKLParameters(ObjectiveParameters):
    """Parameters of akl."""

    mu: float = Field(0.5, gt=0, lt=1)
    """The teacher's mass in the head, above 0 and below 1."""


_HEAD_TOKENS = 64
"""Tokens among which the head is looked for first: most distributions of a language model have it there."""


def _head_floor(teacher: TeacherRows, mu: float) -> Tensor:
    """A log-prob between the head's last token and the most likely one outside, [n, 1].

    The head is the fewest most likely tokens that hold ``mu``, with those as likely as the last of them. Between the
    two, rounding of a token's log-prob does not matter.
    """
    top = teacher.top(_HEAD_TOKENS)
    probs = top.exp()
    held = probs.cumsum(-1)
    least = torch.where(held - probs < mu, top, math.inf).amin(-1, keepdim=True)
    below = torch.where(top < least, top, -math.inf).amax(-1, keepdim=True)
    # Beyond the last of these tokens there may be more of the head, or others as likely.
    known = (held[:, -1:] >= mu) & (below > -math.inf)
    if not bool(known.all()):
        rows = (~known).squeeze(1).nonzero().squeeze(1)
        log_probs = teacher.log_probs(rows)
        probs = log_probs.exp()
        inside = probs >= _least_of_head(probs, mu)
        least[rows] = torch.where(inside, log_probs, math.inf).amin(-1, keepdim=True)
        below[rows] = torch.where(inside, -math.inf, log_probs).amax(-1, keepdim=True)
    return torch.where(below == -math.inf, least - 1.0, (least + below) / 2)


def _least_of_head(probs: Tensor, mass: float) -> Tensor:
    """The probability of the head's last token, [n, 1]: the largest number such that tokens from it on hold the mass.

    Found by halving. Positive floats are ordered as the integers of their bits.
    """
    integer = torch.int64 if probs.dtype == torch.float64 else torch.int32
    # All tokens below it together hold less than what is outside of the head.
    low = torch.full_like(probs[:, :1], 0.99 * (1 - mass) / probs.shape[1]).view(integer)
    width = probs.amax(-1, keepdim=True).view(integer) - low
    inside = torch.empty_like(probs)
    while bool((width > 0).any()):
        half = (width + 1) // 2
        torch.ge(probs, (low + half).view(probs.dtype), out=inside)
        half *= inside.mul_(probs).sum(-1, keepdim=True) >= mass
        low += half
        width = torch.where(half > 0, width - half, (width - 1) // 2)
    return low.view(probs.dtype)


@dataclass(frozen=True)
class _Rows:
    """``TeacherRows`` of log-probs [n, V]."""

    whole: Tensor

    def top(self, count: int) -> Tensor:
        return self.whole.topk(min(count, self.whole.shape[1]), dim=-1).values

    def log_probs(self, rows: Tensor) -> Tensor:
        return self.whole[rows]


@objective(
    "akl",
    over="vocabulary",
    parameters=AKLParameters,
    row_statistic=_head_floor,
    source="Rethinking Kullback-Leibler Divergence in Knowledge Distillation for Large Language Models, "
    "Wu et al. 2024, arXiv 2404.02657",
)
def akl(log_probs: VocabularyLogProbs, mu: float) -> VocabularyWeights:
    """Adaptive KL divergence.

    ``h KL(p || q) + (1 - h) KL(q || p)``, h the share of the head in sum_v |p(v) - q(v)|, detached. The head is the
    teacher's fewest most likely tokens that hold the mass mu, with those as likely as the last of them: the rule of the
    paper, the token that crosses mu inside; its released code leaves that token out. Where p == q, h is 1/2.

    Args:
        log_probs: see ``VocabularyLogProbs``.
        mu: see ``AKLParameters``.
    """
    floor = log_probs.row_statistic
    if floor is None:
        floor = _head_floor(_Rows(log_probs.teacher), mu)
    difference = torch.sub(log_probs.teacher, log_probs.student)
    forward = torch.mul(log_probs.teacher_probs, difference).sum(-1)
    gaps = difference.mul_(log_probs.student_probs)
    reverse = -gaps.sum(-1)
    distance = torch.sub(log_probs.teacher_probs, log_probs.student_probs).abs_()
    total = distance.sum(-1)
    head = torch.where(log_probs.teacher > floor, distance, 0.0).sum(-1)
    share = torch.where(total == 0, 0.5, head / total)
    return VocabularyWeights(
        gaps.lerp_(log_probs.teacher_probs, share.unsqueeze(1)), torch.lerp(reverse, forward, share)
    )


class ABKDParameters(ObjectiveParameters):
    """Parameters of abkd. The defaults are its authors' for GPT-2; theirs for OpenLLaMA2 are 0.1 and 0.8."""

    alpha: float = Field(0.2, gt=0)
    """Exponent of the teacher's probability, above 0."""

    beta: float = Field(0.7, gt=0)
    """Exponent of the student's probability, above 0."""


@objective("abkd", over="vocabulary", parameters=ABKDParameters, source="ABKD, Wang et al. 2025, arXiv 2505.04560")
def abkd(log_probs: VocabularyLogProbs, alpha: float, beta: float) -> VocabularyWeights:
    """Alpha-beta divergence.

    ``-1 / (alpha beta) sum_v [p^alpha q^beta - alpha / (alpha + beta) p^(alpha + beta) - beta / (alpha + beta)
    q^(alpha + beta)]``; weight q^beta (p^alpha - q^alpha) / alpha. (1, beta -> 0) is forward KL, (alpha -> 0, 1) is
    reverse KL.

    Args:
        log_probs: see ``VocabularyLogProbs``.
        alpha, beta: see ``ABKDParameters``.
    """
    student, teacher, total = log_probs.student, log_probs.teacher, alpha + beta
    student_total = (total * student).exp_()
    weights = (beta * student).add_(teacher, alpha=alpha).exp_().sub_(student_total).div_(alpha)
    # The sum above, with p^alpha q^beta - q^(alpha + beta) = alpha w taken out.
    remainder = (total * teacher).exp_().sub_(student_total)
    return VocabularyWeights(weights, (remainder.sum(-1) / total - weights.sum(-1)) / beta)


@objective("todi", over="vocabulary", source="ToDi, Jung et al. 2025, arXiv 2505.16297")
def todi(log_probs: VocabularyLogProbs) -> VocabularyWeights:
    """Token-wise distillation.

    ``sum_v [a p (log p - log q) + (1 - a) q (log q - log p)]`` with a(v) = sigmoid(log p(v) - log q(v)), detached;
    weight a p + (1 - a) (gap - q).
    """
    difference = torch.sub(log_probs.teacher, log_probs.student)
    # The sigmoid is p / (p + q); where both are 0, so are the weights.
    total = torch.add(log_probs.teacher_probs, log_probs.student_probs)
    total.clamp_min_(torch.finfo(total.dtype).tiny)
    forward = torch.div(log_probs.teacher_probs, total).mul_(log_probs.teacher_probs)
    reverse = torch.div(log_probs.student_probs, total, out=total).mul_(log_probs.student_probs)
    value = torch.sub(forward, reverse).mul_(difference).sum(-1)
    return VocabularyWeights(forward.addcmul_(reverse, difference.sub_(1.0)), value)


@objective(
    "vopd",
    over="vocabulary",
    needs_rollouts=True,
    source="vOPD, Oh et al. 2026, arXiv 2605.07865 and its code (holi-lab/vOPD), baseline over the whole vocabulary",
)
def vopd(log_probs: VocabularyLogProbs) -> VocabularyWeights:
    """On-policy distillation with a baseline: weight log p(y) - log q(y) + KL(q || p) of the label.

    The mean gradient is opd's, that of reverse KL, with less variance: KL(q || p) is what the label's log-ratio is less
    than 0 on average. A single token stands for it still; where the cost over the vocabulary is paid anyway, rkl_exact
    has no variance at all.
    """
    reverse = torch.sub(log_probs.student, log_probs.teacher).mul_(log_probs.student_probs).sum(-1, keepdim=True)
    label = log_probs.teacher_label - log_probs.student_label + reverse
    value = -(label * log_probs.student_label)
    return VocabularyWeights(torch.zeros_like(log_probs.student), value.squeeze(1), label.squeeze(1))


class EntropyAwareParameters(ObjectiveParameters):
    """Parameters of entropy_aware. The defaults are its authors'."""

    threshold: float = Field(0.8, ge=0)
    """The teacher's entropy, in nats, above which forward KL joins; at least 0."""

    forward_coef: float = Field(1.0, ge=0)
    """Factor of forward KL there, at least 0."""


@objective(
    "entropy_aware",
    over="vocabulary",
    parameters=EntropyAwareParameters,
    source="EOPD, Jin et al. 2026, arXiv 2603.07079 and its code (WLS04/EOPD), over the whole vocabulary",
)
def entropy_aware(log_probs: VocabularyLogProbs, threshold: float, forward_coef: float) -> VocabularyWeights:
    """Reverse KL, and forward KL beside it where the teacher is uncertain.

    ``KL(q || p) + forward_coef [H(p) > threshold] KL(p || q)``. The authors estimate the reverse KL by the label, clip
    it as PPO does, and take the forward KL over the teacher's likeliest tokens; here both are exact. Below all of the
    teacher's entropies the threshold gives the sum of both divergences, above them rkl_exact, which fails from a
    student that does not cover the teacher.

    Args:
        log_probs: see ``VocabularyLogProbs``.
        threshold, forward_coef: see ``EntropyAwareParameters``.
    """
    entropy = -torch.mul(log_probs.teacher, log_probs.teacher_probs).sum(-1, keepdim=True)
    share = (entropy > threshold).to(entropy.dtype) * forward_coef
    difference = torch.sub(log_probs.teacher, log_probs.student)
    forward = torch.mul(difference, log_probs.teacher_probs).sum(-1)
    gaps = difference.mul_(log_probs.student_probs)
    value = share.squeeze(1) * forward - gaps.sum(-1)
    return VocabularyWeights(gaps.addcmul_(share, log_probs.teacher_probs), value)


class TopKTailParameters(ObjectiveParameters):
    """Parameters of top_k_tail."""

    k: int = Field(64, ge=1)
    """The teacher's likeliest tokens that are told apart; at least 1."""


def _top_floor(teacher: TeacherRows, k: int) -> Tensor:
    """A log-prob between the k-th token and the most likely one of the others, [n, 1].

    Tokens as likely as the k-th are above it.
    """
    top = teacher.top(k + 1)
    least = top[:, min(k, top.shape[1]) - 1].unsqueeze(1)
    below = top[:, k:] if top.shape[1] > k else torch.full_like(least, -math.inf)
    return torch.where(below > least - 1e-3, least - 1e-3, (least + below.clamp_min(LOG_ZERO - 1.0)) / 2)


@objective(
    "top_k_tail",
    over="vocabulary",
    parameters=TopKTailParameters,
    row_statistic=_top_floor,
    source="verl's pull request 7855 and issue 7856, forward_kl_topk_tail",
)
def top_k_tail(log_probs: VocabularyLogProbs, k: int) -> VocabularyWeights:
    """Forward KL over the teacher's k likeliest tokens, with all others as one token.

    With T these tokens, ``sum_T p (log p - log q) + p_T' log(p_T' / q_T')``, p_T' and q_T' the mass outside of T: a
    lower bound of fkl, never negative. It says nothing of how the student shares out the mass outside of T, and is for
    teachers that are known in these tokens only; of a whole teacher fkl costs less.

    Args:
        log_probs: see ``VocabularyLogProbs``.
        k: see ``TopKTailParameters``.
    """
    floor = log_probs.row_statistic
    if floor is None:
        floor = _top_floor(_Rows(log_probs.teacher), k)
    inside = log_probs.teacher > floor
    least = torch.finfo(log_probs.teacher.dtype).tiny
    tail = torch.where(inside, 0.0, log_probs.teacher_probs).sum(-1, keepdim=True)
    student_tail = torch.where(inside, 0.0, log_probs.student_probs).sum(-1, keepdim=True).clamp_min(least)
    difference = torch.sub(log_probs.teacher, log_probs.student).mul_(log_probs.teacher_probs)
    of_tail = tail * (tail.clamp_min(least).log() - student_tail.log())
    value = torch.where(inside, difference, 0.0).sum(-1) + of_tail.squeeze(1)
    outside = torch.div(log_probs.student_probs, student_tail).mul_(tail)
    return VocabularyWeights(torch.where(inside, log_probs.teacher_probs, outside), value)


class TAIDParameters(ObjectiveParameters):
    """Parameters of taid. The defaults are its authors'."""

    start: float = Field(0.4, ge=0, lt=1)
    """The teacher's share at the first step, at least 0 and below 1."""

    end: float = Field(1.0, gt=0, le=1)
    """The share that the run goes to, above 0 and at most 1."""


@objective(
    "taid",
    over="vocabulary",
    parameters=TAIDParameters,
    needs={"step"},
    source="TAID, Shing et al. 2025, arXiv 2501.16937, as its code is with disable_adaptive",
)
def taid(log_probs: VocabularyLogProbs, context: TokenContext, start: float, end: float) -> VocabularyWeights:
    """Forward KL to a target that moves from the student to the teacher.

    ``KL(r || q)`` with r = softmax((1 - t) z_q + t z_p) of the logits, detached, and t growing by the step from start
    to end, linearly; by default the authors let a falling loss push t further. Its early targets are the student's own
    modes: with few steps it stops short of the teacher, and from a student that covers the teacher fkl has nothing to
    bridge.

    Args:
        log_probs: see ``VocabularyLogProbs``.
        context: the step.
        start, end: see ``TAIDParameters``.
    """
    share = (start + (end - start) * (context.step - 1) / context.steps).unsqueeze(1)
    target = torch.lerp(log_probs.student, log_probs.teacher, share)
    target.sub_(target.amax(-1, keepdim=True))
    total = target.exp().sum(-1, keepdim=True)
    target.sub_(total.log())
    weights = target.exp()
    return VocabularyWeights(weights, target.sub_(log_probs.student).mul_(weights).sum(-1))
