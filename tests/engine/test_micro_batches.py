"""Micro-batches of rows of like length: each row once, within the budget, as many on each rank."""

import itertools
import random

import pytest
import torch
from tensordict import TensorDict
from verl.utils import tensordict_utils as tu
from verl.workers.engine.fsdp import transformer_impl

from hpd_verl.engine import micro_batches
from hpd_verl.engine.micro_batches import group_rows, split_to


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("switch", [None, 20])
def test_all_rows_once_within_the_budget(seed: int, padded: bool, switch: int | None) -> None:
    draw = random.Random(seed)
    lengths = [draw.randint(1, 60) for _ in range(draw.randint(1, 30))]
    groups = group_rows(lengths, 64, padded, switch)
    assert sorted(itertools.chain(*groups)) == list(range(len(lengths)))
    for rows in groups:
        of_rows = [lengths[row] for row in rows]
        assert (max(of_rows) * len(rows) if padded else sum(of_rows)) <= 64
        assert switch is None or len({length > switch for length in of_rows}) == 1
    more = split_to(groups, len(lengths))
    assert sorted(itertools.chain(*more)) == list(range(len(lengths)))
    assert len(more) == len(lengths)


def test_a_row_above_the_budget_is_alone() -> None:
    assert group_rows([5, 100, 5], 20, padded=True) == [[1], [0, 2]]


def test_fewer_rows_than_micro_batches() -> None:
    with pytest.raises(ValueError, match="2 rows on a rank do not make 3 micro-batches"):
        split_to([[0, 1]], 3)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"use_remove_padding": False}, [[2], [0, 1]]),
        ({micro_batches.SWITCH: 4}, [[2, 0], [1]]),
        ({"use_remove_padding": False, "use_dynamic_bsz": False, "micro_batch_size_per_gpu": 1}, [[0], [1], [2]]),
    ],
)
def test_what_verls_engine_is_given(settings: dict[str, object], expected: list[list[int]]) -> None:
    """Through the name that verl's engine calls: the patch is there, and fixed sizes are verl's own."""
    rows = [torch.full((length,), length) for length in (5, 4, 9)]
    data = TensorDict({"input_ids": torch.nested.as_nested_tensor(rows, layout=torch.jagged)}, batch_size=3)
    tu.assign_non_tensor(data, max_token_len_per_gpu=14, **settings)
    found, _ = transformer_impl.prepare_micro_batches(data=data, same_micro_num_in_dp=True)
    lengths = [batch["input_ids"].offsets().diff().tolist() for batch in found]
    assert lengths == [[(5, 4, 9)[row] for row in rows] for rows in expected]


def test_verl_still_fills_by_the_sum_of_tokens() -> None:
    """Fails when verl counts padding: then the patch can go, but for the ropes."""
    rows = [torch.zeros(length, dtype=torch.int64) for length in (10, 1, 1, 1, 1)]
    data = TensorDict({"input_ids": torch.nested.as_nested_tensor(rows, layout=torch.jagged)}, batch_size=5)
    tu.assign_non_tensor(data, max_token_len_per_gpu=14, use_remove_padding=False)
    plain = transformer_impl.prepare_micro_batches.__wrapped__
    assert len(plain(data=data)[0]) == 1
    assert len(transformer_impl.prepare_micro_batches(data=data)[0]) == 2
