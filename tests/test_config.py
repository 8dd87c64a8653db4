"""HPDConfig and FractionSchedule: defaults, accepted and refused values, derived properties."""

import math
import pickle
import re
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from hpd_verl.config import FractionSchedule, HPDConfig
from hpd_verl.hydra_config import config_dir
from hpd_verl.objectives import OBJECTIVES

fractions = st.floats(0, 1)


@pytest.fixture(scope="module")
def hpd_block() -> dict[str, Any]:
    """``algorithm.hpd`` as it stands in configs/settings."""
    text = (config_dir() / "settings" / "hpd.yaml").read_text(encoding="utf-8")
    return yaml.safe_load(text)


# Defaults


def test_yaml_holds_the_defaults(hpd_block: dict[str, Any]) -> None:
    """settings/hpd.yaml shows every setting with the default that its declaration documents."""
    assert hpd_block == HPDConfig.defaults()
    found = HPDConfig.from_config(OmegaConf.create(hpd_block))
    assert (found.model_dump(), found.objectives) == (HPDConfig().model_dump(), HPDConfig().objectives)


def test_yaml_has_the_types_of_the_defaults(hpd_block: dict[str, Any]) -> None:
    """1 and 1.0 and true are equal in Python, not on the command line's type check."""
    for name, value in HPDConfig.defaults().items():
        assert type(hpd_block[name]) is type(value), name
        if isinstance(value, dict):
            assert {key: type(each) for key, each in hpd_block[name].items()} == {
                key: type(each) for key, each in value.items()
            }


def test_defaults_are_the_paper() -> None:
    """HPD at coefficients 1, sampling, temperature 1, demonstrations only."""
    config = HPDConfig()
    assert (config.objective, config.on_policy_objective) == ("hpd", None)
    (bound,) = config.objectives.bound
    assert dict(bound.parameters) == {
        "forward_coef": 1.0,
        "reverse_coef": 1.0,
        "reinforce_coef": 1.0,
        "student_sampling": True,
    }
    assert (config.temperature, config.on_policy_fraction) == (1.0, 0.0)


# Values


ACCEPTED = [
    *({"objective": name} for name, each in sorted(OBJECTIVES.items()) if not each.needs_rollouts),
    *({"on_policy_objective": name} for name in [None, *sorted(OBJECTIVES)]),
    {"objective": "opd", "on_policy_fraction": 1},
    {"objective": "opd", "on_policy_fraction": 1.0},
    {"objective": "opd", "on_policy_fraction": FractionSchedule(1.0, 1.0, 5)},
    {"forward_coef": 0, "reverse_coef": 0.0, "reinforce_coef": 2},
    {"student_sampling": False, "score_rollouts": True},
    {"objective": {"hpd": 1.0, "sft": 0.1}, "on_policy_objective": {"opd": 2}},
    {"objective": "fkl", "teacher_temperature": 1.5},
    {"teacher_temperature": None},
    {"token_chunk_size": 1},
    {"temperature": 1e-3},
    {"temperature": 2},
    {"seed": 0},
    {"seed": -1},
    {"on_policy_fraction": 0},
    {"on_policy_fraction": 0.5},
    {"on_policy_fraction": FractionSchedule(0.0, 1.0, 1)},
    {"missing_demonstration": "rollout"},
    {"on_policy_fraction": 0.5, "rollouts_per_prompt": 4},
    {"overlong_demonstration": "drop"},
    {"overlong_demonstration": "error"},
    {"pipeline": "one_pass", "exact_kl_metrics": True},
    {"pipeline": "staged"},
    {"teacher_cache": "memory"},
    {"teacher_cache": "disk", "teacher_cache_dir": "/scratch/teacher"},
    {"teacher_cache_dir": "/scratch/teacher"},
    {"teacher_cache_format": "topk", "teacher_cache_top_k": 1},
    {"teacher_cache_format": "hybrid", "teacher_cache_bits": 2},
    {"teacher_cache_bits": 7},
    {"teacher_cache_dtype": "float32"},
    {"teacher_cache_max_gib": 1},
    {"teacher_cache_max_gib": 0.01},
]


