"""What an objective reads, log-probs of student and teacher, and what it returns, weights of the student's or a loss.

``loss = -sum_t w(v_t) log q(v_t)`` with detached weights (paper eq. 9): ``q`` the student, ``p`` the teacher.
"""

import math
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

LOG_ZERO = -1000.0
"""Stands for the logarithm of a probability of exactly zero, so that weights stay finite."""


@dataclass(frozen=True)
class TokenLogProbs:
    """Log-probs of the label ``y`` and the sampled token ``a`` of each position, at the distillation temperature.

    All of one shape.
    """

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
    value: Tensor | None = None
    """The loss itself, of that shape; None: the weighted log-likelihood."""

    def loss(self, log_probs: TokenLogProbs) -> Tensor:
        """Of each token, of that shape."""
        if self.value is not None:
            return self.value
        return -(_term(self.label, log_probs.student_label) + _term(self.sampled, log_probs.student_sampled))


@dataclass(frozen=True)
class VocabularyLogProbs:
    """Log-probs and probabilities of the whole vocabulary at each position. Objectives must not write into them.

    Made of log-probs alone, it computes the rest; log-probs below ``LOG_ZERO`` become it, NaN stays NaN.
    """

    student: Tensor
    """log q, floating [n, V], at least ``LOG_ZERO``."""
    teacher: Tensor
    """log p, floating [n, V], at least ``LOG_ZERO``."""
    labels: Tensor
    """y, int64 [n]."""
    student_probs: Tensor = field(default=None)  # type: ignore[assignment]
    """q, [n, V]."""
    teacher_probs: Tensor = field(default=None)  # type: ignore[assignment]
    """p, [n, V]."""
    student_label: Tensor = field(default=None)  # type: ignore[assignment]
    """log q(y), [n, 1], at least ``LOG_ZERO``."""
    teacher_label: Tensor = field(default=None)  # type: ignore[assignment]
    """log p(y), [n, 1], at least ``LOG_ZERO``."""
    row_statistic: Tensor | None = None
    """[n, 1], the objective's own; see ``Objective.row_statistic``."""

    def __post_init__(self) -> None:
        for name in ("student", "teacher"):
            if getattr(self, f"{name}_probs") is None:
                log_probs = getattr(self, name).clamp_min(LOG_ZERO)
                object.__setattr__(self, name, log_probs)
                object.__setattr__(self, f"{name}_probs", log_probs.exp())
            if getattr(self, f"{name}_label") is None:
                object.__setattr__(self, f"{name}_label", getattr(self, name).gather(1, self.labels.unsqueeze(1)))


@dataclass(frozen=True)
class VocabularyWeights:
    """Detached weights of log q(v) for all v; the loss of a position has the gradient of -sum_v w(v) log q(v)."""

    weights: Tensor
    """[n, V]. A multiple of q(v) added to all weights of a position changes no gradient, and is left out."""
    value: Tensor
    """[n], the loss itself: the divergence, or for hpd_exact the weighted log-likelihood."""
    label: Tensor | None = None
    """[n], a weight of the label to add to its entry in ``weights``: written into the entry instead, it costs a GPU a
    pass over the vocabulary."""

    def whole(self, labels: Tensor) -> Tensor:
        """``weights`` with ``label`` added: [n, V], for labels [n]."""
        if self.label is None:
            return self.weights
        return self.weights.scatter_add(1, labels.unsqueeze(1), self.label.unsqueeze(1))


class TeacherRows(Protocol):
    """The teacher's distributions at n positions, before the passes over the vocabulary."""

    def top(self, count: int) -> Tensor:
        """The largest log-probs, [n, at most count], in descending order."""

    def log_probs(self, rows: Tensor) -> Tensor:
        """Log-probs, at least ``LOG_ZERO``, of some positions: [m, V of the teacher] of int64 [m]."""


def _term(weights: Tensor, log_probs: Tensor) -> Tensor:
    """``w log q``; a token that is impossible and has no weight adds nothing."""
    return torch.where((weights == 0) & (log_probs == -math.inf), 0.0, weights * log_probs)


def log_ratio(student: Tensor, teacher: Tensor) -> Tensor:
    """``log p(v) - log q(v)``. Its sign is that of ``gap``, also where q(v) is too small for a number of its dtype.

    Args:
        student, teacher: log q(v) and log p(v), any equal shape; below ``LOG_ZERO`` they count as it.
    """
    return teacher.clamp_min(LOG_ZERO) - student.clamp_min(LOG_ZERO)


def gap(student: Tensor, teacher: Tensor) -> Tensor:
    """``q(v) (log p(v) - log q(v))``, the negative reverse-KL integrand (paper 5.1).

    Args:
        student, teacher: log q(v) and log p(v), any equal shape.

    Returns:
        Tensor of that shape; 0 where q(v) = 0 (its limit), finite where only p(v) = 0 (see ``LOG_ZERO``).
    """
    return student.exp() * log_ratio(student, teacher)
