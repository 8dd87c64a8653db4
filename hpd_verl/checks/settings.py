"""Allowed values of verl's settings: one table for both trainers, student and teacher.

verl checks most of them late, by an assertion, or not at all; some it never reads. The tables name every key of a node;
keys without an entry are rejected, and so are values without effect.
"""

import functools
import importlib.util
import itertools
import math
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import verl.trainer.config
from omegaconf import DictConfig, ListConfig, OmegaConf
from verl.utils.config import omega_conf_to_dataclass
from verl.utils.torch_dtypes import PrecisionType
from verl.workers.config.optimizer import build_optimizer

from hpd_verl.config import PREFIX, is_number
from hpd_verl.errors import one_line, require

Rule = tuple[Callable[[Any], bool], str]
"""Check of a value, and the remedy if it fails."""
Rules = Mapping[str, Rule]
"""By setting; ``a.b.*`` stands for all settings below ``a.b`` that have no rule of their own."""
Relation = tuple[str, bool, str]
"""A setting (or several, "a, b"), whether it fits the others, and the remedy where it does not."""


def rules_of(node: str, rules: Rules) -> dict[str, Rule]:
    """Rules of a node's settings; of several that have one rule, the names are separated by spaces."""
    return {f"{node}.{name}": rule for names, rule in rules.items() for name in names.split()}


def is_integer(value: Any) -> bool:
    return type(value) is int


def on_cpu() -> bool:
    """Whether the run is one of ``VERL_PLATFORM=cpu``."""
    return os.environ.get("VERL_PLATFORM", "").strip().lower() == "cpu"


def one_of(*choices: Any) -> Rule:
    named = [{None: "null", True: "true", False: "false"}.get(each, str(each)) for each in choices]
    words = f"{', '.join(named[:-1])} or {named[-1]}" if len(named) > 1 else named[0]
    return lambda value: any(type(value) is type(each) and value == each for each in choices), f"choose {words}"


def only(value: Any, why: str) -> Rule:
    """The one value that is not refused."""
    return lambda found: found == value and type(found) is type(value), why


def unset(reason: str) -> Rule:
    """Of what HPD's passes cannot serve, or what would silently do something else than it says."""
    return lambda value: not value, f"not supported: {reason}; unset it"


COUNT: Rule = (lambda value: is_integer(value) and value >= 1, "give an integer of at least 1")
COUNT_OR_NULL: Rule = (
    lambda value: value is None or (is_integer(value) and value >= 1),
    "give an integer of at least 1, or null",
)
FROM_ZERO: Rule = (lambda value: is_integer(value) and value >= 0, "give an integer of at least 0")
INTEGER: Rule = (is_integer, "give an integer")
FREQUENCY: Rule = (
    lambda value: is_integer(value) or value == "after_each_epoch",
    "give a number of steps, -1 for never, or after_each_epoch",
)
RATE: Rule = (lambda value: is_number(value) and value >= 0, "give a number of at least 0")
POSITIVE: Rule = (lambda value: is_number(value) and value > 0, "give a number above 0")
NORM: Rule = (
    lambda value: value == math.inf or (is_number(value) and value > 0),
    "give a number above 0, or .inf for no clipping",
)
SHARE: Rule = (lambda value: is_number(value) and 0 <= value <= 1, "give a number from 0 to 1")
SHARE_OR_NULL: Rule = (
    lambda value: value is None or (is_number(value) and 0 <= value <= 1),
    "give a number from 0 to 1, or null",
)
SWITCH: Rule = (lambda value: isinstance(value, bool), "choose true or false")
TEXT: Rule = (lambda value: isinstance(value, str) and value.strip() != "", "give a text")
TEXT_OR_NULL: Rule = (lambda value: value is None or TEXT[0](value), "give a text, or null")
MAPPING: Rule = (lambda value: isinstance(value, Mapping | DictConfig), "give names and values, {name: value, ...}")
MAPPING_OR_NULL: Rule = (lambda value: value is None or MAPPING[0](value), f"{MAPPING[1]}, or null")
AGGREGATION = one_of("token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm")
ANYTHING: Rule = (lambda value: True, "")