@pytest.mark.parametrize("values", ACCEPTED, ids=str)
def test_accepts(values: dict[str, Any]) -> None:
    config = HPDConfig(**values)
    for name, value in values.items():
        assert getattr(config, name) == value


def shown(value: Any) -> str:
    """A value in a message, for a pattern: a text that is no word there is in quotes."""
    return re.escape(repr(value) if value in ("1", "2", "42", "true", "") else str(value))


NOT_NUMBERS = [math.nan, math.inf, True, "1", None]
NOT_BOOLEANS = [1, "true", None]
NOT_POSITIVE_INTEGERS = [0, -1, 1.0, True, "2", None]
NOT_TEACHERS: list[Any] = [[1], "maths", {}, 1]
REFUSED = [
    *(("pipeline", value) for value in ("fast", None)),
    *(("exact_kl_metrics", value) for value in NOT_BOOLEANS),
    *(("objective", value) for value in ("kl", "HPD", "", None)),
    *(("on_policy_objective", value) for value in ("kl", "")),
    *((f"{name}_coef", value) for name in ("forward", "reverse", "reinforce") for value in (-0.1, *NOT_NUMBERS)),
    *((name, value) for name in ("student_sampling", "score_rollouts", "check_saved_model") for value in NOT_BOOLEANS),
    *(("token_chunk_size", value) for value in NOT_POSITIVE_INTEGERS if value is not None),
    *(("objective", value) for value in ({}, {"hpd": 0}, {"hpd": -1.0}, {"hpd": True}, {"hpd": "1"}, {"kl": 1.0})),
    *(("objective", {"hpd": value}) for value in (1e300, 1e-300, *NOT_NUMBERS)),
    *(("on_policy_objective", value) for value in ({}, {"opd": 0.0}, 1)),
    *(("teacher_temperature", value) for value in (0, -1.0, *NOT_NUMBERS) if value is not None),
    *(("seed", value) for value in (1.5, True, "42", None)),
    *(("temperature", value) for value in (0, -1.0, *NOT_NUMBERS)),
    *(("on_policy_fraction", value) for value in (-0.01, 1.01, *NOT_NUMBERS)),
    *(("missing_demonstration", value) for value in ("skip", "truncate", None)),
    *(("rollouts_per_prompt", value) for value in (0, 2, 1.5, None)),
    *(("overlong_demonstration", value) for value in ("cut", "rollout", None)),
    *(("teacher_cache", value) for value in ("ram", False, True, None)),
    *(("teacher_cache_dir", value) for value in ("", 1, True)),
    *(("teacher_cache_format", value) for value in ("logits", None)),
    *(("teacher_cache_dtype", value) for value in ("float16", "bfloat16", None)),
    *(("teacher_cache_top_k", value) for value in NOT_POSITIVE_INTEGERS),
    *(("teacher_cache_bits", value) for value in (1, 8, *NOT_POSITIVE_INTEGERS)),
    *(("teacher_cache_max_gib", value) for value in (0, -1.0, *NOT_NUMBERS)),
    *(("teacher_server", value) for value in ([1], "http://host:8000", None)),
    *(("teachers", value) for value in NOT_TEACHERS),
    *(("teacher_key", value) for value in ("", 1, None)),
    *(("teacher_ema", value) for value in (-0.1, 1, 1.0, 1.5, *NOT_NUMBERS) if value is not None),
]


@pytest.mark.parametrize(("name", "value"), REFUSED, ids=str)
def test_refuses(name: str, value: Any) -> None:
    """The message begins with the setting's full name and what was found."""
    with pytest.raises(ValueError, match=rf"^algorithm\.hpd\.{name}={shown(value)}: \w+"):
        HPDConfig(**{name: value})


