"""What follows from verl's settings and those of ``algorithm.hpd`` together: pipeline, rollouts, dtype."""

from omegaconf import DictConfig, OmegaConf

from hpd_verl.config import PREFIX, HPDConfig
from hpd_verl.errors import require


def with_dtype(engine: DictConfig) -> DictConfig:
    """An engine's node with ``dtype`` where verl reads it: in ``mixed_precision``, unless that is set, too."""
    if engine.get("mixed_precision") is not None or engine.get("dtype") in (None, "bf16", "bfloat16"):  # verl's default
        return engine
    copied = OmegaConf.create(OmegaConf.to_container(engine, resolve=True))
    assert isinstance(copied, DictConfig)
    copied.mixed_precision = {"param_dtype": engine.dtype, "reduce_dtype": "fp32", "buffer_dtype": "fp32"}
    return copied


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


def compares_rollouts(config: DictConfig, hpd: HPDConfig) -> bool:
    """Whether the rollout server's log-probs come with training rollouts and can be compared with the student's.

    They can where both are of one distribution: the student's at ``algorithm.hpd.temperature``, the server's at
    temperature 1 if vLLM gives them raw, else as it samples.
    """
    rollout = config.actor_rollout_ref.rollout
    is_raw = rollout.name == "vllm" and rollout.logprobs_mode == "raw_logprobs"
    temperature = 1.0 if is_raw else rollout.temperature
    samples_from_all = is_raw or (rollout.top_p == 1 and rollout.top_k in (-1, 0))
    makes_rollouts = hpd.schedule.highest > 0 or hpd.missing_demonstration == "rollout"
    is_one_distribution = samples_from_all and temperature == hpd.temperature
    return bool(rollout.calculate_log_probs) and makes_rollouts and is_one_distribution


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
        "student and teacher share sequences among different numbers of ranks "
        "(actor_rollout_ref.actor.ulysses_sequence_parallel_size, ref.ulysses_sequence_parallel_size)": actor.get(
            "ulysses_sequence_parallel_size", 1
        )
        != config.actor_rollout_ref.ref.get("ulysses_sequence_parallel_size", 1),
        "actor_rollout_ref.actor.entropy_coeff is set": actor.entropy_coeff != 0,
    }
    needing = hpd.objectives.names(lambda bound: bool(bound.objective.needs))
    needs = {
        f"{PREFIX}.teacher_cache={hpd.teacher_cache}": hpd.teacher_cache != "off",
        hpd.teacher_server.source: hpd.teacher_server.is_used,
        f"{PREFIX}.teachers": hpd.teachers is not None,
        f"{PREFIX}.teacher_ema={hpd.teacher_ema}": hpd.teacher_ema is not None,
        "data.teacher_prompt_template": config.data.get("teacher_prompt_template") is not None,
        f"{PREFIX}.exact_kl_metrics=true": hpd.exact_kl_metrics,
        f"an objective over the vocabulary ({hpd.objectives.names()})": hpd.objectives.over_vocabulary,
        f"an objective that needs more than log-probs ({needing})": needing != "",
    }
    reasons = [reason for reason, holds in cannot.items() if holds]
    needed_by = [reason for reason, holds in needs.items() if holds]
    if hpd.pipeline == "one_pass" or needed_by:
        require(
            not reasons and hpd.pipeline != "staged",
            f"{PREFIX}.pipeline",
            hpd.pipeline,
            (f"{' and '.join(needed_by)} needs one_pass, which " if needed_by else "")
            + (
                f"does not work here: {'; '.join(reasons)}"
                if reasons
                else f"is not what is set: choose auto or {PREFIX}.pipeline=one_pass"
            ),
        )
        return "one_pass", ", ".join(needed_by) or "set"
    if hpd.pipeline == "staged":
        return "staged", "set"
    if updates_per_batch(config) > 1:
        reasons.append("a batch is several updates")
    return ("staged", "; ".join(reasons)) if reasons else ("one_pass", "a batch is one update")