def _are(value: Any, accepts: Callable[[Any], bool]) -> bool:
    return isinstance(value, list | tuple | ListConfig) and all(map(accepts, value))


TEXTS_OR_TEXT: Rule = (
    lambda value: TEXT[0](value) or (_are(value, TEXT[0]) and len(value) > 0),
    "give a name or a list of names",
)
FILES: Rule = (lambda value: TEXT[0](value) or _are(value, lambda each: True), "give a file's path, or a list of them")
FILES_OR_NULL: Rule = (lambda value: value is None or FILES[0](value), f"{FILES[1]}, or null")
SAMPLES: Rule = (
    lambda value: is_integer(value) and (value == -1 or value >= 1),
    "give a number of rows, or -1 for all",
)
TEXTS_TEXT_OR_NULL: Rule = (lambda value: value is None or TEXTS_OR_TEXT[0](value), f"{TEXTS_OR_TEXT[1]}, or null")


def _contents(*names: str) -> Rule:
    return (
        lambda value: _are(value, lambda each: each in names),
        f"give a list of {', '.join(names[:-1])} and {names[-1]}",
    )


_IS_DTYPE: Callable[[Any], bool] = lambda value: (  # noqa: E731
    PrecisionType.is_bf16(value) or PrecisionType.is_fp32(value) or PrecisionType.is_fp16(value)
)


def _dtype(trained: bool, or_null: bool = False) -> Rule:
    """A student is not trained in float16: gradients of its output layer exceed its range, scaled or not."""
    return (
        lambda value: (
            (value is None and or_null)
            or (not isinstance(value, bool) and _IS_DTYPE(value) and not (trained and PrecisionType.is_fp16(value)))
        ),
        "the student is not trained in float16, whose range its gradients exceed; choose bfloat16 or float32"
        if trained
        else "choose bfloat16, float32 or float16",
    )


def _module(value: Any) -> bool:
    try:
        return isinstance(value, str) and importlib.util.find_spec(value) is not None
    except (ImportError, ValueError, AttributeError):
        return False


@functools.cache
def _verl_defaults(file: str) -> DictConfig:
    """A file of verl's own settings."""
    node = OmegaConf.load(Path(next(iter(verl.trainer.config.__path__))) / file)
    assert isinstance(node, DictConfig)
    return node


def _unused(file: str, node: str, keys: str, why: str) -> dict[str, Rule]:
    """Keys that must stay as verl's file has them, by names separated by spaces."""
    rules: dict[str, Rule] = {}
    for key in keys.split():
        default = OmegaConf.select(_verl_defaults(file), key)
        if isinstance(default, DictConfig):
            for name, value in leaves(default):
                rules[f"{node}.{key}.{name}"] = only(value, f"{why}; leave it out")
        else:
            plain = OmegaConf.to_container(default) if isinstance(default, ListConfig) else default
            rules[f"{node}.{key}"] = only(plain, f"{why}; leave it out")
    return rules


