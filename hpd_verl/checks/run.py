"""The settings of a run: HPD's own, and those of verl that would fail late or do something else than they say."""

import importlib.util
import math
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from hpd_verl.checks.settings import (
    AGGREGATION,
    ANYTHING,
    COUNT,
    COUNT_OR_NULL,
    FILES_OR_NULL,
    FREQUENCY,
    FROM_ZERO,
    INTEGER,
    MAPPING,
    RATE,
    SAMPLES,
    SHARE,
    SWITCH,
    TEXT,
    TEXT_OR_NULL,
    Rule,
    check_engine,
    check_known,
    check_lora,
    check_optimiser,
    check_values,
    checkpoint_rules,
    engine_rules,
    is_integer,
    model_rules,
    on_cpu,
    one_of,
    only,
    optimiser_rules,
    takes_hdfs,
)
from hpd_verl.config import PREFIX, HPDConfig, Refused, choose_pipeline, needs_rollout_server, require
from hpd_verl.data.files import as_list
from hpd_verl.teacher.disk_store import check_space
from hpd_verl.teacher.store import DIR_SETTING, GIB, check_memory_store

_COMMON: dict[str, Rule] = {
    "data.train_batch_size": COUNT,
    "data.max_prompt_length": COUNT,
    "data.max_response_length": COUNT,
    "data.train_files": FILES_OR_NULL,
    "data.val_files": FILES_OR_NULL,
    "data.train_max_samples": SAMPLES,
    "data.val_max_samples": SAMPLES,
    "data.prompt_key": TEXT,
    "data.use_shm": SWITCH,
    "data.filter_overlong_prompts": SWITCH,
    "data.apply_chat_template_kwargs": MAPPING,
    "data.apply_chat_template_kwargs.*": ANYTHING,
    "trainer.n_gpus_per_node": COUNT,
    "trainer.nnodes": COUNT,
    "trainer.total_epochs": COUNT,
    "trainer.total_training_steps": COUNT_OR_NULL,
    "trainer.resume_mode": one_of("auto", "disable", "resume_path"),
    "trainer.resume_from_path": TEXT_OR_NULL,
    "trainer.project_name": TEXT,
    "trainer.experiment_name": TEXT,
    "trainer.default_hdfs_dir": (takes_hdfs, "give a folder, null, or an address of hdfs where its command is there"),
}

_NO_KL = "HPD's loss already holds the teacher"
_NO_REWARDS = "HPD takes no advantages of rewards"

