"""The one-sweep output head against plain logits and autograd: values, gradients, draws, and what must not matter."""

import copy
import dataclasses
import math
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import (
    OBJECTIVE_NAMES,
    VOCABULARY_OBJECTIVE_NAMES,
    layer_logits,
    plain_head_loss,
)
from torch import Tensor

from hpd_verl.config import HPDConfig
from hpd_verl.head import bodies as bodies_module
from hpd_verl.head import compiling as compiling_module
from hpd_verl.head import features as features_module
from hpd_verl.head import gradients as gradients_module
from hpd_verl.head import output_head as output_head_module
from hpd_verl.head.distillation_head import HeadOutput, distillation_head
from hpd_verl.head.features import HiddenFeatures, TeacherFeatures, teacher_features, teacher_top_k
from hpd_verl.head.hybrid import teacher_hybrid
from hpd_verl.head.hybrid_code import HybridCode
from hpd_verl.head.output_head import OutputHead
from hpd_verl.head.sampling import counter_uniform, sample_tokens
from hpd_verl.head.warm_up import warm_up
from hpd_verl.objectives import LOG_ZERO, OBJECTIVES, Mixture, RowObjectives, TokenContext

TOKENS, VOCABULARY, PADDING, HIDDEN, TEACHER_HIDDEN = 37, 19, 4, 8, 12
HPD_PARAMETERS: dict[str, Any] = {"forward_coef": 0.5, "reverse_coef": 2.0, "reinforce_coef": 3.0}
PARAMETERS: dict[str, dict[str, Any]] = {
    "hpd": HPD_PARAMETERS,
    "hpd_exact": HPD_PARAMETERS,
    "symmetric_kl": {"symmetric_kl": {"reverse_share": 0.8}},
    "jsd_exact": {"jsd_exact": {"beta": 0.3}},
    "skew_fkl": {"skew_fkl": {"skew": 0.25}},
    "skew_rkl": {"skew_rkl": {"skew": 0.25}},
    "akl": {"akl": {"mu": 0.7}},
    "abkd": {"abkd": {"alpha": 0.6, "beta": 0.9}},
    "power_opd": {"power_opd": {"exponent": 0.4}},
    "constant_negative": {"constant_negative": {"below": 0.6, "strength": 0.8}},
    "entropy_aware": {"entropy_aware": {"threshold": 0.5, "forward_coef": 0.7}},
    "top_k_tail": {"top_k_tail": {"k": 3}},
    "taid": {"taid": {"start": 0.1, "end": 0.6}},
}
each_objective = pytest.mark.parametrize("objective", OBJECTIVE_NAMES + VOCABULARY_OBJECTIVE_NAMES)
property_test = settings(deadline=None, max_examples=50, derandomize=True)


@dataclass
class Case:
    """Student and teacher of random hidden states and weights; every seventh token has scale 0."""

    dtype: torch.dtype = torch.float64
    tokens: int = TOKENS
    vocabulary: int = VOCABULARY
    seed: int = 0
    layer: dict[str, Any] = field(default_factory=dict)
    """``scale`` and ``soft_cap`` of both output layers."""
    bias: bool = False
    config: HPDConfig = field(default_factory=lambda: HPDConfig(token_chunk_size=5))

    def __post_init__(self) -> None:
        random = torch.Generator().manual_seed(self.seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, dtype=torch.float64, generator=random).to(self.dtype)

        rows = self.vocabulary + PADDING
        self.hidden = normal(self.tokens, HIDDEN)
        self.weight = normal(rows, HIDDEN)
        self.weight_bias = normal(rows) if self.bias else None
        self.teacher_hidden = normal(self.tokens, TEACHER_HIDDEN)
        self.teacher_weight = normal(rows + 3, TEACHER_HIDDEN) * 0.7
        self.teacher_bias = normal(rows + 3) if self.bias else None
        self.labels = torch.randint(self.vocabulary, (self.tokens,), generator=random)
        index = torch.arange(self.tokens)
        self.uniforms = counter_uniform(1, 2, index, index).unsqueeze(1)
        self.is_rollout = index % 3 == 0
        self.token_scale = torch.rand(self.tokens, dtype=torch.float64, generator=random) + 0.1
        self.token_scale[index % 7 == 6] = 0.0

    def head(self) -> OutputHead:
        return OutputHead(self.weight, self.vocabulary, self.weight_bias, **self.layer)

    def teacher_head(self) -> OutputHead:
        return OutputHead(self.teacher_weight, self.vocabulary, self.teacher_bias, **self.layer)

    def teacher(self, top: int = 0) -> TeacherFeatures:
        arguments = (self.teacher_hidden, self.teacher_head(), self.labels, self.config.temperature_of_teacher, 6)
        return teacher_top_k(*arguments, k=top) if top else teacher_features(*arguments)

    def parameters(self) -> list[Tensor]:
        return [p for p in (self.hidden, self.weight, self.weight_bias) if p is not None]

    def run(self, **changes: Any) -> HeadOutput:
        needs = changes.get("objectives", self.config.objectives).needs
        arguments = {
            "context": TokenContext.example(needs, self.is_rollout, torch.float32) if needs else None,
            "hidden": self.hidden,
            "head": self.head(),
            "labels": self.labels,
            "uniforms": self.uniforms,
            "token_scale": self.token_scale,
            "is_rollout": self.is_rollout,
            "teacher": self.teacher(),
            "objectives": self.config.objectives,
            "temperature": self.config.temperature,
            "chunk_size": self.config.token_chunk_size,
        }
        return distillation_head(**{**arguments, **changes})

    def run_with_gradients(self, **changes: Any) -> tuple[HeadOutput, list[Tensor]]:
        for parameter in self.parameters():
            parameter.requires_grad_()
        output = self.run(**changes)
        return output, list(torch.autograd.grad(output.loss, self.parameters()))

    def logits(self) -> Tensor:
        return layer_logits(self.hidden, self.weight, self.vocabulary, self.weight_bias, **self.layer)

    def teacher_logits(self) -> Tensor:
        return layer_logits(self.teacher_hidden, self.teacher_weight, self.vocabulary, self.teacher_bias, **self.layer)

    def expected(self, sampled: Tensor, teacher_logits: Tensor | None = None) -> tuple[Tensor, Tensor, list[Tensor]]:
        """``(loss, losses, gradients)`` by plain autograd, in float64, given the draws."""
        double = copy.copy(self)
        for name in ("hidden", "weight", "weight_bias", "teacher_hidden", "teacher_weight", "teacher_bias"):
            value = getattr(self, name)
            setattr(double, name, None if value is None else value.detach().double())
        for parameter in double.parameters():
            parameter.requires_grad_()
        config = self.config
        coefficients = {bound.objective.name: dict(bound.parameters) for bound in config.objectives.bound}
        chosen = [config.objective, config.on_policy_objective or config.objective]
        names = [str(chosen[rollout]) for rollout in self.is_rollout.tolist()]
        loss, losses = plain_head_loss(
            names,
            double.logits(),
            double.teacher_logits() if teacher_logits is None else teacher_logits,
            self.labels,
            sampled if sampled.shape[1] else self.labels.unsqueeze(1),
            self.token_scale,
            config.temperature,
            coefficients,
            config.temperature_of_teacher,
        )
        return loss.detach(), losses.detach(), list(torch.autograd.grad(loss, double.parameters()))