@pytest.mark.parametrize(
    "values",
    [{"temperature": "0.5"}, {"objective": "hpd "}, {"objective": "hpd\n"}, {"teacher_cache": "off "}],
    ids=str,
)
def test_texts_are_shown_with_their_quotes(values: dict[str, Any]) -> None:
    """Where they are no word by themselves; in one line."""
    ((name, value),) = values.items()
    with pytest.raises(ValueError, match=rf"^algorithm\.hpd\.{name}={re.escape(repr(value))}: [^\n]+$"):
        HPDConfig(**values)


def test_a_mixture_in_quotes_is_no_module() -> None:
    with pytest.raises(ValueError, match=r"^algorithm\.hpd\.objective='{hpd: 1\.0}': this is text; write a mixture"):
        HPDConfig(objective="{hpd: 1.0}")


@pytest.mark.parametrize("node", [None, OmegaConf.create([1])], ids=["null", "list"])
def test_the_whole_node_is_settings(node: Any) -> None:
    with pytest.raises(ValueError, match=r"^algorithm\.hpd=(None|\[1\]): give settings by name"):
        HPDConfig.from_config(node)


def test_every_setting_has_a_refused_value() -> None:
    """A new setting without a check would be missed here."""
    assert {name for name, _ in REFUSED} == HPDConfig.model_fields.keys() - {"objective_parameters"}


OF_THE_SERVER: list[tuple[str, Any, str]] = [
    ("urls", "http://host:8000", "give a list of addresses"),
    ("urls", [1], "give a list of addresses"),
    *(("urls", [url], "give addresses with http") for url in ("host:8000", "ftp://host", "http://", "http://a b")),
    ("urls", ["http://host:99999"], "give addresses with http"),
    ("urls", ["http://host", "http://host/v1/"], "an address twice"),
    *(("urls", [url], "would be logged") for url in ("http://me:secret@host", "http://host/?key=secret")),
    *(("timeout_s", value, "give a number above 0") for value in (0, -1.0, *NOT_NUMBERS)),
    *(("prefetch", value, "give an integer") for value in (-1, 2, 0.5, True, None)),
    ("timeout", 1.0, "no such parameter; there are urls"),
    *(("n_gpus_per_node", value, "give an integer of at least 0") for value in (-1, 0.5, True, None)),
    *(("nnodes", value, "give an integer of at least 1") for value in (0, 0.5, True, None)),
    *(("tensor_model_parallel_size", value, "give an integer of at least 1") for value in (0, 0.5, True, None)),
    *((name, 2, "is of servers that the run starts; set ") for name in ("nnodes", "tensor_model_parallel_size")),
]


@pytest.mark.parametrize(("name", "value", "message"), OF_THE_SERVER, ids=str)
def test_refuses_settings_of_the_server(name: str, value: Any, message: str) -> None:
    """In one line, without what may be a secret."""
    with pytest.raises(ValueError, match=rf"^algorithm\.hpd\.teacher_server\.{name}\S*=.*: .*{message}") as refusal:
        HPDConfig(teacher_server={name: value})
    assert "\n" not in str(refusal.value)
    assert "secret" not in str(refusal.value)


@pytest.mark.parametrize(
    ("beside", "message"),
    [
        (
            {"urls": ["http://host:8000"]},
            "n_gpus_per_node=4: algorithm.hpd.teacher_server.urls=['http://host:8000'] names servers that are there "
            "already; leave one of the two out",
        ),
        (
            {"tensor_model_parallel_size": 3},
            "tensor_model_parallel_size=3: must divide algorithm.hpd.teacher_server.n_gpus_per_node=4: a server is on "
            "one machine",
        ),
        (
            {"tensor_model_parallel_size": 8, "nnodes": 2},
            "tensor_model_parallel_size=8: must divide algorithm.hpd.teacher_server.n_gpus_per_node=4: a server is on "
            "one machine",
        ),
        (
            {"features": "topk"},
            "features=topk: the servers that algorithm.hpd.teacher_server.n_gpus_per_node=4 starts give hidden states; "
            "leave it out",
        ),
    ],
    ids=lambda value: "" if isinstance(value, str) else " ".join(value),
)
def test_servers_that_the_run_starts(beside: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match="algorithm") as refusal:
        HPDConfig(teacher_server={"n_gpus_per_node": 4, **beside})
    assert str(refusal.value) == f"algorithm.hpd.teacher_server.{message}"


