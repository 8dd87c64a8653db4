"""What is run: regimes, objectives, learning rates and seeds, fixed before any test score was seen."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Regime:
    """How much a student has to learn from, and what it knows."""

    demonstrations: int
    steps: int
    warm_steps: int
    """Supervised steps of the student before; 0 is a student from scratch."""


REGIMES = {
    "small": Regime(demonstrations=256, steps=300, warm_steps=0),
    "warm": Regime(demonstrations=512, steps=300, warm_steps=300),
    "long": Regime(demonstrations=512, steps=900, warm_steps=0),
}

OBJECTIVES: dict[str, dict[str, Any]] = {
    "sft": {"objective": "sft"},
    "seqkd": {"objective": "seqkd"},
    "rkl": {"objective": "rkl"},
    "jsd": {"objective": "jsd"},
    "hpd": {"objective": "hpd"},
    "hpd_no_sampling": {"objective": "hpd", "student_sampling": False},
    "hpd_no_reinforcement": {"objective": "hpd", "reinforce_coef": 0.0},
    "hpd_exact": {"objective": "hpd_exact"},
    "fkl": {"objective": "fkl"},
    "rkl_exact": {"objective": "rkl_exact"},
    "jsd_exact": {"objective": "jsd_exact"},
    "skew_fkl": {"objective": "skew_fkl"},
    "skew_rkl": {"objective": "skew_rkl"},
    "akl": {"objective": "akl"},
    "abkd": {"objective": "abkd"},
    "todi": {"objective": "todi"},
    "sft_on_teacher": {"objective": "sft"},
}
"""Name in the report to settings of ``algorithm.hpd``. ``sft_on_teacher`` learns from the teacher's correct answers."""

TEACHER_ANSWERS = {"sft_on_teacher"}
TEMPERATURES = (1.0, 1.5, 2.0)
WITHOUT_TEMPERATURE = {"sft", "sft_on_teacher"}
"""Objectives of the labels alone: a temperature there would only change what the student's logits mean."""
RATES = (3e-3, 8e-3, 1.6e-2)
TUNING_SEEDS = (101, 102)
SEEDS = (1, 2, 3, 4, 5)
COMPARED = [("hpd", other) for other in ("fkl", "rkl_exact", "seqkd", "sft")]
"""Named in advance, for Holm's correction."""
BATCH_SIZE = 32
SAMPLES = 8
"""Answers a problem; the primary measure is their mean at temperature 0.7 and top-p 0.95."""
DECODE_TEMPERATURES = (0.3, 0.5, 0.7, 1.0)


@dataclass(frozen=True)
class Job:
    """One student that is trained and measured."""

    regime: str
    objective: str
    temperature: float
    rate: float
    seed: int
    """Of the student's initialisation, the order of the rows and the draws."""
    tuning: bool = False
    """Measured on the validation problems, not on the test problems."""
    clip_grad: float = 1.0
    steps: int | None = None
    """In place of the regime's."""
    settings: tuple[tuple[str, Any], ...] = field(default=())
    """More settings of ``algorithm.hpd``."""

    @property
    def key(self) -> str:
        parts = [self.regime, self.objective, f"T{self.temperature:g}", f"lr{self.rate:g}", f"seed{self.seed}"]
        parts += [f"clip{self.clip_grad:g}"] if self.clip_grad != 1.0 else []
        parts += [f"{name}{value}" for name, value in self.settings]
        return "_".join(["tuning" if self.tuning else "test", *parts])


def settings(objectives: list[str]) -> Iterator[tuple[str, float]]:
    """Objectives at each of their temperatures."""
    for name in objectives:
        for temperature in (1.0,) if name in WITHOUT_TEMPERATURE else TEMPERATURES:
            yield name, temperature


def tuning_jobs(regimes: list[str], objectives: list[str]) -> list[Job]:
    """Every learning rate, on the tuning seeds."""
    return [
        Job(regime, name, temperature, rate, seed, tuning=True)
        for regime, (name, temperature), rate, seed in itertools.product(
            regimes, settings(objectives), RATES, TUNING_SEEDS
        )
    ]


def final_jobs(chosen: dict[tuple[str, str, float], float], seeds: tuple[int, ...]) -> list[Job]:
    """The chosen learning rate of each, on fresh seeds."""
    return [
        Job(regime, name, temperature, rate, seed)
        for (regime, name, temperature), rate in chosen.items()
        for seed in seeds
    ]
