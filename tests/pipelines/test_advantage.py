"""The estimator "hpd" in verl's registry: mask, objective per row."""

import math
from typing import Any

import pytest
import torch
from reference import reference_weights
from torch import Tensor
from verl.trainer.ppo.core_algos import get_adv_estimator_fn

from hpd_verl.config import HPDConfig
from hpd_verl.objectives import OBJECTIVES, RowObjectives, TokenLogProbs
from hpd_verl.pipelines.advantage import compute_hpd_advantage

ROWS, RESPONSE, VOCABULARY = 4, 7, 9


class Responses:
    """Float64 logits of student and teacher, labels, samples, a mask; row 1 is a rollout, row 3 too."""

    def __init__(self, seed: int = 0) -> None:
        random = torch.Generator().manual_seed(seed)
        n = ROWS * RESPONSE
        self.student = 2 * torch.randn(n, VOCABULARY, dtype=torch.float64, generator=random)
        self.teacher = self.student + torch.randn(n, VOCABULARY, dtype=torch.float64, generator=random)
        self.labels = torch.randint(VOCABULARY, (n,), generator=random)
        self.sampled = torch.multinomial(self.student.softmax(-1), 1, generator=random).squeeze(1)
        self.sampled[::3] = self.labels[::3]  # samples that are the label
        self.is_rollout = torch.tensor([False, True, False, True])
        self.mask = torch.arange(RESPONSE) < torch.tensor([[7], [4], [1], [0]])

    def log_probs(self) -> TokenLogProbs:
        """What the trainer passes, [rows, response]."""

        def of(logits: Tensor, tokens: Tensor) -> Tensor:
            return torch.log_softmax(logits, -1).gather(1, tokens.unsqueeze(1)).view(ROWS, RESPONSE)

        return TokenLogProbs(
            of(self.student, self.labels),
            of(self.teacher, self.labels),
            of(self.student, self.sampled),
            of(self.teacher, self.sampled),
            (self.sampled == self.labels).view(ROWS, RESPONSE),
        )

    def reference(self, objective: str, **coefficients: Any) -> tuple[Tensor, Tensor]:
        """Weights, [rows, response], before the mask."""
        label, sampled = reference_weights(
            objective, self.student, self.teacher, self.labels, self.sampled, **coefficients
        )
        return label.view(ROWS, RESPONSE), sampled.view(ROWS, RESPONSE)

    def advantage(self, **config: Any) -> tuple[Tensor, Tensor]:
        return compute_hpd_advantage(
            response_mask=self.mask.long(),
            objectives=HPDConfig(**config).objectives,
            log_probs=self.log_probs(),
            is_rollout=self.is_rollout,
        )


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def test_registered_under_hpd() -> None:
    """verl finds the estimator by the name that algorithm.adv_estimator gives."""
    assert get_adv_estimator_fn("hpd") is compute_hpd_advantage


@pytest.mark.parametrize("objective", sorted(name for name, each in OBJECTIVES.items() if each.over == "token"))
def test_weights(objective: str) -> None:
    """The objective's weights on response tokens, zero elsewhere."""
    batch = Responses()
    label, sampled = batch.advantage(
        objective=objective, on_policy_fraction=float(OBJECTIVES[objective].needs_rollouts)
    )
    expected_label, expected_sampled = batch.reference(objective)
    close(label, expected_label * batch.mask)
    close(sampled, expected_sampled * batch.mask)
    assert label[batch.mask].any()


@pytest.mark.parametrize(
    "coefficients",
    [{"forward_coef": 0.5, "reverse_coef": 2.0, "reinforce_coef": 3.0}, {"student_sampling": False}],
    ids=["coefficients", "no sampling"],
)
def test_coefficients_reach_the_objective(coefficients: dict[str, Any]) -> None:
    batch = Responses(seed=1)
    label, sampled = batch.advantage(**coefficients)
    expected_label, expected_sampled = batch.reference("hpd", **coefficients)
    close(label, expected_label * batch.mask)
    close(sampled, expected_sampled * batch.mask)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32])
def test_mask_hides_whatever_stands_outside(dtype: torch.dtype) -> None:
    """Masks of every dtype; NaN and infinity at padding do not come through."""
    batch = Responses()
    expected_label, expected_sampled = batch.advantage()
    dirty = batch.log_probs()
    for values, garbage in (
        (dirty.student_label, math.nan),
        (dirty.teacher_label, math.inf),
        (dirty.student_sampled, math.inf),
        (dirty.teacher_sampled, -1.0),
    ):
        values[~batch.mask] = garbage
    label, sampled = compute_hpd_advantage(batch.mask.to(dtype), RowObjectives.of("hpd"), dirty, batch.is_rollout)
    assert not label[~batch.mask].any()
    assert torch.equal(label, expected_label)
    assert torch.equal(sampled, expected_sampled)


@pytest.mark.parametrize(
    ("objective", "on_policy_objective"),
    [("hpd", "opd"), ("sft", "hpd"), ("jsd", "rkl"), ("hpd", "hpd"), ("hpd", None)],
)
def test_objective_of_each_row(objective: str, on_policy_objective: str | None) -> None:
    """Rollouts have the on-policy objective's label and sampled weights, demonstrations the other's."""
    batch = Responses(seed=2)
    label, sampled = batch.advantage(objective=objective, on_policy_objective=on_policy_objective)
    for row in range(ROWS):
        name = on_policy_objective if on_policy_objective and batch.is_rollout[row] else objective
        for found, expected in zip((label, sampled), batch.reference(name), strict=True):
            close(found[row], expected[row] * batch.mask[row])


def test_ignores_what_else_verl_passes() -> None:
    """Estimators are called with rewards and more by keyword."""
    batch = Responses()
    label, _ = compute_hpd_advantage(
        batch.mask,
        RowObjectives.of("hpd"),
        batch.log_probs(),
        batch.is_rollout,
        token_level_rewards=torch.ones(1),
        index=None,
    )
    assert torch.equal(label, batch.advantage()[0])


@pytest.mark.parametrize("missing", ["log_probs", "is_rollout"])
def test_refuses_a_trainer_without_teacher(missing: str) -> None:
    """Only HPD's own trainer has what the weights need: the error says what to select."""
    batch = Responses()
    inputs = {"log_probs": batch.log_probs(), "is_rollout": batch.is_rollout, missing: None}
    with pytest.raises(ValueError, match=r"algorithm\.adv_estimator=hpd .* select algorithm=hpd"):
        compute_hpd_advantage(batch.mask, RowObjectives.of("hpd"), **inputs)
    with pytest.raises(ValueError, match="algorithm=hpd"):
        compute_hpd_advantage(
            response_mask=batch.mask,
            config=HPDConfig(),
            token_level_rewards=batch.mask.float(),
            index=None,
        )
