"""The loss function of the one-pass pipeline on verl's batches: against whole logits, autograd and verl's agg_loss."""

import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from reference import VOCABULARY_OBJECTIVE_NAMES, plain_head_loss, position_weights
from tensordict import TensorDict
from torch import Tensor
from verl.trainer.ppo.core_algos import agg_loss
from verl.utils import tensordict_utils as tu
from verl.utils.metric import Metric

from hpd_verl.config import HPDConfig
from hpd_verl.data import fields
from hpd_verl.head.features import TeacherFeatures, teacher_features, teacher_top_k
from hpd_verl.head.output_head import OutputHead
from hpd_verl.head.sampling import counter_uniform, sample_tokens
from hpd_verl.objectives import registry
from hpd_verl.pipelines.one_pass import OnePassLoss

VOCABULARY, HIDDEN, TEACHER_HIDDEN, STEP = 23, 8, 12, 7
AGGREGATIONS = ["token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-sum-norm", "seq-mean-token-mean"]

# (row number, is a rollout, prompt length, response mask): in an order that is not that of the row numbers.
ROWS: list[tuple[int, int, int, list[int]]] = [
    (11, 0, 3, [1, 1, 1, 1]),
    (4, 1, 1, [1]),
    (7, 0, 5, [1, 1, 0, 1, 1, 0]),
    (0, 1, 2, [1, 1, 1]),
    (9, 0, 4, [0, 0, 1]),
]


@dataclass
class PackedRows:
    """Rows with random hidden states of student and teacher, in float64 so that tolerances can be tight."""

    config: HPDConfig = field(default_factory=lambda: HPDConfig(token_chunk_size=3))
    loss_agg_mode: str = "token-mean"
    loss_scale_factor: int | None = None
    dp_size: int = 1
    rows: list[tuple[int, int, int, list[int]]] = field(default_factory=lambda: list(ROWS))
    teachers: tuple[int, ...] | None = None
    """Of each row, its teacher among two; None for one teacher."""

    def __post_init__(self) -> None:
        random = torch.Generator().manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, dtype=torch.float64, generator=random)

        lengths = [prompt + len(mask) for _, _, prompt, mask in self.rows]
        self.ids = [torch.randint(VOCABULARY, (length,), generator=random) for length in lengths]
        self.hidden = [normal(length, HIDDEN) for length in lengths]
        self.teacher_hidden = [normal(length, TEACHER_HIDDEN) for length in lengths]
        self.weight = normal(VOCABULARY, HIDDEN).requires_grad_()
        self.teacher_weight = normal(VOCABULARY, TEACHER_HIDDEN) * 0.7
        self.other_weight = normal(VOCABULARY, TEACHER_HIDDEN) * 0.4

    def data(self, *chosen: int) -> TensorDict:
        """Some rows as a micro-batch of the whole batch, which gives the numbers to divide by."""
        chosen = chosen or tuple(range(len(self.rows)))

        def nested(values: list[Tensor]) -> Tensor:
            return tu.nested_tensor_from_tensor_list(values)

        rows = [self.rows[index] for index in chosen]
        ids = [self.ids[index] for index in chosen]
        own = {} if self.teachers is None else {fields.TEACHER: torch.tensor([[self.teachers[row]] for row in chosen])}
        return tu.get_tensordict(
            {
                **own,
                "input_ids": nested(ids),
                "position_ids": nested([torch.arange(len(each)) for each in ids]),
                "prompts": nested([each[: row[2]] for each, row in zip(ids, rows, strict=True)]),
                "responses": nested([each[row[2] :] for each, row in zip(ids, rows, strict=True)]),
                "response_mask": nested([torch.tensor(row[3]) for row in rows]),
                fields.ROW: torch.tensor([[row[0]] for row in rows]),
                fields.IS_ROLLOUT: nested([torch.tensor([row[1]]) for row in rows]),
                fields.row_number("weight"): torch.tensor([[row[0] / 16] for row in rows]),
                fields.ROLLOUT_LOG_PROBS: nested(
                    [-self.hidden[index][self.rows[index][2] :, 0].abs() for index in chosen]
                ),
            },
            {
                fields.STEP: STEP,
                fields.STEPS: 2 * STEP,
                fields.COMPARES_ROLLOUTS: False,
                "dp_size": self.dp_size,
                "batch_num_tokens": self.tokens,
                "global_batch_size": len(self.rows),
            },
        )

    @property
    def tokens(self) -> int:
        return sum(sum(mask) for *_, mask in self.rows)

    def head(self) -> OutputHead:
        return OutputHead(self.weight, VOCABULARY)

    def weight_of_teacher(self, row: int) -> Tensor:
        return self.other_weight if self.teachers is not None and self.teachers[row] else self.teacher_weight

    def teacher_head(self, row: int = 0) -> OutputHead:
        return OutputHead(self.weight_of_teacher(row), VOCABULARY)

    def features(self, top_k: int | None = None) -> dict[int, TeacherFeatures]:
        """The teacher's features of each row's response tokens."""
        found: dict[int, TeacherFeatures] = {}
        for row, (number, _, prompt, mask) in enumerate(self.rows):
            ids, hidden = self.ids[row], self.teacher_hidden[row]
            at = [prompt - 1 + t for t, counts in enumerate(mask) if counts]
            arguments = (hidden[at], self.teacher_head(row), ids[[p + 1 for p in at]], self.config.temperature, 4)
            found[number] = teacher_features(*arguments) if top_k is None else teacher_top_k(*arguments, k=top_k)
        return found

    def loss_function(self) -> OnePassLoss:
        loss = OnePassLoss(self.config, self.loss_agg_mode, self.loss_scale_factor)
        if self.config.needs_teacher:
            loss.teacher_features = self.features()
        return loss

    def run(self, *chosen: int, loss: OnePassLoss | None = None) -> tuple[Tensor, dict[str, Any], Tensor, Tensor]:
        """``(loss, metrics, gradient of the weight, gradient of the hidden states)`` of a micro-batch."""
        chosen = chosen or tuple(range(len(self.rows)))
        hidden = torch.cat([self.hidden[index] for index in chosen]).requires_grad_()
        value, metrics = (loss or self.loss_function()).from_hidden(hidden, self.head(), self.data(*chosen))
        weight_gradient, hidden_gradient = torch.autograd.grad(value, [self.weight, hidden])
        return value.detach(), metrics, weight_gradient, hidden_gradient


