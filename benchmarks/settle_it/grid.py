"""Regimes, methods, learning rates and seeds, fixed before any test score was seen."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

CANDIDATES_FILE = Path(__file__).resolve().with_name("candidates.py")


@dataclass(frozen=True)
class Regime:
    """How much a student has to learn from, and what it knows."""

    demonstrations: int
    steps: int
    warm_steps: int
    """Supervised steps of the student before; 0 is a student from scratch."""
    vocabulary: int | None = None
    """Of both models, in place of the task's words: the others never occur."""
    reads_solutions: bool = False
    """Half of the prompts of its supervised steps before carry another worked answer of the problem."""


REGIMES = {
    "warm": Regime(demonstrations=512, steps=200, warm_steps=600),
    "small": Regime(demonstrations=256, steps=400, warm_steps=0),
    "long": Regime(demonstrations=512, steps=1200, warm_steps=0),
    "49k": Regime(demonstrations=512, steps=200, warm_steps=600, vocabulary=49_152),
    "rollouts": Regime(demonstrations=512, steps=100, warm_steps=600),
    "reader": Regime(demonstrations=512, steps=200, warm_steps=600, reads_solutions=True),
}
RATE_OF_REGIME = {"long": "small", "49k": "warm"}
"""A regime that takes the learning rates chosen in another, whose students start as its own do."""
ROLLOUTS = "rollouts"
"""The regime of ``on_policy.py``."""
READER = "reader"
"""The regime of students that can be their own teachers, which read the solution."""


@dataclass(frozen=True)
class Method:
    """An objective with its settings: a line of the tables."""

    objective: str
    settings: tuple[tuple[str, Any], ...] = ()
    """Of ``algorithm.hpd``, beside ``objective``."""
    temperature: float = 1.0
    """Of both models, unless ``settings`` has a ``teacher_temperature``."""
    from_teacher: bool = False
    """It learns from the teacher's correct answers in place of the demonstrations."""
    clip_grad: float = 1.0
    self_taught: bool = False
    """The teacher is the student, and reads the demonstration behind the problem."""

    @property
    def trains(self) -> bool:
        return self.objective != "none"

    @property
    def needs_teacher(self) -> bool:
        return self.objective != "sft"

    @property
    def all_settings(self) -> dict[str, Any]:
        return {"objective": self.objective, "temperature": self.temperature, **dict(self.settings)}


def _candidate(name: str, temperature: float, parameters: Mapping[str, float], **settings: float) -> Method:
    """An objective of ``candidates.py`` with its parameters, and settings of ``algorithm.hpd``."""
    named = {f"{name}.{parameter}": value for parameter, value in parameters.items()}
    return Method(f"{CANDIDATES_FILE}:{name}", tuple((named | settings).items()), temperature)


AT_TEMPERATURE_1 = {
    "sft": Method("sft"),
    "seqkd": Method("seqkd"),
    "hpd": Method("hpd"),
    "hpd_no_sampling": Method("hpd", (("student_sampling", False),)),
    "fkl": Method("fkl"),
    "rkl_exact": Method("rkl_exact"),
    "jsd_exact": Method("jsd_exact"),
    "rkl": Method("rkl"),
    "jsd": Method("jsd"),
    "hpd_no_reinforcement": Method("hpd", (("reinforce_coef", 0.0),)),
    "hpd_exact": Method("hpd_exact"),
    "skew_fkl": Method("skew_fkl"),
    "skew_rkl": Method("skew_rkl"),
    "akl": Method("akl"),
    "abkd": Method("abkd"),
    "todi": Method("todi"),
    "entropy_aware": Method("entropy_aware"),
    "taid": Method("taid"),
    "top_k_tail 8": Method("top_k_tail", (("top_k_tail.k", 8),)),
    "sft_on_teacher": Method("sft", from_teacher=True),
}
CORE = ("sft", "seqkd", "hpd", "hpd_no_sampling", "fkl", "rkl_exact", "jsd_exact")
"""What the candidate is compared with, and sft."""
BETWEEN = ("akl", "todi", "abkd", "skew_fkl", "skew_rkl")
"""Over the vocabulary, between forward and reverse KL."""
RECENT = ("entropy_aware", "taid", "top_k_tail 8")
"""Of 2025 and 2026, for demonstrations too."""
OF_ROLLOUTS = ("power_opd", "vopd", "constant_negative")
"""For rollouts only."""
PAPER = ("rkl", "jsd", "hpd_no_reinforcement")
"""What else the paper compares with, on labels."""
TEMPERATURES = (1.5, 2.0)
"""Beside 1. An objective of the labels alone has none: it would only change what the student's logits mean."""