def leaves(node: DictConfig, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Names and values of all settings below a node; lists and empty nodes are values."""
    plain = OmegaConf.to_container(node, resolve=True)

    def walk(part: Any, name: str) -> Iterator[tuple[str, Any]]:
        for key, value in part.items():
            if isinstance(value, dict) and value:
                yield from walk(value, f"{name}{key}.")
            elif key != "_target_":
                yield f"{name}{key}", value

    yield from walk(plain, prefix)


_ENGINE_FILE, _MODEL_FILE = "engine/fsdp.yaml", "model/hf_model.yaml"


def engine_rules(node: str, trained: bool, strategy: str) -> dict[str, Rule]:
    """Rules of a node of verl's FSDP engine.

    Args:
        node: its name.
        trained: the student's, not the teacher's.
        strategy: with which it runs, fsdp or fsdp2.
    """
    rules = rules_of(
        node,
        {
            "param_offload optimizer_offload offload_policy reshard_after_forward forward_prefetch full_determinism "
            "use_torch_compile use_no_sync_for_gradient_accumulation use_orig_params": SWITCH,
            "fsdp_size": (
                lambda value: is_integer(value) and (value == -1 or value >= 1),
                "give a number of ranks, or -1 for all",
            ),
            "model_dtype": _dtype(trained, or_null=True),
            "dtype mixed_precision.param_dtype mixed_precision.reduce_dtype mixed_precision.buffer_dtype": _dtype(
                trained
            ),
            "mixed_precision": one_of(None),
            "seed": INTEGER,
            "ulysses_sequence_parallel_size": COUNT,
            "strategy": TEXT,
            "forward_only": only(not trained, f"it is {str(not trained).lower()} here; leave it out"),
            "pad_to_length": only(False, "verl's logits processor does not know static padding; leave it out"),
            "wrap_policy.transformer_layer_cls_to_wrap": TEXTS_TEXT_OR_NULL,
            "wrap_policy.min_num_params": FROM_ZERO,
        },
    )
    unused = {
        "entropy_from_logits_with_chunking entropy_from_logits_chunk_size entropy_checkpointing": (
            "nothing here takes the entropy of logits"
        ),
        "pad_to_length_bucket": "only static padding reads it",
        "qat": "quantisation-aware training is not supported",
        "turbo_config": "only fsdp_turbo reads it",
    }
    if strategy == "fsdp2":
        unused["use_orig_params wrap_policy.min_num_params"] = "fsdp2 does not read it"
    for keys, why in unused.items():
        rules |= _unused(_ENGINE_FILE, node, keys, why)
    return rules


def model_rules(node: str, trained: bool, uses_megatron_lora: bool = False) -> dict[str, Rule]:
    """Rules of verl's model node.

    Args:
        node: its name.
        trained: the student's, not the teacher's.
        uses_megatron_lora: verl reads ``lora`` beside ``lora_rank``, as main_ppo does for its rollouts.
    """
    has_liger = _module("liger_kernel")
    rules = rules_of(
        node,
        {
            "path": TEXT if trained else TEXT_OR_NULL,
            "hf_config_path tokenizer_path custom_chat_template lora_adapter_path": TEXT_OR_NULL,
            "use_shm trust_remote_code enable_gradient_checkpointing": SWITCH,
            "external_lib": (
                lambda value: value is None or _module(value) or (_are(value, _module) and len(value) > 0),
                "give the name of a module that can be imported, or null",
            ),
            "override_config": MAPPING,
            "override_config.attn_implementation": TEXT_OR_NULL,
            "use_remove_padding": one_of(True, False, "auto"),
            "override_config.*": ANYTHING,  # checked with the model
            "enable_activation_offload": (
                lambda value: value is False or (value is True and not on_cpu()),
                "give false; a CPU has no other memory to move activations to" if on_cpu() else "choose true or false",
            ),
            "lora_rank": FROM_ZERO,
            "lora_alpha": POSITIVE,
            "target_modules": TEXTS_OR_TEXT,
            "target_parameters exclude_modules": TEXTS_TEXT_OR_NULL,
            "use_liger": (
                lambda value: value is False or (value is True and has_liger),
                "choose true or false"
                if has_liger
                else "its package liger_kernel is not installed; pip install liger-kernel, or give false",
            ),
            "use_fused_kernels": only(
                False, unset("HPD reads the student's logits, which fused kernels do not keep")[1]
            ),
            "mtp.enable": only(False, unset("multi-token prediction heads have no teacher")[1]),
        },
    )
    unused = {
        "fused_kernel_options": "only fused kernels read it",
        "tiled_mlp": "verl's FSDP engine does not read it",
        "mtp.enable_train mtp.enable_rollout mtp.detach_encoder mtp.mtp_loss_scaling_factor mtp.method "
        "mtp.speculative_algorithm mtp.speculative_num_steps mtp.speculative_eagle_topk "
        "mtp.speculative_num_draft_tokens mtp.num_speculative_tokens": "only multi-token prediction reads it",
    }
    if uses_megatron_lora:
        rules |= rules_of(node, {"lora.rank": FROM_ZERO, "lora.merge": SWITCH, "lora.*": ANYTHING})
    else:
        unused["lora"] = "verl's FSDP engine does not read it; LoRA is set by lora_rank"
    for keys, why in unused.items():
        rules |= _unused(_MODEL_FILE, node, keys, why)
    return rules


def optimiser_rules(node: str) -> dict[str, Rule]:
    """Of the optimiser's node."""
    return rules_of(
        node,
        {
            "lr weight_decay": RATE,
            "clip_grad": NORM,
            "lr_warmup_steps_ratio": SHARE,
            "lr_warmup_steps": (is_integer, "give a number of steps, or -1 to take lr_warmup_steps_ratio"),
            "min_lr_ratio": SHARE_OR_NULL,
            "lr_scheduler_type": one_of("constant", "cosine"),
            "num_cycles": POSITIVE,
            "zero_indexed_step": SWITCH,
            "betas": (
                lambda value: _are(value, lambda each: is_number(each) and 0 <= each < 1) and len(value) == 2,
                "give two numbers from 0 to 1, 1 left out",
            ),
            "optimizer": TEXT,
            "optimizer_impl": (_module, "give the name of a module that can be imported, as torch.optim"),
            "override_optimizer_config": MAPPING_OR_NULL,
            "override_optimizer_config.fused override_optimizer_config.foreach": one_of(True, False, None),
            "override_optimizer_config.*": ANYTHING,  # checked by building the optimiser
            "warmup_style": only(None, "set lr_scheduler_type instead"),
            "total_training_steps": only(-1, "it follows from the data; set trainer.total_training_steps instead"),
        },
    )


def checkpoint_rules(node: str) -> dict[str, Rule]:
    """Of the checkpoints' node."""
    return rules_of(
        node,
        {
            "save_contents load_contents": _contents("model", "optimizer", "extra", "hf_model"),
            "async_save": only(False, "not supported: a checkpoint could not be told complete; unset it"),
            "strict save_lora_only": SWITCH,
        },
    )


def check_relations(config: DictConfig, *relations: Iterable[Relation]) -> None:
    """Check what settings may be, by themselves and beside others.

    Raises:
        Refused: the first that does not fit.
    """
    for settings, fits, remedy in itertools.chain(*relations):
        found = ", ".join(str(OmegaConf.select(config, setting)) for setting in settings.split(", "))
        require(fits, settings, found, remedy)


def values(config: DictConfig, rules: Rules) -> Iterator[Relation]:
    """Values of settings are such as their rules accept; one that the configuration does not have is passed over."""
    absent = object()
    for setting, (accepts, remedy) in rules.items():
        value = OmegaConf.select(config, setting, default=absent)
        if value is absent or (isinstance(value, DictConfig) and any(name.startswith(f"{setting}.") for name in rules)):
            continue  # its parts have rules
        if isinstance(value, ListConfig):
            value = OmegaConf.to_container(value, resolve=True)
        yield setting, accepts(value), remedy


def known(config: DictConfig, nodes: tuple[str, ...], rules: Rules) -> Iterator[Relation]:
    """Every setting below some nodes has a rule; nothing would read another."""
    for node in nodes:
        found = OmegaConf.select(config, node)
        if not isinstance(found, DictConfig):
            yield node, found is None or node in rules, "no such setting; settings stand in its nodes"
            continue
        for setting, value in leaves(found, f"{node}."):
            parts = setting.split(".")
            parents = [".".join(parts[:end]) + ".*" for end in range(len(parts) - 1, 0, -1)]
            # An empty node stands for its parts.
            is_node = value == {} and any(name.startswith(f"{setting}.") for name in rules)
            if not (is_node or setting in rules or any(parent in rules for parent in parents)):
                yield setting, False, f"no such setting; there are {', '.join(_beside(setting, rules)) or 'none'}"


def _beside(setting: str, rules: Rules) -> list[str]:
    """Names that the setting's node has."""
    node = setting.rpartition(".")[0]
    return sorted(
        name for rule in rules for parent, _, name in [rule.rpartition(".")] if parent == node and name != "*"
    )


def optimiser_relation(config: DictConfig, node: str) -> Relation:
    """The optimiser can be built."""
    first, words = "optimizer", ""
    try:
        build_optimizer([torch.nn.Parameter(torch.zeros(1))], omega_conf_to_dataclass(OmegaConf.select(config, node)))
    except Exception as error:  # whatever an optimiser raises on its arguments
        first = "optimizer" if isinstance(error, AttributeError) else "override_optimizer_config"
        words = one_line(error)[:160]
    return f"{node}.{first}", not words, f"the optimiser cannot be built ({words}); change it"


def lora_relations(config: DictConfig, node: str, trained: bool) -> Iterator[Relation]:
    """Settings of LoRA stand beside a rank, and a teacher's rank beside the adapter that it is for."""
    model = OmegaConf.select(config, node)
    if model is None or not model.get("path"):
        return
    rank, adapter = model.get("lora_rank", 0), model.get("lora_adapter_path")
    yield (
        f"{node}.lora_adapter_path",
        adapter is None or rank > 0,
        "verl loads an adapter only if lora_rank is above 0; set lora_rank too, or leave both out",
    )
    yield (
        f"{node}.lora_rank",
        trained or rank == 0 or adapter is not None,
        "a teacher is not trained; give its adapter by lora_adapter_path, or leave it out",
    )
    is_off = rank == 0 and not OmegaConf.select(model, "lora.rank")
    for key in ("lora_alpha", "target_modules", "target_parameters", "exclude_modules") if is_off else ():
        default = OmegaConf.select(_verl_defaults(_MODEL_FILE), key)
        yield f"{node}.{key}", model.get(key, default) == default, "LoRA is off; set lora_rank, or leave it out"


def engine_relations(config: DictConfig, node: str, inherited: str | None = None) -> Iterator[Relation]:
    """``dtype``, where it is set, is what ``mixed_precision`` says, which verl reads; something reads the seed.

    Args:
        config: the configuration.
        node: the engine's.
        inherited: a node whose ``mixed_precision`` holds where this one has none.
    """
    seed, of_run = OmegaConf.select(config, f"{node}.seed"), OmegaConf.select(config, f"{PREFIX}.seed")
    yield (
        f"{node}.seed",
        seed in (None, of_run, _verl_defaults(_ENGINE_FILE).seed)
        or bool(OmegaConf.select(config, f"{node}.full_determinism")),
        f"read only with full_determinism; set {PREFIX}.seed",
    )
    wanted = OmegaConf.select(config, f"{node}.dtype")
    nodes = [node] if inherited is None else [node, inherited]
    found = next((value for each in nodes if (value := OmegaConf.select(config, f"{each}.mixed_precision"))), None)
    if wanted is None or PrecisionType.is_bf16(wanted) or found is None:
        return
    param_dtype = found.get("param_dtype", "bfloat16")
    yield (
        f"{node}.dtype",
        PrecisionType.to_dtype(param_dtype) == PrecisionType.to_dtype(wanted),
        f"differs from mixed_precision.param_dtype={param_dtype}; set one of them",
    )


def takes_hdfs(value: Any) -> bool:
    """Whether a second place of checkpoints can be written."""
    return value is None or (TEXT[0](value) and (not value.startswith("hdfs://") or shutil.which("hdfs") is not None))