@pytest.mark.parametrize(
    ("beside", "message"),
    [
        (
            {"teachers": {"maths": {"path": "x"}}},
            "teacher_server.n_gpus_per_node=4: algorithm.hpd.teachers has several teachers; give each its own urls",
        ),
        ({"teacher_ema": 0.5}, "teacher_ema=0.5: algorithm.hpd.teacher_server.n_gpus_per_node=4 is of servers, whose"),
    ],
    ids=lambda value: "" if isinstance(value, str) else " ".join(value),
)
def test_servers_that_the_run_starts_are_of_one_teacher(beside: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match="algorithm") as refusal:
        HPDConfig(teacher_server={"n_gpus_per_node": 4}, **beside)
    assert str(refusal.value).startswith(f"algorithm.hpd.{message}")


def test_started_servers_are_servers_that_are_there() -> None:
    """What a run gives to its workers is what ``urls`` would be."""
    own = {"n_gpus_per_node": 4, "nnodes": 2, "tensor_model_parallel_size": 4, "timeout_s": 7.0}
    settings = HPDConfig(teacher_server=own).teacher_server
    urls = ["http://a:1", "http://b:1"]
    assert settings.is_used
    assert not HPDConfig().teacher_server.is_used
    assert settings.started(urls) == HPDConfig(teacher_server={"urls": urls, "timeout_s": 7.0}).teacher_server


REFUSED_PARAMETERS = [
    *(("jsd_exact", "beta", value) for value in (0, 1, -0.5, 1.5, *NOT_NUMBERS)),
    *(("akl", "mu", value) for value in (0, 1, -0.5, 1.5, *NOT_NUMBERS)),
    *((name, "skew", value) for name in ("skew_fkl", "skew_rkl") for value in (-0.1, 1, *NOT_NUMBERS)),
    *(("abkd", name, value) for name in ("alpha", "beta") for value in (0, -1.0, *NOT_NUMBERS)),
    *(("power_opd", "exponent", value) for value in (0, -1.0, *NOT_NUMBERS)),
    *(("constant_negative", "below", value) for value in (0, 1.1, *NOT_NUMBERS)),
    *(("constant_negative", "strength", value) for value in (0, -0.5, *NOT_NUMBERS)),
    *(("entropy_aware", name, value) for name in ("threshold", "forward_coef") for value in (-0.1, *NOT_NUMBERS)),
    *(("taid", "start", value) for value in (-0.1, 1, *NOT_NUMBERS)),
    *(("taid", "end", value) for value in (0, 1.1, *NOT_NUMBERS)),
    *(("top_k_tail", "k", value) for value in (0, -1, 1.5, *NOT_NUMBERS)),
    *(("symmetric_kl", "reverse_share", value) for value in (-0.1, 1.1, *NOT_NUMBERS)),
]


@pytest.mark.parametrize(("objective", "parameter", "value"), REFUSED_PARAMETERS, ids=str)
def test_refuses_parameters(objective: str, parameter: str, value: Any) -> None:
    """The message begins with the parameter's full name, whether or not its objective is in use."""
    match = rf"^algorithm\.hpd\.{objective}\.{parameter}={shown(value)}: give an? (number|integer)"
    for used in (objective, "hpd"):
        with pytest.raises(ValueError, match=match):
            HPDConfig(objective=used, on_policy_fraction=1, **{objective: {parameter: value}})


