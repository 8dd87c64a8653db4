"""Policy loss "hpd" in verl's registry: a weighted log-likelihood, or PPO's clipped ratio for repeated updates."""

from typing import Any

import torch
from torch import Tensor
from verl.trainer.ppo.core_algos import agg_loss, register_policy_loss
from verl.workers.config import ActorConfig


@register_policy_loss("hpd")
def compute_hpd_policy_loss(
    old_log_prob: Tensor | None,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    loss_agg_mode: str = "token-mean",
    config: ActorConfig | None = None,
    rollout_is_weights: Tensor | None = None,
) -> tuple[Tensor, dict[str, Any]]:
    """Loss of one token a position, the label or a sampled token, given its weights (paper eq. 9).

    Args:
        old_log_prob: [rows, response], log-probs of the student that the weights were computed with, where a batch is
            used for several updates: the weights are then corrected by the ratio q_new / q_old, clipped with verl's
            ``clip_ratio_low`` and ``clip_ratio_high``. None where it is used for one: the loss is exactly
            ``-w log q``.
        log_prob: [rows, response], log q of the token, differentiable.
        advantages: [rows, response], the detached weights.
        response_mask: [rows, response].
        loss_agg_mode: verl's aggregation; "token-mean" divides by the global batch's response tokens.
        config: the actor's configuration.
        rollout_is_weights: verl's rollout correction, which HPD does not use.

    Returns:
        ``(loss, metrics)``: a scalar and, with a ratio, the clipped tokens as a fraction of the global batch's, scaled
        as the loss is: the sum over micro-batches and mean over ranks is the batch's fraction.
    """
    assert config is not None
    if rollout_is_weights is not None:
        raise ValueError("the hpd policy loss does not support algorithm.rollout_correction: leave it unset")
    metrics: dict[str, Any] = {}
    if old_log_prob is None:
        # A weight of zero takes no part, not even where the log-prob is -inf.
        losses = torch.where(advantages == 0, 0.0, -advantages * log_prob)
    else:
        low = config.clip_ratio if config.clip_ratio_low is None else config.clip_ratio_low
        high = config.clip_ratio if config.clip_ratio_high is None else config.clip_ratio_high
        difference = torch.where(advantages == 0, 0.0, log_prob - old_log_prob)
        ratio = torch.exp(torch.clamp(difference, -20.0, 20.0))
        unclipped = -advantages * ratio
        clipped = -advantages * torch.clamp(ratio, 1 - low, 1 + high)
        losses = torch.maximum(unclipped, clipped)
        fraction = agg_loss(
            loss_mat=(clipped > unclipped).float(),
            loss_mask=response_mask,
            loss_agg_mode="token-mean",
            **{"batch_num_tokens": response_mask.sum().clamp_min(1), **config.global_batch_info},
        )
        metrics["actor/pg_clipfrac"] = fraction.item()
    loss = agg_loss(loss_mat=losses, loss_mask=response_mask, loss_agg_mode=loss_agg_mode, **config.global_batch_info)
    return loss, metrics