MAIN_PPO_RULES: dict[str, Rule] = {
    **_COMMON,
    "data.gen_batch_size": COUNT_OR_NULL,
    "data.val_batch_size": COUNT_OR_NULL,
    "data.dataloader_num_workers": FROM_ZERO,
    "data.filter_overlong_prompts_workers": COUNT_OR_NULL,
    "data.shuffle": SWITCH,
    "data.validation_shuffle": SWITCH,
    "data.truncation": one_of("error", "left", "right", "middle"),
    "trainer.save_freq": INTEGER,
    "trainer.test_freq": INTEGER,
    "trainer.val_before_train": SWITCH,
    "trainer.val_only": SWITCH,
    "trainer.balance_batch": SWITCH,
    "trainer.critic_warmup": only(0, "HPD has no critic, and verl would skip the first updates; leave it out"),
    "trainer.max_actor_ckpt_to_keep": COUNT_OR_NULL,
    "actor_rollout_ref.actor.ppo_mini_batch_size": COUNT,
    "actor_rollout_ref.actor.ppo_epochs": COUNT,
    "actor_rollout_ref.actor.ppo_micro_batch_size": only(None, "set ppo_micro_batch_size_per_gpu instead"),
    "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu": COUNT_OR_NULL,
    "actor_rollout_ref.actor.ppo_max_token_len_per_gpu": COUNT,
    "actor_rollout_ref.actor.use_dynamic_bsz": SWITCH,
    "actor_rollout_ref.actor.shuffle": SWITCH,
    "actor_rollout_ref.actor.calculate_entropy": SWITCH,
    "actor_rollout_ref.actor.clip_ratio": RATE,
    "actor_rollout_ref.actor.clip_ratio_low": RATE,
    "actor_rollout_ref.actor.clip_ratio_high": RATE,
    "actor_rollout_ref.actor.ulysses_sequence_parallel_size": COUNT,
    "actor_rollout_ref.actor.entropy_coeff": RATE,
    "actor_rollout_ref.actor.loss_agg_mode": AGGREGATION,
    "actor_rollout_ref.actor.loss_scale_factor": COUNT_OR_NULL,
    "actor_rollout_ref.actor.qat.enable": only(False, "quantisation-aware training is not supported; leave it out"),
    "actor_rollout_ref.actor.kl_loss_coef": only(0.001, f"{_NO_KL}; leave it out"),
    "actor_rollout_ref.actor.kl_loss_type": only("low_var_kl", f"{_NO_KL}; leave it out"),
    "algorithm.gamma": only(1.0, f"{_NO_REWARDS}; leave it out"),
    "algorithm.lam": only(1.0, f"{_NO_REWARDS}; leave it out"),
    "algorithm.use_pf_ppo": only(False, f"{_NO_REWARDS}; leave it out"),
    "algorithm.norm_adv_by_std_in_grpo": only(True, f"{_NO_REWARDS}; leave it out"),
    "algorithm.kl_ctrl.kl_coef": only(0.001, f"{_NO_KL}; leave it out"),
    **optimiser_rules("actor_rollout_ref.actor.optim"),
    **checkpoint_rules("actor_rollout_ref.actor.checkpoint"),
    **model_rules("actor_rollout_ref.model", trained=True, uses_megatron_lora=True),
    **model_rules("actor_rollout_ref.ref.model", trained=False),
    "actor_rollout_ref.ref.ulysses_sequence_parallel_size": COUNT,
    "actor_rollout_ref.ref.log_prob_micro_batch_size": only(None, "set log_prob_micro_batch_size_per_gpu instead"),
    "actor_rollout_ref.ref.log_prob_micro_batch_size_per_gpu": COUNT_OR_NULL,
    "actor_rollout_ref.ref.log_prob_max_token_len_per_gpu": COUNT,
    "actor_rollout_ref.ref.log_prob_use_dynamic_bsz": SWITCH,
    "actor_rollout_ref.rollout.n": COUNT,
    "actor_rollout_ref.rollout.temperature": RATE,
    "actor_rollout_ref.rollout.tensor_model_parallel_size": COUNT,
    "actor_rollout_ref.rollout.gpu_memory_utilization": SHARE,
    "actor_rollout_ref.rollout.log_prob_micro_batch_size": only(None, "set log_prob_micro_batch_size_per_gpu instead"),
    "actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu": COUNT_OR_NULL,
    "actor_rollout_ref.rollout.log_prob_max_token_len_per_gpu": COUNT,
    "actor_rollout_ref.rollout.log_prob_use_dynamic_bsz": SWITCH,
}
"""Of main_ppo. The engines' rules depend on their strategy."""

_MAIN_PPO_NODES = (
    "actor_rollout_ref.model",
    "actor_rollout_ref.ref.model",
    "actor_rollout_ref.actor.optim",
    "actor_rollout_ref.actor.checkpoint",
    "actor_rollout_ref.actor.fsdp_config",
    "actor_rollout_ref.ref.fsdp_config",
)
"""Whose every setting has a rule."""

_BY_DATA = "data.{} holds for student and teacher; leave it out"
_NOT_READ = "this trainer does not read it; leave it out"