@dataclass
class Naive:
    """The same from whole logits, row by row and token by token."""

    loss: Tensor
    metrics: dict[str, float]
    weight_gradient: Tensor
    hidden_gradient: Tensor


def naive(batch: PackedRows) -> Naive:
    config = batch.config
    hidden = [each.clone().requires_grad_() for each in batch.hidden]
    longest = max(len(mask) for *_, mask in batch.rows)
    rows, sums = [], dict.fromkeys(_METRICS, 0.0)
    for index, (number, is_rollout, prompt, mask) in enumerate(batch.rows):
        objective = (config.on_policy_objective or config.objective) if is_rollout else config.objective
        losses = []
        for t in range(longest):
            if t >= len(mask) or not mask[t]:
                losses.append(torch.zeros((), dtype=torch.float64))
                continue
            at = prompt + t - 1
            label = batch.ids[index][at + 1].view(1)
            logits = (hidden[index][at] @ batch.weight.T).view(1, -1)
            teacher_logits = (batch.teacher_hidden[index][at] @ batch.teacher_weight.T).view(1, -1)
            uniforms = counter_uniform(config.seed, STEP, torch.tensor([number]), torch.tensor([at]))
            _, sampled, _, _ = sample_tokens(logits / config.temperature, label, uniforms, 8)
            loss, _ = plain_head_loss(
                [str(objective)],
                logits,
                teacher_logits,
                label,
                sampled,
                torch.ones(1, dtype=torch.float64),
                config.temperature,
            )
            losses.append(loss)
            for name, value in _token_metrics(
                str(objective), logits / config.temperature, teacher_logits / config.temperature, label, sampled
            ).items():
                sums[name] += value
        rows.append(torch.stack(losses))
    padded_mask = torch.tensor([mask + [0] * (longest - len(mask)) for *_, mask in batch.rows])
    loss = agg_loss(
        torch.stack(rows),
        padded_mask,
        batch.loss_agg_mode,
        dp_size=batch.dp_size,
        batch_num_tokens=batch.tokens,
        global_batch_size=len(batch.rows),
        loss_scale_factor=batch.loss_scale_factor,
    )
    weight_gradient, *hidden_gradients = torch.autograd.grad(loss, [batch.weight, *hidden])
    return Naive(
        loss.detach(),
        {name: value * batch.dp_size / batch.tokens for name, value in sums.items()},
        weight_gradient,
        torch.cat(hidden_gradients),
    )


