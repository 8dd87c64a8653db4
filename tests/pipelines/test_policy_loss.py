"""The policy loss "hpd" in verl's registry: weighted log-likelihood, clipped ratio, every aggregation."""

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor
from verl.trainer.ppo.core_algos import get_policy_loss_fn
from verl.workers.config import FSDPActorConfig

from hpd_verl.pipelines.policy_loss import compute_hpd_policy_loss

MODES = ["token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-sum-norm", "seq-mean-token-mean"]
GLOBAL_BATCH = {"dp_size": 2, "batch_num_tokens": 31, "global_batch_size": 6, "loss_scale_factor": 5}
ROWS, RESPONSE = 4, 6


def actor_config(**settings: Any) -> FSDPActorConfig:
    return FSDPActorConfig(strategy="fsdp", rollout_n=1, ppo_micro_batch_size_per_gpu=1, **settings)


def make_batch(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """``(log_prob, weights, mask)`` in float64; the last row has no response token; weights are masked."""
    random = torch.Generator().manual_seed(seed)
    log_prob = -3 * torch.rand(ROWS, RESPONSE, dtype=torch.float64, generator=random) - 0.1
    mask = torch.arange(RESPONSE) < torch.tensor([[6], [3], [1], [0]])
    weights = torch.randn(ROWS, RESPONSE, dtype=torch.float64, generator=random) * mask
    return log_prob, weights, mask


def aggregate(losses: Tensor, mask: Tensor, mode: str, batch: dict[str, int]) -> Tensor:
    """verl's aggregations, row by row. Without global counts the micro-batch's own count."""
    rows = [losses[row][mask[row]] for row in range(len(losses)) if mask[row].any()]
    num_rows = batch.get("global_batch_size", len(rows))
    num_tokens = batch.get("batch_num_tokens", sum(len(row) for row in rows))
    total = sum((row.sum() for row in rows), torch.zeros((), dtype=losses.dtype))
    if mode == "token-mean":
        loss = total / num_tokens
    elif mode == "token-sum":
        loss = total
    elif mode == "seq-mean-token-sum":
        loss = total / num_rows
    elif mode == "seq-mean-token-sum-norm":
        loss = total / num_rows / batch.get("loss_scale_factor", losses.shape[1])
    else:
        assert mode == "seq-mean-token-mean"
        loss = sum((row.mean() for row in rows), torch.zeros((), dtype=losses.dtype)) / num_rows
    return loss * batch.get("dp_size", 1)


def clipped_ratio_loss(weight: float, log_ratio: float, low: float, high: float) -> float:
    """PPO's pessimistic surrogate of one token."""
    ratio = math.exp(log_ratio)
    return -min(weight * ratio, weight * min(max(ratio, 1 - low), 1 + high))


def test_registered_under_hpd() -> None:
    """verl finds the loss by the name that policy_loss.loss_mode gives."""
    assert get_policy_loss_fn("hpd") is compute_hpd_policy_loss


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("batch", [{}, GLOBAL_BATCH], ids=["local counts", "global counts"])
def test_single_update(mode: str, batch: dict[str, int]) -> None:
    """Without old log-probs: -w log q, value and gradient, in each aggregation of verl's."""
    log_prob, weights, mask = make_batch()
    log_prob.requires_grad_()
    loss, metrics = compute_hpd_policy_loss(
        None, log_prob, weights, mask, mode, actor_config(global_batch_info=dict(batch))
    )
    expected = aggregate(-weights * log_prob, mask, mode, batch)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    (grad,) = torch.autograd.grad(loss, log_prob)
    (expected_grad,) = torch.autograd.grad(expected, log_prob)
    torch.testing.assert_close(grad, expected_grad, rtol=1e-6, atol=0)
    assert not grad[~mask].any()
    assert metrics == {}


def test_token_mean_is_the_default() -> None:
    """The paper's loss: the sum over response tokens divided by the global number of them."""
    log_prob, weights, mask = make_batch(seed=1)
    loss, _ = compute_hpd_policy_loss(
        None, log_prob, weights, mask, config=actor_config(global_batch_info={"batch_num_tokens": 31})
    )
    torch.testing.assert_close(loss, -(weights * log_prob).sum() / 31)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("old", [False, True], ids=["single update", "ratio"])
def test_micro_batches_add_up(mode: str, old: bool) -> None:
    """With global counts, the losses of any split of the rows sum to the whole batch's."""
    log_prob, weights, mask = make_batch(seed=2)
    old_log_prob = log_prob + 0.3 * weights.sign() if old else None
    config = actor_config(global_batch_info=GLOBAL_BATCH | {"dp_size": 1})

    def loss_of(rows: slice) -> Tensor:
        before = None if old_log_prob is None else old_log_prob[rows]
        return compute_hpd_policy_loss(before, log_prob[rows], weights[rows], mask[rows], mode, config)[0]

    whole = loss_of(slice(None))
    for cuts in ([0, 1, 4], [0, 1, 2, 3, 4]):
        parts = [loss_of(slice(start, stop)) for start, stop in itertools.pairwise(cuts)]
        torch.testing.assert_close(sum(parts, torch.zeros(())), whole)


@pytest.mark.parametrize("mode", MODES)
def test_ratio_of_one_has_the_same_gradient(mode: str) -> None:
    """The first of several updates has ratio 1: its gradient is that of -w log q."""
    log_prob, weights, mask = make_batch(seed=3)
    log_prob.requires_grad_()
    config = actor_config(global_batch_info=dict(GLOBAL_BATCH))
    losses = [
        compute_hpd_policy_loss(old, log_prob, weights, mask, mode, config)[0] for old in (None, log_prob.detach())
    ]
    grads = [torch.autograd.grad(loss, log_prob)[0] for loss in losses]
    torch.testing.assert_close(grads[1], grads[0])


@pytest.mark.parametrize(
    ("settings", "low", "high"),
    [
        ({"clip_ratio_low": 0.1, "clip_ratio_high": 0.3}, 0.1, 0.3),
        ({"clip_ratio": 0.4, "clip_ratio_low": None, "clip_ratio_high": None}, 0.4, 0.4),
        ({"clip_ratio": 0.4, "clip_ratio_low": None, "clip_ratio_high": 0.05}, 0.4, 0.05),
        ({"clip_ratio": 0.9}, 0.2, 0.2),
    ],
    ids=["low and high", "clip_ratio", "mixed", "defaults"],
)
def test_ratio_is_clipped(settings: dict[str, Any], low: float, high: float) -> None:
    """Both signs of weight, ratios below, inside and above the range: value, gradient, fraction clipped."""
    log_ratios = [-0.8, -0.3, -0.06, 0.0, 0.06, 0.2, 0.35, 0.8]
    weights = torch.tensor([[1.0], [-1.0], [0.5], [-2.0], [0.0]]).double().expand(-1, len(log_ratios)).clone()
    mask = torch.ones(weights.shape, dtype=torch.bool)
    mask[2] = False  # a row outside the mask counts nowhere
    old_log_prob = torch.full_like(weights, -2.0)
    log_prob = (old_log_prob + torch.tensor(log_ratios).double()).requires_grad_()

    loss, metrics = compute_hpd_policy_loss(
        old_log_prob, log_prob, weights, mask, "token-sum", actor_config(**settings)
    )
    expected, clipped = 0.0, 0
    expected_grad = torch.zeros_like(weights)
    for row in (0, 1, 3, 4):
        for column, log_ratio in enumerate(log_ratios):
            weight, ratio = weights[row, column].item(), math.exp(log_ratio)
            expected += clipped_ratio_loss(weight, log_ratio, low, high)
            if (weight > 0 and ratio > 1 + high) or (weight < 0 and ratio < 1 - low):
                clipped += 1
            else:
                expected_grad[row, column] = -weight * ratio
    assert clipped > 0
    torch.testing.assert_close(loss.item(), expected)
    torch.testing.assert_close(torch.autograd.grad(loss, log_prob)[0], expected_grad)
    assert metrics == {"actor/pg_clipfrac": pytest.approx(clipped / (4 * len(log_ratios)))}


def test_ratio_of_unlikely_tokens_stays_finite() -> None:
    """However far the student has moved, loss and gradient are finite in float32."""
    old_log_prob = torch.tensor([[-1000.0, -1.0, -500.0]])
    log_prob = torch.tensor([[-1.0, -1000.0, -0.0]], requires_grad=True)
    weights = torch.tensor([[-1.0, 1.0, 1.0]])
    loss, _ = compute_hpd_policy_loss(old_log_prob, log_prob, weights, torch.ones(1, 3), config=actor_config())
    assert loss.isfinite()
    assert torch.autograd.grad(loss, log_prob)[0].isfinite().all()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "ratio",
    [
        False,
        True,
    ],
    ids=["single update", "ratio"],
)
def test_weight_of_zero_takes_no_part(mode: str, ratio: bool) -> None:
    """A token whose logit is -inf has weight 0 (rkl: q(y) = 0): loss and gradient as if it were not there."""
    log_prob = torch.tensor([[-1.0, -math.inf, -2.0]], requires_grad=True)
    weights = torch.tensor([[0.5, 0.0, -1.0]])
    mask = torch.ones(1, 3, dtype=torch.bool)
    old_log_prob = log_prob.detach() if ratio else None
    loss, metrics = compute_hpd_policy_loss(old_log_prob, log_prob, weights, mask, mode, actor_config())
    losses = torch.tensor([[-0.5, 0.0, 1.0]]) if ratio else torch.tensor([[0.5, 0.0, -2.0]])
    torch.testing.assert_close(loss, aggregate(losses, mask, mode, {}))
    (grad,) = torch.autograd.grad(loss, log_prob)
    assert grad.isfinite().all()
    assert grad[0, 1] == 0
    assert grad[0, 0] < 0 < grad[0, 2]
    assert all(math.isfinite(value) for value in metrics.values())


@pytest.mark.parametrize("old", [False, True], ids=["single update", "ratio"])
def test_micro_batch_without_response_tokens(old: bool) -> None:
    """Loss 0, still attached to the graph, and no division by zero."""
    log_prob, weights, _ = make_batch()
    log_prob.requires_grad_()
    before = log_prob.detach() if old else None
    nothing = torch.zeros(ROWS, RESPONSE, dtype=torch.bool)
    config = actor_config(global_batch_info=dict(GLOBAL_BATCH))
    loss, metrics = compute_hpd_policy_loss(before, log_prob, weights, nothing, config=config)
    assert loss == 0
    assert not torch.autograd.grad(loss, log_prob)[0].any()
    assert metrics == ({"actor/pg_clipfrac": 0.0} if old else {})


def test_refuses_rollout_correction() -> None:
    log_prob, weights, mask = make_batch()
    with pytest.raises(ValueError, match=r"algorithm\.rollout_correction"):
        compute_hpd_policy_loss(
            None, log_prob, weights, mask, config=actor_config(), rollout_is_weights=torch.ones_like(weights)
        )