SFT_RULES: dict[str, Rule] = {
    **_COMMON,
    "data.hpd.*": ANYTHING,  # algorithm.hpd
    "data.use_dynamic_bsz": SWITCH,
    "data.micro_batch_size_per_gpu": COUNT,
    "data.max_token_len_per_gpu": COUNT,
    "data.num_workers": FROM_ZERO,
    "data.seed": (is_integer, "give an integer, the seed of the order of the rows"),
    "data.pad_mode": only("no_padding", "keep no_padding"),
    "data.tools_key": TEXT,
    "data.messages_key": only("messages", "the prompt's column is data.prompt_key; leave it out"),
    "data.enable_thinking_key": only("enable_thinking", f"{_NOT_READ}; data.apply_chat_template_kwargs has it"),
    "data.enable_thinking_default": only("none", f"{_NOT_READ}; data.apply_chat_template_kwargs has it"),
    "data.max_length": only(1024, "lengths are data.max_prompt_length and data.max_response_length; leave it out"),
    "data.truncation": only(
        "error", "algorithm.hpd.overlong_demonstration says what becomes of long rows; leave it out"
    ),
    "data.balance_dp_token": only(False, _NOT_READ),
    "data.custom_cls.path": only(None, "the rows are demonstrations, read by this trainer; leave it out"),
    "data.custom_cls.name": only(None, "the rows are demonstrations, read by this trainer; leave it out"),
    "data.ignore_input_ids_mismatch": only(False, _NOT_READ),
    "trainer.default_local_dir": TEXT,
    "trainer.save_freq": FREQUENCY,
    "trainer.test_freq": FREQUENCY,
    "trainer.max_ckpt_to_keep": COUNT_OR_NULL,
    "trainer.loss_agg_mode": AGGREGATION,
    "trainer.logger": ANYTHING,  # check_trackers
    "trainer.device": TEXT,  # set by the platform
    "trainer.seed": only(1, f"{PREFIX}.seed is that of the draws, data.seed that of the rows' order; leave it out"),
    "trainer.balance_batch": only(True, _NOT_READ),
    "trainer.profile_interval": only([-1, -1], _NOT_READ),
    "profiler.enable": only(False, _NOT_READ),
    "profiler.*": ANYTHING,  # nothing without enable
    "teacher.model.path": TEXT_OR_NULL,
    "algorithm.hpd.*": ANYTHING,  # HPDConfig
    **optimiser_rules("optim"),
    **checkpoint_rules("checkpoint"),
    **model_rules("model", trained=True),
    **model_rules("teacher.model", trained=False),
    **engine_rules("engine", trained=True, strategy="fsdp2"),
    **engine_rules("teacher.engine", trained=False, strategy="fsdp2"),
    "engine.strategy": only("fsdp2", "choose fsdp2"),
    "teacher.engine.strategy": only("fsdp2", "choose fsdp2"),
    **{
        f"{node}.{key}": (lambda value: False, _BY_DATA.format(of_data))
        for node in ("engine", "teacher.engine")
        for key, of_data in {
            "infer_max_token_len_per_gpu": "max_token_len_per_gpu",
            "max_token_len_per_gpu": "max_token_len_per_gpu",
            "infer_micro_batch_size_per_gpu": "micro_batch_size_per_gpu",
            "micro_batch_size_per_gpu": "micro_batch_size_per_gpu",
            "use_dynamic_bsz": "use_dynamic_bsz",
        }.items()
    },
}
"""Of the lean trainer: of all its settings."""


_TRACKERS = {
    "console": None,
    "file": None,
    "wandb": "wandb",
    "tracking": "wandb",
    "trackio": "trackio",
    "mlflow": "mlflow",
    "swanlab": "swanlab",
    "tensorboard": "tensorboard",
    "clearml": "clearml",
    "vemlp_wandb": "volcengine_ml_platform",
    "rl_insight": "rl_insight",
}
"""verl's names for ``trainer.logger``, with the package that each needs beyond verl's own."""


def check_trackers(config: DictConfig) -> None:
    """Check that verl knows the run's trackers and that their packages are installed.

    Raises:
        ValueError: the first of which that is not so.
    """
    setting = "trainer.logger"
    for name in as_list(OmegaConf.select(config, setting)):
        require(name in _TRACKERS, setting, name, f"verl knows no such tracker; choose of {', '.join(_TRACKERS)}")
        package = _TRACKERS[name]
        require(
            package is None or importlib.util.find_spec(package) is not None,
            setting,
            name,
            f"its package {package} is not installed; pip install it, or choose another tracker",
        )


