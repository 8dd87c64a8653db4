"""Every setting of HPD, and what follows from them for a run."""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from omegaconf import DictConfig, OmegaConf

from hpd_verl.objectives.weights import (
    FULL_VOCABULARY_OBJECTIVES,
    OBJECTIVES,
    SAMPLING_OBJECTIVES,
    TEACHERLESS_OBJECTIVES,
)

PREFIX = "algorithm.hpd"


def require(condition: bool, setting: str, found: Any, remedy: str) -> None:
    if not condition:
        raise ValueError(f"{setting}={found}: {remedy}")


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


@dataclass(frozen=True)
class FractionSchedule:
    """A linear schedule: ``start`` at the first step, ``end`` from step ``steps`` on."""

    start: float
    end: float
    steps: int

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


@dataclass(frozen=True)
class HPDConfig:
    """``algorithm.hpd``. The defaults are the paper's method."""

    objective: str = "hpd"
    """hpd, sft, seqkd, rkl, jsd or opd; of the whole vocabulary hpd_exact, fkl, rkl_exact, jsd_exact, skew_fkl,
    skew_rkl, akl, abkd or todi (hpd_verl/objectives/weights.py)."""

    on_policy_objective: str | None = None
    """Objective of rows whose label is the student's own rollout; null: the same as ``objective``."""

    forward_coef: float = 1.0
    """Objectives hpd and hpd_exact: factor of the forward-KL weight p(y)."""

    reverse_coef: float = 1.0
    """Objectives hpd and hpd_exact: factor of the reverse-KL weights gap(y) and gap(a)."""

    reinforce_coef: float = 1.0
    """Objectives hpd and hpd_exact: factor of the additional p(y) on reinforced labels."""

    student_sampling: bool = True
    """Objectives hpd and hpd_exact: false drops the sampled token and the reinforcement."""

    jsd_beta: float = 0.5
    """Objective jsd_exact: share of the teacher in the mixture, between 0 and 1."""

    skew: float = 0.1
    """Objectives skew_fkl and skew_rkl: share of the first distribution in the mixture, from 0 to below 1."""

    akl_mu: float = 0.5
    """Objective akl: the teacher's mass in the head, between 0 and 1."""

    ab_alpha: float = 0.2
    """Objective abkd: exponent of the teacher's probability, above 0."""

    ab_beta: float = 0.7
    """Objective abkd: exponent of the student's probability, above 0."""

    num_student_samples: int = 1
    """Tokens the student samples per position; their terms are averaged."""

    temperature: float = 1.0
    """Distillation temperature of student and teacher (rollouts keep actor_rollout_ref.rollout.temperature)."""

    on_policy_fraction: float | FractionSchedule = 0.0
    """Share of a batch's rows that the student answers itself: a number, or {start, end, steps} for a line."""

    missing_demonstration: str = "error"
    """Rows without a demonstration where one is needed: error, or rollout (the student answers; counted)."""

    overlong_demonstration: str = "truncate"
    """Demonstrations longer than data.max_response_length: truncate (no EOS; counted), drop (counted) or error."""

    score_rollouts: bool = False
    """Run the reward function on training rollouts too, for their score in the log; the loss never uses it."""

    seed: int = 42
    """Seed of the student's sampling and of the choice of on-policy rows."""

    token_chunk_size: int | None = None
    """Tokens whose logits exist at once; memory only, never the result. null: 1024, and 8192 in one_pass off the CPU,
    where the logits of a chunk stay in the student's dtype."""

    pipeline: str = "auto"
    """one_pass (one student forward, loss inside the output layer), staged (verl's passes, with PPO's ratio over
    several updates a batch), or auto: one_pass where a batch is one update and nothing stands against it."""

    exact_kl_metrics: bool = False
    """one_pass: log exact KL(teacher || student) and KL(student || teacher); costs the teacher's logits again."""

    teacher_cache: str = "off"
    """Keep the teacher's features of demonstrations for later epochs: off, memory (of the process; one rank only) or
    disk."""

    teacher_cache_dir: str | None = None
    """Teacher cache on disk: its folder, shared by all ranks and by later runs with the same teacher."""

    teacher_cache_format: str = "hidden"
    """What is kept of a token: hidden (the final hidden state) or topk (the most likely tokens' log-probs)."""

    teacher_cache_dtype: str = "bf16"
    """Format hidden: bf16 or float32."""

    teacher_cache_top_k: int = 64
    """Format topk: tokens kept per position."""

    teacher_cache_max_gib: float = 100.0
    """Size limit: of the folder, all ranks and runs together and the output head left out, or of the process's memory.
    Rows beyond it are not kept. A token takes 2 (float32: 4) bytes a hidden unit and 8 more, or 8 bytes a top-k entry
    and 4 more."""

    def __post_init__(self) -> None:
        names = ", ".join(sorted(OBJECTIVES))
        require(self.objective in list(OBJECTIVES), f"{PREFIX}.objective", self.objective, f"choose one of {names}")
        require(
            self.on_policy_objective is None or self.on_policy_objective in list(OBJECTIVES),
            f"{PREFIX}.on_policy_objective",
            self.on_policy_objective,
            f"choose one of {names}, or null for the same as {PREFIX}.objective",
        )
        for name in ("forward_coef", "reverse_coef", "reinforce_coef"):
            value = getattr(self, name)
            require(is_number(value) and value >= 0, f"{PREFIX}.{name}", value, "give a number of at least 0")
        for name in ("jsd_beta", "akl_mu"):
            value = getattr(self, name)
            require(is_number(value) and 0 < value < 1, f"{PREFIX}.{name}", value, "give a number between 0 and 1")
        require(
            is_number(self.skew) and 0 <= self.skew < 1,
            f"{PREFIX}.skew",
            self.skew,
            "give a number of at least 0 and below 1",
        )
        for name in ("ab_alpha", "ab_beta", "temperature"):
            value = getattr(self, name)
            require(is_number(value) and value > 0, f"{PREFIX}.{name}", value, "give a number above 0")
        require(
            isinstance(self.student_sampling, bool),
            f"{PREFIX}.student_sampling",
            self.student_sampling,
            "give true or false",
        )
        require(
            isinstance(self.score_rollouts, bool),
            f"{PREFIX}.score_rollouts",
            self.score_rollouts,
            "give true or false",
        )
        require(
            self.pipeline in ("auto", "one_pass", "staged"),
            f"{PREFIX}.pipeline",
            self.pipeline,
            "choose auto, one_pass or staged",
        )
        require(
            isinstance(self.exact_kl_metrics, bool),
            f"{PREFIX}.exact_kl_metrics",
            self.exact_kl_metrics,
            "give true or false",
        )
        for name in ("num_student_samples", "token_chunk_size"):
            value = getattr(self, name)
            is_set = value is not None or name == "num_student_samples"
            require(
                not is_set or (type(value) is int and value >= 1),
                f"{PREFIX}.{name}",
                value,
                "give an integer of at least 1",
            )
        require(type(self.seed) is int, f"{PREFIX}.seed", self.seed, "give an integer")
        self._check_fraction()
        self._check_teacher_cache()
        require(
            self.missing_demonstration in ("error", "rollout"),
            f"{PREFIX}.missing_demonstration",
            self.missing_demonstration,
            "choose error or rollout",
        )
        require(
            self.overlong_demonstration in ("truncate", "drop", "error"),
            f"{PREFIX}.overlong_demonstration",
            self.overlong_demonstration,
            "choose truncate, drop or error",
        )
        require(
            self.objective != "opd" or self.schedule.lowest == 1.0,
            f"{PREFIX}.objective",
            self.objective,
            f"opd is for the student's own rollouts: set {PREFIX}.on_policy_fraction=1, "
            f"or keep another objective for demonstrations and set {PREFIX}.on_policy_objective=opd",
        )

    def _check_fraction(self) -> None:
        setting = f"{PREFIX}.on_policy_fraction"
        value = self.on_policy_fraction
        if isinstance(value, FractionSchedule):
            ends = {"start": value.start, "end": value.end}
            require(
                type(value.steps) is int and value.steps >= 1,
                f"{setting}.steps",
                value.steps,
                "give an integer of at least 1",
            )
        else:
            ends = {"": value}
        for name, end in ends.items():
            require(
                is_number(end) and 0 <= end <= 1,
                f"{setting}.{name}".rstrip("."),
                end,
                "give a number from 0 (demonstrations only) to 1 (rollouts only), or {start: .., end: .., steps: ..}",
            )

    def _check_teacher_cache(self) -> None:
        choices = {
            "teacher_cache": (("off", "memory", "disk"), 'choose "off" (with quotes in a yaml file), memory or disk'),
            "teacher_cache_format": (("hidden", "topk"), "choose hidden or topk"),
            "teacher_cache_dtype": (("bf16", "float32"), "choose bf16 or float32"),
        }
        for name, (values, remedy) in choices.items():
            value = getattr(self, name)
            require(value in values, f"{PREFIX}.{name}", value, remedy)
        folder = self.teacher_cache_dir
        require(
            folder is None or (isinstance(folder, str) and folder != ""),
            f"{PREFIX}.teacher_cache_dir",
            folder,
            "give a folder, or null",
        )
        require(
            folder is not None or self.teacher_cache != "disk",
            f"{PREFIX}.teacher_cache_dir",
            folder,
            f"{PREFIX}.teacher_cache=disk needs a folder that every rank can write to",
        )
        top_k, limit = self.teacher_cache_top_k, self.teacher_cache_max_gib
        require(
            type(top_k) is int and top_k >= 1,
            f"{PREFIX}.teacher_cache_top_k",
            top_k,
            "give an integer of at least 1",
        )
        require(
            is_number(limit) and limit > 0,
            f"{PREFIX}.teacher_cache_max_gib",
            limit,
            "give a number above 0",
        )
        require(
            not self.exact_kl_metrics or self.teacher_cache == "off" or self.teacher_cache_format == "hidden",
            f"{PREFIX}.exact_kl_metrics",
            self.exact_kl_metrics,
            f"{PREFIX}.teacher_cache_format=topk keeps a part of the teacher's distribution; choose hidden",
        )

    @classmethod
    def from_config(cls, node: DictConfig) -> "HPDConfig":
        """Build from the ``algorithm.hpd`` node of a composed configuration.

        Raises:
            ValueError: an unknown key, or a value outside its range; the message names the setting.
        """
        container = OmegaConf.to_container(node, resolve=True)
        assert isinstance(container, dict)
        values = {str(key): value for key, value in container.items()}
        known = {field.name for field in dataclasses.fields(cls)}
        for key in values:
            require(
                key in known,
                f"{PREFIX}.{key}",
                values[key],
                f"no such setting; there are {', '.join(sorted(known))}",
            )
        fraction = values.get("on_policy_fraction")
        if isinstance(fraction, dict):
            require(
                set(fraction) == {"start", "end", "steps"},
                f"{PREFIX}.on_policy_fraction",
                fraction,
                "a schedule has exactly the keys start, end and steps",
            )
            values["on_policy_fraction"] = FractionSchedule(**fraction)
        return cls(**values)

    @property
    def schedule(self) -> FractionSchedule:
        """``on_policy_fraction`` as a schedule; a number is a constant one."""
        if isinstance(self.on_policy_fraction, FractionSchedule):
            return self.on_policy_fraction
        return FractionSchedule(start=self.on_policy_fraction, end=self.on_policy_fraction, steps=1)

    @property
    def objectives(self) -> frozenset[str]:
        """The objectives in use."""
        return frozenset({self.objective, self.on_policy_objective or self.objective})

    @property
    def needs_teacher(self) -> bool:
        """Whether any objective in use, or a metric that is asked for, needs the teacher."""
        return bool(self.objectives - TEACHERLESS_OBJECTIVES) or self.exact_kl_metrics

    @property
    def samples(self) -> int:
        """Tokens sampled per position whose loss terms are needed: 0 if no objective in use weighs them."""
        return self.num_student_samples if self.student_sampling and self.objectives & SAMPLING_OBJECTIVES else 0

    def coefficients(self, objective: str) -> dict[str, float | bool]:
        """Keyword arguments of an objective."""
        if objective in ("hpd", "hpd_exact"):
            return {
                "forward_coef": self.forward_coef,
                "reverse_coef": self.reverse_coef,
                "reinforce_coef": self.reinforce_coef,
                "student_sampling": self.student_sampling,
            }
        if objective == "jsd_exact":
            return {"beta": self.jsd_beta}
        if objective in ("skew_fkl", "skew_rkl"):
            return {"skew": self.skew}
        if objective == "akl":
            return {"mu": self.akl_mu}
        if objective == "abkd":
            return {"alpha": self.ab_alpha, "beta": self.ab_beta}
        return {}


