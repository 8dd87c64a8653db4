"""What an objective may ask for beside log-probs, and gets as one ``TokenContext``."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

ROW = "row."
"""What the need of a row's number begins with, before the number's name."""
NEEDS = ("step", "position", "behaviour", "prefix")
"""The needs that are not numbers of rows."""
IS_ROLLOUT, REWARD, ADVANTAGE = "is_rollout", "reward", "advantage"
"""Numbers of rows that are no columns of the data."""


class TokenContext(NamedTuple):
    """What is known of n tokens beside log-probs: tensors of shape [n], detached; None of what was not asked for.

    ``unsqueeze(1)`` puts them beside log-probs of [n, V]. Floating tensors have the log-probs' dtype.
    """

    step: Tensor = None  # type: ignore[assignment]
    """Need "step": the training step, counted from 1, floating."""
    steps: Tensor = None  # type: ignore[assignment]
    """Need "step": the number of steps of the run, floating."""
    position: Tensor = None  # type: ignore[assignment]
    """Need "position": index among the response tokens of its row, int64, from 0."""
    length: Tensor = None  # type: ignore[assignment]
    """Need "position": response tokens of its row, int64."""
    row: Mapping[str, Tensor] = {}
    """Needs "row.NAME": numbers of its row by name, floating. ``is_rollout`` is 1 or 0; ``reward`` is the sum of the
    reward function's scores, and ``advantage`` that less the mean over the batch's rollouts of the same prompt, both
    NaN for demonstrations; other names are columns of the data."""
    behaviour: Tensor = None  # type: ignore[assignment]
    """Need "behaviour": log mu(y) of the rollout server that drew y, at its own temperature; NaN for demonstrations."""
    prefix_teacher: Tensor = None  # type: ignore[assignment]
    """Need "prefix": sum over the earlier response tokens of the row of log p(y) - log q(y), q the student of this
    pass; 0 for the first. A log-prob below ``LOG_ZERO`` counts as it. NaN without a teacher."""
    prefix_behaviour: Tensor = None  # type: ignore[assignment]
    """Needs "prefix" and "behaviour": the same sum of log q(y) - log mu(y); NaN for demonstrations."""

    def only(self, needs: frozenset[str]) -> "TokenContext":
        """What was asked for."""
        prefix, behaviour = "prefix" in needs, "behaviour" in needs
        return TokenContext(
            step=self.step if "step" in needs else None,  # type: ignore[arg-type]
            steps=self.steps if "step" in needs else None,  # type: ignore[arg-type]
            position=self.position if "position" in needs else None,  # type: ignore[arg-type]
            length=self.length if "position" in needs else None,  # type: ignore[arg-type]
            row={name: value for name, value in self.row.items() if ROW + name in needs},
            behaviour=self.behaviour if behaviour else None,  # type: ignore[arg-type]
            prefix_teacher=self.prefix_teacher if prefix else None,  # type: ignore[arg-type]
            prefix_behaviour=self.prefix_behaviour if prefix and behaviour else None,  # type: ignore[arg-type]
        )

    def missing(self, needs: frozenset[str]) -> list[str]:
        """The needs that it does not meet. What is summed over earlier tokens is not looked at."""
        has = {"step": self.step, "position": self.position, "behaviour": self.behaviour, "prefix": ()}
        has |= {ROW + name: value for name, value in self.row.items()}
        return sorted(need for need in needs if has.get(need) is None)

    def fields(self) -> dict[str, Tensor]:
        """What it holds, by name; numbers of rows as their needs are named."""
        found = {name: value for name, value in self._asdict().items() if isinstance(value, Tensor)}
        return found | {ROW + name: value for name, value in self.row.items()}

    def at(self, places: Any) -> "TokenContext":
        """That of some of the tokens."""
        found: TokenContext = tree_map_only(Tensor, lambda each: each[places], self)
        return found

    def to(self, dtype: torch.dtype) -> "TokenContext":
        """The same with floating tensors of this dtype."""
        found: TokenContext = tree_map_only(
            Tensor, lambda each: each.to(dtype) if each.is_floating_point() else each, self
        )
        return found

    @classmethod
    def example(cls, needs: frozenset[str], is_rollout: Tensor, dtype: torch.dtype) -> "TokenContext":
        """One of n tokens, bool [n], that meets the needs; as in a run, some of it is NaN for demonstrations."""
        count, device = len(is_rollout), is_rollout.device
        numbers = torch.linspace(0.1, 0.9, count, dtype=dtype, device=device)
        of_rollouts = torch.where(is_rollout, numbers, torch.nan)
        places = torch.arange(count, device=device)
        row = {need.removeprefix(ROW): numbers for need in sorted(needs) if need.startswith(ROW)}
        row |= {name: of_rollouts for name in (REWARD, ADVANTAGE) if name in row}
        row |= {IS_ROLLOUT: is_rollout.to(dtype)} if IS_ROLLOUT in row else {}
        return cls(
            step=torch.full_like(numbers, 3.0),
            steps=torch.full_like(numbers, 10.0),
            position=places,
            length=torch.full_like(places, count),
            row=row,
            behaviour=-of_rollouts,
            prefix_teacher=-numbers,
            prefix_behaviour=of_rollouts,
        ).only(needs)


def check_needs(needs: frozenset[str]) -> None:
    """Refuse a need that nothing meets.

    Raises:
        ValueError: the message does not name the objective.
    """
    for need in sorted(needs):
        if need not in NEEDS and (not need.startswith(ROW) or need == ROW):
            raise ValueError(f"needs {need!r}; choose among {', '.join(NEEDS)}, and row.NAME for a number of each row")