def _check_parallel_sizes(config: DictConfig, ranks: int, counted: str) -> None:
    for role in ("actor", "ref"):
        node = config.actor_rollout_ref[role]
        size = node.get("ulysses_sequence_parallel_size", 1)
        setting = f"actor_rollout_ref.{role}.ulysses_sequence_parallel_size"
        require(ranks % size == 0, setting, size, f"must divide the ranks, {counted}")
        setting = f"actor_rollout_ref.{role}.fsdp_config.fsdp_size"
        _check_group(setting, OmegaConf.select(node, "fsdp_config.fsdp_size"), ranks, counted)


def _check_group(setting: str, size: Any, ranks: int, counted: str) -> None:
    """A group of ranks within which weights are sharded."""
    if size is None or size < 0 or size >= ranks:
        return  # one group of all ranks
    require(ranks % size == 0, setting, size, f"must divide the ranks, {counted} ({ranks})")


def _check_budget(config: DictConfig, budgets: Mapping[str, tuple[bool, int]]) -> None:
    """A micro-batch that is packed by tokens must hold the longest row.

    Args:
        budgets: setting to (batches are packed by tokens, ranks that share a sequence).
    """
    data = config.data
    longest = data.max_prompt_length + data.max_response_length
    for setting, (is_dynamic, shared) in budgets.items():
        budget = OmegaConf.select(config, setting)
        require(
            not is_dynamic or budget * shared >= longest,
            setting,
            budget,
            f"below data.max_prompt_length + data.max_response_length = {longest}, and a row must fit; raise it",
        )


def check_main_ppo_engines(config: DictConfig) -> None:
    """Check the settings of main_ppo's two engines, and that the nodes around them have no others than verl knows."""
    nodes, rules = config.actor_rollout_ref, dict(MAIN_PPO_RULES)
    for role, trained in (("actor", True), ("ref", False)):
        node, strategy = f"actor_rollout_ref.{role}.fsdp_config", nodes[role].strategy
        own = engine_rules(node, trained, strategy)
        sharing = nodes[role].get("ulysses_sequence_parallel_size", 1)
        own[f"{node}.strategy"] = one_of("fsdp", strategy)
        own[f"{node}.ulysses_sequence_parallel_size"] = one_of(*dict.fromkeys((1, sharing)))
        check_values(config, own)
        check_engine(config, node)
        rules |= own
    check_known(config, _MAIN_PPO_NODES, rules)
    check_lora(config, "actor_rollout_ref.model", trained=True)
    check_lora(config, "actor_rollout_ref.ref.model", trained=False)
    check_optimiser(config, "actor_rollout_ref.actor.optim")


def _check_micro_batches(config: DictConfig, rows_by_setting: Mapping[str, tuple[bool, int]]) -> None:
    """Micro-batches of fixed size must fill what a rank gets.

    Args:
        rows_by_setting: setting to (batches are packed by tokens, rows of a rank).
    """
    for setting, (is_dynamic, rows) in rows_by_setting.items():
        size = OmegaConf.select(config, setting)
        if not is_dynamic:
            require(size is not None, setting, size, "micro-batches are not packed by tokens; give their size in rows")
            require(rows % size == 0, setting, size, f"must divide the {rows} sequences that a rank gets at once")


