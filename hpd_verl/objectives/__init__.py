"""Objectives: from log-probs of student and teacher to weights of the student's log-likelihood.

Imports torch alone, and pydantic for parameters. ``registry.py`` says what an objective is; ``token.py`` and
``vocabulary.py`` hold those of this package.

    from hpd_verl.objectives import OBJECTIVES, TokenLogProbs
    weights = OBJECTIVES["hpd"](TokenLogProbs(...), forward_coef=0.5)
    loss = -(weights.label * log_q_label + weights.sampled * log_q_sampled).sum() / num_response_tokens
"""

from hpd_verl.objectives import token, vocabulary
from hpd_verl.objectives.context import TokenContext
from hpd_verl.objectives.log_probs import (
    LOG_ZERO,
    TeacherRows,
    TokenLogProbs,
    TokenWeights,
    VocabularyLogProbs,
    VocabularyWeights,
    gap,
    log_ratio,
)
from hpd_verl.objectives.registry import (
    OBJECTIVES,
    BoundObjective,
    Mixture,
    Objective,
    ObjectiveParameters,
    RowObjectives,
    find_objective,
    objective,
)

__all__ = [
    "LOG_ZERO",
    "OBJECTIVES",
    "BoundObjective",
    "Mixture",
    "Objective",
    "ObjectiveParameters",
    "RowObjectives",
    "TeacherRows",
    "TokenContext",
    "TokenLogProbs",
    "TokenWeights",
    "VocabularyLogProbs",
    "VocabularyWeights",
    "find_objective",
    "gap",
    "log_ratio",
    "objective",
    "token",
    "vocabulary",
]
