"""A store in front of any teacher: features of demonstrations are computed once."""

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed
from tensordict import TensorDict
from torch import Tensor
from verl.utils.device import get_device_id, get_device_name

from hpd_verl.data import fields
from hpd_verl.data.response_tokens import column, row_numbers
from hpd_verl.engine.ranks import highest_of_ranks, sums_of_ranks
from hpd_verl.head.features import HiddenFeatures, TeacherFeatures, TopKFeatures
from hpd_verl.head.hybrid import HybridFeatures
from hpd_verl.head.hybrid_code import HybridCode
from hpd_verl.head.output_head import OutputHead
from hpd_verl.teacher.store.disk import DiskStore
from hpd_verl.teacher.store.records import Record, row_key
from hpd_verl.teacher.store.store import GIB, TeacherStore
from hpd_verl.teacher.teacher import Teacher


class StoredTeacher(Teacher):
    """Features from the store, else from the teacher behind it.

    Fresh features are rounded like stored ones, so results do not depend on the store's content. Rollouts are not
    stored, because they are never seen again.

    Args:
        store: of the features of the teacher behind it.
        teacher: is not prepared, and so a model not loaded, until a row is missing, unless nothing is stored yet.
        scaling: factor and soft cap of the logits, for an output head that is stored.
    """

    def __init__(
        self, store: TeacherStore, teacher: Teacher, scaling: tuple[float, float | None] = (1.0, None)
    ) -> None:
        self.store = store
        self.teacher = teacher
        self.scaling = scaling
        self.is_teacher_used = False
        self.computed_tokens = 0
        """Prompt and response tokens of the rows that this rank did not find."""
        self._is_head_checked = False
        self._form = self._stored_form()
        """Features of no tokens, with all that records do not hold; None until the output head is known."""

    def _stored_form(self) -> TeacherFeatures | None:
        """The same on all ranks."""
        identity, nothing = self.store.identity, torch.empty(0, device=get_device_name())
        if identity.format == "topk":
            return TopKFeatures(nothing, nothing, nothing, nothing, identity.vocabulary_size)
        stored = self.store.load_output_head() if isinstance(self.store, DiskStore) else None
        if highest_of_ranks(stored is None):
            return None
        assert stored is not None
        weight, bias = (None if each is None else each.to(get_device_id()) for each in stored)
        assert weight is not None
        scale, soft_cap = self.scaling
        head = OutputHead(weight, identity.vocabulary_size, bias, scale, soft_cap)
        if identity.format == "hybrid":
            code = HybridCode(head, identity.temperature, identity.top_k, identity.bits)
            return HybridFeatures(nothing, nothing, nothing, code)
        return HiddenFeatures(nothing, head, identity.temperature)

    def prepare(self) -> None:
        """Prepare the teacher behind where it will be needed at once: nothing is stored yet, or no output head."""
        if highest_of_ranks(self._form is None or self.store.stats.rows == 0):
            self.is_teacher_used = True
            self.teacher.prepare()

    def features(self, data: TensorDict, wanted: Sequence[int] | None = None) -> dict[int, TeacherFeatures]:
        numbers = row_numbers(data).tolist()
        rows = range(len(numbers)) if wanted is None else wanted
        keys = self._keys(data, numbers, rows)
        records = dict(zip(keys, self.store.get(list(keys.values())), strict=True))
        if self._form is None:  # records without their output head say nothing
            records = {}
        found = {number: self._of_record(record) for number, record in records.items() if record is not None}
        missing = [index for index in rows if numbers[index] not in found]
        if highest_of_ranks(len(missing)) == 0:
            return found
        self.is_teacher_used = True
        self.computed_tokens += int(data["input_ids"].offsets().diff().cpu()[missing].sum())
        computed = self.teacher.features(data, missing)
        self._take_head()
        for number, features in computed.items():
            if number in found:
                continue
            if number in keys:
                record = self._record(features)
                self.store.put(keys[number], record)
                features = self._of_record(record)
            found[number] = features
        return found

    def _take_head(self) -> None:
        """Check and store the output head of the first computed features; all ranks together."""
        first = self.teacher.known_form()
        assert first is not None
        is_new = self._form is None
        if self._is_head_checked and not is_new:
            return
        head = _output_head(first)
        if isinstance(self.store, DiskStore) and head is not None:
            self.store.check_output_head(head.weight, head.bias)
            if is_new:
                if torch.distributed.get_rank() == 0:
                    self.store.save_output_head(head.weight, head.bias)
                torch.distributed.barrier()
        self._is_head_checked = True
        # Use the teacher's own head instead of the equal stored one: only one is in memory.
        self._form = first.with_tensors({name: torch.empty(0) for name in first.tensors})

    def _of_record(self, record: Record) -> TeacherFeatures:
        assert self._form is not None
        return self._form.with_tensors({name: _to_device(value) for name, value in record.items()})

    def _record(self, features: TeacherFeatures) -> Record:
        """The stored part of a row's features."""
        dtypes = self.store.schema.dtypes
        return {
            name: value.detach().to("cpu", dtypes.get(name, torch.float32)) for name, value in features.tensors.items()
        }

    def _keys(self, data: TensorDict, numbers: list[int], rows: Sequence[int]) -> dict[int, bytes]:
        """Store keys of the demonstrations among the rows, by row number."""
        identity = self.store.identity.digest
        is_rollout = column(data, fields.IS_ROLLOUT).tolist()
        ids, responses = data["input_ids"].unbind(), data["responses"].unbind()
        return {
            numbers[index]: row_key(identity, ids[index], len(responses[index]))
            for index in rows
            if not is_rollout[index]
        }

    def known_form(self) -> TeacherFeatures | None:
        if self._form is None:
            return self.teacher.known_form()
        nothing = torch.empty(0, device=get_device_name())
        return self._form.with_tensors(dict.fromkeys(self._form.TENSORS, nothing))  # records hold all of them

    def announce(self, data: TensorDict, wanted: Sequence[int] | None = None) -> None:
        """Those that are not stored."""
        numbers = row_numbers(data).tolist()
        rows = range(len(numbers)) if wanted is None else wanted
        keys = self._keys(data, numbers, rows)
        missing = set(self.store.missing(list(keys.values())))
        self.teacher.announce(data, [row for row in rows if keys.get(numbers[row], None) in {*missing, None}])

    def save(self, folder: Path) -> None:
        self.teacher.save(folder)

    def resume(self, folder: Path) -> None:
        self.teacher.resume(folder)

    def metrics(self) -> dict[str, float]:
        """Share of rows found, rows and size, and the metrics of the teacher behind. All ranks together."""
        stats = self.store.stats
        counts = [stats.hits, stats.misses, stats.refused, stats.non_finite, stats.damaged]
        hits, misses, refused, non_finite, damaged = sums_of_ranks(counts)
        return self.teacher.metrics() | {
            "hpd/teacher_cache_hit_fraction": hits / max(1, hits + misses),
            "hpd/teacher_cache_rows": stats.rows,
            "hpd/teacher_cache_gib": stats.bytes / GIB,
            "hpd/teacher_cache_refused_rows": refused,
            "hpd/teacher_cache_non_finite_rows": non_finite,
            "hpd/teacher_cache_damaged_rows": damaged,
            "hpd/teacher_is_loaded": float(self.is_teacher_used),
        }


def _output_head(features: TeacherFeatures) -> OutputHead | None:
    """The teacher's output layer, of features that need it."""
    if isinstance(features, HybridFeatures):
        return features.code.head
    return features.head if isinstance(features, HiddenFeatures) else None


def _to_device(value: Tensor) -> Tensor:
    """A stored tensor on the device; from pinned memory the copy does not hold up the process."""
    device = get_device_name()
    return value if device == "cpu" else value.pin_memory().to(device, non_blocking=True)