def check_ranks(config: DictConfig, hpd: HPDConfig) -> None:
    """Check that an update's sequences divide among main_ppo's ranks.

    An update takes ``ppo_mini_batch_size * rollout.n`` sequences, in equal parts a data-parallel rank. verl pads a
    batch to whole updates only, and passes without an update take unequal parts.

    Raises:
        ValueError: they do not.
    """
    actor, rollout = config.actor_rollout_ref.actor, config.actor_rollout_ref.rollout
    ranks = config.trainer.n_gpus_per_node * config.trainer.nnodes
    counted = f"trainer.n_gpus_per_node * trainer.nnodes = {ranks}"
    _check_parallel_sizes(config, ranks, counted)
    data_parallel = ranks // actor.get("ulysses_sequence_parallel_size", 1)
    batch, mini_batch = config.data.train_batch_size, actor.ppo_mini_batch_size
    name = "data.train_batch_size" if batch == mini_batch else "actor_rollout_ref.actor.ppo_mini_batch_size"
    multiple = data_parallel // math.gcd(data_parallel, rollout.n)
    require(
        mini_batch % multiple == 0,
        name,
        mini_batch,
        f"an update's sequences must divide among {data_parallel} data-parallel ranks ({counted}"
        + (", over Ulysses' size" if data_parallel != ranks else "")
        + f"); choose a multiple of {multiple}",
    )
    require(
        actor.use_dynamic_bsz or batch * rollout.n % ranks == 0,
        "data.train_batch_size",
        batch,
        f"without actor_rollout_ref.actor.use_dynamic_bsz verl wants a multiple of all ranks, {counted}",
    )
    require(
        not actor.shuffle or batch == mini_batch or data_parallel == 1,
        "actor_rollout_ref.actor.shuffle",
        actor.shuffle,
        f"each of {data_parallel} data-parallel ranks would shuffle its own rows, and the updates depend on their "
        "number; leave it false: data.shuffle shuffles the rows",
    )
    pipeline, _ = choose_pipeline(config, hpd)
    ref = config.actor_rollout_ref.ref
    updated, whole = mini_batch * rollout.n // data_parallel, batch * rollout.n // data_parallel
    per_rank = {"actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu": (bool(actor.use_dynamic_bsz), updated)}
    if pipeline == "staged":
        per_rank["actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu"] = (
            bool(rollout.log_prob_use_dynamic_bsz),
            whole,
        )
    of_teacher = batch * rollout.n * ref.get("ulysses_sequence_parallel_size", 1) // ranks
    per_rank["actor_rollout_ref.ref.log_prob_micro_batch_size_per_gpu"] = (
        bool(ref.log_prob_use_dynamic_bsz),
        of_teacher if pipeline == "staged" else 0,  # in one pass the teacher's rows are filled up
    )
    _check_micro_batches(config, per_rank)
    require(
        actor.use_dynamic_bsz == rollout.log_prob_use_dynamic_bsz,
        "actor_rollout_ref.rollout.log_prob_use_dynamic_bsz",
        rollout.log_prob_use_dynamic_bsz,
        f"verl wants what actor_rollout_ref.actor.use_dynamic_bsz={actor.use_dynamic_bsz} is; leave it out",
    )
    shared = {
        role: config.actor_rollout_ref[role].get("ulysses_sequence_parallel_size", 1) for role in ("actor", "ref")
    }
    budgets = {
        "actor_rollout_ref.actor.ppo_max_token_len_per_gpu": (bool(actor.use_dynamic_bsz), shared["actor"]),
        "actor_rollout_ref.ref.log_prob_max_token_len_per_gpu": (bool(ref.log_prob_use_dynamic_bsz), shared["ref"]),
    }
    if pipeline == "staged":
        budgets["actor_rollout_ref.rollout.log_prob_max_token_len_per_gpu"] = (
            bool(rollout.log_prob_use_dynamic_bsz),
            shared["actor"],
        )
    _check_budget(config, budgets)
    if needs_rollout_server(config, hpd):
        size = rollout.tensor_model_parallel_size * rollout.data_parallel_size * rollout.pipeline_model_parallel_size
        require(
            ranks % size == 0,
            "actor_rollout_ref.rollout.tensor_model_parallel_size",
            rollout.tensor_model_parallel_size,
            f"a rollout server takes {size} ranks, which must divide {counted}",
        )


def sft_ulysses(config: DictConfig) -> int:
    """Ranks that share a sequence in the lean trainer."""
    return int(config.engine.get("ulysses_sequence_parallel_size", 1))