def configured(objective: str, **values: Any) -> HPDConfig:
    settings = {"token_chunk_size": 5, **values}
    if isinstance(objective, str) and objective in OBJECTIVES and OBJECTIVES[objective].needs_rollouts:
        settings["on_policy_fraction"] = 1.0
    return HPDConfig(objective=objective, **settings)


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-9) -> None:
    torch.testing.assert_close(found.double(), expected.double(), rtol=tolerance, atol=tolerance)


def assert_matches(case: Case, tolerance: float = 1e-9, **changes: Any) -> HeadOutput:
    """Loss, token losses and all gradients are those of plain autograd."""
    output, gradients = case.run_with_gradients(**changes)
    loss, losses, expected = case.expected(output.sampled)
    active = case.token_scale != 0
    close(output.loss, loss, tolerance)
    close(output.token_losses[active], losses[active], tolerance)
    for parameter, gradient, wanted in zip(case.parameters(), gradients, expected, strict=True):
        assert gradient.dtype == parameter.dtype
        assert gradient.abs().max() > (1e-6 if case.config.objective == "power_opd" else 1e-3)  # a fifth power
        close(gradient, wanted, tolerance)
    return output


# Values and gradients


@each_objective
@pytest.mark.parametrize("temperature", [1.0, 1.7])
def test_loss_and_gradients(objective: str, temperature: float) -> None:
    """In float64; the unused rows of the weight have gradient 0."""
    case = Case(config=configured(objective, temperature=temperature))
    assert_matches(case)
    _, (_, weight) = case.run_with_gradients()
    assert not weight[case.vocabulary :].any()


@each_objective
def test_parameters_reach_the_objective(objective: str) -> None:
    assert_matches(Case(seed=1, config=configured(objective, **PARAMETERS.get(objective, {}))))


MIXTURES: list[dict[str, Any]] = [
    {"objective": {"hpd": 1.0, "sft": 0.1}},
    {"objective": {"fkl": 0.3, "rkl_exact": 2.0}},
    {"objective": {"hpd": 0.5, "fkl": 1.5, "tvd": 0.25}},
    {"objective": {"sft": 0.2, "jsd_exact": 1.0}, "on_policy_objective": {"opd": 1.0, "rkl_exact": 0.4}},
    {"objective": "hpd", "on_policy_objective": {"hpd": 1.0, "skew_rkl": 0.5}},
]


@pytest.mark.parametrize("values", MIXTURES, ids=lambda values: "-".join(map(str, values["objective"])))
@pytest.mark.parametrize("layer", [{}, {"scale": 1.5, "soft_cap": 3.0}], ids=["plain", "capped"])
def test_mixtures(values: dict[str, Any], layer: dict[str, Any]) -> None:
    """Values and gradients are the weighted sums of the objectives' own, over tokens and vocabulary, in each row."""
    config = HPDConfig(token_chunk_size=5, **values)
    case = Case(layer=layer, config=config)
    output, gradients = case.run_with_gradients()
    loss, sums = torch.zeros(()).double(), [torch.zeros_like(each) for each in gradients]
    for mixture, is_mine in (
        (config.objectives.demonstration, ~case.is_rollout),
        (config.objectives.rollout, case.is_rollout),
    ):
        for bound, factor in mixture:
            part = Case(layer=layer, config=config)
            part.token_scale = torch.where(is_mine, case.token_scale, 0.0)
            one, own = part.run_with_gradients(objectives=RowObjectives(Mixture(((bound, 1.0),))))
            loss = loss + factor * one.loss.detach()
            sums = [total + factor * each for total, each in zip(sums, own, strict=True)]
    close(output.loss, loss)
    for gradient, wanted in zip(gradients, sums, strict=True):
        close(gradient, wanted)


