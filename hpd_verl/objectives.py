"""The maths of HPD and its siblings: per-token log-probs in, per-token weights out. Pure torch.

Every method is a weighted log-likelihood (paper eq. 9): ``loss = -sum_t w(v_t) log q(v_t)`` with detached weights,
``q`` the student and ``p`` the teacher. An objective is a function from log-probs to the weights of two tokens a
position: the label ``y`` that stands there, and the token ``a`` that the student samples at the same prefix.

    from hpd_verl.objectives import OBJECTIVES, TokenLogProbs
    weights = OBJECTIVES["hpd"](TokenLogProbs(...), forward_coef=1.0)
    loss = -(weights.label * log_q_label + weights.sampled * log_q_sampled).sum() / num_response_tokens

Source: "Hybrid Policy Distillation for LLMs", arXiv 2604.20244; equation numbers are its.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

LOG_ZERO = -1000.0
"""Stands for the logarithm of a teacher probability of exactly zero, so that weights stay finite."""


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


Objective = Callable[..., TokenWeights]
"""``objective(log_probs: TokenLogProbs, **coefficients: float | bool) -> TokenWeights``."""

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
    # A sample that is the label itself is already weighted as the label.
    suppressed = (sampled_gap < 0) & ~log_probs.sampled_is_label
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


SAMPLING_OBJECTIVES = frozenset({"hpd"})
"""Objectives that weigh the sampled token."""

LIKELIHOOD_OBJECTIVES = frozenset({"sft", "seqkd"})
"""Objectives whose weights do not depend on the student: no importance ratio applies to them."""
