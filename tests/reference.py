"""Every objective once more, from the paper's definition and on whole logits; imports nothing of hpd_verl.

Tests compare values and gradients with it. ``naive_hpd_loss`` is the implementation that one writes first, on
whole-vocabulary float32 log-probs: benchmarks measure against it, a test holds it to the definition.

Shapes throughout: logits [n, V]; labels, sampled, mask and weights [n], for n positions.
"""

import math
from typing import Any

import torch
from torch import Tensor

OBJECTIVE_NAMES = ("hpd", "sft", "seqkd", "rkl", "jsd", "opd", "power_opd", "constant_negative")
VOCABULARY_OBJECTIVE_NAMES = (
    *(
        "hpd_exact",
        "fkl",
        "rkl_exact",
        "symmetric_kl",
        "tvd",
        "jsd_exact",
        "skew_fkl",
        "skew_rkl",
        "akl",
        "abkd",
        "todi",
        "vopd",
        "entropy_aware",
        "top_k_tail",
        "taid",
    ),
)


def position_weights(
    objective: str,
    q: list[float],
    p: list[float],
    y: int,
    a: int,
    forward_coef: float = 1.0,
    reverse_coef: float = 1.0,
    reinforce_coef: float = 1.0,
    student_sampling: bool = True,
    exponent: float = 5.0,
    below: float = 0.2,
    strength: float = 0.5,
) -> tuple[float, float]:
    """Weights of log q(y) and log q(a) at one position.

    Args:
        objective: one of ``OBJECTIVE_NAMES``.
        q, p: probabilities of the student and of the teacher, positive, over the vocabulary.
        y, a: the label and the token that the student samples.
        forward_coef, reverse_coef, reinforce_coef, student_sampling: of objective hpd.
        exponent, below, strength: of power_opd and of constant_negative.
    """

    def gap(token: int) -> float:
        return q[token] * (math.log(p[token]) - math.log(q[token]))

    if objective == "sft":
        return 1.0, 0.0
    if objective == "seqkd":
        return p[y], 0.0
    if objective == "rkl":
        return gap(y), 0.0
    if objective == "jsd":
        mixture = (p[y] + q[y]) / 2
        return q[y] * (math.log(mixture) - math.log(q[y])) / 2, 0.0
    if objective == "opd":
        return math.log(p[y]) - math.log(q[y]), 0.0
    if objective == "power_opd":
        return p[y] ** exponent - q[y] ** exponent, 0.0
    if objective == "constant_negative":
        return (-strength if q[y] < below else 0.0), 0.0

    assert objective == "hpd"
    label = reverse_coef * gap(y)
    if gap(y) >= 0:  # else the student over-estimates the label: reverse KL alone
        label += forward_coef * p[y]
    if student_sampling and gap(y) > 0 and gap(a) < 0:
        label += reinforce_coef * p[y]
    sampled = reverse_coef * gap(a) if student_sampling and gap(a) < 0 and a != y else 0.0
    return label, sampled


def reference_weights(
    objective: str,
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    sampled: Tensor,
    temperature: float = 1.0,
    **coefficients: Any,
) -> tuple[Tensor, Tensor]:
    """``(label weights, sampled weights)``, float64 [n] each, one position after the other."""
    q = torch.softmax(student_logits.detach().double() / temperature, dim=-1).tolist()
    p = torch.softmax(teacher_logits.detach().double() / temperature, dim=-1).tolist()
    pairs = [
        position_weights(objective, q[t], p[t], int(labels[t]), int(sampled[t]), **coefficients) for t in range(len(q))
    ]
    weights = torch.tensor(pairs, dtype=torch.float64).reshape(-1, 2)
    return weights[:, 0], weights[:, 1]


