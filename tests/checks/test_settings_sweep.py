"""Every setting of the lean trainer and of main_ppo's engines, models and optimiser: odd values are refused by name."""

import copy
import os
from collections.abc import Mapping
from typing import Any

import pytest
from conftest import main_ppo_config, sft_config
from omegaconf import DictConfig, OmegaConf, open_dict, read_write

from hpd_verl.checks import run
from hpd_verl.checks.run import check_config, check_sft_config
from hpd_verl.checks.settings import Rule, check_relations, leaves, values
from hpd_verl.errors import Refused
from hpd_verl.run.choices import with_dtype

ELSEWHERE = ("algorithm.", "data.hpd.", "profiler.", "trainer.logger")
"""Settings whose values other checks read: HPDConfig, the trackers; the profiler's, which is off."""

MODEL_TEXTS = "path hf_config_path tokenizer_path custom_chat_template lora_adapter_path target_modules exclude_modules"
MODEL_SWITCHES = "use_shm trust_remote_code enable_gradient_checkpointing use_remove_padding"
ENGINE_SWITCHES = (
    "param_offload optimizer_offload offload_policy reshard_after_forward forward_prefetch full_determinism "
    "use_torch_compile use_no_sync_for_gradient_accumulation"
)
ATTENTION = "model.override_config.attn_implementation"
ACCEPTED: list[tuple[Any, set[str]]] = [
    (
        "odd",
        {f"model.{name}" for name in MODEL_TEXTS.split()}
        | {
            ATTENTION,
            "data.train_files",
            "data.val_files",
            "data.tools_key",
            "data.prompt_key",
            "data.teacher_prompt_key",
        }
        | {"trainer.project_name", "trainer.experiment_name"}
        | {"trainer.default_local_dir", "trainer.default_hdfs_dir", "trainer.resume_from_path", "trainer.device"}
        | {"teacher.model.path", "optim.optimizer"},
    ),
    (
        True,
        {f"model.{name}" for name in MODEL_SWITCHES.split()}
        | {f"engine.{name}" for name in ENGINE_SWITCHES.split()}
        | {"data.use_dynamic_bsz", "data.use_shm", "data.filter_overlong_prompts", "optim.zero_indexed_step"}
        | {"optim.override_optimizer_config.fused"},
    ),
    (
        -7,
        {"engine.seed", "optim.lr_warmup_steps", "data.seed"} | {"trainer.save_freq", "trainer.test_freq"},
    ),
    (
        1.5,
        {"model.lora_alpha", "optim.lr", "optim.weight_decay", "optim.clip_grad", "optim.num_cycles"},
    ),
    (
        {"odd": 1},
        {"data.apply_chat_template_kwargs"},
    ),
    (
        None,
        {f"model.{name}" for name in MODEL_TEXTS.split() if name not in ("path", "target_modules")}
        | {ATTENTION, "model.external_lib", "engine.model_dtype", "optim.min_lr_ratio", "trainer.max_ckpt_to_keep"}
        | {"trainer.total_training_steps", "trainer.default_hdfs_dir", "trainer.resume_from_path", "optim.warmup_style"}
        | {"teacher.model.path", "optim.override_optimizer_config.fused", "teacher.engine.model_dtype"}
        | {"data.train_files"},
    ),
    (
        0.0,
        {"optim.lr", "optim.weight_decay", "optim.lr_warmup_steps_ratio", "optim.min_lr_ratio"},
    ),
    ([], {"checkpoint.save_contents", "checkpoint.load_contents", "data.train_files", "data.val_files"}),
]
"""An odd value, and all settings that it is not too odd for."""
PATHS = ("model.path=S", "teacher.model.path=T", "data.train_files=x")


@pytest.fixture(scope="module")
def base() -> DictConfig:
    config: DictConfig = sft_config(*PATHS)
    return config


@pytest.fixture(scope="module")
def main_ppo() -> DictConfig:
    models = ["actor_rollout_ref.model.path=S", "actor_rollout_ref.ref.model.path=T", "data.train_files=x"]
    config: DictConfig = main_ppo_config(*models)
    return config


def changed(config: DictConfig, **values: Any) -> DictConfig:
    """A copy with other values; ``__`` stands for a dot, nodes that are not there are made."""
    config = copy.deepcopy(config)
    for name, value in values.items():
        parent, _, key = name.replace("__", ".").rpartition(".")
        with read_write(config), open_dict(config):
            if OmegaConf.select(config, parent) is None:
                OmegaConf.update(config, parent, {}, force_add=True)
            OmegaConf.select(config, parent)[key] = value
    return config


