"""Objectives that return a loss: through the output layer they are their weights, derived by hand."""

from typing import Any

import pytest
import torch
from reference import OBJECTIVE_NAMES, VOCABULARY_OBJECTIVE_NAMES, position_value, position_weights
from test_head import PARAMETERS, Case, configured
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hpd_verl.objectives import OBJECTIVES, Mixture, Objective, RowObjectives, TokenLogProbs, VocabularyLogProbs


def loss_over_vocabulary(name: str, **parameters: Any) -> Objective:
    """A built-in objective as the loss that its paper defines."""

    def loss(log_probs: VocabularyLogProbs) -> Tensor:
        rows = zip(log_probs.student, log_probs.teacher, log_probs.labels.tolist(), strict=True)
        return torch.stack([position_value(name, *row, **parameters) for row in rows])

    return Objective("loss", loss, "vocabulary", "reference", returns="loss")


def loss_over_tokens(name: str, **parameters: Any) -> Objective:
    """A built-in objective as its weighted log-likelihood."""

    def loss(log_probs: TokenLogProbs) -> Tensor:
        pairs = []
        for student, teacher, student_a, teacher_a, same in zip(
            *(each.detach().exp().tolist() for each in list(vars(log_probs).values())[:4]),
            log_probs.sampled_is_label.tolist(),
            strict=True,
        ):
            pairs.append(position_weights(name, [student, student_a], [teacher, teacher_a], 0, 1 - same, **parameters))
        weights = torch.tensor(pairs, dtype=log_probs.student_label.dtype)
        label, sampled = log_probs.student_label, log_probs.student_sampled
        # Of the label twice, so that both ways to it are used where it is sampled.
        return -(weights * torch.stack([label, sampled], 1)).sum(-1)

    weighs_sample = OBJECTIVES[name].bind(parameters).weighs_sample
    return Objective("loss", loss, "token", "reference", returns="loss", weighs_sample=weighs_sample)


def assert_same(case: Case, loss: Objective, **changes: Any) -> None:
    """Token losses, label's weights of objectives over tokens, and all gradients, to 1e-12."""
    found, gradients = case.run_with_gradients(objectives=RowObjectives(Mixture(((loss.bind(), 1.0),))), **changes)
    wanted, expected = case.run_with_gradients(**changes)
    for one, other in ((found.loss, wanted.loss), (found.token_losses, wanted.token_losses)):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    for gradient, other in zip(gradients, expected, strict=True):
        assert gradient.abs().max() > (1e-6 if case.config.objective == "power_opd" else 1e-3)  # a fifth power
        torch.testing.assert_close(gradient, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("objective", OBJECTIVE_NAMES + VOCABULARY_OBJECTIVE_NAMES)
@pytest.mark.parametrize("defaults", [True, False])
def test_losses_are_their_weights(objective: str, defaults: bool) -> None:
    given = {} if defaults else PARAMETERS.get(objective, {})
    case = Case(config=configured(objective, **given), layer={"soft_cap": 6.0, "scale": 0.8}, bias=True)
    (bound,) = case.config.objectives.bound
    make = loss_over_vocabulary if bound.objective.over == "vocabulary" else loss_over_tokens
    assert_same(case, make(objective, **bound.arguments))


def test_any_way_to_the_student() -> None:
    """A loss may use log q, q and log q(y), or gather log q(y) itself."""
    ways = [
        lambda x: -(x.teacher_probs * x.student).sum(-1),
        lambda x: -(x.teacher_probs * x.student_probs.log()).sum(-1),
    ]
    cases = [(way, "fkl") for way in ways]
    cases += [
        (lambda x: -x.student_label.squeeze(1), "sft"),
        (lambda x: -x.student.gather(1, x.labels[:, None])[:, 0], "sft"),
    ]
    for way, objective in cases:
        case = Case(config=configured(objective))
        loss = Objective("loss", way, "vocabulary", "this test", returns="loss")
        _, gradients = case.run_with_gradients(objectives=RowObjectives(Mixture(((loss.bind(), 1.0),))))
        _, expected = case.run_with_gradients()
        for gradient, other in zip(gradients, expected, strict=True):
            torch.testing.assert_close(gradient, other, rtol=1e-12, atol=1e-12)


def test_losses_in_mixtures_and_by_row() -> None:
    """A loss over the vocabulary for demonstrations, one over tokens for rollouts, beside objectives with weights."""
    case = Case(config=configured({"fkl": 0.5, "hpd": 1.0}, on_policy_objective={"rkl": 2.0, "todi": 0.3}))
    losses = RowObjectives(
        Mixture(((loss_over_vocabulary("fkl").bind(), 0.5), (OBJECTIVES["hpd"].bind(), 1.0))),
        Mixture(((loss_over_tokens("rkl").bind(), 2.0), (OBJECTIVES["todi"].bind(), 0.3))),
    )
    found, gradients = case.run_with_gradients(objectives=losses)
    wanted, expected = case.run_with_gradients()
    torch.testing.assert_close(found.token_losses, wanted.token_losses, rtol=1e-12, atol=1e-12)
    for gradient, other in zip(gradients, expected, strict=True):
        torch.testing.assert_close(gradient, other, rtol=1e-12, atol=1e-12)


class Largest(TorchDispatchMode):
    """The elements of the largest tensor of so many columns that any operation makes."""

    def __init__(self, columns: int) -> None:
        super().__init__()
        self.columns = columns
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for each in tree_leaves(result):
            if isinstance(each, Tensor) and each.ndim and each.shape[-1] == self.columns:
                self.elements = max(self.elements, each.numel())
        return result


def test_memory_stays_a_chunk() -> None:
    case = Case(tokens=60, config=configured("fkl", token_chunk_size=15))
    loss = Objective("loss", lambda x: -(x.teacher_probs * x.student).sum(-1), "vocabulary", "", returns="loss")
    with Largest(case.vocabulary) as largest:
        case.run_with_gradients(objectives=RowObjectives(Mixture(((loss.bind(), 1.0),))))
    assert largest.elements == 15 * case.vocabulary  # a chunk