def test_every_parameter_has_a_refused_value() -> None:
    nodes = {name: each.parameters for name, each in OBJECTIVES.items() if each.has_own_node}
    parameters = {(name, field) for name, node in nodes.items() for field in node.model_fields}
    assert {(name, field) for name, field, _ in REFUSED_PARAMETERS} == parameters


def test_parameters_of_objectives_in_use() -> None:
    """They reach their objective, alone and in a mixture; what is not given keeps its default."""
    config = HPDConfig(
        objective={"abkd": 1.0, "hpd": 0.5},
        on_policy_objective="skew_rkl",
        abkd={"alpha": 1},
        forward_coef=2.0,
        skew_rkl={"skew": 0.3},
    )
    found = {bound.objective.name: dict(bound.parameters) for bound in config.objectives.bound}
    hpd = {"forward_coef": 2.0, "reverse_coef": 1.0, "reinforce_coef": 1.0, "student_sampling": True}
    assert found == {"abkd": {"alpha": 1, "beta": 0.7}, "hpd": hpd, "skew_rkl": {"skew": 0.3}}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"skew_fkl": {"skew": 0.2}},
            "skew_fkl.skew=0.2: it belongs to skew_fkl, and algorithm.hpd.objective=hpd; leave",
        ),
        ({"objective": "fkl", "forward_coef": 0.5}, "forward_coef=0.5: it belongs to hpd and hpd_exact, and"),
        ({"objective": "sft", "student_sampling": False}, "student_sampling=False: it belongs to hpd and hpd_exact"),
        ({"objective": "skew_fkl", "skew_fkl": {"beta": 1}}, "skew_fkl.beta=1: no such parameter; there are skew"),
        ({"objective": "fkl", "fkl": {"skew": 1}}, "fkl.skew=1: no such parameter; there are none"),
        ({"objective": "akl", "akl": 0.5}, "akl=0.5: give its parameters, mu"),
        ({"hpd": {"forward_coef": 1.0}}, "hpd={'forward_coef': 1.0}: no such setting; there are abkd, akl, "),
        ({"objective_parameters": 3}, "objective_parameters=3: no such setting; there are abkd"),
        ({"teacher_temperature": 2.0}, "teacher_temperature=2.0: hpd has one temperature for both models"),
        ({"objective": {"hpd": 1, "fkl": 1}, "teacher_temperature": 2.0}, "teacher_temperature=2.0: hpd has one"),
        ({"objective": {"opd": 1, "fkl": 1}}, "objective={'opd': 1, 'fkl': 1}: opd is for the student's own rollouts"),
        ({"objective": {"kl": 1.0}}, "objective={'kl': 1.0}: choose one of abkd"),
    ],
    ids=str,
)
def test_refuses_parameters_that_would_be_ignored(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape('algorithm.hpd.' + message)}"):
        HPDConfig(**values)


def test_defaults_of_other_objectives_are_no_error(hpd_block: dict[str, Any]) -> None:
    """The whole node, as it is composed, with any objective."""
    for name in sorted(OBJECTIVES):
        values = hpd_block | {"objective": name, "on_policy_fraction": float(OBJECTIVES[name].needs_rollouts)}
        assert HPDConfig(**values).objectives.names() == name


@pytest.mark.parametrize(
    ("part", "value"),
    [
        *(("start", value) for value in (-0.1, 1.1, *NOT_NUMBERS)),
        *(("end", value) for value in (-0.1, 1.1, *NOT_NUMBERS)),
        *(("steps", value) for value in NOT_POSITIVE_INTEGERS),
    ],
)
def test_refuses_schedule(part: str, value: Any) -> None:
    """Start, end and steps are checked like the number, and named."""
    schedule = {"start": 0.0, "end": 1.0, "steps": 10, part: value}
    match = rf"^algorithm\.hpd\.on_policy_fraction\.{part}={shown(value)}: "
    with pytest.raises(ValueError, match=match):
        HPDConfig(on_policy_fraction=FractionSchedule(**schedule))
    with pytest.raises(ValueError, match=match):
        HPDConfig.from_config(OmegaConf.create({"on_policy_fraction": schedule}))