def check_sft_ranks(config: DictConfig, ranks: int, fills_store: bool) -> None:
    """Check that a batch divides among the lean trainer's ranks; filling the store takes any part of it.

    Raises:
        ValueError: it does not.
    """
    batch, shared = config.data.train_batch_size, sft_ulysses(config)
    setting = "engine.ulysses_sequence_parallel_size"
    require(ranks % shared == 0, setting, shared, f"must divide the ranks, torchrun's processes ({ranks})")
    of_teacher = OmegaConf.select(config, f"teacher.{setting}")
    require(
        of_teacher in (None, shared),
        f"teacher.{setting}",
        of_teacher,
        f"student and teacher share the same sequences out; leave it out for {setting}={shared}",
    )
    ranks, counted = ranks // shared, f"torchrun's {ranks} processes" + (f" over {setting}" if shared > 1 else "")
    if fills_store:
        require(
            batch >= ranks,
            "data.train_batch_size",
            batch,
            f"less than a row for each of {ranks} data-parallel ranks ({counted}); raise it",
        )
        return
    require(
        batch % ranks == 0,
        "data.train_batch_size",
        batch,
        f"must divide among {ranks} data-parallel ranks ({counted}); choose a multiple of {ranks}",
    )
    _check_micro_batches(config, {"data.micro_batch_size_per_gpu": (bool(config.data.use_dynamic_bsz), batch // ranks)})


def check_folder(setting: str, folder: Any, what: str) -> Path:
    """Check that a folder can be made and written; nothing is left there.

    Args:
        setting: its name.
        folder: its value.
        what: it is for, in words.

    Returns:
        The folder itself, or the nearest above it that is there.

    Raises:
        ValueError: it cannot.
    """
    require(isinstance(folder, str) and folder != "", setting, folder, f"give a folder for {what}")
    missing = Path(folder).expanduser().absolute()
    existing = missing
    while not os.path.lexists(existing):
        existing = existing.parent
    require(existing.is_dir(), setting, folder, f"{existing} is not a folder; choose another place for {what}")
    try:
        with tempfile.TemporaryDirectory(prefix=".hpd_verl_", dir=existing) as trial:
            inside = Path(trial) / missing.relative_to(existing)
            inside.mkdir(parents=True, exist_ok=True)
            (inside / "trial").write_bytes(b"0")
    except OSError as error:
        raise Refused(
            f"{setting}={folder}: cannot be written ({error.strerror or error}); choose another place for {what}"
        ) from error
    return existing


def check_checkpoint_folder(folder: Any) -> None:
    """Check that the folder ``trainer.default_local_dir`` can be made and written.

    Raises:
        ValueError: it cannot.
    """
    check_folder("trainer.default_local_dir", folder, "checkpoints")


def check_store(hpd: HPDConfig) -> None:
    """Check that the teacher's store can be written, and that its disk holds what the limit allows.

    Raises:
        ValueError: it cannot, or does not.
    """
    if hpd.teacher_cache != "disk" or not hpd.needs_teacher:
        return
    check_folder(DIR_SETTING, hpd.teacher_cache_dir, "the teacher's store")
    check_space(Path(str(hpd.teacher_cache_dir)).expanduser(), int(hpd.teacher_cache_max_gib * GIB))


def _is_set(config: DictConfig, key: str) -> bool:
    return bool(OmegaConf.select(config, key, default=None))


# Settings that would silently do something else than they say, or that HPD's passes cannot serve.
_UNSUPPORTED = {
    "actor_rollout_ref.actor.use_fused_kernels": "HPD reads the student's logits, which fused kernels do not keep",
    "actor_rollout_ref.actor.use_prefix_grouper": "the prefix grouper has its own loss",
    "actor_rollout_ref.actor.pad_to_length": "verl's logits processor does not know static padding",
    "actor_rollout_ref.ref.pad_to_length": "verl's logits processor does not know static padding",
    "actor_rollout_ref.actor.use_kl_loss": "HPD's loss already holds the teacher",
    "actor_rollout_ref.actor.calculate_sum_pi_squared": "it belongs to a baseline that HPD has no use for",
    "algorithm.use_kl_in_reward": "HPD's loss already holds the teacher",
    "algorithm.filter_groups.enable": "HPD has no rewards to filter groups by",
    "algorithm.rollout_correction.bypass_mode": "HPD always takes log-probs from the student itself",
    "algorithm.rollout_correction.rollout_is": "HPD always takes log-probs from the student itself",
    "algorithm.rollout_correction.rollout_rs": "HPD always takes log-probs from the student itself",
    "distillation.enabled": "verl's own distillation is another algorithm",
    "critic.enable": "HPD has no critic",
    "reward.reward_model.enable": "HPD uses no reward model",
}


def check_config(config: DictConfig) -> HPDConfig:
    """Check a composed configuration of a run with ``algorithm=hpd``; loads nothing.

    Returns:
        The algorithm's settings.

    Raises:
        ValueError: one sentence that names the setting, what was found and what to do.
    """
    check_values(config, MAIN_PPO_RULES)
    check_main_ppo_engines(config)
    check_trackers(config)
    require(
        OmegaConf.select(config, PREFIX) is not None,
        "trainer.v1.trainer_mode",
        config.trainer.v1.trainer_mode,
        "HPD's trainer needs algorithm=hpd on the command line",
    )
    hpd = HPDConfig.from_config(config.algorithm.hpd)
    actor_rollout_ref = config.actor_rollout_ref

    teacher = OmegaConf.select(config, "actor_rollout_ref.ref.model.path")
    require(
        bool(teacher) or not hpd.needs_teacher,
        "actor_rollout_ref.ref.model.path",
        teacher,
        "give the teacher's folder or hub name",
    )
    for key, value in {
        "trainer.v1.trainer_mode": "hpd",
        "trainer.use_v1": True,
        "algorithm.adv_estimator": "hpd",
        "actor_rollout_ref.actor.policy_loss.loss_mode": "hpd",
        "actor_rollout_ref.hybrid_engine": True,
    }.items():
        found = OmegaConf.select(config, key)
        require(found == value, key, found, f"algorithm=hpd works only with {key}={value}")
    for role in ("actor", "ref"):
        strategy = actor_rollout_ref[role].strategy
        require(
            strategy in ("fsdp", "fsdp2"),
            f"actor_rollout_ref.{role}.strategy",
            strategy,
            "HPD runs on fsdp2 and fsdp; megatron and the other engines are not supported",
        )
    require(
        not on_cpu() or {actor_rollout_ref.actor.strategy, actor_rollout_ref.ref.strategy} == {"fsdp2"},
        "actor_rollout_ref.actor.strategy, actor_rollout_ref.ref.strategy",
        f"{actor_rollout_ref.actor.strategy}, {actor_rollout_ref.ref.strategy}",
        "verl's fsdp needs an accelerator; a CPU runs fsdp2",
    )
    for key, reason in _UNSUPPORTED.items():
        require(not _is_set(config, key), key, OmegaConf.select(config, key), f"not supported: {reason}; unset it")

    batch, mini_batch = config.data.train_batch_size, actor_rollout_ref.actor.ppo_mini_batch_size
    require(
        batch % mini_batch == 0,
        "actor_rollout_ref.actor.ppo_mini_batch_size",
        mini_batch,
        f"must divide data.train_batch_size={batch}",
    )
    prompts = OmegaConf.select(config, "data.gen_batch_size")
    require(
        prompts is None or batch % prompts == 0,
        "data.gen_batch_size",
        prompts,
        f"must divide data.train_batch_size={batch}",
    )
    require(
        actor_rollout_ref.actor.loss_scale_factor is not None
        or actor_rollout_ref.actor.loss_agg_mode != "seq-mean-token-sum-norm",
        "actor_rollout_ref.actor.loss_scale_factor",
        None,
        "verl would divide by a micro-batch's longest response; leave it out for data.max_response_length, or give a "
        "number",
    )
    likelihood = hpd.objectives.names(lambda bound: bound.objective.is_likelihood)
    epochs = actor_rollout_ref.actor.ppo_epochs
    require(
        epochs == 1 or not likelihood,
        "actor_rollout_ref.actor.ppo_epochs",
        epochs,
        f"objective {likelihood} has no ratio to clip; repeat by trainer.total_epochs instead",
    )
    require(
        actor_rollout_ref.rollout.n == 1 or hpd.schedule.lowest == 1.0,
        "actor_rollout_ref.rollout.n",
        actor_rollout_ref.rollout.n,
        f"several answers a prompt need {PREFIX}.on_policy_fraction=1: a demonstration is one answer",
    )
    if needs_rollout_server(config, hpd):
        require(
            actor_rollout_ref.rollout.name != "hf",
            "actor_rollout_ref.rollout.name",
            actor_rollout_ref.rollout.name,
            "rollouts come from a server: choose vllm or sglang",
        )
    pipeline, reason = choose_pipeline(config, hpd)
    require(
        bool(teacher) or pipeline == "one_pass",
        "actor_rollout_ref.ref.model.path",
        teacher,
        f"the staged pipeline ({reason}) runs a teacher with every objective; give one",
    )
    check_ranks(config, hpd)
    check_memory_store(hpd.teacher_cache, config.trainer.n_gpus_per_node * config.trainer.nnodes)
    return hpd


def check_sft_config(config: DictConfig, ranks: int = 1, fills_store: bool = False) -> HPDConfig:
    """Check a composed configuration of the lean trainer (configs/sft_trainer.yaml); loads nothing.

    Args:
        config: the composed configuration.
        ranks: processes that torchrun has started.
        fills_store: the teacher's store is to be filled, without training.

    Returns:
        The algorithm's settings.

    Raises:
        ValueError: one sentence that names the setting, what was found and what to do.
    """
    check_values(config, SFT_RULES)
    check_known(config, tuple(map(str, config)), SFT_RULES)
    check_trackers(config)
    hpd = HPDConfig.from_config(config.algorithm.hpd)
    require(
        bool(config.teacher.model.path) or not (hpd.needs_teacher or fills_store),
        "teacher.model.path",
        config.teacher.model.path,
        "give the teacher's folder or hub name",
    )
    rollouts = "this trainer has demonstrations only; python -m verl.trainer.main_ppo algorithm=hpd makes rollouts"
    require(hpd.schedule.highest == 0, f"{PREFIX}.on_policy_fraction", hpd.on_policy_fraction, rollouts)
    require(
        hpd.missing_demonstration == "error", f"{PREFIX}.missing_demonstration", hpd.missing_demonstration, rollouts
    )
    require(hpd.pipeline in ("auto", "one_pass"), f"{PREFIX}.pipeline", hpd.pipeline, "this trainer is one_pass only")
    check_engine(config, "engine")
    check_engine(config, "teacher.engine", inherited="engine")
    check_optimiser(config, "optim")
    check_lora(config, "model", trained=True)
    check_lora(config, "teacher.model", trained=False)
    data = config.data
    _check_budget(config, {"data.max_token_len_per_gpu": (bool(data.use_dynamic_bsz), sft_ulysses(config))})
    for role in ("engine", "teacher.engine"):
        _check_group(f"{role}.fsdp_size", OmegaConf.select(config, f"{role}.fsdp_size"), ranks, "torchrun's processes")
    asked = config.trainer.n_gpus_per_node * config.trainer.nnodes
    require(
        asked in (1, ranks),
        "trainer.n_gpus_per_node",
        config.trainer.n_gpus_per_node,
        f"torchrun has started {ranks} processes, which decide; leave it out",
    )
    check_sft_ranks(config, ranks, fills_store)
    check_memory_store(hpd.teacher_cache, ranks)
    return hpd
