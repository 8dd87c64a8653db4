"""A store of the teacher's per-token features, which do not depend on the student and can be used every epoch."""

import logging
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from hpd_verl.teacher.store.identity import StoreIdentity
from hpd_verl.teacher.store.records import Record, Schema

logger = logging.getLogger(__name__)

DIR_SETTING = "algorithm.hpd.teacher_cache_dir"
LIMIT_SETTING = "algorithm.hpd.teacher_cache_max_gib"

GIB = 1 << 30


def check_memory_store(kind: str, ranks: int) -> None:
    """Check that a store in memory has all rows in one process.

    Args:
        kind: algorithm.hpd.teacher_cache.
        ranks: processes that train.

    Raises:
        ValueError: there are several. Each epoch's shuffling hands a row to another rank, which would not find it.
    """
    if kind == "memory" and ranks > 1:
        raise ValueError(
            f"algorithm.hpd.teacher_cache=memory: rows change between the {ranks} ranks in each epoch; set "
            f"algorithm.hpd.teacher_cache=disk and {DIR_SETTING} to a folder that all ranks share (on one node, in "
            "/dev/shm)"
        )


@dataclass(frozen=True)
class StoreStats:
    """Counts of this process since the store was opened; rows and bytes of the whole store as last seen."""

    hits: int
    """Rows that ``get`` found."""

    misses: int
    """Rows that ``get`` did not find."""

    rows: int
    """Rows in the store."""

    bytes: int
    """Size of the store."""

    refused: int
    """Rows not stored because the store was full."""

    non_finite: int
    """Rows not stored because a value was NaN or infinite."""

    damaged: int
    """Stored rows whose checksum was wrong, and which count as missing."""


class TeacherStore(ABC):
    """Records by key.

    Args:
        identity: of the features.
        max_bytes: size limit; a record that would exceed it is not stored.
    """

    def __init__(self, identity: StoreIdentity, max_bytes: int) -> None:
        self.identity = identity
        self.max_bytes = max_bytes
        self.schema = Schema(identity)
        """Of the records."""
        self._hits = self._misses = self._refused = self._non_finite = self._damaged = 0

    @abstractmethod
    def get(self, keys: Sequence[bytes]) -> list[Record | None]:
        """One record per key, in order, None if missing. Treat the tensors as read-only."""

    @abstractmethod
    def put(self, key: bytes, record: Record) -> None:
        """Store a copy of a record, unless its key is known, a value is NaN or infinite, or the store is full.

        Raises:
            ValueError: the tensors are not those of the store's format.
        """

    @abstractmethod
    def missing(self, keys: Sequence[bytes]) -> list[bytes]:
        """The keys without a record, in order. ``get`` may still find a listed record damaged and return None."""

    @abstractmethod
    def refresh(self) -> None:
        """Take in what other processes have stored."""

    @property
    @abstractmethod
    def stats(self) -> StoreStats:
        """Counts for the log."""

    def __contains__(self, key: bytes) -> bool:
        return not self.missing([key])

    def _count(self, records: list[Record | None]) -> list[Record | None]:
        hits = sum(record is not None for record in records)
        self._hits += hits
        self._misses += len(records) - hits
        return records

    def _make_stats(self, rows: int, size: int) -> StoreStats:
        return StoreStats(self._hits, self._misses, rows, size, self._refused, self._non_finite, self._damaged)

    def _is_finite(self, record: Record) -> bool:
        """Whether all values are; if not, count and warn once."""
        for name, field in self.schema.fields.items():
            tensor = record[name]
            # Both ends of a tensor are NaN if any value is; many times faster than a look at each value.
            if field.dtype.is_floating_point and tensor.numel() and not torch.stack(tensor.aminmax()).isfinite().all():
                if not self._non_finite:
                    logger.warning("%s of a row's teacher features is NaN or infinite; such rows are not stored", name)
                self._non_finite += 1
                return False
        return True

    def _fits(self, stored: int, more: int) -> bool:
        """Whether ``more`` bytes may be stored; if not, count and warn once."""
        if stored + more <= self.max_bytes:
            return True
        if not self._refused:
            logger.warning(
                "%s=%g: the teacher's store is full at %.3g GiB; further rows go through the teacher every epoch",
                LIMIT_SETTING,
                self.max_bytes / GIB,
                stored / GIB,
            )
        self._refused += 1
        return False


class MemoryStore(TeacherStore):
    """Records in the memory of this process."""

    def __init__(self, identity: StoreIdentity, max_bytes: int) -> None:
        super().__init__(identity, max_bytes)
        self._records: dict[bytes, Record] = {}
        self._bytes = 0

    def get(self, keys: Sequence[bytes]) -> list[Record | None]:
        return self._count([self._records.get(key) for key in keys])

    def put(self, key: bytes, record: Record) -> None:
        size = self.schema.size(*self.schema.check(record))
        if key in self._records or not self._is_finite(record) or not self._fits(self._bytes, size):
            return
        # A copy: the caller's tensors may be views that keep a whole batch alive.
        self._records[key] = {name: record[name].detach().cpu().clone() for name in self.schema.fields}
        self._bytes += size

    def missing(self, keys: Sequence[bytes]) -> list[bytes]:
        return [key for key in keys if key not in self._records]

    def refresh(self) -> None:
        pass  # no other process stores here

    @property
    def stats(self) -> StoreStats:
        return self._make_stats(len(self._records), self._bytes)