_METRICS = [
    *("label_weight_mean", "sampled_weight_mean", "label_gap_mean", "forward_fraction", "reinforced_fraction"),
    *("suppressed_fraction", "sampled_equals_label_fraction", "reverse_kl_k1", "teacher_nll", "student_nll"),
    *("entropy", "forward_kl", "reverse_kl"),
]


def _token_metrics(
    objective: str, logits: Tensor, teacher_logits: Tensor, label: Tensor, sampled: Tensor
) -> dict[str, float]:
    """The log's metrics at one position, from the probabilities of the whole vocabulary."""
    q, p = torch.softmax(logits[0].detach(), -1).tolist(), torch.softmax(teacher_logits[0], -1).tolist()
    y, a = int(label), int(sampled)

    def gap(token: int) -> float:
        return q[token] * (math.log(p[token]) - math.log(q[token]))

    found = {
        "label_gap_mean": gap(y),
        "forward_fraction": float(gap(y) >= 0),
        "reinforced_fraction": float(gap(y) > 0 and gap(a) < 0),
        "sampled_equals_label_fraction": float(a == y),
        "reverse_kl_k1": math.log(q[a]) - math.log(p[a]),
        "teacher_nll": -math.log(p[y]),
        "student_nll": -math.log(q[y]),
        "entropy": -sum(x * math.log(x) for x in q),
        "forward_kl": sum(b * (math.log(b) - math.log(a)) for a, b in zip(q, p, strict=True)),
        "reverse_kl": sum(a * (math.log(a) - math.log(b)) for a, b in zip(q, p, strict=True)),
    }
    if objective not in VOCABULARY_OBJECTIVE_NAMES:
        label_weight, sampled_weight = position_weights(objective, q, p, y, a)
        found["label_weight_mean"], found["sampled_weight_mean"] = label_weight, sampled_weight
        found["suppressed_fraction"] = float(sampled_weight < 0)
    return found


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9)


def values(metrics: dict[str, Any]) -> dict[str, float]:
    return {name: metric.aggregate() for name, metric in metrics.items()}


def configured(objective: str, **settings: Any) -> HPDConfig:
    return HPDConfig(objective=objective, token_chunk_size=3, **settings)


MIXED = {"on_policy_objective": "opd", "temperature": 1.7}
CONFIGS = {
    "hpd": configured("hpd"),
    "hpd on demonstrations, opd on rollouts": configured("hpd", **MIXED),
    "sft": configured("sft"),
    "fkl": configured("fkl"),
}


@pytest.mark.parametrize("loss_agg_mode", AGGREGATIONS)
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize(("dp_size", "loss_scale_factor"), [(1, None), (4, 50)])
def test_loss_and_gradients(loss_agg_mode: str, name: str, dp_size: int, loss_scale_factor: int | None) -> None:
    """Those of verl's aggregation of the losses of single tokens."""
    batch = PackedRows(CONFIGS[name], loss_agg_mode, loss_scale_factor, dp_size)
    loss, metrics, weight_gradient, hidden_gradient = batch.run()
    expected = naive(batch)
    close(loss, expected.loss)
    close(weight_gradient, expected.weight_gradient)
    close(hidden_gradient, expected.hidden_gradient)
    assert values(metrics)["hpd/loss"] == pytest.approx(expected.loss.item(), rel=1e-6)


def test_an_unknown_aggregation_is_refused_by_verl() -> None:
    with pytest.raises(ValueError, match="Invalid loss_agg_mode: token-median"):
        PackedRows(loss_agg_mode="token-median").run()


@pytest.mark.parametrize("name", ["hpd", "hpd on demonstrations, opd on rollouts"])
@pytest.mark.parametrize("dp_size", [1, 4])
def test_metrics(name: str, dp_size: int) -> None:
    """Means over the response tokens of the batch; verl divides the sum by dp_size."""
    batch = PackedRows(CONFIGS[name], dp_size=dp_size)
    found = values(batch.run()[1])
    expected = naive(batch).metrics
    del expected["forward_kl"], expected["reverse_kl"]
    entropy = expected.pop("entropy")
    assert found.pop("hpd/response_tokens") == batch.tokens * dp_size
    assert found.pop("actor/entropy") == pytest.approx(entropy, rel=1e-6)
    del found["hpd/loss"]
    assert found == pytest.approx({f"hpd/{metric}": value for metric, value in expected.items()}, rel=1e-6)


