"""The settings of a run: HPD's own, and those of verl that would fail late or do something else than they say.

Tables say what a setting may be by itself; what it must be beside others is yielded as ``Relation``, in order.
"""

import importlib.util
import math
from collections.abc import Iterator

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
    Relation,
    Rule,
    check_relations,
    checkpoint_rules,
    engine_relations,
    engine_rules,
    is_integer,
    known,
    lora_relations,
    model_rules,
    on_cpu,
    one_of,
    only,
    optimiser_relation,
    optimiser_rules,
    rules_of,
    takes_hdfs,
    unset,
    values,
)
from hpd_verl.config import PREFIX, HPDConfig
from hpd_verl.data.files import as_list, is_remote
from hpd_verl.data.teacher_prompt import max_teacher_prompt_length, placeholders
from hpd_verl.errors import require
from hpd_verl.objectives.context import ADVANTAGE, REWARD, ROW
from hpd_verl.run.choices import choose_pipeline, needs_rollout_server
from hpd_verl.several_teachers import STUDENT
from hpd_verl.teacher.store.store import check_memory_store
from hpd_verl.teacher_server import NODE, URLS

_COMMON: dict[str, Rule] = {
    **rules_of(
        "data",
        {
            "train_batch_size max_prompt_length max_response_length": COUNT,
            "train_files val_files": FILES_OR_NULL,
            "train_max_samples val_max_samples": SAMPLES,
            "prompt_key teacher_prompt_key": TEXT,
            "teacher_prompt_template": (
                lambda value: value is None or (isinstance(value, str) and bool(placeholders(value))),
                "give a text with columns in braces, as {prompt} and {demonstration}, or null",
            ),
            "max_teacher_prompt_length": COUNT_OR_NULL,
            "use_shm filter_overlong_prompts": SWITCH,
            "apply_chat_template_kwargs": MAPPING,
            "apply_chat_template_kwargs.*": ANYTHING,
        },
    ),
    **rules_of(
        "trainer",
        {
            "n_gpus_per_node nnodes total_epochs": COUNT,
            "total_training_steps": COUNT_OR_NULL,
            "resume_mode": one_of("auto", "disable", "resume_path"),
            "resume_from_path": TEXT_OR_NULL,
            "project_name experiment_name": TEXT,
            "default_hdfs_dir": (takes_hdfs, "give a folder, null, or an address of hdfs if its command is installed"),
        },
    ),
}

_HOLDS_TEACHER = "HPD's loss already holds the teacher"
_NO_REWARDS = "HPD takes no advantages of rewards; leave it out"
_NO_PADDING = "verl's logits processor does not know static padding"
_OWN_LOG_PROBS = "HPD always takes log-probs from the student itself"
_NO_MICRO_BATCH = "set {}_size_per_gpu instead"

