"""The student as its own teacher: its current weights, or their running average."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
import torch.distributed
from safetensors.torch import load_file, save_file
from tensordict import TensorDict
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from verl.workers.engine_workers import TrainingWorker

from hpd_verl.config import PREFIX, HPDConfig
from hpd_verl.engine.ranks import on_every_rank
from hpd_verl.errors import Refused
from hpd_verl.head.features import TeacherFeatures
from hpd_verl.teacher.colocated import ColocatedTeacher, TeacherWorker

SETTING = f"{PREFIX}.teacher_ema"


class CurrentStudent(ColocatedTeacher):
    """The student with the weights that it has when a batch comes. Of its output layer there is a copy, which an update
    of the batch does not move.

    Args:
        student: its worker, the model loaded.
        config: the algorithm's configuration.
        vocabulary_size: of the student's logits.
    """

    def __init__(self, student: TrainingWorker, config: HPDConfig, vocabulary_size: int) -> None:
        super().__init__(student, config, vocabulary_size)

    def _load(self) -> None:
        """It is."""

    def features(self, data: TensorDict, wanted: Sequence[int] | None = None) -> dict[int, TeacherFeatures]:
        loss = self._loaded()
        loss.head = self._whole_head()
        trains = self.worker.loss_fn
        try:
            return super().features(data, wanted)
        finally:
            self.worker.set_loss_fn(trains)


class AveragedStudent(ColocatedTeacher):
    """A second copy of the student, which follows it: the running average of its weights, in float32.

    Args:
        worker: the copy's, lazy.
        student: the student's worker, the model loaded.
        config: the algorithm's configuration, with ``teacher_ema`` above 0.
        vocabulary_size: of the student's logits.
    """

    def __init__(self, worker: TeacherWorker, student: TrainingWorker, config: HPDConfig, vocabulary_size: int) -> None:
        super().__init__(worker, config, vocabulary_size)
        self.student = student

    def prepare(self) -> None:
        """Load the copy, with the student's weights as they are now.

        Raises:
            Refused: its ranks hold other parts of the weights than the student's.
        """
        loss = self._loaded()
        self._move(0.0)
        loss.head = self._whole_head()

    def follow(self) -> None:
        assert self.config.teacher_ema is not None
        self._move(self.config.teacher_ema)
        self._loaded().head = self._whole_head()

    @torch.no_grad()
    def _move(self, kept: float) -> None:
        """average = kept * average + (1 - kept) * student, on each rank's own part."""
        averages, students = dict(_parts(self.worker.engine.module)), dict(_parts(self.student.engine.module))
        if {name: part.shape for name, part in averages.items()} != {
            name: part.shape for name, part in students.items()
        }:
            raise Refused(
                f"{SETTING}={self.config.teacher_ema}: the ranks hold other parts of the average than of the student; "
                "give both engines one fsdp_size"
            )
        for name, average in averages.items():
            new = students[name].to(average.device, average.dtype)
            if kept == 0:
                average.copy_(new)
            else:
                average.lerp_(new, 1 - kept)

    def save(self, folder: Path) -> None:
        parts = {name: part.contiguous() for name, part in _parts(self.worker.engine.module)}
        on_every_rank(lambda: _write(parts, _file(folder)))

    @torch.no_grad()
    def resume(self, folder: Path) -> None:
        saved = on_every_rank(lambda: self._read(_file(folder)))
        for name, part in _parts(self.worker.engine.module):
            part.copy_(saved[name])
        self._loaded().head = self._whole_head()

    def _read(self, file: Path) -> dict[str, Tensor]:
        if not file.is_file():
            raise Refused(
                f"{SETTING}={self.config.teacher_ema}: {file.parent} has no {file.name}; give teacher_ema and the "
                "number of ranks of that run, or begin anew in another folder"
            )
        found: dict[str, Tensor] = load_file(file)
        return found


def _parts(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """This rank's parts of all parameters, which share their memory."""
    for each in module.modules():
        if isinstance(each, FSDPModule):
            each.reshard()  # what a forward pass has gathered may stay gathered, beside the parts that are kept
    for name, parameter in module.named_parameters():
        part = parameter.detach()
        yield name, part.to_local() if isinstance(part, DTensor) else part


def _file(folder: Path) -> Path:
    rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    return folder / f"teacher_ema_world_size_{ranks}_rank_{rank}.safetensors"


def _write(parts: dict[str, Tensor], file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file(parts, file)
