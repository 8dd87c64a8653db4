"""A model's sizes from its config.json: transformers builds it without memory to count its parameters."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from hpd_verl.engine.families import head_counts, layers_to_wrap
from hpd_verl.errors import one_line


@dataclass(frozen=True)
class ModelSize:
    """Sizes of a causal language model. Counts of parameters are of the whole model unless they say otherwise."""

    name: str
    parameters: int
    """All; tied ones count once."""
    active: int
    """Parameters that one token uses: all except unselected experts."""
    embedding: int
    """Parameters of the input embedding."""
    output: int
    """Parameters of the output layer, the embedding's if they are tied."""
    tied: bool
    layers: int
    layer: int
    """Parameters of the largest layer."""
    vocabulary: int
    """Rows of the output layer."""
    hidden: int
    intermediate: int
    """Width of a token's feed-forward network: with experts, of all selected ones."""
    query: int
    """Attention heads times their size."""
    key: int
    """Heads of keys times their size."""
    heads: int
    key_heads: int
    lora_per_rank: int
    """Parameters of an adapter of rank 1 on every linear module of the layers."""

    @property
    def body(self) -> int:
        """Active parameters of the layers, which every token meets in a matrix product."""
        return self.active - self.embedding - (0 if self.tied else self.output)


def read_config(name: str) -> PretrainedConfig:
    """The configuration of a folder, a config.json, or a model of the hub.

    Raises:
        ValueError: it cannot be read, in one line.
    """
    if name.startswith(("/", "./", "../", "~")) and not Path(name).exists():
        raise ValueError(f"{name}: no such folder; give a folder with config.json, or a hub name")
    try:
        return AutoConfig.from_pretrained(name, trust_remote_code=False)  # not left out: it would be asked for
    except Exception as error:  # whatever transformers raises on what a file may hold
        raise ValueError(
            f"{name}: no configuration of a model can be read ({one_line(error)[:160]}); give a folder with "
            "config.json, or a hub name where the hub can be reached"
        ) from error


def _experts(config: PretrainedConfig) -> tuple[int, int] | None:
    """Number of a layer's experts, and of those that a token selects."""
    names = ("num_experts", "num_local_experts", "n_routed_experts")
    count = next((value for name in names if (value := getattr(config, name, None))), None)
    chosen = getattr(config, "num_experts_per_tok", None)
    return (int(count), int(chosen)) if count and chosen else None


def model_size(name: str, config: PretrainedConfig) -> ModelSize:
    """Count a model's parameters.

    Args:
        name: for the reader.
        config: its configuration.

    Raises:
        ValueError: it is no causal language model of transformers.
    """
    text = config.get_text_config()
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        with torch.device("meta"):
            model: Any = AutoModelForCausalLM.from_config(text)
    except Exception as error:  # whatever a model raises on sizes that cannot be
        raise ValueError(
            f"{name}: transformers cannot build a causal language model of it ({one_line(error)[:160]})"
        ) from error
    finally:
        transformers.logging.set_verbosity(verbosity)
    kinds = set(layers_to_wrap(model))
    layers = [module for module in model.modules() if type(module).__name__ in kinds]
    if not layers:
        raise ValueError(f"{name}: a model without layers; check its config.json")
    experts = _experts(text)
    in_experts = sum(
        parameter.numel() for name, parameter in model.named_parameters() if ".experts." in name and experts
    )
    total = sum(parameter.numel() for parameter in model.parameters())
    embedding, output = model.get_input_embeddings(), model.get_output_embeddings()
    heads, key_heads = head_counts(text)
    head_size = getattr(text, "head_dim", None) or text.hidden_size // heads
    intermediate = getattr(text, "intermediate_size", None) or 4 * text.hidden_size
    if experts:
        chosen = experts[1]
        width = getattr(text, "moe_intermediate_size", None) or intermediate
        intermediate = chosen * width + (getattr(text, "shared_expert_intermediate_size", None) or 0)
    linear = [module for layer in layers for module in layer.modules() if isinstance(module, nn.Linear)]
    return ModelSize(
        name=name,
        parameters=total,
        active=total if not experts else total - in_experts + in_experts * experts[1] // experts[0],
        embedding=embedding.weight.numel(),
        output=output.weight.numel(),
        tied=output.weight is embedding.weight,
        layers=len(layers),
        layer=max(sum(parameter.numel() for parameter in layer.parameters()) for layer in layers),
        vocabulary=output.weight.shape[0],
        hidden=text.hidden_size,
        intermediate=intermediate,
        query=heads * head_size,
        key=key_heads * head_size,
        heads=heads,
        key_heads=key_heads,
        lora_per_rank=sum(module.in_features + module.out_features for module in linear),
    )