def test_exact_kl_metrics() -> None:
    batch = PackedRows(configured("hpd", exact_kl_metrics=True))
    found, expected = values(batch.run()[1]), naive(batch).metrics
    for name in ("forward_kl", "reverse_kl"):
        assert found[f"hpd/{name}"] == pytest.approx(expected[name], rel=1e-6)
    without = PackedRows(configured("hpd")).run()[1]
    assert not {"hpd/forward_kl", "hpd/reverse_kl"} & without.keys()


@pytest.mark.parametrize("loss_agg_mode", AGGREGATIONS)
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("split", [[(0,), (1,), (2,), (3,), (4,)], [(3, 0), (4, 2, 1)]], ids=str)
def test_micro_batches_add_up(loss_agg_mode: str, name: str, split: list[tuple[int, ...]]) -> None:
    """To the loss, the gradients and the metrics of the whole batch, in any order of the rows."""
    # Without a factor this mode divides by the longest response of the micro-batch, verl's own rule.
    factor = 50 if loss_agg_mode == "seq-mean-token-sum-norm" else None
    batch = PackedRows(CONFIGS[name], loss_agg_mode, factor)
    loss, metrics, weight_gradient, _ = batch.run()
    parts = [batch.run(*rows) for rows in split]
    close(torch.stack([part[0] for part in parts]).sum(), loss)
    close(torch.stack([part[2] for part in parts]).sum(0), weight_gradient)
    joined: dict[str, Metric] = {}
    for part in parts:
        for metric, value in part[1].items():
            joined.setdefault(metric, Metric(value.aggregation)).append(value)
    assert values(joined) == pytest.approx(values(metrics), rel=1e-6, abs=1e-12)


def test_a_micro_batch_without_response_tokens() -> None:
    """Its loss and gradients are 0, its metrics add nothing."""
    batch = PackedRows(rows=[*ROWS, (2, 0, 3, [0, 0])])
    loss, metrics, weight_gradient, hidden_gradient = batch.run(5)
    assert loss == 0
    assert not weight_gradient.any()
    assert not hidden_gradient.any()
    assert set(values(metrics).values()) == {0.0}
    assert set(metrics) == set(batch.run(0)[1])


def test_sft_needs_no_teacher() -> None:
    """And logs the student's likelihood alone."""
    batch = PackedRows(configured("sft"))
    loss = batch.loss_function()
    assert loss.teacher_features == {}
    value, metrics, *_ = batch.run(loss=loss)
    assert values(metrics) == pytest.approx(
        {"hpd/student_nll": value.item(), "hpd/loss": value.item(), "hpd/response_tokens": batch.tokens}, rel=1e-6
    )


def test_a_teacher_known_by_all_its_log_probs() -> None:
    """The top-k form with k the vocabulary gives what hidden states give."""
    batch = PackedRows()
    loss = batch.loss_function()
    loss.teacher_features = batch.features(top_k=VOCABULARY)
    found, expected = batch.run(loss=loss), batch.run()
    close(found[0], expected[0])
    close(found[2], expected[2])
    assert values(found[1]) == pytest.approx(values(expected[1]), rel=1e-6)


def test_draws_depend_on_step_row_and_position_alone() -> None:
    """Another step draws other tokens; another place in the batch does not."""
    batch = PackedRows(configured("hpd"))
    name = "hpd/reverse_kl_k1"
    alone = sum(values(batch.run(index)[1])[name] for index in range(len(ROWS)))
    assert values(batch.run(2, 0, 4, 1, 3)[1])[name] == pytest.approx(alone, rel=1e-9)
    data = batch.data()
    tu.assign_non_tensor(data, **{fields.STEP: STEP + 1})
    later = batch.loss_function().from_hidden(torch.cat(batch.hidden), batch.head(), data)[1]
    assert abs(values(later)[name] - alone) > 1e-3


def test_nan_in_the_student_is_named() -> None:
    batch = PackedRows()
    batch.hidden[1][0] = math.nan  # the prompt's only token, which predicts the response's first
    batch.hidden[3][2] = math.nan
    message = (
        "step 7: NaN in the student's logits, in 2 of 5 rows of the micro-batch (rows 0, 4); stopped before the "
        "update, checkpoints are untouched"
    )
    with pytest.raises(FloatingPointError, match=re.escape(message)):
        batch.run()