@pytest.mark.parametrize("fraction", [0.0, 0.99, FractionSchedule(0.5, 1.0, 3), FractionSchedule(1.0, 0.0, 3)], ids=str)
def test_refuses_opd_on_demonstrations(fraction: float | FractionSchedule) -> None:
    """opd's labels must be the student's own, at every step; as on_policy_objective they always are."""
    with pytest.raises(ValueError, match=r"^algorithm\.hpd\.objective=opd: .*on_policy_fraction=1"):
        HPDConfig(objective="opd", on_policy_fraction=fraction)
    HPDConfig(on_policy_objective="opd", on_policy_fraction=fraction)


def test_refuses_a_teacher_cache_on_disk_without_a_folder() -> None:
    with pytest.raises(
        ValueError, match=r"^algorithm\.hpd\.teacher_cache_dir=None: .*teacher_cache=disk needs a folder"
    ):
        HPDConfig(teacher_cache="disk")


def test_from_config_explains_off_without_quotes() -> None:
    """Yaml reads a bare off as false."""
    with pytest.raises(ValueError, match=r"^algorithm\.hpd\.teacher_cache=False: .*with quotes"):
        HPDConfig.from_config(OmegaConf.create(yaml.safe_load("teacher_cache: off")))


@pytest.mark.parametrize(
    "values",
    [
        {},
        {
            "objective": {"abkd": 1.0, "sft": 0.5},
            "abkd": {"alpha": 1.0},
            "on_policy_fraction": FractionSchedule(0, 1, 9),
        },
    ],
    ids=str,
)
def test_can_be_pickled(values: dict[str, Any]) -> None:
    config = HPDConfig(**values)
    assert pickle.loads(pickle.dumps(config)) == config


def test_a_copy_is_bound_anew() -> None:
    """Other objectives, the same schedule; and what does not fit is refused."""
    config = HPDConfig(objective="akl", akl={"mu": 0.3}, on_policy_fraction=FractionSchedule(0, 1, 9))
    copied = config.model_copy(update={"pipeline": "one_pass", "on_policy_objective": "fkl"})
    assert (copied.objectives.names(), copied.schedule, copied.pipeline) == ("akl, fkl", config.schedule, "one_pass")
    assert dict(copied.objectives.demonstration.parts[0][0].parameters) == {"mu": 0.3}
    with pytest.raises(ValueError, match=r"akl\.mu=0\.3: it belongs to akl"):
        config.model_copy(update={"objective": "fkl"})


def test_is_frozen() -> None:
    """Checked once, so never changed."""
    with pytest.raises(ValueError, match="frozen"):
        HPDConfig().seed = 1


# From a composed configuration


def test_from_config_takes_values_and_schedules() -> None:
    """Interpolations are resolved; a mapping becomes a schedule; what is not given keeps its default."""
    node = OmegaConf.create(
        {
            "seed": 7,
            "run": {
                "objective": "jsd",
                "seed": "${seed}",
                "on_policy_fraction": {"start": 0, "end": 0.5, "steps": 9},
            },
        }
    )
    schedule = FractionSchedule(start=0, end=0.5, steps=9)
    assert HPDConfig.from_config(node.run) == HPDConfig(objective="jsd", seed=7, on_policy_fraction=schedule)


def test_from_config_refuses_unknown_settings() -> None:
    """A misspelt key is an error that lists the right ones."""
    with pytest.raises(ValueError, match=r"^algorithm\.hpd\.temprature=2: no such setting; .*temperature"):
        HPDConfig.from_config(OmegaConf.create({"temprature": 2}))


@pytest.mark.parametrize(
    "schedule", [{}, {"start": 0.0, "end": 1.0}, {"start": 0.0, "end": 1.0, "steps": 3, "stop": 4}], ids=str
)
def test_from_config_refuses_incomplete_schedules(schedule: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"^algorithm\.hpd\.on_policy_fraction=.*start, end and steps"):
        HPDConfig.from_config(OmegaConf.create({"on_policy_fraction": schedule}))