HOTTER = {
    f"{name} T{temperature:g}": replace(method, temperature=temperature)
    for temperature in reversed(TEMPERATURES)
    for name, method in AT_TEMPERATURE_1.items()
    if method.needs_teacher and name not in RECENT
}
BY_TEMPERATURE = {name: method for name, method in HOTTER.items() if name not in ("fkl T2", "hpd T2")}
"""What is tried at a temperature for its effect alone."""
CANDIDATES = {
    "fkl T3": Method("fkl", temperature=3.0),
    "power 0.25 T2": _candidate("power", 2.0, {"power": 0.25}),
    "power 0.4 T1.5, teacher 1": _candidate("power", 1.5, {"power": 0.4}, teacher_temperature=1.0),
    "power_label 0.4 T1.5, teacher 1": _candidate("power_label", 1.5, {"power": 0.4}, teacher_temperature=1.0),
    "two_temperatures 0.5 T2": _candidate("two_temperatures", 2.0, {"temperature": 2.0, "share": 0.5}),
    "two_temperatures 0.25 T3": _candidate("two_temperatures", 3.0, {"temperature": 3.0, "share": 0.25}),
    "tempered_head T2": _candidate("tempered_head", 1.0, {"temperature": 2.0, "mass": 0.999}),
    "hellinger": Method("abkd", (("abkd.alpha", 0.5), ("abkd.beta", 0.5))),
    "symmetric_kl T2": Method("symmetric_kl", temperature=2.0),
}
"""For a better objective, beside those above; chosen from on validation problems and tuning seeds alone."""

GATED = {name: _candidate(name, 1.0, {}) for name in ("overlap_kl", "stepped_kl")}
"""Move between forward and reverse KL by themselves: candidates for an objective that is good in every regime."""

SENSITIVITY = {
    f"hpd forward {forward:g} reverse {reverse:g} reinforce {reinforce:g}": Method(
        "hpd", (("forward_coef", forward), ("reverse_coef", reverse), ("reinforce_coef", reinforce))
    )
    for reinforce, pairs in {
        1.0: [(forward, reverse) for forward in (0.5, 1.0, 2.0) for reverse in (0.5, 1.0, 2.0)],
        0.0: [(1.0, 1.0)],
        2.0: [(1.0, 1.0)],
    }.items()
    for forward, reverse in pairs
}
WITHOUT_CLIPPING = {
    f"{name} unclipped": replace(AT_TEMPERATURE_1[name], clip_grad=1e9) for name in ("hpd", "fkl", "sft", "rkl_exact")
}
SELF_TAUGHT = {
    "fkl, self": Method("fkl", self_taught=True),
    "hpd, self": Method("hpd", self_taught=True),
}
"""The teacher is the student as it starts."""
BEFORE = "before"
"""The student as it starts, measured like the others."""
METHODS = (
    AT_TEMPERATURE_1
    | HOTTER
    | CANDIDATES
    | GATED
    | SENSITIVITY
    | WITHOUT_CLIPPING
    | SELF_TAUGHT
    | {BEFORE: Method("none")}
)

