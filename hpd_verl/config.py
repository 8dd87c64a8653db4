"""Every setting of HPD, declared once with its check and its documentation."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import quote

from omegaconf import DictConfig, ListConfig, OmegaConf
from pydantic import (
    ConfigDict,
    Discriminator,
    Field,
    PrivateAttr,
    Tag,
    ValidationError,
    field_validator,
    model_validator,
)

from hpd_verl.errors import require
from hpd_verl.field_text import first_error, says
from hpd_verl.objectives import OBJECTIVES, Mixture, Objective, ObjectiveParameters, RowObjectives, find_objective
from hpd_verl.objectives.context import ADVANTAGE, IS_ROLLOUT, REWARD, ROW
from hpd_verl.objectives.token import HPDParameters
from hpd_verl.several_teachers import STUDENT, OneTeacher, teachers_of
from hpd_verl.teacher_server import NODE, TeacherServer

PREFIX = "algorithm.hpd"


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


@dataclass(frozen=True)
class FractionSchedule:
    """A linear schedule: ``start`` at the first step, ``end`` from step ``steps`` on."""

    start: Annotated[float, Field(ge=0, le=1)]
    end: Annotated[float, Field(ge=0, le=1)]
    steps: Annotated[int, Field(ge=1)]

    def at(self, step: int) -> float:
        """The value at a training step, counted from 1."""
        if step >= self.steps:
            return self.end
        return self.start + (self.end - self.start) * max(step - 1, 0) / max(self.steps - 1, 1)

    @property
    def highest(self) -> float:
        return max(self.start, self.end)

    @property
    def lowest(self) -> float:
        return min(self.start, self.end)


_FRACTION = "give a number from 0 (demonstrations only) to 1 (rollouts only), or {start: .., end: .., steps: ..}"


class HPDConfig(HPDParameters):
    """``algorithm.hpd``. The defaults are the paper's method.

    Parameters of an objective stand under its name: ``HPDConfig(objective="skew_fkl", skew_fkl={"skew": 0.2})``.

    Raises:
        ValueError: an unknown key, or a value outside its range, in one line that begins with the setting.
    """

    model_config = ConfigDict(revalidate_instances="always")

    objective: str | dict[str, float] = "hpd"
    """The objective on demonstrations, or a mixture (docs/objectives.md)."""

    on_policy_objective: str | dict[str, float] | None = None
    """The objective on rollouts; null: as ``objective``."""

    temperature: float = Field(1.0, gt=0)
    """Divides both models' logits in the objective; rollouts use actor_rollout_ref.rollout.temperature."""

    teacher_temperature: float | None = Field(None, gt=0)
    """The teacher's own temperature, for objectives over the vocabulary; null: ``temperature``."""

    on_policy_fraction: Annotated[
        Annotated[float, Field(ge=0, le=1), Tag("number")] | Annotated[FractionSchedule, Tag("schedule")],
        Discriminator(lambda value: "schedule" if isinstance(value, dict | FractionSchedule) else "number"),
    ] = Field(0.0, json_schema_extra=says(_FRACTION, steps="give an integer of at least 1"))
    """Share of rollouts in a batch; {start, end, steps} changes it linearly."""

    rollouts_per_prompt: int = Field(1, ge=1)
    """Rollouts of a batch that share one prompt; the others' prompts are dropped (counted). With rollouts only, use
    actor_rollout_ref.rollout.n, which drops none."""

    missing_demonstration: Literal["error", "rollout"] = "error"
    """Rows without a demonstration: error, or rollout (the student answers; counted)."""

    overlong_demonstration: Literal["truncate", "drop", "error"] = "truncate"
    """Demonstrations longer than data.max_response_length: truncate (no EOS; counted), drop (counted) or error."""

    score_rollouts: bool = False
    """Log the reward of training rollouts; the loss never uses it."""

    seed: int = 42
    """Seeds row order (unless data.seed is set), LoRA initialisation, dropout, the student's samples, the choice of
    rollouts and, with vLLM, their tokens."""

    check_saved_model: bool = True
    """Compare a run's first saved ``hf_model`` with the trained model (docs/export.md); a difference ends the run."""

    token_chunk_size: int | None = Field(None, ge=1)
    """Tokens whose logits exist at once; changes memory only. null: 1024, or 8192 in one_pass on a GPU."""

    pipeline: Literal["auto", "one_pass", "staged"] = "auto"
    """See docs/cost.md. auto: one_pass if a batch is one update and the configuration allows it."""

    exact_kl_metrics: bool = False
    """one_pass: log exact KL(teacher || student) and KL(student || teacher). Costs a product with the teacher's output
    layer unless an objective over the vocabulary needs it anyway."""

    teacher_cache: Literal["off", "memory", "disk"] = Field(
        "off", json_schema_extra=says('choose "off" (with quotes in a yaml file), memory or disk')
    )
    """Store the teacher's features of demonstrations (docs/store.md); memory: one rank only."""

    teacher_cache_dir: str | None = Field(None, min_length=1, json_schema_extra=says("give a folder, or null"))
    """Folder of the store on disk, shared by all ranks and runs with this teacher."""

    teacher_cache_format: Literal["hidden", "topk", "hybrid"] = "hidden"
    """Stored per token: the final hidden state, the likeliest tokens' log-probs, or a coarse state with corrections of
    the likeliest tokens (docs/store.md)."""

    teacher_cache_dtype: Literal["bf16", "float32"] = "bf16"
    """Format hidden: dtype on disk."""

    teacher_cache_top_k: int = Field(64, ge=1)
    """Formats topk and hybrid: likeliest tokens stored per position."""

    teacher_cache_bits: int = Field(4, ge=2, le=7)
    """Format hybrid: bits of a value of the coarse state."""

    teacher_cache_max_gib: float = Field(100.0, gt=0)
    """Size limit of the folder without the output layer, or of the process's memory; rows beyond it are not stored."""

    teacher_server: TeacherServer = TeacherServer.from_node({})
    """A teacher that servers of its own run."""

    teachers: dict[str, OneTeacher] | None = Field(
        None, json_schema_extra=says("give {name: {path: folder or hub name}, ...}, or null")
    )
    """Several teachers by name, each row's by its ``teacher_key``: {maths: {path: ..}, code: {path: .., urls: [..]}}.
    ``path`` may be student; ``urls`` are its servers; ``teacher_cache: "off"`` leaves it out of the store. null: the
    trainer's own teacher."""

    teacher_key: str = Field("data_source", min_length=1, json_schema_extra=says("give a column's name"))
    """Several teachers: the column that names each row's."""

    teacher_ema: float | None = Field(None, ge=0, lt=1)
    """A teacher whose path is student: null, the student as it was at the start; above 0, the running average of its
    weights, teacher_ema * average + (1 - teacher_ema) * student after each step; 0, its current weights, without a
    second copy."""

    objective_parameters: dict[str, dict[str, Any]] = Field({}, repr=False, exclude=True)
    """Parameters by their objective's name: the keys of ``algorithm.hpd`` that are objectives. Not a setting itself."""

    _objectives: RowObjectives = PrivateAttr()

    def __init__(self, **values: Any) -> None:
        settings = type(self).model_fields.keys() - {"objective_parameters"}
        own = {name: value for name, value in values.items() if name in settings}
        nodes = {name: value for name, value in values.items() if name not in own}
        if "teacher_server" in own:
            own["teacher_server"] = TeacherServer.from_node(own["teacher_server"])
        if "teachers" in own:
            own["teachers"] = teachers_of(own["teachers"])
        try:
            super().__init__(**{"objective_parameters": nodes, **own})
        except ValidationError as error:
            raise ValueError(first_error(error, HPDConfig.model_fields, PREFIX)) from None

    @field_validator("objective", "on_policy_objective", mode="plain")
    @classmethod
    def _known_objectives(cls, value: Any) -> Any:
        if isinstance(value, str) and value.lstrip().startswith("{"):
            raise ValueError("this is text; write a mixture without quotes: {objective: factor, ...}")
        names = list(value) if isinstance(value, Mapping) else [value]
        if isinstance(value, Mapping) and (
            not names or not all(is_number(factor) and 1e-6 <= factor <= 1e6 for factor in value.values())
        ):
            raise ValueError("a mixture is {objective: factor, ...} with factors from 1e-6 to 1e6")
        for name in names:
            find_objective(name if isinstance(name, str) else "")
        return dict(value) if isinstance(value, Mapping) else value

    @field_validator("objective_parameters", mode="plain")
    @classmethod
    def _nodes(cls, value: Any) -> Any:
        return dict(value)

    @field_validator("on_policy_objective", mode="wrap")
    @classmethod
    def _or_null(cls, value: Any, check: Callable[[Any], Any]) -> Any:
        return None if value is None else check(value)

    @field_validator("on_policy_fraction", mode="before")
    @classmethod
    def _whole_schedule(cls, value: Any) -> Any:
        if isinstance(value, Mapping):
            if set(value) != {"start", "end", "steps"}:
                raise ValueError("a schedule has exactly the keys start, end and steps")
            return FractionSchedule(**value)
        return value

    @model_validator(mode="after")
    def _fits_together(self) -> "HPDConfig":
        self._objectives = self._bind_objectives()
        objectives = self._objectives
        needing = RowObjectives(objectives.demonstration).names(lambda bound: bound.objective.needs_rollouts)
        require(
            not needing or self.schedule.lowest == 1.0,
            f"{PREFIX}.objective",
            self.objective,
            f"{needing} is for the student's own rollouts: set {PREFIX}.on_policy_fraction=1, "
            f"or keep another objective for demonstrations and set {PREFIX}.on_policy_objective={needing}",
        )
        require(
            self.rollouts_per_prompt == 1 or self.schedule.highest > 0 or self.missing_demonstration == "rollout",
            f"{PREFIX}.rollouts_per_prompt",
            self.rollouts_per_prompt,
            f"there are no rollouts; set {PREFIX}.on_policy_fraction, or leave it out",
        )
        over_tokens = objectives.names(lambda bound: bound.objective.over == "token")
        require(
            self.teacher_temperature in (None, self.temperature) or not over_tokens,
            f"{PREFIX}.teacher_temperature",
            self.teacher_temperature,
            f"{over_tokens} has one temperature for both models; set {PREFIX}.temperature, or choose objectives over "
            "the vocabulary",
        )
        require(
            self.teacher_cache_dir is not None or self.teacher_cache != "disk",
            f"{PREFIX}.teacher_cache_dir",
            self.teacher_cache_dir,
            f"{PREFIX}.teacher_cache=disk needs a folder that every rank can write to",
        )
        require(
            not self.exact_kl_metrics or self.teacher_cache == "off" or self.teacher_cache_format == "hidden",
            f"{PREFIX}.exact_kl_metrics",
            self.exact_kl_metrics,
            f"{PREFIX}.teacher_cache_format={self.teacher_cache_format} stores only part of the teacher's "
            "distribution; choose hidden",
        )
        if self.teacher_server.urls and self.teacher_server.features == "topk":
            self.check_served_top_k()
        if self.teachers is not None:
            require(
                not self.teacher_server.is_used,
                *self.teacher_server.origin,
                f"{PREFIX}.teachers has several teachers; give each its own urls there",
            )
            for name in self.teachers:
                self.of_teacher(name)
            require(
                self.teacher_ema is None or any(each.path == STUDENT for each in self.teachers.values()),
                f"{PREFIX}.teacher_ema",
                self.teacher_ema,
                f"it is of a teacher whose path is {STUDENT}, and {PREFIX}.teachers has none; leave it out",
            )
        require(
            self.teacher_ema is None or self.teacher_cache == "off" or self.teachers is not None,
            f"{PREFIX}.teacher_ema",
            self.teacher_ema,
            f"the teacher changes with each step, and {PREFIX}.teacher_cache={self.teacher_cache} keeps what it was; "
            "set teacher_cache=off",
        )
        require(
            self.teacher_ema is None or not self.teacher_server.is_used,
            f"{PREFIX}.teacher_ema",
            self.teacher_ema,
            f"{self.teacher_server.source} is of servers, whose teacher does not change; leave one of them out",
        )
        return self

    def check_served_top_k(self) -> None:
        """Check that the most likely tokens' log-probs at temperature 1, all that a server gives, are enough.

        Raises:
            ValueError: they are not.
        """
        only = f"{NODE}.features=topk gives the server's top {self.teacher_server.top_k} log-probs at temperature 1"
        require(
            not self.exact_kl_metrics,
            f"{PREFIX}.exact_kl_metrics",
            self.exact_kl_metrics,
            f"{only}; leave it out, or serve hidden states",
        )
        require(
            self.temperature_of_teacher == 1,
            f"{PREFIX}.temperature" if self.teacher_temperature is None else f"{PREFIX}.teacher_temperature",
            self.temperature_of_teacher,
            f"{only}; set it to 1, or serve hidden states",
        )
        stores = self.teacher_cache_format == "topk" and self.teacher_cache_top_k == self.teacher_server.top_k
        require(
            self.teacher_cache == "off" or stores,
            f"{PREFIX}.teacher_cache_format",
            self.teacher_cache_format,
            f"{only}; set teacher_cache_format=topk and teacher_cache_top_k={self.teacher_server.top_k}, or serve "
            "hidden states",
        )

    def _bind_objectives(self) -> RowObjectives:
        """The objectives in use with their parameters; refuses parameters of others.

        Raises:
            ValueError: a parameter that no objective in use has, or one outside its bounds.
        """
        chosen = [self.objective, self.on_policy_objective or self.objective]
        factors = [value if isinstance(value, dict) else {value: 1.0} for value in chosen]
        used = {reference: find_objective(reference) for mixture in factors for reference in mixture}
        by_name = {each.name: each for each in used.values()}
        for name in by_name.keys() & type(self).model_fields.keys():
            raise ValueError(f"{PREFIX}.objective={self.objective}: {name} is also a setting; rename the objective")
        for name, values in self.objective_parameters.items():
            known = by_name.get(name) or OBJECTIVES.get(name)
            if known is None or not known.has_own_node:
                settings = sorted([*type(self).model_fields, *_nodes()])
                settings.remove("objective_parameters")
                raise ValueError(f"{PREFIX}.{name}={values}: no such setting; there are {', '.join(settings)}")
            self._check_parameters(known, values, is_used=name in by_name)
        for parameters in {each.parameters for each in OBJECTIVES.values() if not each.has_own_node}:
            owners = [each.name for each in OBJECTIVES.values() if each.parameters is parameters]
            for field in parameters.model_fields if not by_name.keys() & owners else ():
                self._refuse_unused(field, getattr(self, field), parameters.model_fields[field].default, owners)
        bound = {
            reference: each.bind(
                self.objective_parameters.get(each.name, {})
                if each.has_own_node
                else {field: getattr(self, field) for field in each.parameters.model_fields}
            )
            for reference, each in used.items()
        }
        return RowObjectives(
            *(Mixture(tuple((bound[name], float(factor)) for name, factor in mixture.items())) for mixture in factors)
        )

    def _check_parameters(self, known: Objective, values: Any, is_used: bool) -> None:
        fields = known.parameters.model_fields
        setting = f"{PREFIX}.{known.name}"
        require(isinstance(values, Mapping), setting, values, f"give its parameters, {', '.join(fields) or 'none'}")
        try:
            known.bind(values)
        except ValidationError as error:
            raise ValueError(first_error(error, fields, setting)) from None
        if not is_used:
            for field, value in values.items():
                self._refuse_unused(f"{known.name}.{field}", value, fields[field].default, [known.name])

    def _refuse_unused(self, field: str, value: Any, default: Any, owners: list[str]) -> None:
        require(
            value == default,
            f"{PREFIX}.{field}",
            value,
            f"it belongs to {' and '.join(owners)}, and {PREFIX}.objective={self.objective}"
            + (f", on_policy_objective={self.on_policy_objective}" if self.on_policy_objective else "")
            + "; leave it out, or choose that objective",
        )

    @classmethod
    def from_config(cls, node: DictConfig | ListConfig) -> "HPDConfig":
        """Build from the ``algorithm.hpd`` node of a composed configuration.

        Raises:
            ValueError: an unknown key, or a value outside its range; the message names the setting.
        """
        require(isinstance(node, DictConfig), PREFIX, node, "give settings by name, or leave it out for the defaults")
        container = OmegaConf.to_container(node, resolve=True)
        assert isinstance(container, dict)
        return cls(**{str(key): value for key, value in container.items()})

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> "HPDConfig":
        """The same with other values, checked again; objectives are bound to what they are then."""
        return HPDConfig(**(self.model_dump() | self.objective_parameters | dict(update or {})))

    def __reduce__(self) -> tuple[Any, ...]:
        # By its values: functions of objectives are found again where it is read.
        return _from_values, (self.model_dump() | self.objective_parameters,)

    @classmethod
    def defaults(cls) -> dict[str, Any]:
        """Every setting with its default, as in configs/settings/hpd.yaml."""
        nodes = {name: parameters().model_dump() for name, parameters in _nodes().items()}
        return cls().model_dump() | nodes

    @property
    def schedule(self) -> FractionSchedule:
        """``on_policy_fraction`` as a schedule; a number is a constant one."""
        if isinstance(self.on_policy_fraction, FractionSchedule):
            return self.on_policy_fraction
        return FractionSchedule(start=self.on_policy_fraction, end=self.on_policy_fraction, steps=1)

    @property
    def objectives(self) -> RowObjectives:
        """The objectives in use, with their parameters."""
        return self._objectives

    @property
    def needs_teacher(self) -> bool:
        """Whether any objective in use, or a metric that is asked for, needs the teacher."""
        return self.objectives.needs_teacher or self.exact_kl_metrics

    def of_teacher(self, name: str) -> "HPDConfig":
        """The settings of one of several teachers, as if it were the only one. Its store has a folder of its own."""
        assert self.teachers is not None
        teacher, folder = self.teachers[name], self.teacher_cache_dir
        return self.model_copy(
            update={
                "teachers": None,
                "teacher_server": self.teacher_server.model_dump() | {"urls": list(teacher.urls)},
                "teacher_cache": teacher.teacher_cache or self.teacher_cache,
                "teacher_cache_dir": None if folder is None else str(Path(folder) / quote(name, safe="")),
                "teacher_ema": self.teacher_ema if teacher.path == STUDENT else None,
            }
        )

    @property
    def of_each_teacher(self) -> dict[str, "HPDConfig"]:
        """The settings of each teacher by name; of a single one under the empty name."""
        return {"": self} if self.teachers is None else {name: self.of_teacher(name) for name in self.teachers}

    @property
    def row_numbers(self) -> list[str]:
        """The numbers of rows that objectives need, but for ``is_rollout``."""
        needs = self.objectives.needs
        return sorted({need.removeprefix(ROW) for need in needs if need.startswith(ROW)} - {IS_ROLLOUT})

    @property
    def row_columns(self) -> list[str]:
        """Those that are columns of the data."""
        return [name for name in self.row_numbers if name not in (REWARD, ADVANTAGE)]

    @property
    def temperature_of_teacher(self) -> float:
        """The temperature of the teacher's distribution."""
        return self.temperature if self.teacher_temperature is None else self.teacher_temperature


def _from_values(values: dict[str, Any]) -> HPDConfig:
    return HPDConfig(**values)


def _nodes() -> dict[str, type[ObjectiveParameters]]:
    """Parameters of the objectives that have a node for them, by name."""
    return {
        name: each.parameters for name, each in OBJECTIVES.items() if each.has_own_node and each.parameters.model_fields
    }
