"""A global batch in TransferQueue, as a pipeline's driver sees it."""

from collections.abc import Mapping, Sequence
from typing import Any

import transfer_queue as tq
from tensordict import TensorDict
from torch import Tensor
from transfer_queue import KVBatchMeta
from verl.single_controller.ray import RayWorkerGroup

from hpd_verl.data import fields
from hpd_verl.pipelines.pipeline import Batch


class QueueBatch(Batch):
    """The sequences of a step.

    Args:
        meta: their keys.
        step: the training step.
        steps: training steps of the run.
        is_rollout: bool [rows], True where the label is the student's own.
        settings: what every pass and update is told.
        student, teacher: the worker groups.
    """

    def __init__(
        self,
        meta: KVBatchMeta,
        step: int,
        steps: int,
        is_rollout: Tensor,
        settings: Mapping[str, Any],
        student: RayWorkerGroup,
        teacher: RayWorkerGroup,
    ) -> None:
        self.meta = meta
        self.step = step
        self.steps = steps
        self.is_rollout = is_rollout
        self.settings = settings
        self.student = student
        self.teacher = teacher

    def for_worker(self, inputs: Sequence[str], **settings: Any) -> KVBatchMeta:
        """The batch with just the fields and settings that a pass reads."""
        return KVBatchMeta(
            keys=self.meta.keys,
            tags=self.meta.tags,
            partition_id=self.meta.partition_id,
            fields=[*fields.SEQUENCE_FIELDS, *inputs],
            extra_info={fields.STEP: self.step, fields.STEPS: self.steps, **self.settings, **settings},
        )

    def row_name(self, index: int) -> str:
        return self.meta.keys[index].rsplit("_", 2)[0].split("r")[-1]

    def student_pass(self, inputs: Sequence[str]) -> None:
        self.student.compute_log_prob(self.for_worker(inputs, compute_loss=True, calculate_entropy=False))

    def teacher_pass(self, inputs: Sequence[str]) -> None:
        self.teacher.compute_ref_log_prob(self.for_worker(inputs, compute_loss=True, calculate_entropy=False))

    def get(self, names: Sequence[str]) -> TensorDict:
        return tq.kv_batch_get(keys=self.meta.keys, partition_id=self.meta.partition_id, select_fields=list(names))

    def put(self, values: Mapping[str, Tensor]) -> None:
        tq.kv_batch_put(
            keys=self.meta.keys,
            partition_id=self.meta.partition_id,
            fields=TensorDict(dict(values), batch_size=len(self.meta)),
        )