def test_nan_in_the_teacher_is_named() -> None:
    batch = PackedRows()
    batch.teacher_hidden[0][3] = math.nan
    with pytest.raises(FloatingPointError, match=r"^step 7: NaN in the teacher's logits, in 1 of 2 rows .*\(rows 11\)"):
        batch.run(0, 2)


def test_nan_where_nothing_is_predicted_does_not_matter() -> None:
    """At a prompt's inner tokens, at masked ones and at a row's last token."""
    batch = PackedRows()
    expected = batch.run()
    for index, at in ((0, 0), (2, 6), (0, 6)):
        batch.hidden[index][at] = math.nan
        batch.teacher_hidden[index][at] = math.nan
    found = batch.run()
    close(found[0], expected[0])
    close(found[2], expected[2])


# What objectives need beside log-probs


NEEDING = """
import torch
from hpd_verl.objectives import objective

NEEDS = {"step", "position", "behaviour", "prefix", "row.weight", "row.is_rollout"}

def factor(context):
    rollout = context.row["is_rollout"] == 1
    known = torch.where(rollout, context.behaviour + context.prefix_behaviour, 0.5)
    place = context.position / context.length + context.row["weight"] * context.step / context.steps
    return torch.sigmoid(context.prefix_teacher / 4 + known) + place

@objective("needing", over="vocabulary", returns="loss", needs=NEEDS)
def needing(log_probs, context):
    return factor(context) * (log_probs.teacher_probs * (log_probs.teacher - log_probs.student)).sum(-1)

@objective("needing_tokens", over="token", returns="loss", needs=NEEDS)
def needing_tokens(log_probs, context):
    return -factor(context) * log_probs.student_label
"""


@pytest.mark.parametrize("teachers", [None, (0, 1, 1, 0, 1)])
@pytest.mark.parametrize("name", ["needing", "needing_tokens"])
def test_needs_are_met_in_any_micro_batch(
    name: str, teachers: tuple[int, ...] | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Loss and gradients by the definition, with masked tokens inside of rows; micro-batches of any rows add up.

    Rows of two teachers alternate, and the sums over a row's prefix are of its own teacher.
    """
    monkeypatch.setattr(registry, "OBJECTIVES", dict(registry.OBJECTIVES))
    (tmp_path / "needing.py").write_text(NEEDING)
    config = HPDConfig(objective=f"{tmp_path}/needing.py:{name}", token_chunk_size=3)
    batch = PackedRows(config, teachers=teachers)
    value, metrics, weight_gradient, hidden_gradient = batch.run()
    assert "rollout_tokens" not in metrics

    weight, total = batch.weight.detach().clone().requires_grad_(), torch.zeros((), dtype=torch.float64)
    for row, (number, is_rollout, prompt, mask) in enumerate(batch.rows):
        ids, hidden, teacher = batch.ids[row], batch.hidden[row], batch.teacher_hidden[row]
        sum_teacher = sum_behaviour = 0.0
        position = 0
        for t, counts in enumerate(mask):
            if not counts:
                continue
            y = int(ids[prompt + t])
            log_q = (weight @ hidden[prompt - 1 + t]).log_softmax(-1)
            log_p = (batch.weight_of_teacher(row) @ teacher[prompt - 1 + t]).log_softmax(-1)
            behaviour = -abs(float(hidden[prompt + t, 0]))
            known = behaviour + sum_behaviour if is_rollout else 0.5
            factor = 1 / (1 + math.exp(-(sum_teacher / 4 + known))) + position / sum(mask) + number / 16 / 2
            loss = (log_p.exp() * (log_p - log_q)).sum() if name == "needing" else -log_q[y]
            total = total + factor * loss / batch.tokens
            sum_teacher += float(log_p[y].detach() - log_q[y].detach())
            sum_behaviour += float(log_q[y].detach()) - behaviour
            position += 1
    close(value, total.detach())
    close(weight_gradient, torch.autograd.grad(total, weight)[0])

    lengths = [len(each) for each in batch.hidden]
    pieces = dict(enumerate(hidden_gradient.split(lengths)))
    for split in ([(4, 2), (0,), (3, 1)], [(0,), (1,), (2,), (3,), (4,)]):
        added = torch.zeros_like(weight_gradient)
        for rows in split:
            _, _, of_weight, of_hidden = batch.run(*rows)
            added += of_weight
            for row, piece in zip(rows, of_hidden.split([lengths[row] for row in rows]), strict=True):
                close(piece, pieces[row])
        close(added, weight_gradient)