@pytest.mark.parametrize("spread", [1.0, 100.0])
def test_a_mixture_changes_nothing_for_objectives_over_tokens(spread: float) -> None:
    """Beside one over the vocabulary: the label's own log p of top-k features, and log p far below ``LOG_ZERO``."""
    case = Case(config=configured("hpd"))
    case.teacher_weight *= spread
    alone = RowObjectives(HPDConfig(objective={"hpd": 1.0, "opd": 0.5}, on_policy_fraction=1.0).objectives.rollout)
    beside = RowObjectives(Mixture((*alone.demonstration.parts, (OBJECTIVES["fkl"].bind(), 1e-12))))
    for teacher in (case.teacher(), case.teacher(top=2)):
        output = case.run(objectives=alone, teacher=teacher)
        found = case.run(objectives=beside, teacher=teacher)
        for name in ("label_weights", "sampled_weights", "teacher_label_log_probs", "teacher_sampled_log_probs"):
            close(getattr(found, name), getattr(output, name))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_hpd_of_a_student_that_is_its_teacher(dtype: torch.dtype) -> None:
    """gap(y) is exactly 0 where both make the same products, not what rounding leaves of it: its weight is p(y)."""
    case = Case(dtype=dtype, bias=True, layer={"soft_cap": 8.0}, config=HPDConfig(temperature=0.7))
    case.token_scale[:] = 1.0
    output = case.run(teacher=teacher_features(case.hidden, case.head(), case.labels, 0.7), chunk_size=None)
    assert output.teacher_label_log_probs is not None
    close(output.label_weights, output.teacher_label_log_probs.exp(), 1e-6)


@pytest.mark.parametrize("objective", VOCABULARY_OBJECTIVE_NAMES)
def test_temperature_of_the_teacher(objective: str) -> None:
    assert_matches(Case(config=configured(objective, temperature=1.3, teacher_temperature=0.8)))


@each_objective
def test_bare_features_are_the_same(objective: str) -> None:
    """Where the sweep computes the teacher's log-sum-exp itself, from the product that it makes anyway."""
    case = Case(bias=True, layer={"soft_cap": 4.0}, config=configured(objective, temperature=1.3))
    bare = HiddenFeatures(case.teacher_hidden, case.teacher_head(), 1.3)
    output, gradients = case.run_with_gradients(exact_kl=True)
    found, others = case.run_with_gradients(exact_kl=True, teacher=bare)
    for name, value in vars(output).items():
        close(getattr(found, name), value, 1e-11)
    for gradient, other in zip(gradients, others, strict=True):
        close(gradient, other, 1e-11)


@pytest.mark.parametrize("objective", ["hpd", "hpd_exact"])
def test_without_student_sampling(objective: str) -> None:
    assert_matches(Case(seed=2, config=configured(objective, student_sampling=False)))


@each_objective
def test_float32(objective: str) -> None:
    """Single precision, outputs in float32."""
    output = assert_matches(Case(dtype=torch.float32, config=configured(objective)), tolerance=5e-5)
    for name, value in vars(output).items():
        if isinstance(value, Tensor) and name != "sampled":
            assert value.dtype == torch.float32, name


@pytest.mark.parametrize("objective", ["hpd", "sft", "hpd_exact", "fkl", "jsd_exact"])
def test_bfloat16(objective: str) -> None:
    """The same model in double precision is within the rounding of bfloat16; gradients have the parameters' dtype."""
    case = Case(dtype=torch.bfloat16, config=configured(objective))
    output, gradients = case.run_with_gradients()
    loss, _, expected = case.expected(output.sampled)
    assert output.loss.dtype == output.label_log_probs.dtype == torch.float32
    assert output.loss.item() == pytest.approx(loss.item(), rel=3e-2)
    for parameter, gradient, wanted in zip(case.parameters(), gradients, expected, strict=True):
        assert gradient.dtype == parameter.dtype == torch.bfloat16
        assert (gradient.double() - wanted).norm() < 2e-2 * wanted.norm()


@pytest.mark.parametrize("objective", ["hpd", "sft", "fkl"])
@pytest.mark.parametrize("temperature", [1.0, 0.8])
@pytest.mark.parametrize(
    ("layer", "bias"),
    [
        ({"scale": 0.3}, False),
        ({"soft_cap": 2.0}, False),
        ({}, True),
        ({"scale": 1.5, "soft_cap": 3.0}, True),
    ],
    ids=str,
)
def test_output_layers(objective: str, temperature: float, layer: dict[str, Any], bias: bool) -> None:
    """Scale, soft cap and bias, of student and teacher."""
    assert_matches(
        Case(
            layer=layer,
            bias=bias,
            config=configured(objective),
        )
    )
    config = configured(objective, temperature=temperature)
    assert_matches(Case(layer=layer, bias=bias, config=config))
    assert_matches(Case(layer=layer, bias=bias, dtype=torch.float32, config=config), tolerance=1e-4)


