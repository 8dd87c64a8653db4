"""The settings of a run: HPD's own, and those of verl that would fail late or do something else than they say."""

import importlib.util
import math
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from verl.utils.torch_dtypes import PrecisionType

from hpd_verl.checkpoint import ACTOR, LEAN, check_resume
from hpd_verl.config import (
    PREFIX,
    HPDConfig,
    choose_pipeline,
    is_number,
    needs_rollout_server,
    require,
)
from hpd_verl.data.files import as_list
from hpd_verl.teacher.store import check_memory_store

Rule = tuple[Callable[[Any], bool], str]
"""What a value must be, and the remedy where it is not."""


def _is_integer(value: Any) -> bool:
    return type(value) is int


_COUNT: Rule = (lambda value: _is_integer(value) and value >= 1, "give an integer of at least 1")
_COUNT_OR_NULL: Rule = (
    lambda value: value is None or (_is_integer(value) and value >= 1),
    "give an integer of at least 1, or null",
)
_FROM_ZERO: Rule = (lambda value: _is_integer(value) and value >= 0, "give an integer of at least 0")
_INTEGER: Rule = (_is_integer, "give an integer")
_INTEGER_OR_NULL: Rule = (lambda value: value is None or _is_integer(value), "give an integer, or null")
_FREQUENCY: Rule = (
    lambda value: _is_integer(value) or value == "after_each_epoch",
    "give a number of steps, -1 for never, or after_each_epoch",
)
_RATE: Rule = (lambda value: is_number(value) and value >= 0, "give a number of at least 0")
_NORM: Rule = (
    lambda value: value == math.inf or (is_number(value) and value > 0),
    "give a number above 0, or .inf for no clipping",
)
_SHARE: Rule = (lambda value: is_number(value) and 0 <= value <= 1, "give a number from 0 to 1")
_SHARE_OR_NULL: Rule = (
    lambda value: value is None or (is_number(value) and 0 <= value <= 1),
    "give a number from 0 to 1, or null",
)


def _one_of(*choices: Any) -> Rule:
    return lambda value: value in choices, f"choose {', '.join(map(str, choices[:-1]))} or {choices[-1]}"


_AGGREGATION = _one_of(
    "token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm"
)


def _optimiser(node: str) -> dict[str, Rule]:
    return {
        f"{node}.lr": _RATE,
        f"{node}.weight_decay": _RATE,
        f"{node}.clip_grad": _NORM,
        f"{node}.lr_warmup_steps_ratio": _SHARE,
        f"{node}.lr_warmup_steps": _INTEGER_OR_NULL,
        f"{node}.min_lr_ratio": _SHARE_OR_NULL,
        f"{node}.lr_scheduler_type": _one_of("constant", "cosine"),
    }


_COMMON: dict[str, Rule] = {
    "data.train_batch_size": _COUNT,
    "data.max_prompt_length": _COUNT,
    "data.max_response_length": _COUNT,
    "data.train_max_samples": _INTEGER,
    "data.val_max_samples": _INTEGER,
    "trainer.n_gpus_per_node": _COUNT,
    "trainer.nnodes": _COUNT,
    "trainer.total_epochs": _COUNT,
    "trainer.total_training_steps": _COUNT_OR_NULL,
    "trainer.resume_mode": _one_of("auto", "disable", "resume_path"),
}

MAIN_PPO_RULES: dict[str, Rule] = {
    **_COMMON,
    "data.gen_batch_size": _COUNT_OR_NULL,
    "data.val_batch_size": _COUNT_OR_NULL,
    "data.dataloader_num_workers": _FROM_ZERO,
    "trainer.save_freq": _INTEGER,
    "trainer.test_freq": _INTEGER,
    "actor_rollout_ref.actor.ppo_mini_batch_size": _COUNT,
    "actor_rollout_ref.actor.ppo_epochs": _COUNT,
    "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu": _COUNT_OR_NULL,
    "actor_rollout_ref.actor.ppo_max_token_len_per_gpu": _COUNT,
    "actor_rollout_ref.actor.ulysses_sequence_parallel_size": _COUNT,
    "actor_rollout_ref.actor.entropy_coeff": _RATE,
    "actor_rollout_ref.actor.loss_agg_mode": _AGGREGATION,
    "actor_rollout_ref.actor.loss_scale_factor": _COUNT_OR_NULL,
    **_optimiser("actor_rollout_ref.actor.optim"),
    "actor_rollout_ref.ref.ulysses_sequence_parallel_size": _COUNT,
    "actor_rollout_ref.ref.log_prob_micro_batch_size_per_gpu": _COUNT_OR_NULL,
    "actor_rollout_ref.rollout.n": _COUNT,
    "actor_rollout_ref.rollout.tensor_model_parallel_size": _COUNT,
    "actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu": _COUNT_OR_NULL,
}
"""Of main_ppo: the values that verl checks late, by an assertion, or not at all."""

