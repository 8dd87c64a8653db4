"""Micro-batches of rows of similar length, for padded rows and for rope that switches at a length."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed
from tensordict import TensorDict
from verl.utils import tensordict_utils as tu
from verl.utils.device import get_device_id
from verl.workers.engine.fsdp import transformer_impl

from hpd_verl.run.replacing import replace

SWITCH = "rope_switch_length"
"""Setting of a batch: rows of more tokens share no micro-batch with the others."""


def group_rows(lengths: Sequence[int], budget: int, padded: bool, switch: int | None = None) -> list[list[int]]:
    """Rows of each micro-batch, the longest first.

    Args:
        lengths: tokens of each row.
        budget: tokens of a micro-batch, padding included; a longer row has one to itself.
        padded: each row costs as much as the longest of its micro-batch.
        switch: rows of more tokens, and of no more, are kept apart; None where they need not.
    """
    groups: list[list[int]] = []
    tokens, is_long = 0, False
    for row in sorted(range(len(lengths)), key=lambda row: (-lengths[row], row)):
        starts_short = switch is not None and is_long and lengths[row] <= switch
        cost = lengths[groups[-1][0]] if groups and padded else lengths[row]
        if not groups or starts_short or tokens + cost > budget:
            groups.append([])
            tokens, cost = 0, lengths[row]
        groups[-1].append(row)
        tokens += cost
        is_long = switch is not None and lengths[row] > switch
    return groups


def split_to(groups: list[list[int]], count: int) -> list[list[int]]:
    """The same rows in ``count`` micro-batches, at least as many as there are: the largest are halved.

    Raises:
        ValueError: there are fewer rows.
    """
    groups = list(groups)
    while len(groups) < count:
        largest = max(range(len(groups)), key=lambda index: len(groups[index]))
        rows = groups[largest]
        if len(rows) < 2:
            raise ValueError(
                f"{sum(map(len, groups))} rows on a rank do not make {count} micro-batches, as another's do"
            )
        groups[largest : largest + 1] = [rows[: len(rows) // 2], rows[len(rows) // 2 :]]
    return groups


def _by_length(original: Callable[..., Any]) -> Callable[..., Any]:
    """verl fills micro-batches by the sum of their tokens, which for padded rows is not what they cost."""

    def prepare_micro_batches(data: TensorDict, dp_group: Any = None, **kwargs: Any) -> Any:
        padded = not tu.get_non_tensor_data(data=data, key="use_remove_padding", default=True)
        switch = tu.get_non_tensor_data(data=data, key=SWITCH, default=None)
        by_tokens = tu.get_non_tensor_data(data=data, key="use_dynamic_bsz", default=True)
        if not by_tokens or not (padded or switch is not None):
            return original(data=data, dp_group=dp_group, **kwargs)
        lengths = data["input_ids"].offsets().diff().tolist()
        budget = data["max_token_len_per_gpu"] * tu.get_non_tensor_data(data=data, key="sp_size", default=1)
        groups = group_rows(lengths, budget, padded, switch)
        if torch.distributed.is_initialized() and dp_group is not None:  # ranks run the model together
            count = torch.tensor(len(groups), device=get_device_id())
            torch.distributed.all_reduce(count, op=torch.distributed.ReduceOp.MAX, group=dp_group)
            groups = split_to(groups, int(count.item()))
        return [tu.index_select_tensor_dict(data, rows) for rows in groups], groups

    return prepare_micro_batches


replace(transformer_impl, "prepare_micro_batches", _by_length)
