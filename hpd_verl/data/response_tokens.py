"""The response tokens of a packed batch, and the positions that predict them."""

from dataclasses import dataclass, replace

import torch
from tensordict import TensorDict
from torch import Tensor

from hpd_verl.data.fields import ROW


@dataclass(frozen=True)
class ResponseTokens:
    """The n response tokens of a batch, row by row, where the response mask is 1; or those of a part of the batch."""

    positions: Tensor
    """int64 [n]: index into the packed tokens of the position that predicts the token; ascending."""
    labels: Tensor
    """int64 [n]: the token."""
    row: Tensor
    """int64 [n]: index of its row in the batch."""
    lengths: Tensor
    """int64 [rows]: response tokens of each row."""
    place: slice
    """Where they are among the response tokens of the batch."""
    start: int = 0
    """Packed tokens of the batch in front of the part."""

    @property
    def index(self) -> Tensor:
        """int64 [n]: of the tokens of a whole batch, each one's place among those of its row."""
        first = torch.cumsum(self.lengths, 0) - self.lengths
        return torch.arange(len(self.row), device=self.row.device) - first[self.row]

    def part(self, place: slice, start: int) -> "ResponseTokens":
        """Some of the batch's response tokens, of a part with so many packed tokens in front of it."""
        row = self.row[place]
        lengths = torch.bincount(row, minlength=len(self.lengths))
        return replace(
            self,
            positions=self.positions[place],
            labels=self.labels[place],
            row=row,
            lengths=lengths,
            place=place,
            start=start,
        )

    def where(self, chosen: Tensor) -> "ResponseTokens":
        """Those of them that a bool [n] names; ``place`` stays that of all."""
        row = self.row[chosen]
        lengths = torch.bincount(row, minlength=len(self.lengths))
        return replace(self, positions=self.positions[chosen], labels=self.labels[chosen], row=row, lengths=lengths)

    def take(self, values: Tensor) -> Tensor:
        """[n, ...]: what predicts the tokens, of the part's packed values [tokens, ...]."""
        return values[self.positions - self.start]


def response_tokens(data: TensorDict) -> ResponseTokens:
    """Find the response tokens of a batch.

    Args:
        data: ``input_ids``, ``prompts`` and ``response_mask``, nested [rows, tokens].
    """
    input_ids, mask = data["input_ids"], data["response_mask"]
    prompt_lengths, lengths = data["prompts"].offsets().diff(), mask.offsets().diff()
    rows = torch.arange(len(lengths), device=lengths.device).repeat_interleave(lengths)
    within = torch.arange(len(rows), device=rows.device) - mask.offsets()[:-1][rows]
    positions = (input_ids.offsets()[:-1] + prompt_lengths - 1)[rows] + within
    kept = mask.values().bool()
    positions, rows = positions[kept], rows[kept]
    return ResponseTokens(
        positions=positions,
        labels=input_ids.values()[positions + 1],
        row=rows,
        lengths=torch.bincount(rows, minlength=len(lengths)),
        place=slice(0, len(rows)),
    )


def column(data: TensorDict, name: str) -> Tensor:
    """A field of one value a row, [rows]; TransferQueue returns [rows, 1] as a nested tensor or as a dense one."""
    values = data[name]
    return (values.values() if values.is_nested else values).flatten()


def row_numbers(data: TensorDict) -> Tensor:
    """int64 [rows]: the number of each sequence within its global batch."""
    return column(data, ROW)
