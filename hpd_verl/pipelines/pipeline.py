"""The interface of a pipeline: the driver's part, with whole batches, and each rank's part, with the models."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from tensordict import TensorDict
from torch import Tensor
from verl.workers.config import ActorConfig
from verl.workers.engine_workers import TrainingWorker

from hpd_verl.config import HPDConfig
from hpd_verl.teacher.teacher import Teacher


class Batch(ABC):
    """A global batch as a driver sees it, wherever its fields are kept (``data.fields`` has their names)."""

    step: int
    """The training step."""
    is_rollout: Tensor
    """bool [rows], True where the label is the student's own."""

    @abstractmethod
    def row_name(self, index: int) -> str:
        """A row's name in messages."""

    @abstractmethod
    def student_pass(self, inputs: Sequence[str]) -> None:
        """Run the student on all ranks; the results of its loss function become fields of the batch.

        Args:
            inputs: fields that the pass reads beside those of the sequences.
        """

    @abstractmethod
    def teacher_pass(self, inputs: Sequence[str]) -> None:
        """The same with the teacher."""

    @abstractmethod
    def get(self, names: Sequence[str]) -> TensorDict:
        """Fields of all rows, nested tensors."""

    @abstractmethod
    def put(self, values: Mapping[str, Tensor]) -> None:
        """Add fields, nested tensors."""


class Driver:
    """The steps between a batch's responses and its update, in this order. Here none: the update does everything.

    Args:
        config: the algorithm's configuration.
        updates_per_batch: optimiser steps taken with one batch.
        compares_rollouts: the rollout server's log-probs are in the batch, to be compared with the student's.
    """

    settings: ClassVar[Mapping[str, Any]] = {}
    """Arguments of the engine for every pass and update."""

    def __init__(self, config: HPDConfig, updates_per_batch: int = 1, compares_rollouts: bool = False) -> None:
        self.config = config
        self.updates_per_batch = updates_per_batch
        self.compares_rollouts = compares_rollouts

    def student_pass(self, batch: Batch) -> None:
        """Forward of the student."""

    def teacher_pass(self, batch: Batch) -> None:
        """Forward of the teacher."""

    def weigh(self, batch: Batch) -> dict[str, float]:
        """Weights of the tokens, as fields of the batch; returns the metrics of the log."""
        return {}

    @property
    def update_inputs(self) -> list[str]:
        """Fields that the update reads in addition to the sequences'."""
        return []


class RankPipeline(ABC):
    """Student and teacher of one rank, ready for the passes and the update."""

    teacher: Teacher | None = None
    """What gives the update its features; None where none are needed, or the teacher has a pass of its own."""

    @classmethod
    @abstractmethod
    def of_workers(cls, student: TrainingWorker, teacher: Any, config: HPDConfig, actor: ActorConfig) -> "RankPipeline":
        """Give verl's workers of the two models their loss functions.

        Args:
            student: of the pipeline's ``student_worker``, its model loaded.
            teacher: of the pipeline's ``teacher``.
            config: the algorithm's configuration.
            actor: verl's, for the aggregation of token losses and the clipping of a ratio.
        """

    @abstractmethod
    def update(self, data: TensorDict) -> TensorDict | None:
        """Train on this rank's rows of a batch.

        Returns:
            The metrics, as of verl's ``train_mini_batch``; None on a rank whose metrics verl takes from another.
        """


@dataclass(frozen=True)
class Pipeline:
    """The classes of a pipeline."""

    driver: type[Driver]
    rank: type[RankPipeline]
    student_worker: type[TrainingWorker]
    teacher: Callable[..., Any]
    """Takes verl's configuration of a reference's worker and ``model``, the teacher's (one_pass: also ``several``, by
    name); stands where verl expects that worker."""
