"""Weights, loss and gradient of every objective: the reference, the authors' golden vectors, invariants."""

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import (
    OBJECTIVE_NAMES,
    VOCABULARY_OBJECTIVE_NAMES,
    naive_hpd_loss,
    position_value,
    reference_loss,
    reference_weights,
)
from torch import Tensor

from hpd_verl.head.sampling import token_log_probs
from hpd_verl.objectives import (
    LOG_ZERO,
    OBJECTIVES,
    ObjectiveParameters,
    TokenContext,
    TokenLogProbs,
    TokenWeights,
    VocabularyLogProbs,
    VocabularyWeights,
    gap,
    registry,
)
from hpd_verl.objectives import objective as declare

GOLDEN = Path(__file__).parents[1] / "golden"

COEFFICIENTS: list[dict[str, Any]] = [
    {},
    {"forward_coef": 0.0},
    {"reverse_coef": 0.0},
    {"reinforce_coef": 0.0},
    {"student_sampling": False},
    {"forward_coef": 0.5, "reverse_coef": 2.0, "reinforce_coef": 3.0},
    {"forward_coef": 0.25, "reverse_coef": 1.5, "reinforce_coef": 7.0, "student_sampling": False},
]
CASES = [("hpd", coefficients) for coefficients in COEFFICIENTS]
CASES += [(name, {}) for name in OBJECTIVE_NAMES if name != "hpd"]
CASES += [("power_opd", {"exponent": 0.3}), ("constant_negative", {"below": 0.05, "strength": 2.0})]
CASE_IDS = [
    "-".join([name, *(f"{key.split('_')[0]}={value}" for key, value in coefficients.items())])
    for name, coefficients in CASES
]
each_case = pytest.mark.parametrize(("objective", "coefficients"), CASES, ids=CASE_IDS)
each_objective = pytest.mark.parametrize("objective", OBJECTIVE_NAMES)
property_test = settings(deadline=None, max_examples=100, derandomize=True)


class Positions(NamedTuple):
    """Inputs of the loss, in the order of its arguments."""

    student_logits: Tensor
    teacher_logits: Tensor
    labels: Tensor
    sampled: Tensor
    mask: Tensor
    num_tokens: int


def make_batch(seed: int = 0, positions: int = 48, vocabulary: int = 11) -> Positions:
    """Random float64 logits; every sixth position has a == y, every fifth p == q, every seventh is masked."""
    generator = torch.Generator().manual_seed(seed)
    index = torch.arange(positions)
    student = 2 * torch.randn(positions, vocabulary, dtype=torch.float64, generator=generator)
    teacher = student + 1.5 * torch.randn(positions, vocabulary, dtype=torch.float64, generator=generator)
    teacher[index % 5 == 0] = student[index % 5 == 0]
    labels = torch.randint(vocabulary, (positions,), generator=generator)
    # A generator of the CPU draws from probabilities there only.
    sampled = torch.multinomial(student.softmax(-1).cpu(), 1, generator=generator).squeeze(1).to(student.device)
    sampled[index % 6 == 0] = labels[index % 6 == 0]
    mask = index % 7 != 0
    return Positions(student, teacher, labels, sampled, mask, int(mask.sum()) + 13)


def log_probs_of(batch: Positions, temperature: float = 1.0, chunk_size: int = 7) -> TokenLogProbs:
    """The log-probs of both tokens, computed as training does."""
    tokens = torch.stack([batch.labels, batch.sampled], dim=1)
    student = token_log_probs(batch.student_logits / temperature, tokens, chunk_size)
    teacher = token_log_probs(batch.teacher_logits / temperature, tokens, chunk_size)
    return TokenLogProbs(student[:, 0], teacher[:, 0], student[:, 1], teacher[:, 1], batch.labels == batch.sampled)


def loss_of(objective: str, batch: Positions, temperature: float = 1.0, **coefficients: Any) -> Tensor:
    """The loss as hpd_verl computes it: token_log_probs, weights, weighted log-likelihood."""
    log_probs = log_probs_of(batch, temperature)
    weights = OBJECTIVES[objective](log_probs, **coefficients)
    terms = weights.label * log_probs.student_label + weights.sampled * log_probs.student_sampled
    return -(terms * batch.mask).sum() / batch.num_tokens


def value_and_grad(loss: Callable[[Positions], Tensor], batch: Positions) -> tuple[Tensor, Tensor]:
    """Loss and its gradient with respect to the student's logits."""
    logits = batch.student_logits.clone().requires_grad_()
    value = loss(batch._replace(student_logits=logits))
    (grad,) = torch.autograd.grad(value, logits)
    return value.detach(), grad


# Against the reference


def test_batch_holds_every_case_of_hpd() -> None:
    """The random inputs below reach all branches, or the comparisons would be worth little."""
    batch = make_batch()
    label, _ = reference_weights("rkl", *batch[:4])
    at_sample, _ = reference_weights("rkl", *batch[:2], batch.sampled, batch.sampled)
    same = batch.labels == batch.sampled
    for condition in (
        label < 0,
        label == 0,
        (label > 0) & (at_sample < 0),
        (label > 0) & (at_sample >= 0) & ~same,
        (at_sample < 0) & same,
        (label < 0) & (at_sample < 0) & ~same,
    ):
        assert condition.sum() >= 2