def test_from_config_refuses_bad_values() -> None:
    """The same checks as the constructor's."""
    with pytest.raises(ValueError, match=r"^algorithm\.hpd\.temperature=0: "):
        HPDConfig.from_config(OmegaConf.create({"temperature": 0}))


def test_exact_kl_needs_the_whole_teacher() -> None:
    with pytest.raises(
        ValueError, match=r"exact_kl_metrics=True: algorithm\.hpd\.teacher_cache_format=topk stores only part"
    ):
        HPDConfig(exact_kl_metrics=True, teacher_cache="memory", teacher_cache_format="topk")


# Derived


@pytest.mark.parametrize(
    ("values", "objectives", "weighs_sample"),
    [
        ({}, {"hpd"}, True),
        ({"student_sampling": False}, {"hpd"}, False),
        ({"objective": "sft"}, {"sft"}, False),
        ({"objective": "sft", "on_policy_objective": "hpd"}, {"sft", "hpd"}, True),
        ({"on_policy_objective": "opd"}, {"hpd", "opd"}, True),
        ({"on_policy_objective": "hpd"}, {"hpd"}, True),
    ],
    ids=lambda value: str(sorted(value)) if isinstance(value, set) else str(value),  # a set has no order
)
def test_objectives_in_use(values: dict[str, Any], objectives: set[str], weighs_sample: bool) -> None:
    """And whether their loss needs the sampled token."""
    config = HPDConfig(**values)
    assert {bound.objective.name for bound in config.objectives.bound} == objectives
    assert config.objectives.weighs_sample == weighs_sample


def test_schedule_of_a_number_is_constant() -> None:
    schedule = HPDConfig(on_policy_fraction=0.25).schedule
    assert [schedule.at(step) for step in (0, 1, 2, 1000)] == [0.25] * 4
    assert (schedule.lowest, schedule.highest) == (0.25, 0.25)
    line = FractionSchedule(0.0, 1.0, 4)
    assert HPDConfig(on_policy_fraction=line).schedule == line


@pytest.mark.parametrize(
    ("schedule", "values"),
    [
        (FractionSchedule(0.0, 1.0, 5), [0.0, 0.25, 0.5, 0.75, 1.0, 1.0, 1.0]),
        (FractionSchedule(1.0, 0.5, 3), [1.0, 0.75, 0.5, 0.5]),
        (FractionSchedule(0.25, 0.75, 2), [0.25, 0.75, 0.75]),
        (FractionSchedule(0.5, 0.5, 9), [0.5] * 12),
    ],
    ids=str,
)
def test_schedule_values(schedule: FractionSchedule, values: list[float]) -> None:
    """Steps count from 1: start at step 1, end at ``steps`` and after."""
    assert [schedule.at(step) for step in range(1, len(values) + 1)] == values
    assert schedule.at(0) == values[0]
    assert (schedule.lowest, schedule.highest) == (min(values), max(values))


@settings(deadline=None, max_examples=200, derandomize=True)
@given(start=fractions, end=fractions, steps=st.integers(2, 10_000), step=st.integers(1, 20_000))
def test_schedule_is_a_line(start: float, end: float, steps: int, step: int) -> None:
    """It begins and ends where it says, moves by equal amounts, and never leaves the range between."""
    schedule = FractionSchedule(start, end, steps)
    assert schedule.at(1) == start
    assert schedule.at(steps) == schedule.at(steps + step) == pytest.approx(end, abs=1e-12)
    assert schedule.lowest - 1e-12 <= schedule.at(step) <= schedule.highest + 1e-12
    change = schedule.at(step + 1) - schedule.at(step)
    expected = (end - start) / (steps - 1) if step < steps else 0.0
    assert change == pytest.approx(expected, abs=1e-12)
