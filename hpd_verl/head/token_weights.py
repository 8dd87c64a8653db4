"""The configured objectives' weights of the label and of each sampled token."""

from collections.abc import Sequence

import torch
from torch import Tensor

from hpd_verl.config import HPDConfig
from hpd_verl.objectives.weights import OBJECTIVES, TokenLogProbs


def row_objectives(is_rollout: Tensor, config: HPDConfig) -> list[tuple[str, Tensor]]:
    """Which rows each objective in use is for.

    Args:
        is_rollout: bool, True where the label is the student's own.
        config: the algorithm's configuration.

    Returns:
        Objectives with their rows, bool of ``is_rollout``'s shape; every row has exactly one.
    """
    if config.on_policy_objective in (None, config.objective):
        return [(config.objective, torch.ones_like(is_rollout))]
    return [(config.objective, ~is_rollout), (config.on_policy_objective, is_rollout)]


def token_weights(
    log_probs: Sequence[TokenLogProbs], objectives: Sequence[tuple[str, Tensor]], config: HPDConfig
) -> tuple[Tensor, list[Tensor]]:
    """Weights of the label and of each sampled token, with K > 1 samples their average.

    Args:
        log_probs: one entry for each of the K samples a position, all of one shape.
        objectives: objectives that weigh tokens, not the vocabulary, each with its rows: bool, broadcastable to the
            log-probs; see ``row_objectives``.
        config: the algorithm's configuration.

    Returns:
        ``(label_weights, K sampled_weights)`` of the log-probs' shape and dtype, 0 in rows of no objective. The label's
        weight is the mean over samples and each sample counts 1/K.
    """
    label_weights = torch.zeros_like(log_probs[0].student_label)
    sampled_weights = [torch.zeros_like(sample.student_sampled) for sample in log_probs]
    for name, rows in objectives:
        weights = [OBJECTIVES[name](sample, **config.coefficients(name)) for sample in log_probs]
        label_weights = torch.where(rows, torch.stack([each.label for each in weights]).mean(0), label_weights)
        sampled_weights = [
            torch.where(rows, each.sampled / len(weights), others)
            for each, others in zip(weights, sampled_weights, strict=True)
        ]
    return label_weights, sampled_weights
