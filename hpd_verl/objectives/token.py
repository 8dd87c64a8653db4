"""Objectives over tokens: a weight for the label that stands at a position and for the token the student samples there.

Source of all: "Hybrid Policy Distillation for LLMs", arXiv 2604.20244; equation numbers are its.
"""

import math

import torch
from pydantic import Field
from torch import Tensor

from hpd_verl.objectives.log_probs import TokenLogProbs, TokenWeights, gap, log_ratio
from hpd_verl.objectives.registry import ObjectiveParameters, objective

PAPER = "arXiv 2604.20244"


class HPDParameters(ObjectiveParameters):
    """Parameters of hpd and hpd_exact."""

    forward_coef: float = Field(1.0, ge=0)
    """Objectives hpd and hpd_exact: factor of the forward-KL weight p(y)."""

    reverse_coef: float = Field(1.0, ge=0)
    """Objectives hpd and hpd_exact: factor of the reverse-KL weights gap(y) and gap(a)."""

    reinforce_coef: float = Field(1.0, ge=0)
    """Objectives hpd and hpd_exact: factor of the additional p(y) on reinforced labels."""

    student_sampling: bool = True
    """Objectives hpd and hpd_exact: false drops the sampled token and the reinforcement, as in the paper's first
    ablation."""


def _label_only(weights: Tensor) -> TokenWeights:
    return TokenWeights(label=weights, sampled=torch.zeros_like(weights))


@objective(
    "hpd",
    over="token",
    parameters=HPDParameters,
    has_own_node=False,
    weighs_sample=lambda parameters: parameters.student_sampling,
    source=f"{PAPER}, eq. 14-15",
)
def hpd(
    log_probs: TokenLogProbs, forward_coef: float, reverse_coef: float, reinforce_coef: float, student_sampling: bool
) -> TokenWeights:
    """Hybrid Policy Distillation.

    Where the student over-estimates the label (gap(y) < 0) only reverse KL acts; elsewhere forward KL joins it, and
    is reinforced where the student under-estimates the label while it over-estimates the token that it samples.

    Args:
        log_probs: see ``TokenLogProbs``.
        forward_coef, reverse_coef, reinforce_coef, student_sampling: see ``HPDParameters``.
    """
    label_gap = gap(log_probs.student_label, log_probs.teacher_label)
    label_ratio = log_ratio(log_probs.student_label, log_probs.teacher_label)
    teacher_prob = log_probs.teacher_label.exp()

    label = reverse_coef * label_gap + torch.where(label_ratio >= 0, forward_coef * teacher_prob, 0.0)
    if not student_sampling:
        return _label_only(label)
    sampled_gap = gap(log_probs.student_sampled, log_probs.teacher_sampled)
    sampled_ratio = log_ratio(log_probs.student_sampled, log_probs.teacher_sampled)
    reinforced = (label_ratio > 0) & (sampled_ratio < 0)
    label = label + torch.where(reinforced, reinforce_coef * teacher_prob, 0.0)
    # A sampled token that is the label itself is already weighted as the label; a NaN is kept, for the caller to see.
    suppressed = ~(sampled_ratio >= 0) & ~log_probs.sampled_is_label
    return TokenWeights(label=label, sampled=torch.where(suppressed, reverse_coef * sampled_gap, 0.0))


@objective("sft", over="token", needs_teacher=False, is_likelihood=True, source=f"{PAPER}, table 1")
def sft(log_probs: TokenLogProbs) -> TokenWeights:
    """Supervised fine-tuning: weight 1."""
    return _label_only(torch.ones_like(log_probs.student_label))


@objective("seqkd", over="token", is_likelihood=True, source=f"{PAPER}, table 1")
def seqkd(log_probs: TokenLogProbs) -> TokenWeights:
    """Forward KL on the label: weight p(y)."""
    return _label_only(log_probs.teacher_label.exp())


@objective("rkl", over="token", source=f"{PAPER}, 5.1")
def rkl(log_probs: TokenLogProbs) -> TokenWeights:
    """Reverse KL on the label: weight gap(y)."""
    return _label_only(gap(log_probs.student_label, log_probs.teacher_label))


@objective("jsd", over="token", source=f"{PAPER}, appendix C")
def jsd(log_probs: TokenLogProbs) -> TokenWeights:
    """Jensen-Shannon divergence on the label: weight q(y) (log m(y) - log q(y)) / 2, m = (p + q) / 2."""
    mixture = torch.logaddexp(log_probs.teacher_label, log_probs.student_label) - math.log(2)
    return _label_only(gap(log_probs.student_label, mixture) / 2)


@objective("opd", over="token", needs_rollouts=True, source=f"{PAPER}, on-policy distillation")
def opd(log_probs: TokenLogProbs) -> TokenWeights:
    """On-policy distillation: weight log p(y) - log q(y), for labels that the student drew itself."""
    return _label_only(log_ratio(log_probs.student_label, log_probs.teacher_label))


class PowerOPDParameters(ObjectiveParameters):
    """Parameters of power_opd. The default is that of its authors' script."""

    exponent: float = Field(5.0, gt=0)
    """Exponent of both probabilities, above 0; towards 0, divided by it, the weight becomes that of opd."""


@objective(
    "power_opd",
    over="token",
    parameters=PowerOPDParameters,
    needs_rollouts=True,
    source="PowerOPD, Zhao et al. 2026, arXiv 2606.17199 and its code (EIT-NLP/PowerOPD)",
)
def power_opd(log_probs: TokenLogProbs, exponent: float) -> TokenWeights:
    """On-policy distillation with a bounded weight: p(y)^exponent - q(y)^exponent.

    Of the sign of opd's weight, within -1 and 1. With a large exponent a token that both models find improbable has
    almost no weight, so that the student does not learn from its own rare tokens.

    Args:
        log_probs: see ``TokenLogProbs``.
        exponent: see ``PowerOPDParameters``.
    """
    return _label_only((exponent * log_probs.teacher_label).exp() - (exponent * log_probs.student_label).exp())


class ConstantNegativeParameters(ObjectiveParameters):
    """Parameters of constant_negative."""

    below: float = Field(0.2, gt=0, le=1)
    """Probability q(y) under which a token has the weight, above 0 and at most 1."""

    strength: float = Field(0.5, gt=0)
    """The weight's size, above 0; the paper's is 0.5."""


@objective(
    "constant_negative",
    over="token",
    parameters=ConstantNegativeParameters,
    needs_teacher=False,
    needs_rollouts=True,
    source="a control after Ding and Zhang 2026, arXiv 2608.31046, and the fixed mode of its code "
    "(DripNowhy/On-Policy-Self-Adaptation)",
)
def constant_negative(log_probs: TokenLogProbs, below: float, strength: float) -> TokenWeights:
    """A control without a teacher: weight -strength on the student's own tokens of q(y) < below, 0 on others.

    What on-policy distillation gains beyond it is of the teacher. The authors weigh the least probable fifth of the
    tokens of a rank's batch; here a token's own probability decides, so choose ``below`` to take about as many. It only
    sharpens the student, whose entropy falls.

    Args:
        log_probs: see ``TokenLogProbs``.
        below, strength: see ``ConstantNegativeParameters``.
    """
    improbable = log_probs.student_label < math.log(below)
    return _label_only(improbable.to(log_probs.student_label.dtype) * -strength)
