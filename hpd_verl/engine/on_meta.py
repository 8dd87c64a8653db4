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
from transformers.modeling_utils import load_state_dict

from hpd_verl.engine.families import register


class CannotBuild(Exception):
    """transformers does not build a model; the message has the reason."""


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


def build(config: PretrainedConfig, trust_remote_code: bool = False) -> PreTrainedModel:
    """The model of a configuration, as verl chooses its class, with eager attention.

    Args:
        config: of the model; stays as it is.
        trust_remote_code: whether code beside the configuration may run.

    Raises:
        CannotBuild: the model's class does not take the configuration.
    """
    config = copy.deepcopy(config)
    config._attn_implementation = "eager"
    try:
        with _quiet(), torch.device("meta"):
            model: PreTrainedModel = _class_of(config).from_config(config, trust_remote_code=trust_remote_code)
    except Exception as error:  # models raise anything on sizes that cannot be
        raise CannotBuild(f"{type(error).__name__}: {error}") from error
    return model


@dataclass(frozen=True)
class Weights:
    """A model's parameters as transformers finds them in its files."""

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
    config = copy.deepcopy(model.config)
    output = next((name for name, part in model.named_modules() if part is model.get_output_embeddings()), None)
    if f"{output}.weight" in shapes:  # an output layer of its own, whatever the configuration says
        config.tie_word_embeddings = False
    with _quiet():
        _, found = type(model).from_pretrained(
            None,
            config=config,
            state_dict=shapes,
            dtype=torch.float32,
            device_map="meta",
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
    mismatched = [(name, tuple(in_file), tuple(by_config)) for name, in_file, by_config in found["mismatched_keys"]]
    return Weights(sorted(found["missing_keys"]), sorted(mismatched))


def quantisation(config: PretrainedConfig) -> str | None:
    """The quantisation of a model's weights by its configuration, or None."""
    for part in (config, config.get_text_config()):
        found = getattr(part, "quantization_config", None)
        if found is not None:
            method = found.get("quant_method") if isinstance(found, dict) else getattr(found, "quant_method", None)
            return str(getattr(method, "value", method))
    return None