@pytest.mark.parametrize(
    ("objective", "on_policy_objective"),
    [("hpd", "opd"), ("sft", "hpd"), ("hpd", "rkl_exact"), ("fkl", "opd"), ("fkl", "rkl_exact"), ("sft", "jsd_exact")],
)
def test_objective_of_each_row(objective: str, on_policy_objective: str) -> None:
    """Rollouts have the on-policy objective, of the label or of the whole vocabulary."""
    assert_matches(Case(config=configured(objective, on_policy_objective=on_policy_objective)))


def test_gradcheck() -> None:
    """The backward pass is that of the forward pass by finite differences, where weights do not depend on it."""
    case = Case(tokens=6, vocabulary=5, bias=True, layer={"scale": 0.5, "soft_cap": 3.0}, config=configured("seqkd"))
    teacher = case.teacher()
    head, bias = case.head(), case.weight_bias
    assert bias is not None

    def loss(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        changed = dataclasses.replace(head, weight=weight, bias=bias)
        return case.run(hidden=hidden, head=changed, teacher=teacher).loss

    inputs = [value.clone().requires_grad_() for value in (case.hidden, case.weight, bias)]
    assert torch.autograd.gradcheck(loss, inputs)


def test_backward_scales_the_gradients() -> None:
    """As part of a larger loss, and when called twice."""
    case = Case()
    _, gradients = case.run_with_gradients()
    loss = case.run().loss * -3.0
    for _ in range(2):
        for gradient, found in zip(
            gradients, torch.autograd.grad(loss, case.parameters(), retain_graph=True), strict=True
        ):
            close(found, -3.0 * gradient)


def test_hpd_exact_is_the_mean_of_hpd() -> None:
    """Over all tokens that could be drawn, each with its probability: loss and gradients."""
    exact = Case(tokens=1, config=configured("hpd_exact"))
    exact.token_scale[:] = 1.0
    output, gradients = exact.run_with_gradients()
    probs = exact.logits().detach().softmax(-1)[0]
    sampled = Case(tokens=1, config=configured("hpd"))
    sampled.token_scale[:] = 1.0
    ends = probs.cumsum(0)
    loss, mean = torch.zeros(()).double(), [torch.zeros_like(each) for each in gradients]
    for token, prob in enumerate(probs):
        one, one_gradients = sampled.run_with_gradients(uniforms=(ends[token] - prob / 2).view(1, 1))
        assert one.sampled.item() == token
        loss = loss + prob * one.loss.detach()
        mean = [total + prob * each for total, each in zip(mean, one_gradients, strict=True)]
    close(output.loss, loss)
    for gradient, wanted in zip(gradients, mean, strict=True):
        close(gradient, wanted)


# Per-token outputs


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_token_outputs(temperature: float) -> None:
    """Log-probs, entropy, draws and divergences are those of whole logits; the draws are sample_tokens'."""
    case = Case(config=configured("hpd", temperature=temperature))
    case.token_scale[:] = 1.0
    output = case.run(exact_kl=True)
    log_q = torch.log_softmax(case.logits() / temperature, -1)
    log_p = torch.log_softmax(case.teacher_logits() / temperature, -1)
    label, sampled, sampled_log_probs, entropy = sample_tokens(
        case.logits() / temperature, case.labels, case.uniforms.squeeze(1), chunk_size=8
    )
    sampled, sampled_log_probs = sampled.unsqueeze(1), sampled_log_probs.unsqueeze(1)
    assert torch.equal(output.sampled, sampled)
    close(output.label_log_probs, label)
    close(output.sampled_log_probs, sampled_log_probs)
    close(output.entropy, entropy)
    assert output.teacher_sampled_log_probs is not None
    close(output.teacher_sampled_log_probs, log_p.gather(1, sampled))
    close(case.teacher().tensors["label_log_probs"], log_p.gather(1, case.labels.unsqueeze(1)).squeeze(1))
    assert output.forward_kl is not None
    assert output.reverse_kl is not None
    close(output.forward_kl, (log_p.exp() * (log_p - log_q)).sum(-1))
    close(output.reverse_kl, (log_q.exp() * (log_q - log_p)).sum(-1))
    terms = output.label_weights * label + (output.sampled_weights * sampled_log_probs).sum(1)
    close(output.token_losses, -terms)


def test_nothing_is_attached_but_the_loss() -> None:
    """Nor is an input written to."""
    case = Case()
    before = [value.clone() for value in (*case.parameters(), case.teacher_hidden, case.uniforms)]
    output, _ = case.run_with_gradients(exact_kl=True)
    attached = [name for name, value in vars(output).items() if value is not None and value.requires_grad]
    assert attached == ["loss"]
    for value, kept in zip((*case.parameters(), case.teacher_hidden, case.uniforms), before, strict=True):
        assert torch.equal(value, kept)


def test_exact_kl_changes_nothing_else() -> None:
    case = Case()
    output, gradients = case.run_with_gradients()
    assert output.forward_kl is output.reverse_kl is None
    both, both_gradients = case.run_with_gradients(exact_kl=True)
    assert torch.equal(both.sampled, output.sampled)
    close(both.loss, output.loss, 1e-12)
    for gradient, other in zip(gradients, both_gradients, strict=True):
        close(gradient, other, 1e-12)


@each_objective
def test_chunks_change_nothing(objective: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunk size and rows per step: the same draws, and the same numbers up to the order of sums."""
    whole, gradients = Case(config=configured(objective, token_chunk_size=1000)).run_with_gradients(exact_kl=True)
    for chunk_size, elements in [(1, 1 << 17), (4, 1), (7, 40), (36, 100)]:
        monkeypatch.setattr(output_head_module, "_CPU_STEP", elements)
        monkeypatch.setattr(gradients_module, "_WEIGHT_ROWS", 3)
        case = Case(config=configured(objective, token_chunk_size=chunk_size))
        output, others = case.run_with_gradients(exact_kl=True)
        assert torch.equal(output.sampled, whole.sampled)
        for name, value in vars(output).items():
            close(value, getattr(whole, name), 1e-11)
        for gradient, other in zip(gradients, others, strict=True):
            close(gradient, other, 1e-11)


def test_low_precision_gradient_is_accumulated_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunk by chunk the bfloat16 gradient stays as good as in one."""
    monkeypatch.setattr(gradients_module, "_WEIGHT_ROWS", 5)
    errors = []
    for chunk_size in (1, 3, 1000):
        case = Case(dtype=torch.bfloat16, tokens=400, config=configured("seqkd", token_chunk_size=chunk_size))
        output, (_, gradient) = case.run_with_gradients()
        _, _, (_, wanted) = case.expected(output.sampled)
        errors.append(((gradient.double() - wanted).norm() / wanted.norm()).item())
    assert max(errors) < 1e-2


# Scale, frozen parameters, tied weights


def test_tokens_of_scale_zero_are_skipped() -> None:
    """Whatever stands there, NaN included; their outputs are zeros, those of the others unchanged."""
    case = Case(config=configured("hpd"))
    output, gradients = case.run_with_gradients()
    teacher = case.teacher()
    skipped = case.token_scale == 0
    assert skipped.any()
    with torch.no_grad():
        case.hidden[skipped] = math.nan
    for name in ("hidden", "label_log_probs"):
        teacher.tensors[name][skipped] = math.nan
    found, found_gradients = case.run_with_gradients(teacher=teacher)
    for name, value in vars(found).items():
        if value is not None:
            assert torch.equal(value, getattr(output, name)), name
            assert name == "loss" or not value[skipped].any()
    for gradient, other in zip(gradients, found_gradients, strict=True):
        assert torch.equal(gradient, other)
    assert not gradients[0][skipped].any()


def test_no_token_counts() -> None:
    """A micro-batch without response tokens: loss 0, gradients 0."""
    case = Case(bias=True)
    case.token_scale[:] = 0.0
    output, gradients = case.run_with_gradients(exact_kl=True)
    assert output.loss.item() == 0.0
    assert not any(gradient.any() for gradient in gradients)


@pytest.mark.parametrize("objective", ["hpd", "fkl"])
@pytest.mark.parametrize("trained", ["hidden", "weight", "weight_bias"])
def test_frozen_parameters(objective: str, trained: str) -> None:
    """Only what requires a gradient has one, and it is the same."""
    case = Case(bias=True, config=configured(objective))
    _, gradients = case.run_with_gradients()
    wanted = dict(zip(("hidden", "weight", "weight_bias"), gradients, strict=True))[trained]
    for parameter in case.parameters():
        parameter.requires_grad_(parameter is getattr(case, trained))
    case.run().loss.backward()
    for name in ("hidden", "weight", "weight_bias"):
        gradient = getattr(case, name).grad
        assert (gradient is not None) == (name == trained)
    assert torch.equal(getattr(case, trained).grad, wanted)


@each_objective
def test_evaluation_computes_no_gradient(objective: str) -> None:
    """The same numbers under no_grad and with nothing that requires a gradient."""
    case = Case(config=configured(objective))
    frozen = case.run()
    assert not frozen.loss.requires_grad
    trained, _ = case.run_with_gradients()
    with torch.no_grad():
        evaluated = case.run()
    assert not evaluated.loss.requires_grad
    for name, value in vars(trained).items():
        if value is not None:
            assert torch.equal(value, getattr(evaluated, name)), name
            assert torch.equal(value, getattr(frozen, name)), name


def test_tied_weight() -> None:
    """The embedding of the inputs is the output layer too: its gradient is the sum of both uses."""
    case = Case()
    tokens = torch.arange(TOKENS) % (VOCABULARY + PADDING)
    weight = case.weight.requires_grad_()
    output = case.run(hidden=torch.tanh(weight[tokens]))
    (gradient,) = torch.autograd.grad(output.loss, weight)

    plain = case.weight.detach().clone().requires_grad_()
    logits = layer_logits(torch.tanh(plain[tokens]), plain, case.vocabulary)
    arguments = (case.teacher_logits(), case.labels, output.sampled, case.token_scale)
    loss, _ = plain_head_loss(["hpd"] * TOKENS, logits, *arguments)
    (wanted,) = torch.autograd.grad(loss, plain)
    close(gradient, wanted)


# Teacher


@each_objective
@pytest.mark.parametrize("top", [1, 5, VOCABULARY])
def test_top_k_features(objective: str, top: int) -> None:
    """The loss is that with the dense distribution in which the remaining mass is spread evenly."""
    case = Case(config=configured(objective, temperature=1.3))
    log_p = torch.log_softmax(case.teacher_logits() / 1.3, -1)
    best, tokens = log_p.topk(top, -1)
    rest = (1 - best.exp().sum(-1, keepdim=True)) / max(1, VOCABULARY - top)
    dense = rest.clamp_min(1e-300).log().repeat(1, VOCABULARY).scatter(1, tokens, best)

    teacher = case.teacher(top)
    close(teacher.tensors["label_log_probs"], log_p.gather(1, case.labels.unsqueeze(1)).squeeze(1))
    # Labels outside of the top k have their true log-prob; the plain computation has no place for it.
    teacher = teacher.with_tensors(
        teacher.tensors | {"label_log_probs": dense.gather(1, case.labels.unsqueeze(1)).squeeze(1)}
    )
    output, gradients = case.run_with_gradients(teacher=teacher)
    loss, _, expected = case.expected(output.sampled, 1.3 * dense)
    close(output.loss, loss, 1e-7)
    for gradient, wanted in zip(gradients, expected, strict=True):
        close(gradient, wanted, 1e-7)


@each_objective
def test_hybrid_features(objective: str) -> None:
    """The loss is that with the dense distribution that the features say token by token."""
    case = Case(bias=True, config=configured(objective, temperature=1.3))
    code = HybridCode(case.teacher_head(), 1.3, top_k=7)
    teacher = teacher_hybrid(case.teacher_hidden, code, case.labels, 6)
    dense = teacher.log_probs(torch.arange(VOCABULARY).expand(case.tokens, -1))
    log_p = torch.log_softmax(case.teacher_logits() / 1.3, -1)
    close(teacher.label_log_probs, log_p.gather(1, case.labels.unsqueeze(1)).squeeze(1))
    # The label has its true log-prob; the plain computation has no place for it.
    teacher = teacher.with_tensors(
        teacher.tensors | {"label_log_probs": dense.gather(1, case.labels.unsqueeze(1)).squeeze(1)}
    )
    output, gradients = case.run_with_gradients(teacher=teacher)
    loss, _, expected = case.expected(output.sampled, 1.3 * dense)
    close(output.loss, loss, 1e-6)  # a token's mass is 1 to a float32's precision
    for gradient, wanted in zip(gradients, expected, strict=True):
        close(gradient, wanted, 1e-6)


@pytest.mark.parametrize("objective", ["rkl_exact", "akl", "todi", "hpd_exact", "hpd"])
def test_top_k_that_hold_nearly_everything(objective: str) -> None:
    """In float32 the mass outside the top k keeps its size, however small: gradients are those of float64."""
    gradients = {}
    for dtype in (torch.float64, torch.float32):
        case = Case(dtype=dtype, config=configured(objective))
        case.teacher_hidden, case.teacher_weight = case.teacher_hidden.sign() * 3, case.teacher_weight.sign() * 3
        teacher = case.teacher(top=3)
        assert teacher.tensors["rest_log_prob"].min() < -25  # below the smallest step of a float32 near 1
        gradients[dtype] = case.run_with_gradients(teacher=teacher)[1]
    for found, wanted in zip(gradients[torch.float32], gradients[torch.float64], strict=True):
        assert (found - wanted).norm() < 1e-4 * wanted.norm()


@pytest.mark.parametrize("top", [0, 3])
@each_objective
def test_student_of_a_larger_vocabulary(objective: str, top: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The student is normalised over all its logits; beyond the teacher's vocabulary the teacher's probability is 0."""
    impossible = -600.0  # a probability that float64 can still hold, for the reference's logarithm
    for module in (bodies_module, features_module):
        monkeypatch.setattr(module, "LOG_ZERO", impossible)
    known = VOCABULARY - 5
    case = Case(config=configured(objective))
    case.labels %= known
    teacher_head = dataclasses.replace(case.teacher_head(), vocabulary_size=known)
    arguments = (case.teacher_hidden, teacher_head, case.labels, 1.0, 6)
    teacher = teacher_top_k(*arguments, k=top) if top else teacher_features(*arguments)
    log_p = torch.log_softmax(case.teacher_logits()[:, :known], -1)
    if top:
        best, tokens = log_p.topk(top, -1)
        rest = (1 - best.exp().sum(-1, keepdim=True)) / (known - top)
        log_p = rest.log().repeat(1, known).scatter(1, tokens, best)
        teacher = teacher.with_tensors(
            teacher.tensors | {"label_log_probs": log_p.gather(1, case.labels.unsqueeze(1)).squeeze(1)}
        )
    dense = torch.nn.functional.pad(log_p, (0, VOCABULARY - known), value=impossible)
    output, gradients = case.run_with_gradients(teacher=teacher)
    assert (output.sampled >= known).any()
    loss, _, expected = case.expected(output.sampled, dense)
    close(output.loss, loss, 1e-7)
    for gradient, wanted in zip(gradients, expected, strict=True):
        close(gradient, wanted, 1e-7)


@pytest.mark.parametrize("objective", ["fkl", "hpd_exact", "rkl_exact", "hpd"])
def test_mass_beyond_the_teachers_vocabulary_is_trained_away(objective: str) -> None:
    known = VOCABULARY - 9
    case = Case(tokens=200, config=configured(objective))
    case.labels %= known
    teacher_head = dataclasses.replace(case.teacher_head(), vocabulary_size=known)
    teacher = teacher_features(case.teacher_hidden, teacher_head, case.labels, 1.0)

    def beyond() -> float:
        return case.logits().detach().softmax(-1)[:, known:].sum(-1).mean().item()

    before = beyond()
    assert before > 0.4
    for _ in range(40):
        _, gradients = case.run_with_gradients(teacher=teacher)
        norm = torch.stack([gradient.norm() for gradient in gradients]).norm()
        with torch.no_grad():
            for parameter, gradient in zip(case.parameters(), gradients, strict=True):
                parameter -= gradient / norm
    assert beyond() < 0.6 * before


@each_objective
def test_label_beyond_the_teachers_vocabulary(objective: str) -> None:
    """Its log-prob is that of an impossible token, and everything stays finite."""
    case = Case(config=configured(objective))
    teacher_head = dataclasses.replace(case.teacher_head(), vocabulary_size=VOCABULARY - 5)
    case.labels[:] = VOCABULARY - 1
    for top in (0, 3):
        arguments = (case.teacher_hidden, teacher_head, case.labels, 1.0, 6)
        teacher = teacher_top_k(*arguments, k=top) if top else teacher_features(*arguments)
        assert (teacher.tensors["label_log_probs"] == LOG_ZERO).all()
        output, gradients = case.run_with_gradients(teacher=teacher)
        assert output.loss.isfinite()
        assert all(gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize("form", ["hidden", "bare", "top k"])
@pytest.mark.parametrize("objective", ["hpd", "akl", {"hpd": 1.0, "jsd_exact": 0.5}])
def test_warm_up_compiles_what_a_run_needs(objective: Any, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of it and nothing else, for every form of the teacher's features. Nothing is compiled here."""
    compiled: dict[Any, Any] = {}
    monkeypatch.setattr(compiling_module, "_compiled", compiled)
    monkeypatch.setattr(compiling_module, "_compile", lambda body, form: lambda rows, others: body(form, rows, others))
    if form == "bare" and objective == "hpd":
        return  # refused: log p of single tokens needs the log-sum-exp
    case = Case(dtype=torch.bfloat16, bias=True, config=configured(objective))
    arguments = (case.teacher_hidden, case.teacher_head(), case.labels, 1.0)
    teacher = {
        "hidden": lambda: teacher_features(*arguments, compiled=True),
        "bare": lambda: HiddenFeatures(case.teacher_hidden, case.teacher_head(), 1.0),
        "top k": lambda: teacher_top_k(*arguments, k=3),
    }[form]
    run = case.run_with_gradients(teacher=teacher(), compiled=True)[0]
    needed, nothing = set(compiled), teacher()[:0]
    compiled.clear()
    warm_up(case.head(), nothing, case.config.objectives, 1.0, 1, exact_kl=False)
    assert set(compiled) == needed
    close(run.loss, case.run(teacher=teacher()).loss, 1e-6)


@pytest.mark.slow
def test_compiled() -> None:
    """``compiled_cases.py``: all that is said of compiled passes, in one process, for torch takes its time."""
    environment = {name: value for name, value in os.environ.items() if name != "TORCHDYNAMO_DISABLE"}
    folder = Path(__file__).parent
    environment["PYTHONPATH"] = os.pathsep.join(str(path) for path in (folder.parents[1], folder.parent, folder))
    command = [sys.executable, str(folder / "compiled_cases.py")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]


def test_features_can_be_indexed() -> None:
    """Slices, indices and masks, of both forms."""
    case = Case()
    for features in (case.teacher(), case.teacher(top=3)):
        for rows in (slice(2, 9), torch.tensor([4, 1]), case.is_rollout):
            part = features[rows]
            assert part.tensors.keys() == set(features.TENSORS)
            for name, value in features.tensors.items():
                assert torch.equal(part.tensors[name], value[rows])
            assert torch.equal(
                type(part).cat([part, part]).tensors["label_log_probs"][len(part) :], part.tensors["label_log_probs"]
            )


def test_low_precision_cache() -> None:
    """A teacher's hidden states cached in bfloat16 barely change the gradient."""
    case = Case(dtype=torch.float32)
    _, gradients = case.run_with_gradients()
    teacher = case.teacher()
    rounded = teacher.with_tensors(teacher.tensors | {"hidden": teacher.tensors["hidden"].bfloat16()})
    _, found = case.run_with_gradients(teacher=rounded)
    for gradient, other in zip(gradients, found, strict=True):
        assert (gradient - other).norm() < 2e-2 * gradient.norm()


def test_sft_needs_no_teacher_and_no_draws() -> None:
    """Cross-entropy alone; with a teacher and draws, the same loss and gradients."""
    case = Case(config=configured("sft"))
    output, gradients = case.run_with_gradients(teacher=None, uniforms=case.uniforms[:, :0])
    assert output.sampled.shape == output.sampled_weights.shape == (TOKENS, 0)
    assert output.teacher_sampled_log_probs is None
    losses = torch.nn.functional.cross_entropy(case.logits().detach(), case.labels, reduction="none")
    close(output.loss, (losses * case.token_scale).sum())
    other, other_gradients = case.run_with_gradients()
    assert torch.equal(other.loss, output.loss)
    for gradient, found in zip(gradients, other_gradients, strict=True):
        close(gradient, found, 1e-12)


@each_objective
def test_draws_are_optional_where_no_objective_weighs_them(objective: str) -> None:
    case = Case(config=configured(objective))
    if case.config.objectives.weighs_sample:
        with pytest.raises(ValueError, match="hpd: weighs the sampled token, uniforms has no"):
            case.run(uniforms=case.uniforms[:, :0])
        return
    without, drawn = case.run(uniforms=case.uniforms[:, :0]), case.run()
    assert torch.equal(without.loss, drawn.loss)
    assert not drawn.sampled_weights.any()


# Errors and NaN


def test_refuses_what_cannot_work() -> None:
    case = Case()
    head = dataclasses.replace(case.teacher_head(), vocabulary_size=20)
    larger = teacher_features(case.teacher_hidden, head, case.labels, 1.0)
    with pytest.raises(ValueError, match="hpd: give the teacher's features"):
        case.run(teacher=None)
    with pytest.raises(ValueError, match="exact_kl: give the teacher's features"):
        case.run(teacher=None, objectives=RowObjectives.of("sft"), exact_kl=True)
    with pytest.raises(ValueError, match="exact_kl: needs the teacher's hidden states"):
        case.run(teacher=case.teacher(top=3), exact_kl=True)
    with pytest.raises(ValueError, match="vocabulary_size is 19 of the student and 20 of the teacher"):
        case.run(teacher=larger)
    with pytest.raises(ValueError, match="vocabulary_size=99: the weight has 23 rows"):
        OutputHead(case.weight, 99)
    with pytest.raises(ValueError, match="k=20: the vocabulary has 19 tokens"):
        case.teacher(top=20)
    with pytest.raises(ValueError, match="the log-sum-exp of the teacher's logits is not known"):
        case.run(teacher=HiddenFeatures(case.teacher_hidden, case.teacher_head(), 1.0))


@each_objective
@pytest.mark.parametrize("where", ["student hidden", "student weight", "teacher hidden", "teacher weight", "top k"])
def test_nan_comes_out(objective: str, where: str) -> None:
    """In the loss and in the token concerned, without an error on the way."""
    case = Case(config=configured(objective))
    if where.startswith("teacher") and not OBJECTIVES[objective].needs_teacher:
        return
    teacher = None
    with torch.no_grad():
        if where == "student hidden":
            case.hidden[3] = math.nan
        elif where == "student weight":
            case.weight[2] = math.nan
        elif where == "teacher hidden":
            case.teacher_hidden[3] = math.nan
        elif where == "teacher weight":
            case.teacher_weight[2] = math.nan
        else:
            teacher = case.teacher(top=3)
            for name in ("top_log_probs", "rest_log_prob"):
                teacher.tensors[name][3] = math.nan
            if objective in OBJECTIVE_NAMES:
                output = case.run(teacher=teacher)
                assert output.teacher_sampled_log_probs is not None
                assert output.teacher_sampled_log_probs[3].isnan().all()
                return
    output = case.run() if teacher is None else case.run(teacher=teacher)
    assert output.loss.isnan()
    assert output.token_losses[3].isnan()
    if where == "student hidden":
        others = torch.arange(TOKENS) != 3
        assert output.token_losses[others].isfinite().all()
        for value in (output.label_log_probs, output.entropy, output.sampled_log_probs):
            assert value[3].isnan().all()


def test_impossible_tokens() -> None:
    """Vocabulary entries that student or teacher rule out by a bias of -inf: finite losses and gradients."""
    for objective in OBJECTIVES:
        case = Case(bias=True, config=configured(objective))
        assert case.weight_bias is not None
        assert case.teacher_bias is not None
        case.weight_bias[4] = -math.inf
        case.teacher_bias[5] = -math.inf
        case.labels[case.labels == 4] = 3
        output, gradients = case.run_with_gradients(exact_kl=True)
        for name, value in vars(output).items():
            if name != "teacher_sampled_log_probs":
                assert value.isfinite().all(), (objective, name)
        for gradient in gradients:
            assert gradient.isfinite().all(), objective


# Properties


@property_test
@given(
    tokens=st.integers(0, 9),
    vocabulary=st.integers(1, 12),
    chunk_size=st.integers(1, 10),
    objective=st.sampled_from(sorted(OBJECTIVES)),
    seed=st.integers(0, 99),
)
def test_shapes(tokens: int, vocabulary: int, chunk_size: int, objective: str, seed: int) -> None:
    """Any number of tokens, none included; any vocabulary, of one token included."""
    config = configured(objective, token_chunk_size=chunk_size)
    case = Case(tokens=tokens, vocabulary=vocabulary, seed=seed, config=config)
    output, gradients = case.run_with_gradients()
    for name in ("label_log_probs", "entropy", "label_weights", "token_losses"):
        assert getattr(output, name).shape == (tokens,)
    for name in ("sampled", "sampled_log_probs", "sampled_weights", "teacher_sampled_log_probs"):
        assert getattr(output, name).shape == (tokens, 1)
    assert ((output.sampled >= 0) & (output.sampled < vocabulary)).all()
    if tokens:
        loss, _, expected = case.expected(output.sampled)
        close(output.loss, loss)
        for gradient, wanted in zip(gradients, expected, strict=True):
            close(gradient, wanted)
    if vocabulary == 1:
        assert output.loss.abs() < 1e-12
        assert all((gradient.abs() < 1e-12).all() for gradient in gradients)


@property_test
@given(objective=st.sampled_from(sorted(set(VOCABULARY_OBJECTIVE_NAMES) - {"hpd_exact"})), seed=st.integers(0, 99))
def test_equal_models(objective: str, seed: int) -> None:
    """p == q: divergences and their gradients vanish; that of the total variation has a kink there."""
    case = Case(seed=seed, config=configured(objective))
    case.teacher_hidden, case.teacher_weight = case.hidden.clone(), case.weight.clone()
    output, gradients = case.run_with_gradients()
    assert output.token_losses.abs().max() < 1e-9
    assert objective == "tvd" or all(gradient.abs().max() < 1e-9 for gradient in gradients)