def refusal(config: DictConfig, rules: Mapping[str, Rule]) -> str | None:
    """The line that refuses a configuration's values, None where nothing does."""
    try:
        check_relations(config, values(config, rules))
    except Refused as error:
        return str(error)
    return None


def accepted(config: DictConfig, rules: Mapping[str, Rule], value: Any) -> set[str]:
    """Settings for which a value is not refused; every refusal is one line that begins with the setting."""
    found = set()
    for setting, now in leaves(config):
        if setting.startswith(ELSEWHERE) or (type(now) is type(value) and now == value):
            continue
        odd = changed(OmegaConf.create({}), **{setting.replace(".", "__"): value})
        refused = refusal(odd, rules)
        assert refused is None or (refused.startswith(f"{setting}={value}: ") and "\n" not in refused)
        if refused is None:
            found.add(setting)
    return found


@pytest.mark.parametrize(("value", "settings"), ACCEPTED, ids=[repr(value) for value, _ in ACCEPTED])
def test_odd_values_of_the_lean_trainer(base: DictConfig, value: Any, settings: set[str]) -> None:
    """All settings of its composed configuration are tried, so that one that verl adds is seen."""
    own = {setting for setting, now in leaves(base) if type(now) is type(value) and now == value}
    assert accepted(base, run.SFT_RULES, value) == settings - own


def test_defaults_pass_on_both_platforms(base: DictConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    check_sft_config(base)
    monkeypatch.delenv("VERL_PLATFORM")
    check_sft_config(sft_config(*PATHS))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"data__max_token_len_per_gpu": 3071}, "data.max_token_len_per_gpu=3071: below data.max_prompt_length + data"),
        ({"engine__fsdp_size": 0}, "engine.fsdp_size=0: give a number of ranks, or -1 for all"),
        ({"engine__fsdp_size": 3}, "engine.fsdp_size=3: must divide the ranks, torchrun's processes (4)"),
        ({"teacher__engine__fsdp_size": 3}, "teacher.engine.fsdp_size=3: must divide the ranks, torchrun's processes"),
        ({"engine__dtype": "float31"}, "engine.dtype=float31: the student is not trained in float16, whose"),
        (
            {"engine__dtype": "bfloat16", "teacher__engine__dtype": "float16"},
            "teacher.engine.dtype=float16: differs from mixed_p",
        ),
        (
            {"teacher__engine__model_dtype": "half"},
            "teacher.engine.model_dtype=half: choose bfloat16, float32 or float",
        ),
        ({"engine__seed": 7}, "engine.seed=7: read only with full_determinism; set algorithm.hpd.seed"),
        ({"model__lora_alpha": 32}, "model.lora_alpha=32: LoRA is off; set lora_rank, or leave it out"),
        ({"teacher__model__lora_rank": 8}, "teacher.model.lora_rank=8: a teacher is not trained; give its adapter"),
        ({"teacher__engine__strategy": "fsdp"}, "teacher.engine.strategy=fsdp: choose fsdp2"),
        (
            {"teacher__engine__ulysses_sequence_parallel_size": 2},
            "teacher.engine.ulysses_sequence_parallel_size=2: student and teacher share the same sequences; leave",
        ),
        (
            {"teacher__engine__infer_max_token_len_per_gpu": 9},
            "teacher.engine.infer_max_token_len_per_gpu=9: data.max",
        ),
        ({"engine__odd": 1}, "engine.odd=1: no such setting; there are dtype, "),
        ({"teacher__engine__odd": 1}, "teacher.engine.odd=1: no such setting; there are dtype, "),
        ({"teacher__model__odd": 1}, "teacher.model.odd=1: no such setting; there are custom_chat_template, "),
        ({"odd": 1}, "odd=1: no such setting; settings stand in its nodes"),
        ({"engine__qat__enable": True}, "engine.qat.enable=True: quantisation-aware training is not supported"),
        ({"engine__turbo_config__distributed__tensor_parallel_size": 2}, "parallel_size=2: only fsdp_turbo reads it"),
        ({"engine__wrap_policy__min_num_params": 100}, "engine.wrap_policy.min_num_params=100: fsdp2 does not read it"),
        ({"model__use_liger": True}, "model.use_liger=True: its package liger_kernel is not installed; pip install"),
        ({"model__enable_activation_offload": True}, "model.enable_activation_offload=True: give false; a CPU has no"),
        ({"optim__optimizer": "AdamX"}, "optim.optimizer=AdamX: the optimiser cannot be built (Optimizer 'AdamX' not"),
        ({"optim__override_optimizer_config": {"odd": 1}}, "optim.override_optimizer_config={'odd': 1}: the optimiser"),
        ({"trainer__n_gpus_per_node": 8}, "trainer.n_gpus_per_node=8: torchrun has started 4 processes; leave it out"),
        (
            {"data__custom_cls__path": "x.py"},
            "data.custom_cls.path=x.py: the rows are demonstrations, read by this tr",
        ),
        ({"data__truncation": "left"}, "data.truncation=left: algorithm.hpd.overlong_demonstration decides about"),
        ({"data__max_length": 4096}, "data.max_length=4096: lengths are data.max_prompt_length and data.max_response_"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
)
def test_settings_that_would_fail_or_change_nothing(base: DictConfig, values: dict[str, Any], message: str) -> None:
    if "odd" in values:
        config = copy.deepcopy(base)
        with open_dict(config):
            config.odd = 1
    else:
        config = changed(base, **values)
    with pytest.raises(Refused) as refused:
        check_sft_config(config, ranks=4)
    assert message in str(refused.value)
    assert str(refused.value).startswith(next(reversed(values)).replace("__", "."))