MAIN_PPO_RULES: dict[str, Rule] = {
    **_COMMON,
    **rules_of(
        "data",
        {
            "gen_batch_size val_batch_size filter_overlong_prompts_workers": COUNT_OR_NULL,
            "dataloader_num_workers": FROM_ZERO,
            "shuffle validation_shuffle": SWITCH,
            "truncation": one_of("error", "left", "right", "middle"),
        },
    ),
    **rules_of(
        "trainer",
        {
            "save_freq test_freq": INTEGER,
            "val_before_train val_only balance_batch": SWITCH,
            "critic_warmup": only(0, "HPD has no critic, and verl would skip the first updates; leave it out"),
            "max_actor_ckpt_to_keep": COUNT_OR_NULL,
        },
    ),
    **rules_of(
        "actor_rollout_ref.actor",
        {
            "ppo_mini_batch_size ppo_epochs ppo_max_token_len_per_gpu ulysses_sequence_parallel_size": COUNT,
            "ppo_micro_batch_size": only(None, _NO_MICRO_BATCH.format("ppo_micro_batch")),
            "ppo_micro_batch_size_per_gpu loss_scale_factor": COUNT_OR_NULL,
            "use_dynamic_bsz shuffle calculate_entropy": SWITCH,
            "clip_ratio clip_ratio_low clip_ratio_high entropy_coeff": RATE,
            "loss_agg_mode": AGGREGATION,
            "qat.enable": only(False, "quantisation-aware training is not supported; leave it out"),
            "kl_loss_coef": only(0.001, f"{_HOLDS_TEACHER}; leave it out"),
            "kl_loss_type": only("low_var_kl", f"{_HOLDS_TEACHER}; leave it out"),
            "use_fused_kernels": unset("HPD reads the student's logits, which fused kernels do not keep"),
            "use_prefix_grouper": unset("the prefix grouper has its own loss"),
            "pad_to_length": unset(_NO_PADDING),
            "use_kl_loss": unset(_HOLDS_TEACHER),
            "calculate_sum_pi_squared": unset("it belongs to a baseline that HPD has no use for"),
        },
    ),
    **rules_of(
        "actor_rollout_ref.ref",
        {
            "ulysses_sequence_parallel_size log_prob_max_token_len_per_gpu": COUNT,
            "log_prob_micro_batch_size": only(None, _NO_MICRO_BATCH.format("log_prob_micro_batch")),
            "log_prob_micro_batch_size_per_gpu": COUNT_OR_NULL,
            "log_prob_use_dynamic_bsz": SWITCH,
            "pad_to_length": unset(_NO_PADDING),
        },
    ),
    **rules_of(
        "actor_rollout_ref.rollout",
        {
            "n tensor_model_parallel_size log_prob_max_token_len_per_gpu": COUNT,
            "temperature": RATE,
            "gpu_memory_utilization": SHARE,
            "log_prob_micro_batch_size": only(None, _NO_MICRO_BATCH.format("log_prob_micro_batch")),
            "log_prob_micro_batch_size_per_gpu": COUNT_OR_NULL,
            "log_prob_use_dynamic_bsz": SWITCH,
        },
    ),
    **rules_of(
        "algorithm",
        {
            "gamma lam": only(1.0, _NO_REWARDS),
            "use_pf_ppo": only(False, _NO_REWARDS),
            "norm_adv_by_std_in_grpo": only(True, _NO_REWARDS),
            "kl_ctrl.kl_coef": only(0.001, f"{_HOLDS_TEACHER}; leave it out"),
            "use_kl_in_reward": unset(_HOLDS_TEACHER),
            "filter_groups.enable": unset("HPD has no rewards to filter groups by"),
            **{
                f"rollout_correction.{name}": unset(_OWN_LOG_PROBS)
                for name in ("bypass_mode", "rollout_is", "rollout_rs")
            },
        },
    ),
    "distillation.enabled": unset("verl's own distillation is another algorithm"),
    "critic.enable": unset("HPD has no critic"),
    "reward.reward_model.enable": unset("HPD uses no reward model"),
    **optimiser_rules("actor_rollout_ref.actor.optim"),
    **checkpoint_rules("actor_rollout_ref.actor.checkpoint"),
    **model_rules("actor_rollout_ref.model", trained=True, uses_megatron_lora=True),
    **model_rules("actor_rollout_ref.ref.model", trained=False),
}
"""Rules of main_ppo. The engines' rules depend on their strategy."""

_MAIN_PPO_NODES = (
    "actor_rollout_ref.model",
    "actor_rollout_ref.ref.model",
    "actor_rollout_ref.actor.optim",
    "actor_rollout_ref.actor.checkpoint",
    "actor_rollout_ref.actor.fsdp_config",
    "actor_rollout_ref.ref.fsdp_config",
)
"""Whose every setting has a rule."""

_MAIN_PPO_NEEDS = {
    "trainer.v1.trainer_mode": "hpd",
    "trainer.use_v1": True,
    "algorithm.adv_estimator": "hpd",
    "actor_rollout_ref.actor.policy_loss.loss_mode": "hpd",
    "actor_rollout_ref.hybrid_engine": True,
}

_NOT_READ = "this trainer does not read it; leave it out"
_TEMPLATE = f"{_NOT_READ}; data.apply_chat_template_kwargs has it"
_ROWS = "the rows are demonstrations, read by this trainer; leave it out"

