"""Advantage estimator "hpd" in verl's registry: the token weights of the configured objective."""

from typing import Any

import torch
from torch import Tensor
from verl.trainer.ppo.core_algos import register_adv_est

from hpd_verl.head.token_weights import token_weights
from hpd_verl.objectives import RowObjectives, TokenLogProbs


@register_adv_est("hpd")
def compute_hpd_advantage(
    response_mask: Tensor,
    objectives: RowObjectives | None = None,
    log_probs: TokenLogProbs | None = None,
    is_rollout: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    """Weights of the label and of the sampled token.

    Args:
        response_mask: [rows, response], 1 on response tokens.
        objectives: what is optimised.
        log_probs: tensors of shape [rows, response].
        is_rollout: bool [rows], True where the label is the student's own.

    Returns:
        ``(label_weights, sampled_weights)``, [rows, response], zero outside the mask.

    Raises:
        ValueError: called by another trainer than HPD's, which alone provides the log-probs.
    """
    if log_probs is None or is_rollout is None or objectives is None:
        raise ValueError(
            "algorithm.adv_estimator=hpd needs the teacher's log-probs, which only trainer.v1.trainer_mode=hpd "
            "provides: select algorithm=hpd instead of setting the estimator alone"
        )
    mask = response_mask.bool()
    weights = token_weights(log_probs, objectives.by_row(is_rollout.unsqueeze(1)))
    return torch.where(mask, weights.label, 0.0), torch.where(mask, weights.sampled, 0.0)
