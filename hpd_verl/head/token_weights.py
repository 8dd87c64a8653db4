"""Weights of the label and of each sampled token, by the objectives of each row."""

from collections.abc import Sequence

import torch
from torch import Tensor

from hpd_verl.objectives import Mixture, TokenLogProbs


def token_weights(
    log_probs: Sequence[TokenLogProbs], mixtures: Sequence[tuple[Mixture, Tensor]]
) -> tuple[Tensor, list[Tensor]]:
    """Weights of the label and of each sampled token, with K > 1 of them their average.

    Args:
        log_probs: one entry for each of the K sampled tokens a position, all of one shape.
        mixtures: objectives, of which those over tokens count, with their rows: bool, broadcastable to the log-probs;
            see ``RowObjectives.by_row``.

    Returns:
        ``(label_weights, K sampled_weights)`` of the log-probs' shape and dtype, 0 in rows of no objective over tokens.
        The label's weight is the mean over sampled tokens, and each of them counts 1/K.
    """
    label_weights = torch.zeros_like(log_probs[0].student_label)
    sampled_weights = [torch.zeros_like(sample.student_sampled) for sample in log_probs]
    for mixture, rows in mixtures:
        if not mixture.over("token"):
            continue
        label, sampled = mixture.token_weights(log_probs)
        label_weights = torch.where(rows, label, label_weights)
        sampled_weights = [
            torch.where(rows, each, others) for each, others in zip(sampled, sampled_weights, strict=True)
        ]
    return label_weights, sampled_weights
