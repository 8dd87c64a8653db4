"""Weights of the label and of the sampled token, by the objectives of each row."""

from collections.abc import Sequence

import torch
from torch import Tensor

from hpd_verl.objectives import Mixture, TokenContext, TokenLogProbs, TokenWeights


def token_weights(
    log_probs: TokenLogProbs, mixtures: Sequence[tuple[Mixture, Tensor]], context: TokenContext | None = None
) -> TokenWeights:
    """Weights of the label and of the sampled token.

    Args:
        log_probs: tensors of any one shape.
        mixtures: objectives, of which those over tokens count, with their rows: bool, broadcastable to the log-probs;
            see ``RowObjectives.by_row``.
        context: what the objectives need.

    Returns:
        Of the log-probs' shape and dtype, 0 in rows of no objective over tokens.
    """
    label = sampled = value = torch.zeros_like(log_probs.student_label)
    has_value = False
    for mixture, rows in mixtures:
        if mixture.over("token"):
            weights = mixture.token_weights(log_probs, context)
            label, sampled = torch.where(rows, weights.label, label), torch.where(rows, weights.sampled, sampled)
            value = torch.where(rows, weights.loss(log_probs), value)
            has_value |= weights.value is not None
    return TokenWeights(label, sampled, value if has_value else None)