SFT_RULES: dict[str, Rule] = {
    **_COMMON,
    "data.micro_batch_size_per_gpu": _COUNT,
    "data.max_token_len_per_gpu": _COUNT,
    "data.num_workers": _FROM_ZERO,
    "data.seed": (_is_integer, "give an integer, the seed of the order of the rows"),
    "trainer.save_freq": _FREQUENCY,
    "trainer.test_freq": _FREQUENCY,
    "trainer.loss_agg_mode": _AGGREGATION,
    **_optimiser("optim"),
}
"""Of the lean trainer."""


def check_values(config: DictConfig, rules: Mapping[str, Rule]) -> None:
    """Check values of settings; one that the configuration does not have is passed over.

    Raises:
        ValueError: the first that its rule refuses.
    """
    absent = object()
    for setting, (accepts, remedy) in rules.items():
        value = OmegaConf.select(config, setting, default=absent)
        if value is absent:
            continue
        require(accepts(value), setting, value, remedy)


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
        sizes = {
            f"actor_rollout_ref.{role}.ulysses_sequence_parallel_size": node.get("ulysses_sequence_parallel_size", 1),
            f"actor_rollout_ref.{role}.fsdp_config.fsdp_size": OmegaConf.select(node, "fsdp_config.fsdp_size"),
        }
        for setting, size in sizes.items():
            if size is None or (setting.endswith("fsdp_size") and not 0 <= size < ranks):
                continue  # one group of all ranks
            require(size >= 1 and ranks % size == 0, setting, size, f"must divide the ranks, {counted}")


def _check_micro_batches(config: DictConfig, rows_by_setting: Mapping[str, tuple[bool, int]]) -> None:
    """Micro-batches of fixed size must fill what a rank gets.

    Args:
        rows_by_setting: setting to (batches are packed by tokens, rows of a rank).
    """
    for setting, (is_dynamic, rows) in rows_by_setting.items():
        size = OmegaConf.select(config, setting)
        if not is_dynamic and size is not None:
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
    updated, whole = mini_batch * rollout.n // data_parallel, batch * rollout.n // data_parallel
    per_rank = {"actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu": (bool(actor.use_dynamic_bsz), updated)}
    if pipeline == "staged":
        per_rank["actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu"] = (
            bool(rollout.log_prob_use_dynamic_bsz),
            whole,
        )
        teacher = config.actor_rollout_ref.ref
        of_teacher = batch * rollout.n * teacher.get("ulysses_sequence_parallel_size", 1) // ranks
        per_rank["actor_rollout_ref.ref.log_prob_micro_batch_size_per_gpu"] = (
            bool(teacher.log_prob_use_dynamic_bsz),
            of_teacher,
        )
    _check_micro_batches(config, per_rank)
    if needs_rollout_server(config, hpd):
        size = rollout.tensor_model_parallel_size * rollout.data_parallel_size * rollout.pipeline_model_parallel_size
        require(
            ranks % size == 0,
            "actor_rollout_ref.rollout.tensor_model_parallel_size",
            rollout.tensor_model_parallel_size,
            f"a rollout server takes {size} ranks, which must divide {counted}",
        )


