"""The check of a whole run: what cannot work is refused before anything loads, by name."""

import copy
import functools
import re
from contextlib import nullcontext
from pathlib import Path

import pytest
from conftest import main_ppo_config, sft_config
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf, open_dict, read_write
from verl.utils.tracking import Tracking

from hpd_verl.checks import run
from hpd_verl.checks.folders import check_checkpoint_folder
from hpd_verl.checks.run import check_config, check_sft_config
from hpd_verl.config import HPDConfig
from hpd_verl.objectives import registry
from hpd_verl.run.choices import choose_pipeline, compares_rollouts, needs_rollout_server, updates_per_batch

MODELS = ("actor_rollout_ref.model.path=S", "actor_rollout_ref.ref.model.path=T", "data.train_files=x")


@functools.cache
def base() -> DictConfig:
    config: DictConfig = main_ppo_config(*MODELS)
    return config


def composed(*overrides: str) -> DictConfig:
    """The configuration of a run; composed once, for Hydra takes a second."""
    config = copy.deepcopy(base())
    for override in OverridesParser.create().parse_overrides(list(overrides)):
        with read_write(config), open_dict(config) if override.is_add() else nullcontext():
            OmegaConf.update(config, override.key_or_group, override.value())
    return config


ACTOR = "actor_rollout_ref.actor"
ULYSSES = "actor_rollout_ref.{}.ulysses_sequence_parallel_size=2"
FSDP_SIZE = "actor_rollout_ref.actor.fsdp_config.fsdp_size={}"
ROLLOUTS = "algorithm.hpd.on_policy_fraction=1"
NO_TEACHER = ("actor_rollout_ref.ref.model.path=null", "algorithm.hpd.objective=sft")


def batches(batch: int, mini_batch: int) -> list[str]:
    return [f"data.train_batch_size={batch}", f"actor_rollout_ref.actor.ppo_mini_batch_size={mini_batch}"]


