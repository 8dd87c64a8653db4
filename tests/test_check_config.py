"""The check of a whole run: what cannot work is refused before anything loads, by name."""

import logging
import re
from pathlib import Path

import pytest
from conftest import WORDS, Tiny, make_model
from hydra import compose, initialize_config_dir, initialize_config_module
from omegaconf import DictConfig

from hpd_verl.config import (
    HPDConfig,
    check_config,
    check_sft_config,
    choose_pipeline,
    needs_rollout_server,
    updates_per_batch,
)
from hpd_verl.hydra_config import config_dir
from hpd_verl.models import check_models

MODELS = ("actor_rollout_ref.model.path=S", "actor_rollout_ref.ref.model.path=T", "data.train_files=x")


def composed(*overrides: str) -> DictConfig:
    with initialize_config_module("verl.trainer.config", version_base=None):
        return compose("ppo_trainer", overrides=["algorithm=hpd", *MODELS, *overrides])


def test_the_defaults_pass() -> None:
    config = composed()
    hpd = check_config(config)
    assert (hpd.objective, updates_per_batch(config), needs_rollout_server(config, hpd)) == ("hpd", 1, False)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["algorithm.hpd.objektive=sft"], "Could not override 'algorithm.hpd.objektive'"),
        (["+algorithm.hpd.objektive=sft"], r"algorithm.hpd.objektive=sft: no such setting; there are "),
        (["actor_rollout_ref.ref.model.path=null"], "actor_rollout_ref.ref.model.path=None: give the teacher"),
        (["actor_rollout_ref.actor.strategy=megatron"], "actor_rollout_ref.actor.strategy=megatron: HPD runs on"),
        (["actor_rollout_ref.actor.strategy=fsdp"], "=fsdp, fsdp: verl's fsdp needs an accelerator"),
        (
            [
                "actor_rollout_ref.actor.ulysses_sequence_parallel_size=2",
                "actor_rollout_ref.model.override_config.attn_implementation=sdpa",
            ],
            "override_config.attn_implementation=sdpa: with actor_rollout_ref.actor.ulysses",
        ),
        (["actor_rollout_ref.model.use_fused_kernels=true"], "use_fused_kernels=True: not supported"),
        (["actor_rollout_ref.actor.use_kl_loss=true"], "use_kl_loss=True: not supported"),
        (["algorithm.adv_estimator=gae"], "algorithm.adv_estimator=gae: algorithm=hpd works only with"),
        (["trainer.v1.trainer_mode=sync"], "trainer.v1.trainer_mode=sync: algorithm=hpd works only with"),
        (["actor_rollout_ref.actor.ppo_mini_batch_size=100"], "ppo_mini_batch_size=100: must divide data.train_batch"),
        (["algorithm.hpd.objective=sft", "actor_rollout_ref.actor.ppo_epochs=2"], "ppo_epochs=2: objective sft has no"),
        (["actor_rollout_ref.rollout.n=2"], "actor_rollout_ref.rollout.n=2: several answers a prompt need"),
        (["algorithm.hpd.on_policy_fraction={start: 0, end: 1}"], "on_policy_fraction={'start': 0, 'end': 1}: a sche"),
        (
            ["+actor_rollout_ref.actor.fsdp_config.mixed_precision={param_dtype: fp16}"],
            "actor_rollout_ref.actor.fsdp_config.mixed_precision.param_dtype=fp16: the student is not trained in float",
        ),
        (["actor_rollout_ref.actor.fsdp_config.model_dtype=float16"], "fsdp_config.model_dtype=float16: the student"),
        (["actor_rollout_ref.actor.fsdp_config.dtype=float16"], "actor.fsdp_config.dtype=float16: the student is not"),
        (["algorithm.hpd.objective=opd"], "algorithm.hpd.objective=opd: opd is for the student's own rollouts"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_work_is_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(Exception) as refusal:  # noqa: PT011 - Hydra's own exception or ValueError; the text decides
        check_config(composed(*overrides))
    assert message.replace("\\", "") in str(refusal.value)


def chosen(*overrides: str) -> tuple[str, str]:
    config = composed(*overrides)
    return choose_pipeline(config, HPDConfig.from_config(config.algorithm.hpd))


SEVERAL_UPDATES = ("data.train_batch_size=64", "actor_rollout_ref.actor.ppo_mini_batch_size=16")
ULYSSES = "actor_rollout_ref.{}.ulysses_sequence_parallel_size=2"
AGAINST_ONE_PASS = [
    (ULYSSES.format("actor"), "Ulysses sequence parallelism shares sequences out"),
    (ULYSSES.format("ref"), "Ulysses sequence parallelism shares sequences out"),
    ("actor_rollout_ref.actor.entropy_coeff=0.1", "actor_rollout_ref.actor.entropy_coeff is set"),
    ("actor_rollout_ref.rollout.calculate_log_probs=true", "calculate_log_probs compares with a student pass"),
    ("actor_rollout_ref.actor.strategy=fsdp", "student and teacher are not both on fsdp2"),
    ("actor_rollout_ref.ref.strategy=fsdp", "student and teacher are not both on fsdp2"),
]
NEEDING_ONE_PASS = [
    (("algorithm.hpd.teacher_cache=memory",), "algorithm.hpd.teacher_cache=memory"),
    (("algorithm.hpd.exact_kl_metrics=true",), "algorithm.hpd.exact_kl_metrics=true"),
    (("algorithm.hpd.objective=jsd_exact",), "a full-vocabulary objective (jsd_exact)"),
    (("algorithm.hpd.on_policy_objective=fkl",), "a full-vocabulary objective (fkl, hpd)"),
    (
        ("algorithm.hpd.objective=akl", "algorithm.hpd.exact_kl_metrics=true"),
        "algorithm.hpd.exact_kl_metrics=true and a full-vocabulary objective (akl)",
    ),
]
against_one_pass = pytest.mark.parametrize(("override", "reason"), AGAINST_ONE_PASS, ids=lambda value: value)
needing_one_pass = pytest.mark.parametrize(("overrides", "need"), NEEDING_ONE_PASS, ids=str)


def test_one_pass_is_the_default() -> None:
    assert chosen() == ("one_pass", "a batch is one update")


@pytest.mark.parametrize("updates", [SEVERAL_UPDATES, ("actor_rollout_ref.actor.ppo_epochs=2",)], ids=str)
def test_several_updates_are_staged_unless_set(updates: tuple[str, ...]) -> None:
    """The staged pipeline has PPO's ratio; one_pass computes the weights anew in each update."""
    assert chosen(*updates) == ("staged", "a batch is several updates")
    assert chosen(*updates, "algorithm.hpd.pipeline=one_pass") == ("one_pass", "set")
    assert chosen(*updates, "algorithm.hpd.exact_kl_metrics=true")[0] == "one_pass"


@against_one_pass
def test_what_one_pass_cannot_do_is_staged(override: str, reason: str) -> None:
    pipeline, why = chosen(override)
    assert pipeline == "staged"
    assert reason in why


@against_one_pass
def test_what_one_pass_cannot_do_is_refused_where_it_is_set(override: str, reason: str) -> None:
    with pytest.raises(ValueError, match=r"^algorithm\.hpd\.pipeline=one_pass: does not work here: ") as refusal:
        chosen(override, "algorithm.hpd.pipeline=one_pass")
    assert reason in str(refusal.value)


def test_all_reasons_are_named() -> None:
    overrides = (ULYSSES.format("actor"), "actor_rollout_ref.actor.entropy_coeff=0.1", *SEVERAL_UPDATES)
    assert chosen(*overrides) == (
        "staged",
        "Ulysses sequence parallelism shares sequences out; actor_rollout_ref.actor.entropy_coeff is set; "
        "a batch is several updates",
    )


def test_staged_where_it_is_set() -> None:
    assert chosen("algorithm.hpd.pipeline=staged") == ("staged", "set")


@needing_one_pass
def test_what_needs_one_pass_gets_it(overrides: tuple[str, ...], need: str) -> None:
    pipeline, why = chosen(*overrides)
    assert pipeline == "one_pass"
    assert why == need.replace(" and ", ", ")


@needing_one_pass
def test_staged_is_refused_where_one_pass_is_needed(overrides: tuple[str, ...], need: str) -> None:
    with pytest.raises(ValueError, match="pipeline=staged") as refusal:
        chosen(*overrides, "algorithm.hpd.pipeline=staged")
    assert str(refusal.value) == (
        f"algorithm.hpd.pipeline=staged: {need} needs one_pass, which is not what is set: choose auto"
    )


@needing_one_pass
def test_needing_what_does_not_work_is_refused(overrides: tuple[str, ...], need: str) -> None:
    with pytest.raises(ValueError, match="pipeline=auto") as refusal:
        chosen(*overrides, "actor_rollout_ref.actor.entropy_coeff=0.1")
    assert str(refusal.value) == (
        f"algorithm.hpd.pipeline=auto: {need} needs one_pass, which does not work here: "
        "actor_rollout_ref.actor.entropy_coeff is set"
    )


def check(student: Path, teacher: Path, needed_context: int = 128) -> None:
    config = composed(f"actor_rollout_ref.model.path={student}", f"actor_rollout_ref.ref.model.path={teacher}")
    check_models(
        student=config.actor_rollout_ref.model,
        teacher=config.actor_rollout_ref.ref.model,
        student_setting="actor_rollout_ref.model.path",
        teacher_setting="actor_rollout_ref.ref.model.path",
        needed_context=needed_context,
    )


def test_models_that_fit(tiny: Tiny) -> None:
    check(tiny.student, tiny.teacher)


def test_missing_teacher_folder(tiny: Tiny, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"actor_rollout_ref\.ref\.model\.path=.*nowhere: no such folder"):
        check(tiny.student, tmp_path / "nowhere")


def test_folder_without_a_model(tiny: Tiny, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"actor_rollout_ref\.ref\.model\.path=.*: cannot load its configuration"):
        check(tiny.student, tmp_path)


def test_short_context(tiny: Tiny) -> None:
    with pytest.raises(ValueError, match=r"ref\.model\.path=.*: its context has 128 tokens, .* = 129; shorten them"):
        check(tiny.student, tiny.teacher, needed_context=129)


def test_disagreeing_tokenizers(tiny: Tiny, tmp_path: Path) -> None:
    swapped = [*WORDS[:9], *reversed(WORDS[9:])]
    other = make_model(tmp_path / "other", seed=3, words=swapped)
    with pytest.raises(ValueError, match=r"tokenizers disagree at 20 token ids \(id 9: student '0', teacher '19'"):
        check(tiny.student, other)


def test_student_as_its_own_teacher_is_warned_of(tiny: Tiny, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        check(tiny.student, tiny.student)
    assert "the gap between them starts at zero" in caplog.text


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["teacher.model.path=null"], "teacher.model.path=None: give the teacher"),
        (["algorithm.hpd.on_policy_fraction=0.5"], "algorithm.hpd.on_policy_fraction=0.5: this trainer has demonst"),
        (["algorithm.hpd.missing_demonstration=rollout"], "algorithm.hpd.missing_demonstration=rollout: this trainer"),
        (["algorithm.hpd.pipeline=staged"], "algorithm.hpd.pipeline=staged: this trainer is one_pass only"),
        (["algorithm.hpd.teacher_cache=disk"], "algorithm.hpd.teacher_cache_dir=None: "),
        (["engine.strategy=fsdp"], "engine.strategy=fsdp: choose fsdp2"),
        (["engine.ulysses_sequence_parallel_size=2"], "engine.ulysses_sequence_parallel_size=2: one_pass does not"),
        (["engine.mixed_precision.param_dtype=fp16"], "engine.mixed_precision.param_dtype=fp16: the student is"),
        (["engine.model_dtype=fp16"], "engine.model_dtype=fp16: the student is not trained in float16"),
        (["data.seed=null"], "data.seed=None: give an integer"),
        (["model.use_fused_kernels=true"], "model.use_fused_kernels=True: HPD has its own output layer"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_the_lean_trainer_refuses(overrides: list[str], message: str) -> None:
    with (
        initialize_config_dir(str(config_dir()), version_base=None),
        pytest.raises(ValueError, match=re.escape(message)),
    ):
        check_sft_config(compose("sft_trainer", overrides=["model.path=S", "teacher.model.path=T", *overrides]))


def test_the_lean_trainers_defaults_pass() -> None:
    with initialize_config_dir(str(config_dir()), version_base=None):
        check_sft_config(compose("sft_trainer", overrides=["model.path=S", "teacher.model.path=T"]))