SFT_RULES: dict[str, Rule] = {
    **_COMMON,
    **rules_of(
        "data",
        {
            "hpd.*": ANYTHING,  # algorithm.hpd
            "use_dynamic_bsz": SWITCH,
            "micro_batch_size_per_gpu max_token_len_per_gpu": COUNT,
            "num_workers": FROM_ZERO,
            "seed": (is_integer, "give an integer, the seed of the order of the rows"),
            "pad_mode": only("no_padding", "keep no_padding"),
            "tools_key": TEXT,
            "messages_key": only("messages", "the prompt's column is data.prompt_key; leave it out"),
            "enable_thinking_key": only("enable_thinking", _TEMPLATE),
            "enable_thinking_default": only("none", _TEMPLATE),
            "max_length": only(1024, "lengths are data.max_prompt_length and data.max_response_length; leave it out"),
            "truncation": only("error", "algorithm.hpd.overlong_demonstration decides about long rows; leave it out"),
            "balance_dp_token ignore_input_ids_mismatch": only(False, _NOT_READ),
            "custom_cls.path custom_cls.name": only(None, _ROWS),
        },
    ),
    **rules_of(
        "trainer",
        {
            "default_local_dir": TEXT,
            "save_freq test_freq": FREQUENCY,
            "max_ckpt_to_keep": COUNT_OR_NULL,
            "loss_agg_mode": AGGREGATION,
            "logger": ANYTHING,  # check_trackers
            "device": TEXT,  # set by the platform
            "seed": only(1, f"{PREFIX}.seed is that of the draws, data.seed that of the rows' order; leave it out"),
            "balance_batch": only(True, _NOT_READ),
            "profile_interval": only([-1, -1], _NOT_READ),
        },
    ),
    "profiler.enable": only(False, _NOT_READ),
    "profiler.*": ANYTHING,  # nothing without enable
    "algorithm.hpd.*": ANYTHING,  # HPDConfig
    **optimiser_rules("optim"),
    **checkpoint_rules("checkpoint"),
    **model_rules("model", trained=True),
    **model_rules("teacher.model", trained=False),
    **engine_rules("engine", trained=True, strategy="fsdp2"),
    **engine_rules("teacher.engine", trained=False, strategy="fsdp2"),
    **{
        f"{node}.{name}": rule
        for node in ("engine", "teacher.engine")
        for name, rule in {
            "strategy": only("fsdp2", "choose fsdp2"),
            **{
                f"{start}{of_data}": (
                    lambda value: False,
                    f"data.{of_data} holds for student and teacher; leave it out",
                )
                for start in ("", "infer_")
                for of_data in ("max_token_len_per_gpu", "micro_batch_size_per_gpu", "use_dynamic_bsz")
            },
        }.items()
    },
}
"""Rules of all settings of the lean trainer."""


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
        require(name in _TRACKERS, setting, name, f"verl knows no such tracker; choose from {', '.join(_TRACKERS)}")
        package = _TRACKERS[name]
        require(
            package is None or importlib.util.find_spec(package) is not None,
            setting,
            name,
            f"its package {package} is not installed; pip install it, or choose another tracker",
        )


def _micro_batches(
    config: DictConfig,
    rows: str,
    tokens: str,
    by_tokens: bool,
    of_rank: int,
    sharing: int = 1,
    has_teacher: bool = False,
) -> Iterator[Relation]:
    """Micro-batches of a pass: packed by tokens they hold the longest row, of fixed size they fill what a rank gets.

    Args:
        config: the composed configuration.
        rows: setting of their size in rows.
        tokens: setting of their size in tokens.
        by_tokens: which of the two holds.
        of_rank: rows that a rank gets at once.
        sharing: ranks that share a sequence.
        has_teacher: the teacher's rows are among them.
    """
    name, longest = "max_prompt_length", config.data.max_prompt_length
    if has_teacher and max_teacher_prompt_length(config.data) > longest:
        name, longest = "max_teacher_prompt_length", max_teacher_prompt_length(config.data)
    longest += config.data.max_response_length
    if by_tokens:
        said = f"below data.{name} + data.max_response_length = {longest}; raise it"
        yield tokens, OmegaConf.select(config, tokens) * sharing >= longest, said
    else:
        size = OmegaConf.select(config, rows)
        yield rows, size is not None, "micro-batches are not packed by tokens; give their size in rows"
        yield rows, of_rank % size == 0, f"must divide the {of_rank} sequences of a rank"