def test_the_defaults_pass() -> None:
    config = composed()
    hpd = check_config(config)
    assert (hpd.objective, updates_per_batch(config), needs_rollout_server(config, hpd)) == ("hpd", 1, False)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["algorithm.hpd.objektive=sft"], "Key 'objektive' is not in struct"),
        (["+algorithm.hpd.objektive=sft"], r"algorithm.hpd.objektive=sft: no such setting; there are "),
        (["actor_rollout_ref.ref.model.path=null"], "actor_rollout_ref.ref.model.path=None: give the teacher"),
        (["actor_rollout_ref.actor.strategy=megatron"], "actor_rollout_ref.actor.strategy=megatron: HPD runs on"),
        (["actor_rollout_ref.actor.strategy=fsdp"], "=fsdp, fsdp: verl's fsdp needs an accelerator"),
        (["actor_rollout_ref.model.use_fused_kernels=true"], "use_fused_kernels=True: not supported"),
        (["actor_rollout_ref.actor.use_kl_loss=true"], "use_kl_loss=True: not supported"),
        (["algorithm.adv_estimator=gae"], "algorithm.adv_estimator=gae: algorithm=hpd works only with"),
        (["trainer.v1.trainer_mode=sync"], "trainer.v1.trainer_mode=sync: algorithm=hpd works only with"),
        (["actor_rollout_ref.actor.ppo_mini_batch_size=100"], "ppo_mini_batch_size=100: must divide data.train_batch"),
        (["algorithm.hpd.objective=sft", "actor_rollout_ref.actor.ppo_epochs=2"], "ppo_epochs=2: objective sft has no"),
        (["actor_rollout_ref.rollout.n=2"], "actor_rollout_ref.rollout.n=2: several answers per prompt need"),
        (["algorithm.hpd.on_policy_fraction={start: 0, end: 1}"], "on_policy_fraction={'start': 0, 'end': 1}: a sche"),
        (
            ["+actor_rollout_ref.actor.fsdp_config.mixed_precision={param_dtype: fp16}"],
            "actor_rollout_ref.actor.fsdp_config.mixed_precision.param_dtype=fp16: the student is not trained in float",
        ),
        (["actor_rollout_ref.actor.fsdp_config.model_dtype=float16"], "fsdp_config.model_dtype=float16: the student"),
        (["actor_rollout_ref.actor.fsdp_config.dtype=float16"], "actor.fsdp_config.dtype=float16: the student is not"),
        (["algorithm.hpd.objective=opd"], "algorithm.hpd.objective=opd: opd is for the student's own rollouts"),
        (["data.train_batch_size=0"], "data.train_batch_size=0: give an integer of at least 1"),
        (["data.train_batch_size=many"], "data.train_batch_size=many: give an integer"),
        (["data.train_batch_size=8.0"], "data.train_batch_size=8.0: give an integer"),
        (["data.gen_batch_size=3"], "data.gen_batch_size=3: must divide data.train_batch_size=256"),
        (["data.max_prompt_length=0"], "data.max_prompt_length=0: give an integer of at least 1"),
        (["data.max_response_length=-1"], "data.max_response_length=-1: give an integer of at least 1"),
        (["trainer.n_gpus_per_node=0"], "trainer.n_gpus_per_node=0: give an integer of at least 1"),
        (["trainer.total_epochs=0"], "trainer.total_epochs=0: give an integer of at least 1"),
        (["trainer.total_training_steps=0"], "trainer.total_training_steps=0: give an integer of at least 1"),
        (["trainer.resume_mode=always"], "trainer.resume_mode=always: choose auto, disable or resume_path"),
        (
            ["trainer.logger=[console,wandbb]"],
            "trainer.logger=wandbb: verl knows no such tracker; choose from console, ",
        ),
        (["trainer.logger=vemlp_wandb"], "trainer.logger=vemlp_wandb: its package volcengine_ml_platform is not insta"),
        (["actor_rollout_ref.actor.optim.lr=-1e-5"], "actor_rollout_ref.actor.optim.lr=-1e-05: give a number of at"),
        (["actor_rollout_ref.actor.optim.lr=nan"], "actor_rollout_ref.actor.optim.lr=nan: give a number of at least"),
        (["actor_rollout_ref.actor.optim.lr=fast"], "actor_rollout_ref.actor.optim.lr=fast: give a number of at"),
        (["actor_rollout_ref.actor.optim.lr_scheduler_type=line"], "lr_scheduler_type=line: choose constant or cosine"),
        (["actor_rollout_ref.actor.optim.clip_grad=0"], "actor_rollout_ref.actor.optim.clip_grad=0: give a number"),
        (["actor_rollout_ref.actor.loss_agg_mode=mean"], "actor.loss_agg_mode=mean: choose token-mean, "),
        (["trainer.n_gpus_per_node=3"], "data.train_batch_size=256: an update's sequences must divide among 3 data-"),
        (
            ["trainer.n_gpus_per_node=4", "trainer.nnodes=2", *batches(24, 12)],
            "actor_rollout_ref.actor.ppo_mini_batch_size=12: an update's sequences must divide among 8 data-parallel "
            "ranks (trainer.n_gpus_per_node * trainer.nnodes = 8); choose a multiple of 8",
        ),
        (
            ["trainer.n_gpus_per_node=8", ULYSSES.format("actor"), *batches(6, 6)],
            "data.train_batch_size=6: an update's sequences must divide among 4 data-parallel ranks",
        ),
        (
            ["trainer.n_gpus_per_node=3", ULYSSES.format("actor")],
            "parallel_size=2: must divide the ranks, trainer.",
        ),
        (["trainer.n_gpus_per_node=4", FSDP_SIZE.format(3)], "fsdp_config.fsdp_size=3: must divide the ranks"),
        (
            ["actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=3", "trainer.n_gpus_per_node=2", *batches(16, 8)],
            "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=3: must divide the 4 sequences of a rank",
        ),
        (
            ["actor_rollout_ref.rollout.tensor_model_parallel_size=2", "algorithm.hpd.on_policy_fraction=0.5"],
            "actor_rollout_ref.rollout.tensor_model_parallel_size=2: a rollout server takes 2 ranks",
        ),
        (
            ["trainer.n_gpus_per_node=2", *batches(8, 4), "actor_rollout_ref.actor.shuffle=true"],
            "actor_rollout_ref.actor.shuffle=True: each of the 2 data-parallel ranks would shuffle its own rows",
        ),
        (
            [f"{ACTOR}.loss_agg_mode=seq-mean-token-sum-norm", f"{ACTOR}.loss_scale_factor=null"],
            f"{ACTOR}.loss_scale_factor=None: verl would divide by a micro-batch's longest response; leave it out",
        ),
        (
            [
                *batches(12, 12),
                "algorithm.hpd.pipeline=staged",
                f"{ACTOR}.ppo_micro_batch_size_per_gpu=4",
                "actor_rollout_ref.ref.log_prob_micro_batch_size_per_gpu=5",
            ],
            "actor_rollout_ref.ref.log_prob_micro_batch_size_per_gpu=5: must divide the 12 sequences of a rank",
        ),
        ([f"{ACTOR}.loss_scale_factor=0"], f"{ACTOR}.loss_scale_factor=0: give an integer of at least 1"),
        (
            [*NO_TEACHER, "algorithm.hpd.teacher_server.n_gpus_per_node=8"],
            "algorithm.hpd.teacher_server.n_gpus_per_node=8: no objective in use needs a teacher",
        ),
        (
            ["actor_rollout_ref.ref.model.path=hdfs://teacher", "algorithm.hpd.teacher_server.n_gpus_per_node=8"],
            "actor_rollout_ref.ref.model.path=hdfs://teacher: a server that the run starts cannot fetch it",
        ),
        (
            ["algorithm.hpd.teacher_server.n_gpus_per_node=8", "algorithm.hpd.pipeline=staged"],
            "algorithm.hpd.pipeline=staged: algorithm.hpd.teacher_server.n_gpus_per_node=8 needs one_pass, which",
        ),
        (
            [*NO_TEACHER, "algorithm.hpd.pipeline=staged"],
            "actor_rollout_ref.ref.model.path=None: the staged pipeline (set) always needs a teacher",
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_work_is_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(Exception) as refusal:  # noqa: PT011 - Hydra's own exception or ValueError; the text decides
        check_config(composed(*overrides))
    assert message.replace("\\", "") in str(refusal.value)


@pytest.mark.parametrize(
    "overrides",
    [
        # 3 prompts with 4 rollouts each are 12 sequences: verl shares out sequences, not prompts.
        ["trainer.n_gpus_per_node=4", *batches(6, 3), "actor_rollout_ref.rollout.n=4", ROLLOUTS],
        ["trainer.n_gpus_per_node=8", ULYSSES.format("actor"), *batches(4, 4)],
        ["trainer.n_gpus_per_node=4", FSDP_SIZE.format(2)],
        ["trainer.n_gpus_per_node=4", FSDP_SIZE.format(16)],
        ["trainer.nnodes=2", "trainer.n_gpus_per_node=2", *batches(8, 4)],
        ["actor_rollout_ref.actor.optim.lr=0", "actor_rollout_ref.actor.optim.clip_grad=inf"],
        ["trainer.n_gpus_per_node=2", *batches(8, 8), "actor_rollout_ref.actor.shuffle=true"],
        [*batches(8, 4), "actor_rollout_ref.actor.shuffle=true"],
        ["actor_rollout_ref.actor.loss_scale_factor=null"],
        [  # one pass fills up what the teacher's micro-batches lack
            *batches(12, 12),
            f"{ACTOR}.ppo_micro_batch_size_per_gpu=4",
            "actor_rollout_ref.ref.log_prob_micro_batch_size_per_gpu=5",
        ],
        [*NO_TEACHER],
    ],
    ids=" ".join,
)
def test_what_works_is_not_refused(overrides: list[str]) -> None:
    check_config(composed(*overrides))


def test_all_trackers_of_verl_are_known() -> None:
    assert set(run._TRACKERS) == {*Tracking.supported_backend, "tracking"}


def test_checkpoint_folder(tmp_path: Path) -> None:
    """One that can be made is not made; a file on the way and a place without write access are refused."""
    check_checkpoint_folder(str(tmp_path / "a" / "b"))
    check_checkpoint_folder(str(tmp_path))
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"^trainer\.default_local_dir=.*/file/a: /.*/file is not a folder; choose"):
        check_checkpoint_folder(str(tmp_path / "file" / "a"))
    with pytest.raises(ValueError, match=r"^trainer\.default_local_dir=/proc/a/b: cannot be written \(.*\); choose"):
        check_checkpoint_folder("/proc/a/b")
    with pytest.raises(ValueError, match=r"^trainer\.default_local_dir=None: give a folder"):
        check_checkpoint_folder(None)


