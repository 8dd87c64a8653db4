"""What a teacher is made of."""

import copy
import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import torch
from verl.utils.torch_dtypes import PrecisionType
from verl.workers.config import HFModelConfig, TrainingWorkerConfig

from hpd_verl.teacher.colocated import TeacherWorker


@dataclasses.dataclass(frozen=True)
class TeacherSettings:
    """A teacher's model and the engine that would run it beside the student; nothing is loaded, no server asked.

    In main_ppo it stands where verl expects its worker of the reference.
    """

    config: TrainingWorkerConfig
    """verl's, of a worker of the reference."""
    model: HFModelConfig
    """The teacher's configuration and tokenizer."""
    several: Mapping[str, HFModelConfig] = dataclasses.field(default_factory=dict)
    """Those of several teachers by name, in place of ``model``; they share the engine's settings."""

    def of(self, name: str) -> "TeacherSettings":
        """One of several teachers, the same each time."""
        return self._each[name]

    @functools.cached_property
    def _each(self) -> dict[str, "TeacherSettings"]:
        return {name: dataclasses.replace(self, model=model, several={}) for name, model in self.several.items()}

    def in_float32(self) -> "TeacherSettings":
        """The same with weights in float32."""
        engine = dataclasses.replace(self.config.engine_config, model_dtype="fp32")
        return dataclasses.replace(self, config=dataclasses.replace(self.config, engine_config=engine))

    def worker(self) -> TeacherWorker:
        """The worker of the model beside the student, not loaded, the same each time; all ranks together."""
        return self._worker

    @functools.cached_property
    def _worker(self) -> TeacherWorker:
        engine = copy.deepcopy(self.config.engine_config)  # verl writes the model's own settings into it
        return TeacherWorker(dataclasses.replace(self.config, engine_config=engine), self.model, lazy=True)

    @property
    def dtype_name(self) -> str:
        """What the teacher's weights are kept and used in."""
        return f"{self.config.engine_config.model_dtype}, {self._param_dtype}"

    @property
    def dtype(self) -> torch.dtype:
        """Of its matrix products."""
        found: torch.dtype = PrecisionType.to_dtype(self._param_dtype)
        return found

    @property
    def _param_dtype(self) -> str:
        return str((self.config.engine_config.mixed_precision or {}).get("param_dtype", "bf16"))

    # ------------------------------ of verl's worker ------------------------------

    def reset(self) -> None:
        """verl's call to load the model: a teacher loads what it needs when it is prepared."""

    def get_dispatch_collect(self) -> dict[str, Any]:
        """How verl shares out the reference's passes: there are none."""
        return {"dispatch_dp_rank": {}, "collect_dp_rank": {}}