RATES = (3e-3, 8e-3, 1.6e-2)
WIDER_RATES = {3e-3: 1.5e-3, 1.5e-3: 7.5e-4, 1.6e-2: 3.2e-2}
"""Tried too where the best of ``RATES`` is the lowest or the highest, and once more further down."""
TUNING_SEEDS = (101, 102)
SEEDS = (1, 2, 3, 4, 5)
FRESH_SEEDS = (11, 12, 13, 14, 15)
"""Of the confirmation, with problems that nothing was chosen on."""
ANEW = "anew"
"""The split of a second confirmation, on the problems of the first, which chose nothing, and other seeds."""
SEEDS_ANEW = (21, 22, 23, 24, 25)
FRESH_SPLITS = ("fresh", ANEW)
"""Splits that train and test on problems that nothing was chosen on."""
EVERYWHERE = "todi"
"""Near the best in "warm" and in "long" by their tests: compared once more, on fresh seeds and problems."""
COMPARED_ANEW = {
    "warm": (EVERYWHERE, "hpd", "fkl", "rkl_exact", "jsd_exact", "akl", "seqkd"),
    "long": (EVERYWHERE, "hpd", "fkl", "jsd_exact", "akl"),
}
"""It and what it is to be as good as, by regime; ``rkl_exact`` and ``seqkd`` did not learn in "long"."""
AIM = ("hpd", "fkl", "rkl_exact", "jsd_exact", "akl", "seqkd")
"""An objective for everywhere is in no regime worse than the best of these."""
ELSEWHERE = {
    "small": tuple((EVERYWHERE, other) for other in AIM),
    "49k": tuple((EVERYWHERE, other) for other in ("hpd", "fkl", "rkl_exact", "akl")),
    ROLLOUTS: (
        *((f"{EVERYWHERE}, rollouts", f"{other}, rollouts") for other in ("opd", *AIM[:-1])),
        *((f"{name}, rollouts", "opd, rollouts") for name in ("akl", *OF_ROLLOUTS)),
    ),
}
"""Named before the scores of it in these regimes, and of the objectives for rollouts, were read."""
COMPARED = [("hpd", other) for other in ("fkl", "rkl_exact", "seqkd", "sft")]
"""Named in advance, for Holm's correction."""
BATCH_SIZE = 32
SAMPLES = 8
"""Answers a problem; the primary measure is their mean at temperature 0.7 and top-p 0.95."""
DECODE_TEMPERATURES = (0.3, 0.5, 0.7, 1.0)


RISING = f"{{start: 0, end: 1, steps: {REGIMES[ROLLOUTS].steps}}}"
ROLLOUT_METHODS: dict[str, dict[str, Any]] = {
    **{
        f"{name}, rollouts": {"on_policy_objective": name, "on_policy_fraction": 1}
        for name in ("opd", "rkl_exact", "fkl", "jsd_exact", "hpd", *BETWEEN, "entropy_aware", *OF_ROLLOUTS)
    },
    **{
        f"{name}, {fraction} rollouts": {"objective": name, "on_policy_fraction": fraction}
        for fraction in (0, 0.25)
        for name in ("hpd", "fkl")
    },
    **{
        f"{name}, then {then}": {"objective": name, "on_policy_objective": then, "on_policy_fraction": RISING}
        for name, then in (("hpd", "opd"), ("fkl", "opd"), ("fkl", "rkl_exact"))
    },
}
"""Name to settings of ``algorithm.hpd``; with "then", rollouts grow from none to all."""
LEAN = ("hpd", "fkl")
"""What the lean trainer runs too."""
ROLLOUTS_COMPARED = [
    *((f"{name}, rollouts", "opd, rollouts") for name in ("rkl_exact", "fkl", "jsd_exact", "hpd")),
    ("hpd, then opd", "fkl, then opd"),
    ("fkl, then rkl_exact", "fkl, then opd"),
    *((f"{name}, then opd", f"{name}, 0 rollouts") for name in LEAN),
    *((f"{name}, 0.25 rollouts", f"{name}, 0 rollouts") for name in LEAN),
    *((f"{name}, 0 rollouts", name) for name in LEAN),
]
"""The last ones show whether both trainers agree."""


@dataclass(frozen=True)
class Job:
    """One student that is trained and measured."""

    regime: str
    method: str
    rate: float
    seed: int
    """Of the student's initialisation, the order of the rows and the draws."""
    split: str = "test"
    """Problems that it is measured on: validation, test, or one of ``FRESH_SPLITS``, which have training problems of
    their own."""
    steps: int | None = None
    """In place of the regime's."""

    @property
    def key(self) -> str:
        steps = f" {self.steps} steps" if self.steps else ""
        return f"{self.split} {self.regime}: {self.method} lr{self.rate:g} seed{self.seed}{steps}"


