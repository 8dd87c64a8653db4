"""A batch as several updates: the rows of each update on each rank, and the batch's metrics."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor
from verl.utils import tensordict_utils as tu
from verl.utils.seqlen_balancing import calculate_workload, get_seqlen_balanced_partitions

RESPONSE_TOKENS = "hpd/response_tokens"
ROLLOUT_DIFFERENCE = "hpd/rollout_log_prob_difference"
ROLLOUT_TOKENS = "rollout_tokens"
"""Divisor of an update's rollout difference, which is a sum. Not logged."""
_TEACHERS = "hpd/teachers/"
_FRACTION = "token_fraction"
_OF_TEACHERS = ("teacher_nll", "student_nll", "label_gap_mean", "reverse_kl_k1", "forward_kl", "reverse_kl")


def rows_of_ranks(lengths: Sequence[int], updates: int, ranks: int) -> list[list[int]]:
    """Assign rows of a global batch to ranks, so that updates do not depend on the number of ranks.

    Update u takes the u-th part of the batch in order. verl's worker cuts a rank's rows into equal parts, so a rank
    gets its share of the first update, then of the second, and so on.

    Args:
        lengths: tokens of each row.
        updates: equal parts of the batch.
        ranks: data-parallel ranks, among which the rows of each part divide.

    Returns:
        Row indices, a list for each rank. Within an update ranks get as many rows each, of about the same work.
    """
    size = len(lengths) // updates
    found: list[list[int]] = [[] for _ in range(ranks)]
    for start in range(0, len(lengths), size):
        work = calculate_workload(torch.tensor(lengths[start : start + size], dtype=torch.int64))
        for rank, rows in enumerate(get_seqlen_balanced_partitions(work, k_partitions=ranks, equal_size=True)):
            found[rank] += [start + row for row in rows]
    return found


def train(student: Any, data: TensorDict, loss_agg_mode: str) -> TensorDict | None:
    """verl's ``train_mini_batch`` with the metrics of the batch in place of those of its updates.

    Args:
        student: verl's worker.
        data: this rank's rows.
        loss_agg_mode: verl's aggregation of token losses.

    Returns:
        As of verl's; None on a rank whose metrics verl takes from another.
    """
    epochs = tu.get_non_tensor_data(data=data, key="epochs", default=1)  # verl takes it out of the batch
    output = student.train_mini_batch(data=data)
    if output is not None:
        tu.assign_non_tensor(output, metrics=batch_metrics(tu.get(output, "metrics"), epochs, loss_agg_mode))
    return output


def of_each_teacher(per_token: Mapping[str, Tensor], of_token: Tensor, names: Sequence[str]) -> dict[str, Tensor]:
    """Metrics of each of several teachers' tokens, 0 at the others', and where its tokens are.

    Args:
        per_token: metric name to values, [n].
        of_token: int64 [n], place of the token's teacher in ``names``.
        names: of the teachers.
    """
    found = {}
    for place, name in enumerate(names):
        own = of_token == place
        found[f"{_TEACHERS}{name}/{_FRACTION}"] = own
        for metric in _OF_TEACHERS:
            if f"hpd/{metric}" in per_token:
                found[f"{_TEACHERS}{name}/{metric}"] = torch.where(own, per_token[f"hpd/{metric}"].double(), 0.0)
    return found


def over_own_tokens(metrics: Mapping[str, float]) -> dict[str, float]:
    """Metrics of a batch, in which those of one teacher become means over its own tokens in place of all.

    Args:
        metrics: means over all response tokens; a teacher without any keeps its fraction alone.
    """
    found = dict(metrics)
    for fraction in [name for name in metrics if name.startswith(_TEACHERS) and name.endswith(f"/{_FRACTION}")]:
        own = fraction.removesuffix(_FRACTION)
        for name in [f"{own}{metric}" for metric in _OF_TEACHERS if f"{own}{metric}" in metrics]:
            mean = found.pop(name)
            if metrics[fraction] > 0:
                found[name] = mean / metrics[fraction]
    return found


def batch_metrics(metrics: Mapping[str, Any], epochs: int, loss_agg_mode: str) -> dict[str, Any]:
    """The metrics of a batch from those of its updates, as if it were one.

    Means over an update's response tokens become means over those of all updates.

    Args:
        metrics: by name, a list with a number for each update; ``RESPONSE_TOKENS`` among them. Names with a prefix
            ``hpd/`` or ``actor/`` are means over tokens, but for those named here; others stay as they are.
        epochs: times that each row is trained on.
        loss_agg_mode: verl's aggregation of token losses.
    """
    tokens: list[float] = metrics[RESPONSE_TOKENS]

    def over_tokens(values: Sequence[float]) -> float:
        return sum(value * count for value, count in zip(values, tokens, strict=True)) / max(sum(tokens), 1)

    def of_loss(values: Sequence[float]) -> float:
        if loss_agg_mode == "token-mean":
            return over_tokens(values)
        return sum(values) / (epochs if loss_agg_mode == "token-sum" else len(values))

    found: dict[str, Any] = {}
    for name, values in metrics.items():
        if name == RESPONSE_TOKENS:
            found[name] = sum(values) / epochs
        elif name in ("loss", "hpd/loss"):
            found[name] = of_loss(values)
        elif name == ROLLOUT_DIFFERENCE:
            # First update only: after it the student differs from the rollout server's.
            if metrics[ROLLOUT_TOKENS][0]:
                found[name] = values[0] / metrics[ROLLOUT_TOKENS][0]
        elif name.startswith(("hpd/", "actor/")):
            found[name] = over_tokens(values)
        elif name != ROLLOUT_TOKENS:
            found[name] = values
    return found