def _of_teachers(
    config: DictConfig, hpd: HPDConfig, setting: str, needs_teacher: bool, student: str, engine: str, of_teacher: str
) -> Iterator[Relation]:
    """Where the teacher comes from, and what a teacher that is made of the student can be.

    Args:
        config: the composed configuration.
        hpd: the algorithm's settings.
        setting: of the trainer's own teacher's path.
        needs_teacher: the run has a teacher.
        student: the student's model node.
        engine, of_teacher: the engines' nodes.
    """
    path, has_several = OmegaConf.select(config, setting), hpd.teachers is not None
    yield setting, bool(path) or has_several or not needs_teacher, "give the teacher's folder or hub name"
    yield setting, not path or not has_several, f"{PREFIX}.teachers has the teachers, too; leave one of them out"
    ema, paths = f"{PREFIX}.teacher_ema", [path, *(each.path for each in (hpd.teachers or {}).values())]
    averages = bool(hpd.teacher_ema)
    yield (
        ema,
        hpd.teacher_ema is None or STUDENT in paths,
        f"it is of the student as its teacher: set {setting}={STUDENT}",
    )
    rank = OmegaConf.select(config, f"{student}.lora_rank", default=0)
    yield (
        ema,
        not averages or not rank,
        f"{student}.lora_rank={rank}: the running average of an adapter is not supported; give 0 for the current "
        "weights, or null for those of the start",
    )
    sizes = [OmegaConf.select(config, f"{node}.fsdp_size", default=-1) for node in (engine, of_teacher)]
    inherited = of_teacher == "teacher.engine" and OmegaConf.select(config, f"{of_teacher}.fsdp_size") is None
    yield (
        f"{of_teacher}.fsdp_size",
        not averages or inherited or sizes[0] == sizes[1],
        f"{ema}={hpd.teacher_ema} averages each rank's part of the weights; give {engine}.fsdp_size={sizes[0]} to both",
    )
    longer = config.data.get("max_teacher_prompt_length")
    if OmegaConf.select(config, "data.teacher_prompt_template") is not None:
        yield "data.teacher_prompt_template", needs_teacher, "no objective here needs a teacher; leave it out"
    yield (
        "data.max_teacher_prompt_length",
        longer is None or needs_teacher,
        "no objective here needs a teacher; leave it out",
    )


def _group(config: DictConfig, engine: str, ranks: int, counted: str) -> Relation:
    """A group of ranks within which weights are sharded; all ranks are one group."""
    size = OmegaConf.select(config, f"{engine}.fsdp_size")
    is_part = size is not None and 0 <= size < ranks
    return f"{engine}.fsdp_size", not is_part or ranks % size == 0, f"must divide the ranks, {counted} ({ranks})"


def _engine_rules_of_main_ppo(config: DictConfig) -> dict[str, Rule]:
    """Of its two engines, by their strategies and the ranks that share a sequence."""
    rules: dict[str, Rule] = {}
    for role, trained in (("actor", True), ("ref", False)):
        node, of_role = f"actor_rollout_ref.{role}.fsdp_config", config.actor_rollout_ref[role]
        sharing = of_role.get("ulysses_sequence_parallel_size", 1)
        rules |= engine_rules(node, trained, of_role.strategy)
        rules[f"{node}.strategy"] = one_of("fsdp", of_role.strategy)
        rules[f"{node}.ulysses_sequence_parallel_size"] = one_of(*dict.fromkeys((1, sharing)))
    return rules


