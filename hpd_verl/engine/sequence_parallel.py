"""Ulysses: the ranks of a group have the same rows, and each the models' part of every packed sequence.

A rank's part is what verl's engine hands to the model: as many tokens as every other's, in the order of the pack. The
teacher's and the student's micro-batches are not the same, and so neither are the parts in which a row lies. In
between, each row's features are whole on one rank of the group, its owner.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed
from torch import Tensor
from torch.distributed import ProcessGroup
from verl.utils.device import get_device_id
from verl.utils.metric import AggregationType, Metric
from verl.utils.ulysses import get_ulysses_sequence_parallel_group

from hpd_verl.data.response_tokens import ResponseTokens
from hpd_verl.head.features import TeacherFeatures


@dataclass(frozen=True)
class SequenceGroup:
    """The ranks that share sequences out, as seen by one of them; a rank by itself where none are."""

    group: ProcessGroup | None
    rank: int
    size: int

    @classmethod
    def of(cls, group: ProcessGroup | None) -> "SequenceGroup":
        """That of an engine, by its ``ulysses_parallel_group``: None without Ulysses."""
        if group is None:
            return cls(None, 0, 1)
        return cls(group, torch.distributed.get_rank(group), torch.distributed.get_world_size(group))

    @classmethod
    def current(cls) -> "SequenceGroup":
        """That of the engine which is passing."""
        return cls.of(get_ulysses_sequence_parallel_group())

    def owned(self, rows: int) -> list[int] | None:
        """Indices of the rows of a batch that this rank owns; None for all, where no group shares them."""
        return None if self.size == 1 else list(range(self.rank, rows, self.size))

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, pickled; all ranks of the group together."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        torch.distributed.all_gather_object(values, value, group=self.group)
        return values

    def parts(self, responses: ResponseTokens, tokens: int) -> list[ResponseTokens]:
        """The response tokens that are predicted in each rank's part of a pack.

        Args:
            responses: of the micro-batch.
            tokens: of a part, padding included.
        """
        if self.size == 1:
            return [responses]
        starts = torch.arange(self.size + 1, device=responses.positions.device) * tokens
        cuts = torch.searchsorted(responses.positions, starts).tolist()  # the positions ascend
        return [responses.part(slice(*cuts[rank : rank + 2]), rank * tokens) for rank in self._ranks]

    def to_owners(
        self, features: TeacherFeatures, parts: Sequence[ResponseTokens], owners: Sequence[int | None]
    ) -> dict[int, TeacherFeatures]:
        """Whole rows on their owners, from the parts in which the teacher computed them.

        Args:
            features: of this rank's part.
            parts: response tokens of each rank's part.
            owners: rank of each row of the micro-batch; None where nobody wants it.

        Returns:
            Features of the rows that this rank owns, by index of the row.
        """
        counts = _counts(parts)
        pieces = _split(features, counts[self.rank])
        sent = [[piece for piece, owner in zip(pieces, owners, strict=True) if owner == rank] for rank in self._ranks]
        mine = [row for row, owner in enumerate(owners) if owner == self.rank]
        received = self._exchange(features[:0], sent, [[counts[rank][row] for row in mine] for rank in self._ranks])
        return {
            row: TeacherFeatures.cat([received[rank][index] for rank in self._ranks]) for index, row in enumerate(mine)
        }

    def to_parts(
        self,
        whole: Sequence[TeacherFeatures | None],
        template: TeacherFeatures,
        parts: Sequence[ResponseTokens],
        owners: Sequence[int],
    ) -> TeacherFeatures:
        """This rank's part of rows that are whole on their owners.

        Args:
            whole: features of each row of the micro-batch that this rank owns; None for the others.
            template: of no tokens, in the dtypes in which all ranks send.
            parts: response tokens of each rank's part.
            owners: rank of each row.
        """
        counts = _counts(parts)
        sent: list[list[TeacherFeatures]] = [[] for _ in self._ranks]
        for row, features in enumerate(whole):
            if features is not None:
                for rank, piece in enumerate(_split(features, [counts[rank][row] for rank in self._ranks])):
                    sent[rank].append(piece)
        lengths = [
            [count for count, owner in zip(counts[self.rank], owners, strict=True) if owner == rank]
            for rank in self._ranks
        ]
        received = [iter(pieces) for pieces in self._exchange(template, sent, lengths)]
        return TeacherFeatures.cat([template, *(next(received[owner]) for owner in owners)])

    @property
    def _ranks(self) -> range:
        return range(self.size)

    def _exchange(
        self, template: TeacherFeatures, sent: Sequence[Sequence[TeacherFeatures]], lengths: Sequence[Sequence[int]]
    ) -> list[list[TeacherFeatures]]:
        """Send pieces to each rank and receive its pieces; all ranks of the group together.

        Args:
            template: features of no tokens.
            sent: pieces for each rank.
            lengths: tokens of the pieces from each rank.
        """
        joined = [TeacherFeatures.cat([template, *pieces]) for pieces in sent]
        sizes = [sum(each) for each in lengths]
        received = {}
        for name, empty in template.tensors.items():
            out = empty.new_empty(sum(sizes), *empty.shape[1:])
            given = torch.cat([each.tensors[name].to(empty.dtype) for each in joined])
            torch.distributed.all_to_all_single(out, given, sizes, [len(each) for each in joined], group=self.group)
            received[name] = out
        from_ranks = _split(template.with_tensors(received), sizes)
        return [_split(each, list(pieces)) for each, pieces in zip(from_ranks, lengths, strict=True)]

    def common_template(self, rows: Mapping[int, TeacherFeatures], template: TeacherFeatures) -> TeacherFeatures:
        """Features of no tokens in the shapes and dtypes of all ranks' rows; all ranks of the group together.

        Args:
            rows: this rank's, perhaps none.
            template: what they have beside their tensors.
        """
        own = [{name: (value.shape[1:], value.dtype) for name, value in each.tensors.items()} for each in rows.values()]
        found: dict[str, Tensor] = {}
        for of_row in (each for of_rank in self.gather(own) for each in of_rank):
            for name, (shape, dtype) in of_row.items():
                if name in found:  # rows of a store may be rounded, others not
                    dtype = torch.promote_types(dtype, found[name].dtype)
                found[name] = torch.empty(0, *shape, dtype=dtype, device=get_device_id())
        return template.with_tensors(found)

    def average(self, loss: Tensor, metrics: Mapping[str, Metric]) -> tuple[float, dict[str, Metric]]:
        """Loss and sums over the ranks of the group, each a data-parallel rank's as verl averages them."""
        assert all(metric.aggregation == AggregationType.SUM for metric in metrics.values())
        values = [loss.detach(), *(torch.as_tensor(metric.aggregate()) for metric in metrics.values())]
        total = torch.stack([value.to(loss.device, torch.float64) for value in values])
        torch.distributed.all_reduce(total, group=self.group)
        mean, *means = (total / self.size).tolist()
        return mean, {name: Metric(AggregationType.SUM, value) for name, value in zip(metrics, means, strict=True)}

    def any_of(self, flags: Tensor) -> Tensor:
        """Bool flags that are true on any rank; all ranks of the group together."""
        if self.size == 1:
            return flags
        counts = flags.int()
        torch.distributed.all_reduce(counts, op=torch.distributed.ReduceOp.MAX, group=self.group)
        return counts.bool()


def _counts(parts: Sequence[ResponseTokens]) -> list[list[int]]:
    """Response tokens of each row in each part."""
    found: list[list[int]] = torch.stack([part.lengths for part in parts]).tolist()
    return found


def _split(features: TeacherFeatures, lengths: Sequence[int]) -> list[TeacherFeatures]:
    """Consecutive pieces of so many tokens."""
    cuts = itertools.accumulate(lengths, initial=0)
    return [features[start:stop] for start, stop in itertools.pairwise(cuts)]