def check_sft_ranks(config: DictConfig, ranks: int, fills_store: bool) -> None:
    """Check that a batch divides among the lean trainer's ranks; filling the store takes any part of it.

    Raises:
        ValueError: it does not.
    """
    batch = config.data.train_batch_size
    if fills_store:
        require(batch >= ranks, "data.train_batch_size", batch, f"less than a row for each of {ranks} ranks; raise it")
        return
    require(
        batch % ranks == 0,
        "data.train_batch_size",
        batch,
        f"must divide among {ranks} ranks (torchrun's processes); choose a multiple of {ranks}",
    )
    _check_micro_batches(config, {"data.micro_batch_size_per_gpu": (bool(config.data.use_dynamic_bsz), batch // ranks)})


def check_checkpoint_folder(folder: Any) -> None:
    """Check that the folder ``trainer.default_local_dir`` can be made and written; nothing is left there.

    Raises:
        ValueError: it cannot.
    """
    setting = "trainer.default_local_dir"
    require(isinstance(folder, str) and folder != "", setting, folder, "give a folder for the checkpoints")
    missing = Path(folder).absolute()
    existing = missing
    while not os.path.lexists(existing):
        existing = existing.parent
    require(existing.is_dir(), setting, folder, f"{existing} is not a folder; choose another place for checkpoints")
    try:
        with tempfile.TemporaryDirectory(prefix=".hpd_verl_", dir=existing) as trial:
            inside = Path(trial) / missing.relative_to(existing)
            inside.mkdir(parents=True, exist_ok=True)
            (inside / "trial").write_bytes(b"0")
    except OSError as error:
        raise ValueError(
            f"{setting}={folder}: cannot be written ({error.strerror or error}); choose another place for checkpoints"
        ) from error


def _is_set(config: DictConfig, key: str) -> bool:
    return bool(OmegaConf.select(config, key, default=None))


# Settings that would silently do something else than they say, or that HPD's passes cannot serve.
_UNSUPPORTED = {
    "actor_rollout_ref.model.use_fused_kernels": "HPD reads the student's logits, which fused kernels do not keep",
    "actor_rollout_ref.actor.use_fused_kernels": "HPD reads the student's logits, which fused kernels do not keep",
    "actor_rollout_ref.actor.use_prefix_grouper": "the prefix grouper has its own loss",
    "actor_rollout_ref.actor.pad_to_length": "verl's logits processor does not know static padding",
    "actor_rollout_ref.ref.pad_to_length": "verl's logits processor does not know static padding",
    "actor_rollout_ref.actor.use_kl_loss": "HPD's loss already holds the teacher",
    "actor_rollout_ref.actor.calculate_sum_pi_squared": "it belongs to a baseline that HPD has no use for",
    "actor_rollout_ref.model.mtp.enable": "multi-token prediction heads have no teacher",
    "algorithm.use_kl_in_reward": "HPD's loss already holds the teacher",
    "algorithm.filter_groups.enable": "HPD has no rewards to filter groups by",
    "algorithm.rollout_correction.bypass_mode": "HPD always takes log-probs from the student itself",
    "algorithm.rollout_correction.rollout_is": "HPD always takes log-probs from the student itself",
    "algorithm.rollout_correction.rollout_rs": "HPD always takes log-probs from the student itself",
    "distillation.enabled": "verl's own distillation is another algorithm",
    "critic.enable": "HPD has no critic",
    "reward.reward_model.enable": "HPD uses no reward model",
    "actor_rollout_ref.actor.checkpoint.async_save": "a checkpoint could not be told complete",
}


def _refuse_float16(config: DictConfig, engine: str) -> None:
    """Gradients of the student's output layer do not survive float16, with verl's factor of 65,536 or without."""
    for name in ("mixed_precision.param_dtype", "mixed_precision.reduce_dtype", "model_dtype", "dtype"):
        setting = f"{engine}.{name}"
        found = OmegaConf.select(config, setting)
        require(
            not PrecisionType.is_fp16(found),
            setting,
            found,
            "the student is not trained in float16, whose range its gradients exceed; choose bfloat16 or float32 (the "
            "teacher may be float16)",
        )


def check_config(config: DictConfig) -> HPDConfig:
    """Check a composed configuration of a run with ``algorithm=hpd``; loads nothing.

    Returns:
        The algorithm's settings.

    Raises:
        ValueError: one sentence that names the setting, what was found and what to do.
    """
    check_values(config, MAIN_PPO_RULES)
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
        sequence_parallel = actor_rollout_ref[role].get("ulysses_sequence_parallel_size", 1)
        attention = OmegaConf.select(config, "actor_rollout_ref.model.override_config.attn_implementation")
        require(
            sequence_parallel == 1 or attention not in ("sdpa", "eager"),
            "actor_rollout_ref.model.override_config.attn_implementation",
            attention,
            f"with actor_rollout_ref.{role}.ulysses_sequence_parallel_size={sequence_parallel} each rank would see its "
            "own part of a sequence alone; unset it",
        )
    require(
        os.environ.get("VERL_PLATFORM", "").strip().lower() != "cpu"
        or {actor_rollout_ref.actor.strategy, actor_rollout_ref.ref.strategy} == {"fsdp2"},
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
    _refuse_float16(config, "actor_rollout_ref.actor.fsdp_config")
    check_resume(config.trainer, ACTOR)
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
    required = {
        f"{PREFIX}.pipeline": (hpd.pipeline, ("auto", "one_pass"), "this trainer is one_pass only"),
        "engine.strategy": (config.engine.strategy, ("fsdp2",), "choose fsdp2"),
        "engine.ulysses_sequence_parallel_size": (
            config.engine.ulysses_sequence_parallel_size,
            (1,),
            "one_pass does not share sequences out; use main_ppo with staged",
        ),
        "data.pad_mode": (config.data.pad_mode, ("no_padding",), "keep no_padding"),
        "model.use_fused_kernels": (config.model.use_fused_kernels, (False,), "HPD has its own output layer; unset it"),
        "engine.pad_to_length": (config.engine.pad_to_length, (False,), "not supported; unset it"),
    }
    for setting, (found, allowed, remedy) in required.items():
        require(found in allowed, setting, found, remedy)
    check_sft_ranks(config, ranks, fills_store)
    _refuse_float16(config, "engine")
    if not fills_store:
        check_resume(config.trainer, LEAN)
    check_memory_store(hpd.teacher_cache, ranks)
    return hpd