def _of_main_ppo(config: DictConfig, hpd: HPDConfig) -> Iterator[Relation]:
    """What must hold between the settings of main_ppo."""
    yield optimiser_relation(config, "actor_rollout_ref.actor.optim")
    for role in ("actor", "ref"):
        yield from engine_relations(config, f"actor_rollout_ref.{role}.fsdp_config")
    yield from lora_relations(config, "actor_rollout_ref.model", trained=True)
    yield from lora_relations(config, "actor_rollout_ref.ref.model", trained=False)
    models, batch = config.actor_rollout_ref, config.data.train_batch_size
    actor, rollout = models.actor, models.rollout
    teacher = "actor_rollout_ref.ref.model.path"
    yield from _of_teachers(
        config,
        hpd,
        teacher,
        hpd.needs_teacher,
        "actor_rollout_ref.model",
        "actor_rollout_ref.actor.fsdp_config",
        "actor_rollout_ref.ref.fsdp_config",
    )
    starts_servers = hpd.teacher_server.n_gpus_per_node > 0
    useless = "no objective in use needs a teacher, so that no server is needed; leave it out"
    yield f"{NODE}.n_gpus_per_node", hpd.needs_teacher or not starts_servers, useless
    fetched = f"a server that the run starts cannot fetch it; give a folder or a hub name, or {URLS}"
    yield teacher, not (starts_servers and is_remote(str(OmegaConf.select(config, teacher)))), fetched
    for key, value in _MAIN_PPO_NEEDS.items():
        yield key, OmegaConf.select(config, key) == value, f"algorithm=hpd works only with {key}={value}"
    for role in ("actor", "ref"):
        yield (
            f"actor_rollout_ref.{role}.strategy",
            models[role].strategy in ("fsdp", "fsdp2"),
            "HPD runs on fsdp2 and fsdp; megatron and the other engines are not supported",
        )
    yield (
        "actor_rollout_ref.actor.strategy, actor_rollout_ref.ref.strategy",
        not on_cpu() or {actor.strategy, models.ref.strategy} == {"fsdp2"},
        "verl's fsdp needs an accelerator; a CPU runs fsdp2",
    )
    mini_batch, prompts = "actor_rollout_ref.actor.ppo_mini_batch_size", config.data.get("gen_batch_size")
    yield mini_batch, batch % actor.ppo_mini_batch_size == 0, f"must divide data.train_batch_size={batch}"
    yield "data.gen_batch_size", prompts is None or batch % prompts == 0, f"must divide data.train_batch_size={batch}"
    yield (
        "actor_rollout_ref.actor.loss_scale_factor",
        actor.loss_scale_factor is not None or actor.loss_agg_mode != "seq-mean-token-sum-norm",
        "verl would divide by a micro-batch's longest response; leave it out for data.max_response_length, or give a "
        "number",
    )
    likelihood = hpd.objectives.names(lambda bound: bound.objective.is_likelihood)
    yield (
        "actor_rollout_ref.actor.ppo_epochs",
        actor.ppo_epochs == 1 or not likelihood,
        f"objective {likelihood} has no ratio to clip; repeat by trainer.total_epochs instead",
    )
    yield (
        "actor_rollout_ref.rollout.n",
        rollout.n == 1 or hpd.schedule.lowest == 1.0,
        f"several answers per prompt need {PREFIX}.on_policy_fraction=1; with demonstrations set "
        f"{PREFIX}.rollouts_per_prompt",
    )
    yield (
        "actor_rollout_ref.rollout.name",
        rollout.name != "hf" or not needs_rollout_server(config, hpd),
        "rollouts come from a server: choose vllm or sglang",
    )
    yield from _of_needs(hpd, "actor_rollout_ref.actor.ulysses_sequence_parallel_size", actor)
    behaviour = hpd.objectives.names(lambda bound: "behaviour" in bound.objective.needs)
    yield (
        "actor_rollout_ref.rollout.calculate_log_probs",
        not behaviour or bool(rollout.calculate_log_probs),
        f"objective {behaviour} needs the rollout server's log-probs; set true",
    )
    rewarded = hpd.objectives.names(lambda bound: bool(bound.objective.needs & {ROW + REWARD, ROW + ADVANTAGE}))
    yield (
        f"{PREFIX}.score_rollouts",
        hpd.score_rollouts or not rewarded,
        f"objective {rewarded} needs rewards; set true",
    )
    of_rollouts = behaviour or rewarded
    yield (
        f"{PREFIX}.on_policy_fraction",
        not of_rollouts or hpd.schedule.highest > 0 or hpd.missing_demonstration == "rollout",
        f"objective {of_rollouts} needs log-probs or rewards of rollouts, and there are none; raise it",
    )
    pipeline, reason = choose_pipeline(config, hpd)
    yield (
        teacher,
        bool(OmegaConf.select(config, teacher)) or pipeline == "one_pass",
        f"the staged pipeline ({reason}) always needs a teacher",
    )
    yield from _main_ppo_ranks(config, hpd, is_staged=pipeline == "staged")


def _of_needs(hpd: HPDConfig, setting: str, engine: DictConfig) -> Iterator[Relation]:
    """What objectives need of either trainer, beside log-probs.

    Args:
        setting: the engine's number of ranks that share a sequence.
        engine: the node that holds it.
    """
    prefix = hpd.objectives.names(lambda bound: "prefix" in bound.objective.needs)
    yield (
        setting,
        not prefix or engine.get("ulysses_sequence_parallel_size", 1) == 1,
        f"objective {prefix} sums over the earlier tokens of a row, which ranks would share; set 1",
    )