def reference_loss(
    objective: str,
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    sampled: Tensor,
    mask: Tensor,
    num_tokens: float,
    temperature: float = 1.0,
    **coefficients: Any,
) -> Tensor:
    """The scalar loss, float64, differentiable in ``student_logits`` by plain autograd.

    Args:
        mask: 1 on response tokens.
        num_tokens: response tokens of the global batch.
    """
    label_weights, sampled_weights = reference_weights(
        objective, student_logits, teacher_logits, labels, sampled, temperature, **coefficients
    )
    log_q = torch.log_softmax(student_logits.double() / temperature, dim=-1)
    position = torch.arange(len(labels))
    terms = label_weights * log_q[position, labels] + sampled_weights * log_q[position, sampled]
    return -(terms * mask).sum() / num_tokens


def naive_hpd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    mask: Tensor,
    num_tokens: float,
    sampled: Tensor | None = None,
    temperature: float = 1.0,
) -> Tensor:
    """HPD at the paper's coefficients, on float32 log-probs of the whole vocabulary kept for all positions.

    Args:
        sampled: the student's tokens; None draws them with ``torch.multinomial``.
    """
    log_q = torch.log_softmax(student_logits.float() / temperature, dim=-1)
    log_p = torch.log_softmax(teacher_logits.float() / temperature, dim=-1)
    probs = log_q.detach().exp()
    if sampled is None:
        sampled = torch.multinomial(probs, 1).squeeze(-1)
    gaps = probs * (log_p - log_q.detach())
    position = torch.arange(len(labels), device=labels.device)
    label_gap, sampled_gap = gaps[position, labels], gaps[position, sampled]
    forward = log_p[position, labels].exp()

    label_weights = label_gap + forward * (label_gap >= 0) + forward * ((label_gap > 0) & (sampled_gap < 0))
    sampled_weights = sampled_gap * ((sampled_gap < 0) & (sampled != labels))
    terms = label_weights * log_q[position, labels] + sampled_weights * log_q[position, sampled]
    return -(terms * mask).sum() / num_tokens


# Full-vocabulary objectives and the output layer


def _frozen(value: Tensor) -> Tensor:
    return value.detach()


def position_value(
    objective: str,
    log_q: Tensor,
    log_p: Tensor,
    y: int,
    reverse_share: float = 0.5,
    skew: float = 0.1,
    mu: float = 0.5,
    alpha: float = 0.2,
    beta: float | None = None,
    threshold: float = 0.8,
    forward_coef: float = 1.0,
    k: int = 64,
    start: float = 0.4,
    end: float = 1.0,
    progress: float = 0.2,
    **hpd_coefficients: Any,
) -> Tensor:
    """A full-vocabulary objective at one position: a scalar whose gradient is, by plain autograd, the objective's.

    Args:
        objective: one of ``VOCABULARY_OBJECTIVE_NAMES``.
        log_q, log_p: finite log-probs [V] of the student, differentiable, and of the teacher.
        y: the label.
        reverse_share, skew, mu, alpha: of symmetric_kl, skew_fkl and skew_rkl, akl, abkd.
        beta: of jsd_exact, 0.5 by default, and of abkd, 0.7.
        threshold, forward_coef: of entropy_aware; the latter of hpd_exact, too.
        k: of top_k_tail.
        start, end, progress: of taid; steps done before this one, of the run's.
        hpd_coefficients: of hpd_exact.
    """
    q, p = log_q.exp(), log_p.exp()

    def kl(a: Tensor, b: Tensor) -> Tensor:
        return (a * (a.log() - b.log())).sum()

    if objective == "fkl":
        return kl(p, q)
    if objective == "rkl_exact":
        return kl(q, p)
    if objective == "symmetric_kl":
        return (1 - reverse_share) * kl(p, q) + reverse_share * kl(q, p)
    if objective == "tvd":
        return (p - q).abs().sum() / 2
    if objective == "jsd_exact":
        beta = 0.5 if beta is None else beta
        mixture = beta * p + (1 - beta) * q
        return beta * kl(p, mixture) + (1 - beta) * kl(q, mixture)
    if objective == "skew_fkl":
        return kl(p, skew * p + (1 - skew) * q)
    if objective == "skew_rkl":
        return kl(q, skew * q + (1 - skew) * p)
    if objective == "akl":
        ordered, held = p.sort(descending=True).values, 0
        while ordered[:held].sum() < mu and held < len(p):
            held += 1
        distance = _frozen((p - q).abs())
        share = distance[p >= ordered[held - 1]].sum() / distance.sum() if distance.sum() > 0 else 0.5
        return share * kl(p, q) + (1 - share) * kl(q, p)
    if objective == "abkd":
        a, b = alpha, 0.7 if beta is None else beta
        c = a + b
        return -(p**a * q**b - a / c * p**c - b / c * q**c).sum() / (a * b)
    if objective == "todi":
        share = _frozen(torch.sigmoid(log_p - log_q))
        return (share * p * (log_p - log_q) + (1 - share) * q * (log_q - log_p)).sum()

    if objective == "vopd":
        weight = _frozen(log_p[y] - log_q[y] + kl(q, p))  # the reward less its mean, -KL(q || p)
        return -weight * log_q[y]
    if objective == "entropy_aware":
        entropy = -(p * log_p).sum()
        return kl(q, p) + (forward_coef * kl(p, q) if entropy > threshold else 0.0)
    if objective == "top_k_tail":
        inside = p >= p.sort(descending=True).values[min(k, len(p)) - 1]
        value = (p * (log_p - log_q))[inside].sum()
        if not inside.all():
            value = value + p[~inside].sum() * (p[~inside].sum() / q[~inside].sum()).log()
        return value
    if objective == "taid":
        share = start + (end - start) * progress
        return kl(torch.softmax((1 - share) * _frozen(log_q) + share * log_p, -1), q)

    assert objective == "hpd_exact"
    hpd_coefficients["forward_coef"] = forward_coef
    total = torch.zeros((), dtype=log_q.dtype)
    probs, teacher_probs = _frozen(q).tolist(), p.tolist()
    for a, chance in enumerate(probs):
        label, sampled = position_weights("hpd", probs, teacher_probs, y, a, **hpd_coefficients)
        total = total - chance * (label * log_q[y] + sampled * log_q[a])
    return total


