"""A model before its weights load: transformers builds its modules on the meta device, without memory.

The classes themselves answer here, so it holds for families that nobody has listed. Building a model of 7 billion
parameters takes a fraction of a second.
"""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.modeling_utils import FLASH_ATTENTION_COMPATIBILITY_MATRIX, load_state_dict

from hpd_verl.engine.families import register

ATTENTION_FUNCTIONS = ("flash_attention_2", "flex_attention", "sdpa", "eager")
"""transformers' names, those that cost the least first."""


class CannotBuild(Exception):
    """transformers does not build a model, for the reason that the message gives."""


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' remarks on weights that are not there, and its progress bars."""
    verbosity, bars = transformers.logging.get_verbosity(), transformers.logging.is_progress_bar_enabled()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(verbosity)
        if bars:
            transformers.logging.enable_progress_bar()


def _class_of(config: PretrainedConfig) -> Any:
    """transformers' class by which verl loads a model; verl refuses a configuration that names none."""
    if not config.architectures:
        return AutoModelForCausalLM
    register()
    from verl.utils.model import get_hf_auto_model_class  # here, so that the planner starts without verl

    return get_hf_auto_model_class(config)


def build(config: PretrainedConfig, attention: str, trust_remote_code: bool = False) -> PreTrainedModel:
    """The model of a configuration, as verl chooses its class.

    Args:
        config: of the model; stays as it is.
        attention: name of the attention function. Flash attention and kernels of the hub are asked of the class alone,
            since they may be installed on the workers only.
        trust_remote_code: whether code beside the configuration may run.

    Raises:
        CannotBuild: the model's class does not take the configuration, or the attention.
    """
    config = copy.deepcopy(config)
    is_kernel = "/" in attention  # of the hub
    flash = is_kernel or attention in [f"flash_attention_{each}" for each in FLASH_ATTENTION_COMPATIBILITY_MATRIX]
    config._attn_implementation = "eager" if flash else attention
    try:
        with _quiet(), torch.device("meta"):
            model: PreTrainedModel = _class_of(config).from_config(config, trust_remote_code=trust_remote_code)
    except Exception as error:  # models raise anything on sizes that cannot be, and on names of attention
        raise CannotBuild(f"{type(error).__name__}: {error}") from error
    if flash and not model._supports_flash_attn:
        raise CannotBuild(f"{type(model).__name__} has no flash attention")
    return model


def attention_functions(config: PretrainedConfig, trust_remote_code: bool = False) -> list[str]:
    """Those of ``ATTENTION_FUNCTIONS`` with which the model can be built; which of them are right is another matter."""
    found = []
    for name in ATTENTION_FUNCTIONS:
        try:
            build(config, name, trust_remote_code)
        except CannotBuild:
            continue
        found.append(name)
    return found


@dataclass(frozen=True)
class Weights:
    """What transformers finds of a model's parameters in its files."""

    missing: list[str]
    """Parameters that are not there, and which it would draw at random."""
    mismatched: list[tuple[str, tuple[int, ...], tuple[int, ...]]]
    """Parameters of another shape: name, shape in the file, shape by the configuration."""


def match_weights(model: PreTrainedModel, files: Sequence[Path]) -> Weights:
    """Compare a model with its files by names and shapes, through transformers' own loading; reads no tensor.

    Args:
        model: from ``build``.
        files: all files of its weights.

    Raises:
        Exception: whatever transformers raises on files that it cannot turn into the model's parameters.
    """
    shapes: dict[str, Any] = {}
    for file in files:
        shapes |= load_state_dict(str(file), map_location="meta")
    with _quiet():
        _, found = type(model).from_pretrained(
            None,
            config=copy.deepcopy(model.config),
            state_dict=shapes,
            dtype=torch.float32,
            device_map="meta",
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
    mismatched = [(name, tuple(in_file), tuple(by_config)) for name, in_file, by_config in found["mismatched_keys"]]
    return Weights(sorted(found["missing_keys"]), sorted(mismatched))


def quantisation(config: PretrainedConfig) -> str | None:
    """How a model's weights are quantised, by its configuration; None where they are not."""
    for part in (config, config.get_text_config()):
        found = getattr(part, "quantization_config", None)
        if found is not None:
            method = found.get("quant_method") if isinstance(found, dict) else getattr(found, "quant_method", None)
            return str(getattr(method, "value", method))
    return None