@each_case
@pytest.mark.parametrize("temperature", [1.0, 0.6, 2.5])
def test_weights_match_reference(objective: str, coefficients: dict[str, Any], temperature: float) -> None:
    """Label and sampled weights at every position, in float64."""
    batch = make_batch(seed=1)
    weights = OBJECTIVES[objective](log_probs_of(batch, temperature), **coefficients)
    label, sampled = reference_weights(objective, *batch[:4], temperature, **coefficients)
    torch.testing.assert_close(weights.label, label, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(weights.sampled, sampled, rtol=1e-9, atol=1e-12)


@each_case
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_loss_and_gradient_match_reference(objective: str, coefficients: dict[str, Any], temperature: float) -> None:
    """The scalar loss and its gradient in the student's logits: wrong if a weight were not detached."""
    batch = make_batch(seed=2)
    value, grad = value_and_grad(lambda b: loss_of(objective, b, temperature, **coefficients), batch)
    expected, expected_grad = value_and_grad(
        lambda b: reference_loss(objective, *b, temperature, **coefficients), batch
    )
    assert grad[batch.mask].abs().max() > (1e-6 if objective == "power_opd" else 1e-4)  # a fifth power
    torch.testing.assert_close(value, expected, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(grad, expected_grad, rtol=1e-9, atol=1e-12)


@each_objective
def test_loss_and_gradient_in_float32(objective: str) -> None:
    """The same from float32 logits, to float32's precision; where p == q the bits agree: gap is exactly 0."""
    batch = make_batch(seed=3)
    single = batch._replace(student_logits=batch.student_logits.float(), teacher_logits=batch.teacher_logits.float())
    value, grad = value_and_grad(lambda b: loss_of(objective, b), single)
    expected, expected_grad = value_and_grad(lambda b: reference_loss(objective, *b), single)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(grad, expected_grad, rtol=1e-4, atol=1e-6)


def test_naive_loss_is_the_reference() -> None:
    """The benchmark's baseline computes the same loss, and draws its own sample if none is given."""
    batch = make_batch(seed=4)
    value, grad = value_and_grad(
        lambda b: naive_hpd_loss(b.student_logits, b.teacher_logits, b.labels, b.mask, b.num_tokens, b.sampled, 1.3),
        batch,
    )
    expected, expected_grad = value_and_grad(lambda b: reference_loss("hpd", *b, 1.3), batch)
    torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(grad, expected_grad, rtol=1e-4, atol=1e-6)
    drawn = naive_hpd_loss(*batch[:3], batch.mask, batch.num_tokens)
    assert drawn.isfinite()


@pytest.mark.parametrize(
    ("q_label", "p_label", "q_sampled", "p_sampled", "label", "sampled"),
    [
        (0.50, 0.25, 0.25, 0.50, "gap", 0.0),
        (0.50, 0.25, 0.50, 0.25, "gap", "gap"),
        (0.25, 0.25, 0.25, 0.50, "p", 0.0),
        (0.25, 0.25, 0.50, 0.25, "p", "gap"),  # a label that is already right is not reinforced
        (0.25, 0.50, 0.25, 0.25, "p + gap", 0.0),
        (0.25, 0.50, 0.25, 0.50, "p + gap", 0.0),
        (0.25, 0.50, 0.50, 0.25, "2 p + gap", "gap"),
    ],
)
def test_hpd_by_hand(
    q_label: float, p_label: float, q_sampled: float, p_sampled: float, label: str, sampled: str | float
) -> None:
    """Each case of eq. 14-15, on probabilities whose gaps are +-log(2) / 4, -log(2) / 2 or exactly 0."""
    q_y, p_y, q_a, p_a = (torch.tensor([value]).double().log() for value in (q_label, p_label, q_sampled, p_sampled))
    weights = OBJECTIVES["hpd"](TokenLogProbs(q_y, p_y, q_a, p_a, torch.tensor([False])))
    factor = {"gap": 0, "p": 1, "p + gap": 1, "2 p + gap": 2}[label]
    expected = factor * p_label + q_label * math.log(p_label / q_label)
    assert weights.label.item() == pytest.approx(expected)
    assert weights.sampled.item() == pytest.approx(-math.log(2) / 2 if sampled == "gap" else 0.0)


def test_hpd_contains_its_siblings() -> None:
    """Without sampling: reverse KL alone is rkl; forward KL alone is seqkd where gap >= 0, else nothing."""
    log_probs = log_probs_of(make_batch(seed=5))
    hpd = OBJECTIVES["hpd"]
    reverse = hpd(log_probs, forward_coef=0.0, student_sampling=False).label
    assert torch.equal(reverse, OBJECTIVES["rkl"](log_probs).label)
    forward = hpd(log_probs, reverse_coef=0.0, student_sampling=False).label
    assert torch.equal(forward, OBJECTIVES["seqkd"](log_probs).label * (reverse >= 0))


# Against the authors' implementation


@pytest.fixture(params=[1, 2, 3], ids="case{}".format)
def golden(request: pytest.FixtureRequest) -> dict[str, np.ndarray]:
    with np.load(GOLDEN / f"case{request.param}.npz") as arrays:
        return dict(arrays)


def golden_batch(golden: dict[str, np.ndarray]) -> Positions:
    """Position t predicts labels[t + 1]; -100 is no response token; the loss is the mean over the others."""
    vocabulary = golden["student_logits"].shape[-1]
    student, teacher = (
        torch.tensor(golden[name])[:, :-1].reshape(-1, vocabulary).double()
        for name in ("student_logits", "teacher_logits")
    )
    labels = torch.tensor(golden["labels"])[:, 1:].flatten()
    mask = labels != -100
    sampled = torch.tensor(golden["sampled"]).flatten()
    return Positions(student, teacher, labels.clamp_min(0), sampled, mask, int(mask.sum()))


def test_golden_has_no_gap_of_zero(golden: dict[str, np.ndarray]) -> None:
    """Where gap(y) == 0 the authors' LlamaFactory code gives weight 0 and we, like the paper, p(y).

    No golden position is such a place (their float32 gap included), so the vectors must match everywhere; the
    weight p(y) itself is tested by ``test_equal_distributions``.
    """
    batch = golden_batch(golden)
    for dtype in (torch.float64, torch.float32):
        log_probs = log_probs_of(
            batch._replace(student_logits=batch.student_logits.to(dtype), teacher_logits=batch.teacher_logits.to(dtype))
        )
        assert (gap(log_probs.student_label, log_probs.teacher_label)[batch.mask].abs() > 1e-7).all()


@pytest.mark.parametrize(
    "loss", [lambda b: loss_of("hpd", b), lambda b: reference_loss("hpd", *b)], ids=["hpd_verl", "reference"]
)
def test_golden_loss_and_gradient(golden: dict[str, np.ndarray], loss: Callable[[Positions], Tensor]) -> None:
    """Their loss and gradient, given their samples; the last position predicts nothing: gradient 0."""
    value, grad = value_and_grad(loss, golden_batch(golden))
    expected = torch.tensor(golden["grad"]).double()
    assert not expected[:, -1].any()
    assert value.item() == pytest.approx(float(golden["loss"]), rel=1e-4, abs=1e-6)
    torch.testing.assert_close(grad.view_as(expected[:, :-1]), expected[:, :-1], rtol=1e-4, atol=1e-6)


def test_golden_gaps(golden: dict[str, np.ndarray]) -> None:
    """Their logged statistics of gap(y), and how often a != y."""
    batch = golden_batch(golden)
    log_probs = log_probs_of(batch)
    gaps = gap(log_probs.student_label, log_probs.teacher_label)[batch.mask]
    differs = ~log_probs.sampled_is_label[batch.mask]
    found = {
        "m_k1_gt_raw_mean": gaps.mean(),
        "m_k1_gt_raw_min": gaps.min(),
        "m_k1_gt_raw_max": gaps.max(),
        "m_k1_gt_raw_neg_pct": 100 * (gaps < 0).double().mean(),
        "m_sampled_diff_pct": 100 * differs.double().mean(),
    }
    for name, value in found.items():
        assert value.item() == pytest.approx(float(golden[name]), rel=1e-4, abs=1e-6), name


# Invariants


@st.composite
def token_log_prob_batches(draw: st.DrawFn, least: float = -math.inf) -> TokenLogProbs:
    """Log-probs in [-60, 0], or -inf if allowed, of several shapes and dtypes; a == y shares the label's."""
    dtype = draw(st.sampled_from([torch.float32, torch.float64]))
    log_prob = st.floats(-60.0, 0.0, width=32)
    if least == -math.inf:
        log_prob = log_prob | st.just(-math.inf)
    positions = draw(st.lists(st.tuples(log_prob, log_prob, log_prob, log_prob, st.booleans()), max_size=6))
    shape = draw(st.sampled_from([(-1,), (1, -1), (-1, 1)])) if positions else (0, 3)
    rows = [(q, p, q, p, same) if same else (q, p, q_a, p_a, same) for q, p, q_a, p_a, same in positions]
    q_y, p_y, q_a, p_a = (
        torch.tensor([row[column] for row in rows], dtype=dtype).reshape(shape) for column in range(4)
    )
    same_token = torch.tensor([row[4] for row in rows], dtype=torch.bool).reshape(shape)
    return TokenLogProbs(q_y, p_y, q_a, p_a, same_token)


def weights_of(objective: str, log_probs: TokenLogProbs, **coefficients: Any) -> TokenWeights:
    weights = OBJECTIVES[objective](log_probs, **coefficients)
    for values in (weights.label, weights.sampled):
        assert values.shape == log_probs.student_label.shape
        assert values.dtype == log_probs.student_label.dtype
        assert not values.requires_grad
    return weights


@each_case
@property_test
@given(data=st.data())
def test_weights_are_finite(objective: str, coefficients: dict[str, Any], data: st.DataObject) -> None:
    """Of the log-probs' shape and dtype, and finite even where a probability is exactly zero.

    Objective opd has labels that the student drew: their q(y) is not zero.
    """
    log_probs = data.draw(token_log_prob_batches(least=-60.0 if objective == "opd" else -math.inf))
    weights = weights_of(objective, log_probs, **coefficients)
    assert weights.label.isfinite().all()
    assert weights.sampled.isfinite().all()


def test_zero_probabilities() -> None:
    """gap is 0 where q(v) = 0; log p(v) = -inf counts as LOG_ZERO."""
    log_q, log_p = (
        torch.tensor([-math.inf, -math.inf, -0.5, -0.5]),
        torch.tensor([-1.0, -math.inf, -math.inf, 0.0]),
    )
    expected = torch.tensor([0.0, 0.0, math.exp(-0.5) * (LOG_ZERO + 0.5), math.exp(-0.5) * 0.5])
    torch.testing.assert_close(gap(log_q, log_p), expected)

    same = torch.ones(4, dtype=torch.bool)
    log_probs = TokenLogProbs(log_q, log_p, log_q, log_p, same)
    forward = torch.tensor([math.exp(-1.0), 0.0, 0.0, 1.0])
    torch.testing.assert_close(weights_of("hpd", log_probs).label, expected + forward)
    torch.testing.assert_close(weights_of("seqkd", log_probs).label, forward)
    # With p(y) = 0 the mixture is q(y) / 2.
    assert weights_of("jsd", log_probs).label[2].item() == pytest.approx(-math.exp(-0.5) * math.log(2) / 2)
    assert weights_of("opd", log_probs).label[2].item() == pytest.approx(LOG_ZERO + 0.5)


@property_test
@given(log_probs=token_log_prob_batches())
def test_equal_distributions(log_probs: TokenLogProbs) -> None:
    """p == q: hpd is forward KL, weight p(y) on the label alone; rkl, jsd and opd have nothing to do."""
    equal = TokenLogProbs(
        log_probs.student_label,
        log_probs.student_label,
        log_probs.student_sampled,
        log_probs.student_sampled,
        log_probs.sampled_is_label,
    )
    for student_sampling in (True, False):
        weights = weights_of("hpd", equal, student_sampling=student_sampling)
        assert torch.equal(weights.label, equal.teacher_label.exp())
        assert not weights.sampled.any()
    assert not weights_of("rkl", equal).label.any()
    # Up to the rounding of log((p + q) / 2).
    assert (weights_of("jsd", equal).label.abs() <= 1e-6).all()
    possible = equal.student_label.isfinite()
    assert not weights_of("opd", equal).label[possible].any()


@property_test
@given(log_probs=token_log_prob_batches(), reverse_coef=st.floats(0, 4), reinforce_coef=st.floats(0, 4))
def test_sampled_label_counts_once(log_probs: TokenLogProbs, reverse_coef: float, reinforce_coef: float) -> None:
    """Where a == y the position is weighted as if nothing had been sampled."""
    same = log_probs.sampled_is_label
    coefficients = {"reverse_coef": reverse_coef, "reinforce_coef": reinforce_coef}
    weights = weights_of("hpd", log_probs, **coefficients)
    unsampled = weights_of("hpd", log_probs, **coefficients, student_sampling=False)
    assert not weights.sampled[same].any()
    assert torch.equal(weights.label[same], unsampled.label[same])


@property_test
@given(log_probs=token_log_prob_batches())
def test_sampled_token_is_only_suppressed(log_probs: TokenLogProbs) -> None:
    """w_a is never positive, and sampling changes the label's weight by nothing or by p(y)."""
    weights = weights_of("hpd", log_probs)
    extra = weights.label - weights_of("hpd", log_probs, student_sampling=False).label
    assert (weights.sampled <= 0).all()
    reinforced = extra != 0
    torch.testing.assert_close(extra[reinforced], log_probs.teacher_label.exp()[reinforced], rtol=1e-4, atol=1e-6)


@each_objective
def test_one_token_vocabulary(objective: str) -> None:
    """Everything is certain: q = p = 1 whatever the logits, so loss and gradient vanish."""
    generator = torch.Generator().manual_seed(0)
    logits, other = torch.randn(2, 5, 1, generator=generator, dtype=torch.float64)
    token = torch.zeros(5, dtype=torch.int64)
    batch = Positions(logits, other, token, token, torch.ones(5, dtype=torch.bool), 5)
    weights = weights_of(objective, log_probs_of(batch))
    expected = 1.0 if objective in ("hpd", "sft", "seqkd") else 0.0
    assert weights.label.tolist() == [expected] * 5
    assert weights.sampled.tolist() == [0.0] * 5
    value, grad = value_and_grad(lambda b: loss_of(objective, b), batch)
    assert value == 0
    assert not grad.any()


@each_objective
def test_weights_are_detached_and_inputs_kept(objective: str) -> None:
    """No graph hangs on the weights of log-probs that need one, and the log-probs are not written to."""
    batch = make_batch()
    log_probs = log_probs_of(batch._replace(student_logits=batch.student_logits.requires_grad_()))
    assert log_probs.student_label.requires_grad
    before = {name: values.detach().clone() for name, values in vars(log_probs).items()}
    weights_of(objective, log_probs)
    for name, values in before.items():
        assert torch.equal(getattr(log_probs, name), values), name


# Full-vocabulary objectives


VOCABULARY_COEFFICIENTS: dict[str, list[dict[str, Any]]] = {
    "hpd_exact": COEFFICIENTS,
    "jsd_exact": [{}, {"beta": 0.1}, {"beta": 0.9}],
    "skew_fkl": [{}, {"skew": 0.0}, {"skew": 0.6}],
    "skew_rkl": [{}, {"skew": 0.0}, {"skew": 0.6}],
    "akl": [{}, {"mu": 0.05}, {"mu": 0.95}],
    "entropy_aware": [{}, {"threshold": 0.0}, {"threshold": 9.0}, {"threshold": 0.8, "forward_coef": 0.3}],
    "top_k_tail": [{}, {"k": 1}, {"k": 3}, {"k": 10}, {"k": 11}],
    "taid": [{}, {"start": 0.0}, {"start": 0.9, "end": 0.1}],
    "abkd": [{}, {"alpha": 1.0, "beta": 1e-3}, {"alpha": 1e-3, "beta": 1.0}, {"alpha": 0.5, "beta": 1.5}],
}
VOCABULARY_CASES = [
    (name, coefficients)
    for name in VOCABULARY_OBJECTIVE_NAMES
    for coefficients in VOCABULARY_COEFFICIENTS.get(name, [{}])
]
each_vocabulary_case = pytest.mark.parametrize(("objective", "coefficients"), VOCABULARY_CASES, ids=str)
each_vocabulary_objective = pytest.mark.parametrize("objective", VOCABULARY_OBJECTIVE_NAMES)


def vocabulary_log_probs(batch: Positions) -> VocabularyLogProbs:
    return VocabularyLogProbs(batch.student_logits.log_softmax(-1), batch.teacher_logits.log_softmax(-1), batch.labels)


def over_vocabulary(objective: str, log_probs: VocabularyLogProbs, **coefficients: Any) -> VocabularyWeights:
    """An objective's weights, at the third of ten steps."""
    like = log_probs.student[:, 0]
    context = TokenContext.example(OBJECTIVES[objective].needs, torch.ones_like(like, dtype=torch.bool), like.dtype)
    weights: VocabularyWeights = OBJECTIVES[objective](log_probs, context, **coefficients)
    return weights


@each_vocabulary_case
def test_vocabulary_values_and_gradients(objective: str, coefficients: dict[str, Any]) -> None:
    """The value is the reference's, and the weights give its gradient in the logits: (sum w) q - w."""
    batch = make_batch(seed=6)
    logits = batch.student_logits.clone().requires_grad_()
    log_q, log_p = logits.log_softmax(-1), batch.teacher_logits.log_softmax(-1)
    values = torch.stack(
        [
            position_value(objective, log_q[t], log_p[t], int(batch.labels[t]), **coefficients)
            for t in range(len(logits))
        ]
    )
    (expected,) = torch.autograd.grad(values.sum(), logits)
    found = over_vocabulary(objective, vocabulary_log_probs(batch), **coefficients)
    torch.testing.assert_close(found.value, values.detach(), rtol=1e-8, atol=1e-9)
    weights = found.whole(batch.labels)
    grad = weights.sum(-1, keepdim=True) * log_q.detach().exp() - weights
    torch.testing.assert_close(grad, expected, rtol=1e-8, atol=1e-9)
    assert weights.shape == logits.shape
    assert not weights.requires_grad


def test_vocabulary_limits() -> None:
    """Known special cases: of the mixtures, of the exponents, of the head's mass, and the label's JSD."""
    log_probs = vocabulary_log_probs(make_batch(seed=7))
    fkl, rkl = (OBJECTIVES[name](log_probs) for name in ("fkl", "rkl_exact"))
    for name, coefficients, limit, tolerance in [
        ("skew_fkl", {"skew": 0.0}, fkl, 1e-12),
        ("skew_rkl", {"skew": 0.0}, rkl, 1e-12),
        ("abkd", {"alpha": 1.0, "beta": 1e-7}, fkl, 1e-5),
        ("abkd", {"alpha": 1e-7, "beta": 1.0}, rkl, 1e-5),
    ]:
        found = OBJECTIVES[name](log_probs, None, **coefficients)
        torch.testing.assert_close(found.value, limit.value, rtol=tolerance, atol=tolerance)
    label = torch.arange(len(log_probs.labels)), log_probs.labels
    tokens = TokenLogProbs(
        log_probs.student[label],
        log_probs.teacher[label],
        log_probs.student[label],
        log_probs.teacher[label],
        torch.ones(len(log_probs.labels), dtype=torch.bool),
    )
    for exact, on_label in (("jsd_exact", "jsd"), ("rkl_exact", "rkl")):
        weights = OBJECTIVES[exact](log_probs).weights[label]
        torch.testing.assert_close(weights, OBJECTIVES[on_label](tokens).label, rtol=1e-9, atol=1e-12)


def test_adaptive_kl_head_of_a_large_vocabulary() -> None:
    """A head of more tokens than are looked at first."""
    torch.manual_seed(0)
    student_logits, teacher_logits = torch.randn(2, 4, 1000).double()
    labels = torch.zeros(4, dtype=torch.int64)
    batch = Positions(student_logits, teacher_logits, labels, sampled=labels, mask=torch.zeros(4), num_tokens=4)
    log_probs = vocabulary_log_probs(batch)
    for mu in (0.05, 0.5, 0.99):
        values = [
            position_value("akl", q, p, 0, mu=mu) for q, p in zip(log_probs.student, log_probs.teacher, strict=True)
        ]
        torch.testing.assert_close(OBJECTIVES["akl"](log_probs, mu=mu).value, torch.stack(values))


@each_vocabulary_objective
@property_test
@given(seed=st.integers(0, 2**32), scale=st.sampled_from([0.0, 1.0, 30.0, 200.0]), vocabulary=st.integers(1, 9))
def test_vocabulary_weights_are_finite(objective: str, seed: int, scale: float, vocabulary: int) -> None:
    """With probabilities of zero in student, teacher and both; a divergence is never negative, and 0 if p == q."""
    random = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(2, 5, vocabulary, generator=random)
    removed = torch.rand(logits.shape, generator=random) < 0.3
    removed[..., 0] = False
    student, teacher = logits.masked_fill(removed, -math.inf).log_softmax(-1)
    labels = torch.zeros(5, dtype=torch.int64)
    found = over_vocabulary(objective, VocabularyLogProbs(student, teacher, labels))
    assert found.whole(labels).isfinite().all()
    assert found.value.isfinite().all()
    equal = over_vocabulary(objective, VocabularyLogProbs(student, student, labels))
    if objective == "hpd_exact":
        assert torch.equal(equal.whole(labels)[:, 0], student[:, 0].exp())
        assert not equal.weights[:, 1:].any()
    elif objective == "vopd":  # no divergence, but a sampled term
        assert (equal.whole(labels).abs() < 1e-5).all()
    else:
        assert (found.value > -1e-5).all()
        assert (equal.value.abs() < 1e-5).all()


@each_vocabulary_objective
def test_vocabulary_nan_comes_out(objective: str) -> None:
    batch = make_batch()
    for logits in (batch.student_logits, batch.teacher_logits):
        kept = logits[3].clone()
        logits[3, 2] = math.nan
        value = over_vocabulary(objective, vocabulary_log_probs(batch)).value
        assert value[3].isnan()
        assert value.isnan().sum() == 1
        logits[3] = kept


# Registry


def test_registry_names() -> None:
    """The reference knows every objective there is; the declared properties are what the weights say."""
    assert set(OBJECTIVES) == set(OBJECTIVE_NAMES) | set(VOCABULARY_OBJECTIVE_NAMES)
    assert {name for name, each in OBJECTIVES.items() if each.over == "vocabulary"} == set(VOCABULARY_OBJECTIVE_NAMES)
    log_probs = log_probs_of(make_batch())
    moved = dataclasses.replace(
        log_probs, student_label=log_probs.student_label - 1, student_sampled=log_probs.student_sampled - 1
    )
    untaught = dataclasses.replace(
        log_probs, teacher_label=log_probs.teacher_label - 1, teacher_sampled=log_probs.teacher_sampled - 1
    )
    for name in OBJECTIVE_NAMES:
        objective, weights = OBJECTIVES[name], OBJECTIVES[name](log_probs)
        assert objective.bind().weighs_sample == bool(weights.sampled.any()), name
        assert objective.is_likelihood == torch.equal(weights.label, objective(moved).label), name
        assert objective.needs_teacher != torch.equal(weights.label, objective(untaught).label), name
        assert objective.needs_rollouts == (name in ("opd", "power_opd", "constant_negative"))
    assert not OBJECTIVES["hpd"].bind({"student_sampling": False}).weighs_sample


@pytest.fixture
def own_registry(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The registry, to which a test may add."""
    monkeypatch.setattr(registry, "OBJECTIVES", dict(OBJECTIVES))
    return registry.OBJECTIVES


def test_registry_adds_and_refuses_doubles(own_registry: dict[str, Any]) -> None:
    """A new name is added and runs without autograd; a taken one is refused and keeps its objective."""

    @declare("double", over="token", source="this test")
    def double(log_probs: TokenLogProbs) -> TokenWeights:
        return TokenWeights(2 * log_probs.student_label, 2 * log_probs.student_sampled)

    assert own_registry["double"] is double
    needs_grad = torch.zeros(2, requires_grad=True)
    weights = double(TokenLogProbs(needs_grad, needs_grad, needs_grad, needs_grad, torch.ones(2, dtype=torch.bool)))
    assert not weights.label.requires_grad

    for taken in ("double", "hpd"):
        kept = own_registry[taken]
        with pytest.raises(ValueError, match=f"'{taken}' is already registered"):
            declare(taken, over="token", source="")(lambda log_probs: TokenWeights(log_probs, log_probs))
        assert own_registry[taken] is kept
    assert "double" not in OBJECTIVES


def test_arguments_are_the_parameters(own_registry: dict[str, Any]) -> None:
    """A function that takes other arguments than its parameters declare is refused where it is declared."""

    class Parameters(ObjectiveParameters):
        strength: float = 1.0

    for function in (lambda: None, lambda log_probs: None, lambda log_probs, strong: None):
        with pytest.raises(ValueError, match=r"expected the log-probs and its parameters \(log_probs, strength\)"):
            declare("wrong", over="token", source="", parameters=Parameters)(function)

    class Required(ObjectiveParameters):
        strength: float

    with pytest.raises(ValueError, match="'wrong': its parameter strength has no default; give it one"):
        declare("wrong", over="token", source="", parameters=Required)(lambda log_probs, strength: None)
    for name, value in (("over", "tokens"), ("returns", "lossy")):
        kinds: dict[str, Any] = {"over": "token", name: value}
        with pytest.raises(ValueError, match=f"'wrong': {name}='{value}'; choose (token or vocab|weights or loss)"):
            declare("wrong", **kinds)(lambda log_probs: None)
    assert "wrong" not in own_registry


OWN = """
import torch
from hpd_verl.objectives import TokenWeights, VocabularyWeights, objective

@objective("mine", over="token", source="here")
def mine(log_probs):
    return TokenWeights(log_probs.teacher_label.exp(), torch.zeros_like(log_probs.teacher_label))

@objective("half", over="vocabulary", source="here")
def half(log_probs):
    weights = log_probs.teacher_probs / 2
    return VocabularyWeights(weights, (weights * (log_probs.teacher - log_probs.student)).sum(-1))

@objective("misshapen", over="token", source="here")
def misshapen(log_probs):
    return TokenWeights(log_probs.student_label[:1], log_probs.student_label)

@objective("infinite", over="vocabulary", source="here")
def infinite(log_probs):
    return VocabularyWeights(log_probs.student / 0, log_probs.student[:, 0])

@objective("failing", over="token", source="here")
def failing(log_probs):
    return log_probs.nothing

@objective("tuple", over="token", source="here")
def untyped(log_probs):
    return log_probs.student_label, log_probs.student_label

@objective("undeclared", over="token", source="here")
def undeclared(log_probs):
    return TokenWeights(log_probs.teacher_label.exp(), log_probs.teacher_sampled)

@objective("untaught", over="token", source="here", needs_teacher=False)
def untaught(log_probs):
    return TokenWeights(log_probs.teacher_label.exp(), torch.zeros_like(log_probs.teacher_label))

@objective("writing", over="vocabulary", source="here")
def writing(log_probs):
    return VocabularyWeights(log_probs.teacher_probs.mul_(2), log_probs.student[:, 0])

@objective("normalising", over="token", source="here")
def normalising(log_probs):
    weights = log_probs.teacher_label.softmax(0)
    return TokenWeights(weights, torch.zeros_like(weights))

@objective("squeezing", over="token", source="here")
def squeezing(log_probs):
    weights = log_probs.teacher_label.exp().squeeze()
    return TokenWeights(weights, torch.zeros_like(weights))

@objective("leaving", over="token", source="here")
def leaving(log_probs):
    raise SystemExit(3)

@objective("accumulating", over="token", source="here")
def accumulating(log_probs):
    return TokenWeights(log_probs.teacher_label.cumsum(0), torch.zeros_like(log_probs.teacher_label))

def kl(log_probs):
    return (log_probs.teacher_probs * (log_probs.teacher - log_probs.student)).sum(-1)

def own_loss(name, **properties):
    return objective(name, **{"over": "vocabulary", "returns": "loss", **properties})

@own_loss("as_loss")
def as_loss(log_probs):
    return kl(log_probs)

@own_loss("as_token_loss", over="token")
def as_token_loss(log_probs):
    return -log_probs.student_label

rooted = own_loss("rooted")(lambda log_probs: (log_probs.student - log_probs.student.detach()).sum(-1).sqrt())
logarithm = own_loss("logarithm")(lambda log_probs: kl(log_probs) / 0)
detached = own_loss("detached")(lambda log_probs: kl(log_probs).detach())
argmax = own_loss("argmax")(lambda log_probs: log_probs.student.argmax(-1).float())
scalar = own_loss("scalar")(lambda log_probs: kl(log_probs).mean())
column = own_loss("column")(lambda log_probs: kl(log_probs).unsqueeze(1))
centred = own_loss("centred")(lambda log_probs: kl(log_probs) - kl(log_probs).mean())
neighbour = own_loss("neighbour")(lambda log_probs: kl(log_probs) * kl(log_probs).detach().roll(1))
summed = own_loss("summed")(lambda log_probs: kl(log_probs).cumsum(0))
chance = own_loss("chance")(lambda log_probs: kl(log_probs) * torch.rand(()))
drawn = own_loss("drawn", over="token")(lambda log_probs: -log_probs.student_sampled)
alone = own_loss("alone", needs_teacher=False)(kl)
overwriting = own_loss("overwriting")(lambda log_probs: log_probs.student_probs.mul_(2).sum(-1))
not_declared = objective("not_declared", over="vocabulary")(kl)
trained = own_loss("trained")(lambda log_probs: kl(log_probs) * torch.nn.Parameter(torch.ones(())))
elsewhere = own_loss("elsewhere")(lambda log_probs: torch.ones(len(log_probs.labels), requires_grad=True))
by_step = own_loss("by_step", needs={"position"})(lambda log_probs, context: kl(log_probs) / context.step)
by_reward = own_loss("by_reward", needs={"position"})(lambda log_probs, context: context.row["reward"] * kl(log_probs))
filling = own_loss("filling", needs={"behaviour"})(
    lambda log_probs, context: kl(log_probs) * context.behaviour.nan_to_num_()
)
counting = own_loss("counting", needs={"row.level"})(
    lambda log_probs, context: kl(log_probs) * context.row["level"].add_(1)
)
prefixed = own_loss("prefixed", over="token", needs_teacher=False, needs={"prefix"})(
    lambda log_probs, context: -log_probs.student_label * context.prefix_teacher
)
chosen = own_loss("chosen", over="token", needs={"behaviour", "row.is_rollout"})(
    lambda log_probs, context: torch.where(
        context.row["is_rollout"] == 1, (log_probs.student_label - context.behaviour).exp(), -log_probs.student_label
    )
)

plain = mine.function
"""


def test_own_objectives_by_file_and_module(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own_registry: dict[str, Any]
) -> None:
    """Found by path or module, imported once, tried before use; what is wrong with one is said in a line."""
    file = tmp_path / "own_objectives.py"
    file.write_text(OWN)
    mine = registry.find_objective(f"{file}:mine")
    assert registry.find_objective(f"{file}:mine") is mine
    assert registry.find_objective("mine") is mine
    assert registry.find_objective(f"{file}:half").over == "vocabulary"
    assert registry.find_objective(f"{file}:as_loss").returns == "loss"
    assert registry.find_objective(f"{file}:as_token_loss").over == "token"
    for name, message in [
        ("misshapen", r"'misshapen': label is torch.float32 \(1,\), expected torch.float32 \(5,\)"),
        ("infinite", r"'infinite': weights is not finite"),
        ("failing", r"'failing' fails on 5 random tokens \(AttributeError: .*nothing"),
        ("untyped", r"'tuple' returns tuple, not TokenWeights"),
        ("undeclared", "'undeclared': weighs the sampled token; declare weighs_sample=True"),
        ("untaught", "'untaught': label is not finite without a teacher: declare needs_teacher"),
        ("writing", "'writing': writes into teacher_probs of the log-probs"),
        ("normalising", "'normalising': label of a token is another one where it is alone"),
        ("squeezing", "'squeezing': label of a token is another one where it is alone"),
        ("accumulating", "'accumulating': label of a token is another one where it is alone"),
        ("rooted", "'rooted': the gradient of its loss is not finite for ordinary log-probs"),
        ("logarithm", "'logarithm': the gradient of its loss is not finite for ordinary log-probs"),
        ("detached", "'detached' returns a loss without gradient in the student's log-probs; compute it from them"),
        ("argmax", "'argmax' returns a loss without gradient in the student's log-probs"),
        ("scalar", r"'scalar' returns torch.float32 \(\), expected the loss of each token, torch.float32 \(5,\)"),
        ("column", r"'column' returns torch.float32 \(5, 1\), expected the loss of each token, torch.float32 \(5,\)"),
        ("centred", "'centred': its loss of a token is another one where it is alone"),
        ("neighbour", "'neighbour': the gradient of its loss of a token is another one where it is alone"),
        ("summed", "'summed': the gradient of its loss of a token is another one where it is alone"),
        ("chance", "'chance': the gradient of its loss of a token is another one where it is alone"),
        ("drawn", "'drawn': weighs the sampled token; declare weighs_sample=True"),
        ("alone", "'alone': the gradient of its loss is not finite without a teacher: declare needs_teacher"),
        ("overwriting", r"'overwriting' fails on 5 random tokens \(RuntimeError: a leaf Variable"),
        ("not_declared", "'not_declared' returns Tensor, not VocabularyWeights; declare returns=\"loss\""),
        ("trained", "'trained' returns a loss that depends on a tensor with requires_grad, which nothing would train"),
        ("elsewhere", "'elsewhere' returns a loss without gradient in the student's log-probs"),
        ("by_step", r"fails on 5 random tokens \(TypeError: .*its context holds position: declare what else it reads"),
        ("by_reward", r"\(KeyError: 'reward'\); its context holds position: declare what else it reads in needs"),
        ("filling", "'filling': writes into behaviour of the context; let it work on a copy"),
        ("counting", "'counting': writes into row.level of the context; let it work on a copy"),
        ("prefixed", "'prefixed': the gradient of its loss is not finite without a teacher: declare needs_teacher"),
        ("chosen", r"is not finite for demonstrations, .*: replace these \(nan_to_num\) and weigh demonstrations by"),
        ("leaving", r"'leaving' fails on 5 random tokens \(SystemExit: 3\)"),
        ("plain", r"has a function of the name 'plain'; define it with"),
        ("absent", r"has nothing of the name 'absent'"),
    ]:
        with pytest.raises(ValueError, match=message):
            registry.find_objective(f"{file}:{name}")
    (tmp_path / "broken_objective.py").write_text(
        OWN.split('@objective("half')[0].replace("mine", "half_way") + "1 / 0"
    )
    with pytest.raises(ValueError, match="fails when it is imported"):
        registry.find_objective(f"{tmp_path}/broken_objective.py:any")
    assert "half_way" not in own_registry
    (tmp_path / "leaving_objective.py").write_text("raise SystemExit('no')")
    monkeypatch.syspath_prepend(tmp_path)
    for place in (f"{tmp_path}/leaving_objective.py", "leaving_objective"):
        with pytest.raises(ValueError, match=r"import.*\(SystemExit: no\)"):
            registry.find_objective(f"{place}:any")
    with pytest.raises(ValueError, match="there is no file"):
        registry.find_objective("/nowhere/own.py:mine")
    for place in ("..x", ".", "~no_such_user/own.py"):
        with pytest.raises(ValueError, match="; give "):
            registry.find_objective(f"{place}:mine")
    with pytest.raises(ValueError, match="cannot import no_such_module"):
        registry.find_objective("no_such_module:mine")
    with pytest.raises(ValueError, match=r"choose one of abkd, .*, or give your own as module:name"):
        registry.find_objective("nothing")

    (tmp_path / "own_module_of_objectives.py").write_text(OWN.replace('"mine"', '"other"').split('@objective("half')[0])
    assert registry.find_objective("own_module_of_objectives:mine").name == "other"


# Probabilities too small for float32


def test_reinforcement_of_a_label_of_no_mass() -> None:
    """The sign of gap(y) is that of log p - log q, where q(y) and gap(y) are 0 in float32."""
    student, teacher = torch.tensor([[-150.0, 0.0, -140.0]]), torch.tensor([[0.3, 0.5, 0.2]]).log()
    log_probs = TokenLogProbs(
        student[:, 0], teacher[:, 0], student[:, 1], teacher[:, 1], torch.zeros(1, dtype=torch.bool)
    )
    label = torch.tensor([0])
    assert not student[:, 0].exp().any()
    for found in (
        OBJECTIVES["hpd"](log_probs, forward_coef=0.0).label,
        OBJECTIVES["hpd_exact"](VocabularyLogProbs(student, teacher, label), forward_coef=0.0).whole(label)[:, 0],
    ):
        torch.testing.assert_close(found, torch.tensor([0.3]))


@pytest.mark.parametrize(("skewed", "plain"), [("skew_fkl", "fkl"), ("skew_rkl", "rkl_exact")])
def test_no_skew_is_the_plain_divergence(skewed: str, plain: str) -> None:
    """Also where probabilities are 0 in float32."""
    student, teacher = torch.tensor([[-150.0, 0.0, -140.0]]), torch.tensor([[0.0, -150.0, -1000.0]])
    log_probs = VocabularyLogProbs(student, teacher, torch.tensor([0]))
    found, wanted = OBJECTIVES[skewed](log_probs, skew=0.0), OBJECTIVES[plain](log_probs)
    assert torch.equal(found.weights, wanted.weights)
    assert torch.equal(found.value, wanted.value)