@dataclass(frozen=True)
class Suite:
    """Jobs that are run together; results of suites before it may be read."""

    name: str
    methods: Mapping[str, Method]
    regimes: tuple[str, ...]
    rates_of: Mapping[str, str] = field(default_factory=dict)
    """Method to the method whose learning rate it takes, in place of tuning its own."""
    seeds: tuple[int, ...] = SEEDS
    """None: tuning only."""
    split: str = "test"

    def only(self, names: Iterable[str]) -> dict[str, Method]:
        """Its methods of these names."""
        wanted = set(names)
        return {name: method for name, method in self.methods.items() if name in wanted}


def _named(names: Iterable[str]) -> dict[str, Method]:
    return {name: METHODS[name] for name in names}


SUITES = [
    Suite("core", _named([*CORE, "fkl T2", "hpd T2"]), ("warm",)),
    Suite("before", _named([BEFORE]), ("warm",), {BEFORE: "hpd"}),
    Suite("self_teacher", SELF_TAUGHT | _named(["sft", BEFORE]), (READER,), {BEFORE: "sft"}),
    Suite("self_teacher_warm", SELF_TAUGHT, ("warm",)),
    Suite("candidates", CANDIDATES, ("warm",), seeds=()),
    Suite("paper", _named(PAPER), ("warm",)),
    Suite("objectives", _named(name for name in AT_TEMPERATURE_1 if name not in (*CORE, *PAPER, *RECENT)), ("warm",)),
    Suite("sensitivity", SENSITIVITY, ("warm",), dict.fromkeys(SENSITIVITY, "hpd"), seeds=SEEDS[:3]),
    Suite("clipping", WITHOUT_CLIPPING, ("warm",), {name: name.split()[0] for name in WITHOUT_CLIPPING}, SEEDS[:3]),
    Suite("small", _named([*CORE, "fkl T2", "hpd T2", *BETWEEN]), ("small",)),
    Suite("long", _named([*CORE, "fkl T2", "hpd T2", *BETWEEN]), ("long",), seeds=SEEDS[:3]),
    Suite("49k", _named(["fkl", "fkl T2", "hpd", "sft", "rkl_exact", *BETWEEN]), ("49k",), seeds=SEEDS[:3]),
    Suite("recent", _named(RECENT), ("warm", "small", "long"), seeds=SEEDS[:3]),
    Suite("gated", GATED, ("warm", "small", "long"), seeds=SEEDS[:3]),
    *(
        Suite(f"anew_{regime}", _named(names), (regime,), {name: name for name in names}, SEEDS_ANEW, ANEW)
        for regime, names in COMPARED_ANEW.items()
    ),
    Suite("temperatures", BY_TEMPERATURE, ("warm",), seeds=SEEDS[:3]),
]
"""In the order in which they are run: what decides most comes first."""


def tuning_jobs(suite: Suite, rates: Iterable[float] = RATES) -> Iterator[Job]:
    """Every learning rate, on the tuning seeds, of the methods that have none from elsewhere."""
    for regime in suite.regimes:
        for method in suite.methods if regime not in RATE_OF_REGIME else ():
            if method not in suite.rates_of:
                for rate in rates:
                    for seed in TUNING_SEEDS:
                        yield Job(regime, method, rate, seed, "validation")


Chosen = Mapping[tuple[str, str], float]
"""Learning rate by regime and method."""


def wider_jobs(suite: Suite, chosen: Chosen) -> Iterator[Job]:
    """The next learning rate where the best so far is at an edge."""
    for regime, method in chosen:
        wider = WIDER_RATES.get(chosen[regime, method])
        if wider is not None and method in suite.methods and regime in suite.regimes:
            for seed in TUNING_SEEDS:
                yield Job(regime, method, wider, seed, "validation")


def test_jobs(suite: Suite, chosen: Chosen) -> Iterator[Job]:
    """The chosen learning rate of each on fresh seeds; the first seed of everything comes first."""
    for seed in suite.seeds:
        for regime in suite.regimes:
            for method in suite.methods:
                rate = chosen[RATE_OF_REGIME.get(regime, regime), suite.rates_of.get(method, method)]
                yield Job(regime, method, rate, seed, suite.split)
