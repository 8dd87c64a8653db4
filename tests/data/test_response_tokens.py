"""Response tokens of a packed batch, against loops over its rows."""

from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tensordict import TensorDict
from verl.utils import tensordict_utils as tu

from hpd_verl.data import fields
from hpd_verl.data.response_tokens import column, response_tokens, row_numbers


@dataclass
class Row:
    prompt: list[int]
    response: list[int]
    mask: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.mask = self.mask or [1] * len(self.response)


def packed(rows: list[Row]) -> TensorDict:
    """A batch as verl's workers get it."""

    def nested(values: list[list[int]]) -> torch.Tensor:
        tensors = [torch.tensor(each, dtype=torch.int64) for each in values]
        return tu.nested_tensor_from_tensor_list(tensors)

    return tu.get_tensordict(
        {
            "input_ids": nested([row.prompt + row.response for row in rows]),
            "prompts": nested([row.prompt for row in rows]),
            "response_mask": nested([row.mask for row in rows]),
        }
    )


def by_loops(rows: list[Row]) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {"positions": [], "labels": [], "row": [], "lengths": []}
    start = 0
    for index, row in enumerate(rows):
        for t, (token, counts) in enumerate(zip(row.response, row.mask, strict=True)):
            if counts:
                found["positions"].append(start + len(row.prompt) + t - 1)
                found["labels"].append(token)
                found["row"].append(index)
        found["lengths"].append(sum(row.mask))
        start += len(row.prompt) + len(row.response)
    return found


def assert_found(rows: list[Row]) -> None:
    found = response_tokens(packed(rows))
    for name, expected in by_loops(rows).items():
        value = getattr(found, name)
        assert value.dtype == torch.int64
        assert value.tolist() == expected, name


def test_by_hand() -> None:
    found = response_tokens(packed([Row([5, 6, 7], [8, 9]), Row([1], [2, 3, 4])]))
    assert found.positions.tolist() == [2, 3, 5, 6, 7]
    assert found.labels.tolist() == [8, 9, 2, 3, 4]
    assert found.row.tolist() == [0, 0, 1, 1, 1]
    assert found.lengths.tolist() == [2, 3]


@pytest.mark.parametrize(
    "rows",
    [
        [Row([1], [2])],
        [Row([1, 2], [3, 4, 5], [1, 0, 1]), Row([6], [7, 8], [0, 1])],
        [Row([1, 2], [3, 4], [0, 0]), Row([5], [6])],
        [Row([5], [6]), Row([1, 2], [3, 4], [0, 0])],
        [Row([1, 2], [3, 4], [0, 0])],
    ],
    ids=["one token", "a hole", "first row masked", "last row masked", "nothing"],
)
def test_masks(rows: list[Row]) -> None:
    assert_found(rows)


@st.composite
def _rows(draw: st.DrawFn) -> list[Row]:
    token = st.integers(0, 99)
    rows = []
    for _ in range(draw(st.integers(1, 6))):
        response = draw(st.lists(token, min_size=1, max_size=7))
        mask = draw(st.lists(st.integers(0, 1), min_size=len(response), max_size=len(response)))
        rows.append(Row(draw(st.lists(token, min_size=1, max_size=7)), response, mask))
    return rows


@settings(deadline=None, max_examples=100, derandomize=True)
@given(_rows())
def test_any_batch(rows: list[Row]) -> None:
    assert_found(rows)


@settings(deadline=None, max_examples=30, derandomize=True)
@given(_rows(), st.data())
def test_any_selection_of_rows(rows: list[Row], data: st.DataObject) -> None:
    """Rows taken out of a batch by verl are found like a batch of their own."""
    chosen = data.draw(st.lists(st.integers(0, len(rows) - 1), min_size=1, max_size=6))
    found = response_tokens(tu.index_select_tensor_dict(packed(rows), chosen))
    expected = by_loops([rows[index] for index in chosen])
    assert {name: getattr(found, name).tolist() for name in expected} == expected


@pytest.mark.parametrize(
    "values",
    [
        torch.tensor([[3], [1], [2]]),
        torch.tensor([3, 1, 2]),
        torch.nested.as_nested_tensor([torch.tensor([value]) for value in (3, 1, 2)], layout=torch.jagged),
    ],
    ids=["[rows, 1]", "[rows]", "nested"],
)
def test_fields_of_one_value_a_row(values: torch.Tensor) -> None:
    data = TensorDict({fields.ROW: values, "other": values + 1}, batch_size=[3])
    assert row_numbers(data).tolist() == [3, 1, 2]
    assert column(data, "other").tolist() == [4, 2, 3]
