"""A causal language model of transformers, with an output layer that a function can replace for one call."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from hpd_verl.errors import Refused
from hpd_verl.head.output_head import OutputHead

HeadFunction = Callable[[Tensor, OutputHead], Any]
"""``head(hidden [rows, tokens, d], layer)``: takes the place of the output layer; the model returns what it returns."""

_PROBE_LENGTH = 8


def _causal_lm(module: nn.Module) -> Any:
    """The model itself, without PEFT's wrapping."""
    unwrap = getattr(module, "get_base_model", None)
    return unwrap() if unwrap is not None else module


_STAGED = "main_ppo trains it with algorithm.hpd.pipeline=staged"


def body(module: nn.Module) -> nn.Module | None:
    """The part that makes the hidden states; None where the model does not tell which it is."""
    model = _causal_lm(module)
    if model.base_model is not model:
        return model.base_model
    parts = [child for child in model.children() if isinstance(child, PreTrainedModel)]  # as Llama 4's
    return parts[0] if len(parts) == 1 else None


def check_one_pass(module: nn.Module) -> None:
    """Check that a model has a body and an output layer between which the loss can take its place.

    Raises:
        Refused: it has not.
    """
    output_head(module)
    if body(module) is None:
        model = _causal_lm(module)
        raise Refused(
            f"algorithm.hpd.pipeline=one_pass: {type(model).__name__} has no part {model.base_model_prefix!r} that "
            f"returns hidden states; {_STAGED}"
        )


def output_head(module: nn.Module, vocabulary_size: int | None = None) -> OutputHead:
    """The output layer of a causal language model, as far as it is a linear layer with known scaling.

    Args:
        module: the model, possibly wrapped by PEFT.
        vocabulary_size: number of logits to use; None for all.

    Raises:
        Refused: the output layer is no linear layer.
    """
    model = _causal_lm(module)
    layer = model.get_output_embeddings()
    if not isinstance(layer, nn.Linear):
        found = f"{type(layer).__module__}.{type(layer).__qualname__}"
        raise Refused(
            f"algorithm.hpd.pipeline=one_pass: the output layer of {type(model).__name__} is {found}, not a linear "
            f"layer; {_STAGED}"
        )
    scale, soft_cap = head_scaling(model.config)
    return OutputHead(
        weight=layer.weight,
        bias=layer.bias,
        scale=scale,
        soft_cap=soft_cap,
        vocabulary_size=vocabulary_size or layer.weight.shape[0],
    )


def head_scaling(config: PretrainedConfig) -> tuple[float, float | None]:
    """Factor and soft cap of a model's logits, by its configuration."""
    text = config.get_text_config()
    factor = getattr(text, "logit_scale", None) or 1.0  # Cohere
    divisor = getattr(text, "logits_scaling", None) or 1.0  # Granite
    return factor / divisor, getattr(text, "final_logit_softcapping", None)  # Gemma


def offer_head(module: nn.Module, vocabulary_size: int | None = None) -> None:
    """Give a model's forward the keyword ``head``; without it, forward is what it was.

    The head is called from within the output layer's forward, since FSDP2 may shard that layer on its own.

    Args:
        module: the model, possibly wrapped by PEFT or FSDP2; changed in place.
        vocabulary_size: number of logits to use; None for all.

    Raises:
        Refused: the output layer is no linear layer, or the model does not tell which part precedes it.
    """
    model = _causal_lm(module)
    check_one_pass(model)
    part, layer = body(model), model.get_output_embeddings()
    assert part is not None
    plain_model_forward, plain_layer_forward = model.forward, layer.forward

    def layer_forward(hidden: Tensor, head: HeadFunction | None = None) -> Any:
        return plain_layer_forward(hidden) if head is None else head(hidden, output_head(model, vocabulary_size))

    @functools.wraps(plain_model_forward)  # transformers reads the signature
    def model_forward(*args: Any, head: HeadFunction | None = None, **kwargs: Any) -> Any:
        if head is None:
            return plain_model_forward(*args, **kwargs)
        return layer(part(*args, **kwargs)[0], head=head)

    model.forward, layer.forward = model_forward, layer_forward


@torch.no_grad()
def check_head(module: nn.Module) -> None:
    """Compare the model's own logits of a few tokens with those of its hidden states and ``output_head``.

    Raises:
        Refused: they differ: the model does more in its output layer than is known here.
    """
    device = next(module.parameters()).device
    ids = torch.arange(1, _PROBE_LENGTH + 1, device=device).unsqueeze(0)
    inputs = {
        "input_ids": ids % _causal_lm(module).config.get_text_config().vocab_size,
        "position_ids": torch.arange(_PROBE_LENGTH, device=device).unsqueeze(0),
        "use_cache": False,
    }
    logits = module(**inputs).logits

    def from_hidden(hidden: Tensor, layer: OutputHead) -> tuple[Tensor]:
        weight = layer.weight[: logits.shape[-1]]
        products = hidden.to(weight.dtype) @ weight.T
        return (OutputHead(weight, len(weight), layer.bias, layer.scale, layer.soft_cap).logits(products, 1.0),)

    (expected,) = module(**inputs, head=from_hidden)
    if torch.isnan(logits).any() and torch.isnan(expected).any():
        return  # a broken model: the first step refuses it and names the rows
    # The model rounds after each step to what its logits are in, which autocast or FSDP2 may have made bfloat16.
    tolerance = 1e-4 if logits.dtype in (torch.float32, torch.float64) else 2e-2
    logits = logits[..., : expected.shape[-1]].float()
    difference = (logits - expected).abs().max().item()
    if not difference <= tolerance * (1 + logits.abs().max().item()):
        name = type(_causal_lm(module)).__name__
        raise Refused(
            f"algorithm.hpd.pipeline=one_pass: the output layer of {name} does more than a linear layer, scaling and "
            f"soft-capping (logits differ by {difference:.3g}); {_STAGED}"
        )