REF, ACTOR = "actor_rollout_ref__ref__", "actor_rollout_ref__actor__"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({f"{ACTOR}ppo_max_token_len_per_gpu": 3071}, "=3071: below data.max_prompt_length + data.max_response_length"),
        ({f"{REF}log_prob_max_token_len_per_gpu": 3071}, "=3071: below data.max_prompt_length + data.max_response_le"),
        ({f"{ACTOR}use_dynamic_bsz": False}, "ppo_micro_batch_size_per_gpu=None: micro-batches are not packed by tok"),
        ({f"{REF}log_prob_use_dynamic_bsz": False}, "log_prob_micro_batch_size_per_gpu=None: micro-batches are not p"),
        ({f"{ACTOR}fsdp_config__fsdp_size": 0}, "fsdp_size=0: give a number of ranks, or -1 for all"),
        ({f"{REF}fsdp_config__fsdp_size": 0}, "fsdp_size=0: give a number of ranks, or -1 for all"),
        ({f"{REF}fsdp_config__model_dtype": "half"}, "ref.fsdp_config.model_dtype=half: choose bfloat16, float32 or"),
        ({f"{REF}fsdp_config__odd": 1}, "actor_rollout_ref.ref.fsdp_config.odd=1: no such setting; there are dtype"),
        ({f"{REF}model__odd": 1}, "actor_rollout_ref.ref.model.odd=1: no such setting; there are custom_chat_templ"),
        ({f"{ACTOR}fsdp_config__forward_only": True}, "forward_only=True: it is false here; leave it out"),
        ({f"{ACTOR}fsdp_config__qat__enable": True}, "qat.enable=True: quantisation-aware training is not supported"),
        ({f"{ACTOR}qat__enable": True}, "actor.qat.enable=True: quantisation-aware training is not supported"),
        ({f"{ACTOR}fsdp_config__dtype": "float32"}, "no refusal"),
        ({f"{ACTOR}fsdp_config__strategy": "fsdp_turbo"}, "fsdp_config.strategy=fsdp_turbo: choose fsdp or fsdp2"),
        ({f"{ACTOR}optim__optimizer": "AdamX"}, "optim.optimizer=AdamX: the optimiser cannot be built (Optimizer"),
        ({f"{ACTOR}checkpoint__save_contents": ["odd"]}, "save_contents=['odd']: give a list of model, optimizer,"),
        ({"actor_rollout_ref__model__use_liger": True}, "use_liger=True: its package liger_kernel is not installed"),
        ({"trainer__critic_warmup": 5}, "trainer.critic_warmup=5: HPD has no critic, and verl would skip the first"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
)
def test_the_same_of_main_ppo(main_ppo: DictConfig, values: dict[str, Any], message: str) -> None:
    if message == "no refusal":
        check_config(changed(main_ppo, **values))
        return
    with pytest.raises(Refused) as refused:
        check_config(changed(main_ppo, **values))
    assert message in str(refused.value)


def test_a_dtype_goes_where_verl_reads_it() -> None:
    """verl reads mixed_precision only."""
    plain = OmegaConf.create({"dtype": "bfloat16", "mixed_precision": None})
    asked = OmegaConf.create({"dtype": "float32", "mixed_precision": None})
    both = OmegaConf.create({"dtype": "float32", "mixed_precision": {"param_dtype": "fp32"}})
    assert with_dtype(plain) is plain
    assert with_dtype(asked).mixed_precision.param_dtype == "float32"
    assert asked.mixed_precision is None
    assert with_dtype(both) is both


def test_the_platform_of_these_tests() -> None:
    assert os.environ["VERL_PLATFORM"] == "cpu"