def updates_per_batch(config: DictConfig) -> int:
    """Optimiser steps taken with the weights of one batch."""
    actor = config.actor_rollout_ref.actor
    return max(1, config.data.train_batch_size // actor.ppo_mini_batch_size) * actor.ppo_epochs


def validates(config: DictConfig) -> bool:
    """Whether the run validates at any time."""
    return bool(config.trainer.val_before_train or config.trainer.test_freq > 0 or config.trainer.val_only)


def needs_rollout_server(config: DictConfig, hpd: HPDConfig) -> bool:
    """Whether anything is ever generated: rollouts for training, or validation."""
    return hpd.schedule.highest > 0 or hpd.missing_demonstration == "rollout" or validates(config)


def choose_pipeline(config: DictConfig, hpd: HPDConfig) -> tuple[str, str]:
    """Which pipeline a run takes, one_pass or staged, and why.

    Raises:
        ValueError: the one that is set, or that another setting needs, cannot work.
    """
    actor = config.actor_rollout_ref.actor
    cannot = {
        "student and teacher are not both on fsdp2 (actor_rollout_ref.actor.strategy, ref.strategy)": {
            actor.strategy,
            config.actor_rollout_ref.ref.strategy,
        }
        != {"fsdp2"},
        "Ulysses sequence parallelism shares sequences out": max(
            actor.get("ulysses_sequence_parallel_size", 1),
            config.actor_rollout_ref.ref.get("ulysses_sequence_parallel_size", 1),
        )
        > 1,
        "actor_rollout_ref.actor.entropy_coeff is set": actor.entropy_coeff != 0,
        "actor_rollout_ref.rollout.calculate_log_probs compares with a student pass": bool(
            config.actor_rollout_ref.rollout.calculate_log_probs
        ),
    }
    needs = {
        f"{PREFIX}.teacher_cache={hpd.teacher_cache}": hpd.teacher_cache != "off",
        f"{PREFIX}.exact_kl_metrics=true": hpd.exact_kl_metrics,
        f"a full-vocabulary objective ({', '.join(sorted(hpd.objectives))})": bool(
            hpd.objectives & FULL_VOCABULARY_OBJECTIVES
        ),
    }
    reasons = [reason for reason, holds in cannot.items() if holds]
    needed_by = [reason for reason, holds in needs.items() if holds]
    if hpd.pipeline == "one_pass" or needed_by:
        require(
            not reasons and hpd.pipeline != "staged",
            f"{PREFIX}.pipeline",
            hpd.pipeline,
            (f"{' and '.join(needed_by)} needs one_pass, which " if needed_by else "")
            + (f"does not work here: {'; '.join(reasons)}" if reasons else "is not what is set: choose auto"),
        )
        return "one_pass", ", ".join(needed_by) or "set"
    if hpd.pipeline == "staged":
        return "staged", "set"
    if updates_per_batch(config) > 1:
        reasons.append("a batch is several updates")
    return ("staged", "; ".join(reasons)) if reasons else ("one_pass", "a batch is one update")
