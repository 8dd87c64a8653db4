"""Candidates for a better objective, chosen as a user's own: ``file.py:name``.

All are over the vocabulary, with weights w(v) of log q_T(v), T the student's distillation temperature.
"""

import torch
from pydantic import Field

from hpd_verl.objectives import ObjectiveParameters, TokenContext, VocabularyLogProbs, VocabularyWeights, objective

HERE = "this project's benchmarks/settle_it"


class PowerParameters(ObjectiveParameters):
    """Parameters of power and power_label."""

    power: float = Field(0.25, ge=0, lt=1)
    """Exponent of the student's probability."""


@objective("power", over="vocabulary", parameters=PowerParameters, source=HERE)
def power(log_probs: VocabularyLogProbs, power: float) -> VocabularyWeights:
    """Soft generalised cross-entropy: weight p(v) q(v)^power; its fixed point is q ~ p^(1 / (1 - power))."""
    weights = (log_probs.teacher + power * log_probs.student).exp()
    return VocabularyWeights(weights, -(weights * log_probs.student).sum(-1))


@objective("power_label", over="vocabulary", parameters=PowerParameters, source=HERE)
def power_label(log_probs: VocabularyLogProbs, power: float) -> VocabularyWeights:
    """The same of the label alone: weight p(y) q(y)^power."""
    labels = log_probs.labels.unsqueeze(1)
    label = log_probs.student.gather(1, labels)
    weight = (log_probs.teacher.gather(1, labels) + power * label).exp()
    weights = torch.zeros_like(log_probs.student).scatter_(1, labels, weight)
    return VocabularyWeights(weights, -(weight * label).squeeze(1))


class TwoTemperaturesParameters(ObjectiveParameters):
    """Parameters of two_temperatures."""

    temperature: float = Field(2.0, gt=0)
    """The distillation temperature, which an objective is not told."""

    share: float = Field(0.5, ge=0, le=1)
    """Share of the forward KL at temperature 1."""


@objective("two_temperatures", over="vocabulary", parameters=TwoTemperaturesParameters, source=HERE)
def two_temperatures(log_probs: VocabularyLogProbs, temperature: float, share: float) -> VocabularyWeights:
    """Forward KL at the distillation temperature T and at 1: (1 - share) KL(p_T, q_T) + share KL(p_1, q_1).

    With log q_1 the log-softmax of T log q_T, T (p_1 - q_1) are the weights of log q_T that have the gradient
    q_1 - p_1 of the second in the logits: their sum is 0.
    """
    student, teacher = ((temperature * each).log_softmax(-1) for each in (log_probs.student, log_probs.teacher))
    at_1 = temperature * (teacher.exp() - student.exp())
    weights = (1 - share) * log_probs.teacher_probs + share * at_1
    value = (1 - share) * (log_probs.teacher_probs * (log_probs.teacher - log_probs.student)).sum(-1)
    return VocabularyWeights(weights, value + share * (teacher.exp() * (teacher - student)).sum(-1))


class TemperedHeadParameters(ObjectiveParameters):
    """Parameters of tempered_head."""

    temperature: float = Field(2.0, gt=0)
    """Temperature inside the head."""

    mass: float = Field(0.999, gt=0, lt=1)
    """The teacher's mass in the head."""


@objective("tempered_head", over="vocabulary", parameters=TemperedHeadParameters, source=HERE)
def tempered_head(log_probs: VocabularyLogProbs, temperature: float, mass: float) -> VocabularyWeights:
    """Forward KL at 1, and at a higher temperature inside the teacher's head, the fewest tokens that hold ``mass``.

    For a distillation temperature of 1. KL(p, q) + KL(p_T, q_T) over the head's tokens alone, both normalised there:
    the teacher's ranking of unlikely tokens without the mass that a high temperature moves into a large vocabulary.
    """
    probs = log_probs.teacher_probs
    ordered, tokens = probs.sort(-1, descending=True)
    inside = torch.zeros_like(probs, dtype=torch.bool).scatter_(1, tokens, ordered.cumsum(-1) - ordered < mass)
    student, teacher = (
        (each / temperature).masked_fill(~inside, -torch.inf).log_softmax(-1)
        for each in (log_probs.student, log_probs.teacher)
    )
    # The gradient of the head's divergence in the logits is (q_T - p_T) / T; times T, as is usual, q_T - p_T.
    weights = probs + teacher.exp() - student.exp()
    head = torch.where(inside, teacher.exp() * (teacher - student).masked_fill(~inside, 0.0), 0.0)
    value = (probs * (log_probs.teacher - log_probs.student)).sum(-1) + temperature * head.sum(-1)
    return VocabularyWeights(weights, value)


@objective("overlap_kl", over="vocabulary", source=HERE)
def overlap_kl(log_probs: VocabularyLogProbs) -> VocabularyWeights:
    """Forward KL where the models are apart, reverse KL where they agree: (1 - g) KL(p, q) + g KL(q, p).

    g, the overlap sum_v min(p(v), q(v)) of a position, is 0 where the models share no token and 1 where they are equal;
    it carries no gradient.
    """
    overlap = torch.minimum(log_probs.teacher_probs, log_probs.student_probs).sum(-1, keepdim=True)
    gaps = log_probs.student_probs * (log_probs.teacher - log_probs.student)
    forward = (log_probs.teacher_probs * (log_probs.teacher - log_probs.student)).sum(-1, keepdim=True)
    value = torch.lerp(forward, -gaps.sum(-1, keepdim=True), overlap)
    return VocabularyWeights(torch.lerp(log_probs.teacher_probs, gaps, overlap), value.squeeze(1))


@objective("stepped_kl", over="vocabulary", needs={"step"}, source=HERE)
def stepped_kl(log_probs: VocabularyLogProbs, context: TokenContext) -> VocabularyWeights:
    """Forward KL at the first step, reverse KL at the last, in between a mixture with the share of the steps done."""
    share = ((context.step - 1) / (context.steps - 1).clamp_min(1)).unsqueeze(1)
    gaps = log_probs.student_probs * (log_probs.teacher - log_probs.student)
    forward = (log_probs.teacher_probs * (log_probs.teacher - log_probs.student)).sum(-1, keepdim=True)
    value = torch.lerp(forward, -gaps.sum(-1, keepdim=True), share)
    return VocabularyWeights(torch.lerp(log_probs.teacher_probs, gaps, share), value.squeeze(1))