def chosen(*overrides: str) -> tuple[str, str]:
    config = composed(*overrides)
    return choose_pipeline(config, HPDConfig.from_config(config.algorithm.hpd))


SEVERAL_UPDATES = ("data.train_batch_size=64", "actor_rollout_ref.actor.ppo_mini_batch_size=16")
AGAINST_ONE_PASS = [
    (ULYSSES.format("ref"), "student and teacher share sequences among different numbers of ranks"),
    ("actor_rollout_ref.actor.entropy_coeff=0.1", "actor_rollout_ref.actor.entropy_coeff is set"),
    ("actor_rollout_ref.actor.strategy=fsdp", "student and teacher are not both on fsdp2"),
    ("actor_rollout_ref.ref.strategy=fsdp", "student and teacher are not both on fsdp2"),
]
NEEDING_ONE_PASS = [
    (("algorithm.hpd.teacher_cache=memory",), "algorithm.hpd.teacher_cache=memory"),
    (("algorithm.hpd.exact_kl_metrics=true",), "algorithm.hpd.exact_kl_metrics=true"),
    (("algorithm.hpd.objective=jsd_exact",), "an objective over the vocabulary (jsd_exact)"),
    (("algorithm.hpd.on_policy_objective=fkl",), "an objective over the vocabulary (fkl, hpd)"),
    (
        ("algorithm.hpd.objective=akl", "algorithm.hpd.exact_kl_metrics=true"),
        "algorithm.hpd.exact_kl_metrics=true and an objective over the vocabulary (akl)",
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


def test_the_sum_of_a_sequence_is_divided_by_the_longest_response_that_there_can_be() -> None:
    assert composed("data.max_response_length=77").actor_rollout_ref.actor.loss_scale_factor == 77


def test_one_seed() -> None:
    config = composed("algorithm.hpd.seed=7")
    models = config.actor_rollout_ref
    assert [config.data.seed, models.actor.data_loader_seed, models.actor.fsdp_config.seed] == [7, 7, 7]
    config = lean("algorithm.hpd.seed=7")
    assert [config.data.seed, config.engine.seed] == [7, 7]


ROLLOUT = "actor_rollout_ref.rollout"


@pytest.mark.parametrize(
    ("overrides", "compares"),
    [
        ([ROLLOUTS], True),
        (["algorithm.hpd.missing_demonstration=rollout"], True),
        ([], False),
        (["trainer.test_freq=1"], False),
        ([ROLLOUTS, f"{ROLLOUT}.calculate_log_probs=false"], False),
        ([ROLLOUTS, "algorithm.hpd.temperature=2"], False),
        ([ROLLOUTS, f"{ROLLOUT}.temperature=0.7", f"{ROLLOUT}.top_p=0.9"], True),
        ([ROLLOUTS, f"{ROLLOUT}.temperature=0.7", f"{ROLLOUT}.name=sglang"], False),
        ([ROLLOUTS, f"{ROLLOUT}.logprobs_mode=processed_logprobs"], True),
        ([ROLLOUTS, f"{ROLLOUT}.logprobs_mode=processed_logprobs", f"{ROLLOUT}.top_k=20"], False),
        (
            [
                *(ROLLOUTS, f"{ROLLOUT}.logprobs_mode=processed_logprobs", f"{ROLLOUT}.temperature=2"),
                "algorithm.hpd.temperature=2",
            ],
            True,
        ),
    ],
    ids=str,
)
def test_log_probs_of_one_distribution_are_compared(overrides: list[str], compares: bool) -> None:
    config = composed(*overrides)
    assert compares_rollouts(config, HPDConfig.from_config(config.algorithm.hpd)) == compares


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
    overrides = (ULYSSES.format("ref"), "actor_rollout_ref.actor.entropy_coeff=0.1", *SEVERAL_UPDATES)
    assert chosen(*overrides) == (
        "staged",
        "student and teacher share sequences among different numbers of ranks "
        "(actor_rollout_ref.actor.ulysses_sequence_parallel_size, ref.ulysses_sequence_parallel_size); "
        "actor_rollout_ref.actor.entropy_coeff is set; "
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
        f"algorithm.hpd.pipeline=staged: {need} needs one_pass, which is not what is set: choose auto or "
        "algorithm.hpd.pipeline=one_pass"
    )


@needing_one_pass
def test_needing_what_does_not_work_is_refused(overrides: tuple[str, ...], need: str) -> None:
    with pytest.raises(ValueError, match="pipeline=auto") as refusal:
        chosen(*overrides, "actor_rollout_ref.actor.entropy_coeff=0.1")
    assert str(refusal.value) == (
        f"algorithm.hpd.pipeline=auto: {need} needs one_pass, which does not work here: "
        "actor_rollout_ref.actor.entropy_coeff is set"
    )


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["teacher.model.path=null"], "teacher.model.path=None: give the teacher"),
        (["algorithm.hpd.on_policy_fraction=0.5"], "algorithm.hpd.on_policy_fraction=0.5: this trainer has demonst"),
        (["algorithm.hpd.missing_demonstration=rollout"], "algorithm.hpd.missing_demonstration=rollout: this trainer"),
        (["algorithm.hpd.pipeline=staged"], "algorithm.hpd.pipeline=staged: this trainer is one_pass only"),
        (
            ["algorithm.hpd.teacher_server.n_gpus_per_node=1"],
            "algorithm.hpd.teacher_server.n_gpus_per_node=1: this trainer starts no servers; start them (docs/served",
        ),
        (["algorithm.hpd.teacher_cache=disk"], "algorithm.hpd.teacher_cache_dir=None: "),
        (["engine.strategy=fsdp"], "engine.strategy=fsdp: choose fsdp2"),
        (["engine.ulysses_sequence_parallel_size=3"], "engine.ulysses_sequence_parallel_size=3: must divide the ranks"),
        (
            ["engine.ulysses_sequence_parallel_size=2", "+teacher.engine.ulysses_sequence_parallel_size=1"],
            "teacher.engine.ulysses_sequence_parallel_size=1: student and teacher share the same sequences; leave",
        ),
        (["engine.mixed_precision.param_dtype=fp16"], "engine.mixed_precision.param_dtype=fp16: the student is"),
        (["engine.model_dtype=fp16"], "engine.model_dtype=fp16: the student is not trained in float16"),
        (["data.seed=null"], "data.seed=None: give an integer"),
        (["model.use_fused_kernels=true"], "model.use_fused_kernels=True: not supported: HPD reads"),
        (
            ["trainer.logger=[file,vemlp_wandb]"],
            "trainer.logger=vemlp_wandb: its package volcengine_ml_platform is not",
        ),
        (["optim.lr=-1"], "optim.lr=-1: give a number of at least 0"),
        (["data.train_batch_size=0"], "data.train_batch_size=0: give an integer of at least 1"),
        (["trainer.save_freq=often"], "trainer.save_freq=often: give a number of steps, -1 for never, or after_each"),
        (["trainer.loss_agg_mode=mean"], "trainer.loss_agg_mode=mean: choose token-mean, "),
        (["data.train_batch_size=7"], "data.train_batch_size=7: must divide among 2 data-parallel ranks (torchrun's 2"),
        (
            ["data.use_dynamic_bsz=false", "data.train_batch_size=12"],
            "data.micro_batch_size_per_gpu=4: must divide the 6 sequences of a rank",
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_the_lean_trainer_refuses(overrides: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        check_sft_config(lean(*overrides), ranks=2)


def lean(*overrides: str) -> DictConfig:
    config: DictConfig = sft_config("model.path=S", "teacher.model.path=T", *overrides)
    return config


def test_what_works_in_the_lean_trainer() -> None:
    """Its defaults; no teacher where none is needed; to fill the store, any batch of at least a row a rank."""
    check_sft_config(lean())
    check_sft_config(lean("trainer.save_freq=after_each_epoch"), ranks=8)
    check_sft_config(lean("teacher.model.path=null", "algorithm.hpd.objective=sft"))
    check_sft_config(lean("data.train_batch_size=7"), ranks=2, fills_store=True)
    shared = ("engine.ulysses_sequence_parallel_size=2", "data.max_token_len_per_gpu=1536")
    check_sft_config(lean("data.train_batch_size=7", *shared), ranks=2)
    with pytest.raises(ValueError, match=r"^data\.train_batch_size=7: must divide among 2 data-parallel ranks"):
        check_sft_config(lean("data.train_batch_size=7", *shared), ranks=4)
    with pytest.raises(ValueError, match=r"^data\.train_batch_size=7: less than a row for each of 8 data-parallel"):
        check_sft_config(lean("data.train_batch_size=7"), ranks=8, fills_store=True)
    with pytest.raises(ValueError, match=r"^teacher\.model\.path=None: give the teacher's folder or hub name"):
        check_sft_config(lean("teacher.model.path=null", "algorithm.hpd.objective=sft"), fills_store=True)


NEEDING = """
from hpd_verl.objectives import objective

def needing(name, *needs):
    def loss(log_probs, context):
        return -log_probs.student_label
    return objective(name, over="token", returns="loss", needs=needs, needs_teacher=False)(loss)

summing, measuring = needing("summing", "prefix"), needing("measuring", "behaviour")
rewarding, stepping = needing("rewarding", "row.advantage"), needing("stepping", "step", "position")
"""


def test_needs_of_objectives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What an objective needs beside log-probs, and a run cannot give it, is a line before the start."""
    monkeypatch.setattr(registry, "OBJECTIVES", dict(registry.OBJECTIVES))
    (tmp_path / "needing.py").write_text(NEEDING)

    def using(name: str, *overrides: str) -> list[str]:
        return [f"algorithm.hpd.objective={tmp_path}/needing.py:{name}", *overrides]

    shared = (ULYSSES.format("actor"), ULYSSES.format("ref"), "trainer.n_gpus_per_node=2")
    for overrides in (
        using("stepping", *shared),
        using("summing", "trainer.n_gpus_per_node=2"),
        using("measuring", ROLLOUTS),
        using("rewarding", ROLLOUTS, "algorithm.hpd.score_rollouts=true"),
    ):
        config = composed(*overrides)
        assert choose_pipeline(config, check_config(config))[0] == "one_pass"
    name = "actor_rollout_ref.rollout.calculate_log_probs"
    for overrides, message in (
        (using("summing", *shared), r"actor.ulysses_sequence_parallel_size=2: objective summing sums over the earlier"),
        (
            using("measuring", ROLLOUTS, f"{name}=false"),
            f"{name}=False: objective measuring needs the rollout server's log-probs; set true",
        ),
        (using("measuring"), "on_policy_fraction=0.0: objective measuring needs log-probs or rewards of rollouts"),
        (using("rewarding", ROLLOUTS), "score_rollouts=False: objective rewarding needs rewards; set true"),
        (
            using("stepping", "algorithm.hpd.pipeline=staged"),
            r"pipeline=staged: an objective that needs more than log-probs \(stepping\) needs one_pass",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            check_config(composed(*overrides))
    paths = ["model.path=S", "teacher.model.path=T", "data.train_files=x"]
    for overrides, message in (
        (using("summing", "engine.ulysses_sequence_parallel_size=2"), "engine.ulysses_sequence_parallel_size=2: objec"),
        (
            using("measuring"),
            "algorithm.hpd.objective=.*: measuring needs log-probs or rewards of rollouts; this ",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            check_sft_config(sft_config(*paths, *overrides), ranks=2)
    check_sft_config(sft_config(*paths, *using("stepping")))