def _main_ppo_ranks(config: DictConfig, hpd: HPDConfig, is_staged: bool) -> Iterator[Relation]:
    """An update's sequences divide among main_ppo's ranks.

    An update takes ``ppo_mini_batch_size * rollout.n`` sequences, in equal parts a data-parallel rank. verl pads a
    batch to whole updates only, and passes without an update take unequal parts.
    """
    actor, ref, rollout = (config.actor_rollout_ref[role] for role in ("actor", "ref", "rollout"))
    ranks = config.trainer.n_gpus_per_node * config.trainer.nnodes
    counted = f"trainer.n_gpus_per_node * trainer.nnodes = {ranks}"
    sharing = {"actor": 1, "ref": 1}
    for role in sharing:
        node = f"actor_rollout_ref.{role}"
        sharing[role] = config.actor_rollout_ref[role].get("ulysses_sequence_parallel_size", 1)
        said = f"must divide the ranks, {counted}"
        yield f"{node}.ulysses_sequence_parallel_size", ranks % sharing[role] == 0, said
        yield _group(config, f"{node}.fsdp_config", ranks, counted)
    data_parallel = ranks // sharing["actor"]
    batch, mini_batch = config.data.train_batch_size, actor.ppo_mini_batch_size
    multiple = data_parallel // math.gcd(data_parallel, rollout.n)
    yield (
        "data.train_batch_size" if batch == mini_batch else "actor_rollout_ref.actor.ppo_mini_batch_size",
        mini_batch % multiple == 0,
        f"an update's sequences must divide among {data_parallel} data-parallel ranks ({counted}"
        + (", over Ulysses' size" if data_parallel != ranks else "")
        + f"); choose a multiple of {multiple}",
    )
    yield (
        "data.train_batch_size",
        actor.use_dynamic_bsz or batch * rollout.n % ranks == 0,
        f"must be a multiple of all ranks, {counted}, without actor_rollout_ref.actor.use_dynamic_bsz",
    )
    yield (
        "actor_rollout_ref.actor.shuffle",
        not actor.shuffle or batch == mini_batch or data_parallel == 1,
        f"each of the {data_parallel} data-parallel ranks would shuffle its own rows; leave it false and set "
        "data.shuffle",
    )
    # In one pass the teacher's rows are filled up.
    of_teacher = batch * rollout.n * sharing["ref"] // ranks if is_staged else 0
    passes = [
        ("actor.ppo", actor.use_dynamic_bsz, mini_batch * rollout.n // data_parallel, sharing["actor"]),
        ("ref.log_prob", ref.log_prob_use_dynamic_bsz, of_teacher, sharing["ref"]),
    ]
    if is_staged or hpd.teacher_ema == 0:  # verl's sizes of the student's passes without an update
        of_student = batch * rollout.n // data_parallel if is_staged else 0
        passes.append(("rollout.log_prob", rollout.log_prob_use_dynamic_bsz, of_student, sharing["actor"]))
    for name, by_tokens, of_rank, shared in passes:
        start = f"actor_rollout_ref.{name}"
        sizes = (f"{start}_micro_batch_size_per_gpu", f"{start}_max_token_len_per_gpu")
        has_teacher = name == "ref.log_prob" or (name == "rollout.log_prob" and hpd.teacher_ema == 0)
        yield from _micro_batches(config, *sizes, by_tokens, of_rank, shared, has_teacher)
    yield (
        "actor_rollout_ref.rollout.log_prob_use_dynamic_bsz",
        actor.use_dynamic_bsz == rollout.log_prob_use_dynamic_bsz,
        f"must equal actor_rollout_ref.actor.use_dynamic_bsz={actor.use_dynamic_bsz}; leave it out",
    )
    size = rollout.tensor_model_parallel_size * rollout.data_parallel_size * rollout.pipeline_model_parallel_size
    yield (
        "actor_rollout_ref.rollout.tensor_model_parallel_size",
        ranks % size == 0 or not needs_rollout_server(config, hpd),
        f"a rollout server takes {size} ranks, which must divide {counted}",
    )


def check_config(config: DictConfig) -> HPDConfig:
    """Check a composed configuration of a run with ``algorithm=hpd``; loads nothing.

    Returns:
        The algorithm's settings.

    Raises:
        ValueError: one sentence that names the setting, what was found and what to do.
    """
    rules = MAIN_PPO_RULES | _engine_rules_of_main_ppo(config)
    check_relations(config, values(config, rules), known(config, _MAIN_PPO_NODES, rules))
    check_trackers(config)
    require(
        OmegaConf.select(config, PREFIX) is not None,
        "trainer.v1.trainer_mode",
        config.trainer.v1.trainer_mode,
        "HPD's trainer needs algorithm=hpd on the command line",
    )
    hpd = HPDConfig.from_config(config.algorithm.hpd)
    check_relations(config, _of_main_ppo(config, hpd))
    for own in hpd.of_each_teacher.values():
        check_memory_store(own.teacher_cache, config.trainer.n_gpus_per_node * config.trainer.nnodes)
    return hpd


def sft_ulysses(config: DictConfig) -> int:
    """Ranks that share a sequence in the lean trainer."""
    return int(config.engine.get("ulysses_sequence_parallel_size", 1))


def _of_sft(config: DictConfig, hpd: HPDConfig, ranks: int, fills_store: bool) -> Iterator[Relation]:
    """What must hold between the settings of the lean trainer, and its ranks."""
    yield optimiser_relation(config, "optim")
    yield from engine_relations(config, "engine")
    yield from engine_relations(config, "teacher.engine", inherited="engine")
    yield from lora_relations(config, "model", trained=True)
    yield from lora_relations(config, "teacher.model", trained=False)
    data, trainer = config.data, config.trainer
    needs_teacher = hpd.needs_teacher or fills_store
    yield from _of_teachers(config, hpd, "teacher.model.path", needs_teacher, "model", "engine", "teacher.engine")
    rollouts = "this trainer has demonstrations only; python -m verl.trainer.main_ppo algorithm=hpd makes rollouts"
    yield f"{PREFIX}.on_policy_fraction", hpd.schedule.highest == 0, rollouts
    yield f"{PREFIX}.missing_demonstration", hpd.missing_demonstration == "error", rollouts
    yield from _of_needs(hpd, "engine.ulysses_sequence_parallel_size", config.engine)
    of_rollouts = {"behaviour", ROW + REWARD, ROW + ADVANTAGE}
    needing = hpd.objectives.names(lambda bound: bool(bound.objective.needs & of_rollouts))
    yield f"{PREFIX}.objective", not needing, f"{needing} needs log-probs or rewards of rollouts; {rollouts}"
    yield f"{PREFIX}.pipeline", hpd.pipeline in ("auto", "one_pass"), "this trainer is one_pass only"
    started = f"this trainer starts no servers; start them (docs/served.md), and give {URLS}"
    yield f"{NODE}.n_gpus_per_node", hpd.teacher_server.n_gpus_per_node == 0, started
    for engine in ("engine", "teacher.engine"):
        yield _group(config, engine, ranks, "torchrun's processes")
    yield (
        "trainer.n_gpus_per_node",
        trainer.n_gpus_per_node * trainer.nnodes in (1, ranks),
        f"torchrun has started {ranks} processes; leave it out",
    )
    batch, shared, setting = data.train_batch_size, sft_ulysses(config), "engine.ulysses_sequence_parallel_size"
    yield setting, ranks % shared == 0, f"must divide the ranks, torchrun's processes ({ranks})"
    yield (
        f"teacher.{setting}",
        OmegaConf.select(config, f"teacher.{setting}") in (None, shared),
        f"student and teacher share the same sequences; leave it out for {setting}={shared}",
    )
    counted = f"torchrun's {ranks} processes" + (f" over {setting}" if shared > 1 else "")
    data_parallel = ranks // shared
    if fills_store:  # any part of a batch
        said = f"less than a row for each of {data_parallel} data-parallel ranks ({counted}); raise it"
        yield "data.train_batch_size", batch >= data_parallel, said
    else:
        said = f"must divide among {data_parallel} data-parallel ranks ({counted}); choose a multiple"
        yield "data.train_batch_size", batch % data_parallel == 0, said
    sizes = ("data.micro_batch_size_per_gpu", "data.max_token_len_per_gpu")
    of_rank = 0 if fills_store else batch // data_parallel
    yield from _micro_batches(config, *sizes, data.use_dynamic_bsz, of_rank, shared, has_teacher=True)


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
    check_relations(config, values(config, SFT_RULES), known(config, tuple(map(str, config)), SFT_RULES))
    check_trackers(config)
    hpd = HPDConfig.from_config(config.algorithm.hpd)
    check_relations(config, _of_sft(config, hpd, ranks, fills_store))
    for own in hpd.of_each_teacher.values():
        check_memory_store(own.teacher_cache, ranks)
    return hpd
