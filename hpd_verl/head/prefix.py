"""Sums over the earlier tokens of a row, though chunks cut it."""

import torch
from torch import Tensor
from torch.nn import functional as F


class PrefixSums:
    """Sums that go on from one part of the tokens to the next.

    The same for a row wherever it stands, within float64's rounding; a NaN stays in its row.
    """

    def __init__(self) -> None:
        self._row: Tensor | None = None
        self._sums: Tensor | None = None

    def take(self, row: Tensor, values: Tensor) -> Tensor:
        """Sums of the values of earlier tokens, float64 [n, k]; NaN where the token's own value is.

        Args:
            row: int64 [n], n > 0: the row of each token, whose tokens stand together and in order.
            values: floating [n, k].
        """
        unknown = values.isnan()
        numbers = torch.cat([torch.where(unknown, 0.0, values).double(), unknown.double()], 1)
        before = F.pad(numbers.cumsum(0)[:-1], (0, 0, 1, 0))
        places = torch.arange(len(row), device=row.device)
        is_first = F.pad(row[1:] != row[:-1], (1, 0), value=True)
        first = torch.where(is_first, places, 0).cummax(0).values
        sums = before - before[first]
        if self._row is not None and self._sums is not None:
            goes_on = (first == 0) & (row == self._row)
            sums = sums + torch.where(goes_on.unsqueeze(1), self._sums, 0.0)
        self._row, self._sums = row[-1], sums[-1] + numbers[-1]
        found, unknown_before = sums.chunk(2, 1)
        return torch.where(unknown | (unknown_before > 0), torch.nan, found)