def layer_logits(
    hidden: Tensor,
    weight: Tensor,
    vocabulary: int,
    bias: Tensor | None = None,
    scale: float = 1.0,
    soft_cap: float | None = None,
) -> Tensor:
    """Logits [n, vocabulary] of an output layer."""
    logits = hidden @ weight[:vocabulary].T
    if bias is not None:
        logits = logits + bias[:vocabulary]
    logits = logits * scale
    return logits if soft_cap is None else soft_cap * torch.tanh(logits / soft_cap)


def plain_head_loss(
    row_objectives: list[str],
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    sampled: Tensor,
    token_scale: Tensor,
    temperature: float = 1.0,
    coefficients: dict[str, dict[str, Any]] | None = None,
    teacher_temperature: float | None = None,
) -> tuple[Tensor, Tensor]:
    """The loss of positions with an objective each, on whole float64 logits by plain autograd.

    Args:
        row_objectives: n names.
        sampled: int64 [n, 1].
        token_scale: [n].
        coefficients: keyword arguments of objectives, by name.
        teacher_temperature: of the teacher alone; None for the same.

    Returns:
        ``(sum of token_scale * losses, losses [n])``.
    """
    log_q = torch.log_softmax(student_logits.double() / temperature, dim=-1)
    log_p = torch.log_softmax(teacher_logits.double() / (teacher_temperature or temperature), dim=-1)
    losses = []
    for t, name in enumerate(row_objectives):
        arguments = (coefficients or {}).get(name, {})
        y = int(labels[t])
        if name in VOCABULARY_OBJECTIVE_NAMES:
            losses.append(position_value(name, log_q[t], log_p[t], y, **arguments))
            continue
        q, p = log_q[t].detach().exp().tolist(), log_p[t].exp().tolist()
        a = int(sampled[t])
        label_weight, sampled_weight = position_weights(name, q, p, y, a, **arguments)
        losses.append(-(label_weight * log_q[t, y] + sampled_weight * log_q[t, a]))
    stacked = torch.stack(losses)
    return (stacked * token_scale).sum(), stacked
