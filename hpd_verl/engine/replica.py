"""A small model with random weights and layers of every kind that a large model of its family has.

It answers questions about masks, positions and states before the large model loads. These do not depend on widths;
windows, chunks and soft caps are made so small that a few tokens show them. float32, on the CPU.
"""

import copy
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM, PretrainedConfig
from transformers.initialization import no_init_weights

AFFORDABLE = 60_000_000
"""Parameters of the largest replica that is made."""

_TOKENS_SEEN: Mapping[str, int] = {
    "sliding_window": 5,
    "attention_window_size": 5,
    "window_size": 5,
    "local_attention": 10,
    "keep_window_size": 4,
    "attention_chunk_size": 6,
    "index_topk": 6,
    # In how many tokens at once a state is computed.
    **dict.fromkeys(("chunk_size", "mamba_chunk_size"), 16),
}
"""Settings of how far a token sees, and what they become where they cut the longest row: a few tokens show it then."""

_SOFT_CAP: Mapping[str, float] = {"attn_logit_softcapping": 2.0}

_TOKENS: Mapping[str, int] = {"vocab_size": 512, "vocab_size_per_layer_input": 512}
_WIDTHS: Mapping[str, int] = {
    **dict.fromkeys(("intermediate_size", "intermediate_size_mlp", "ffn_hidden_size", "ffn_dim", "n_inner"), 128),
    **dict.fromkeys(("shared_intermediate_size", "moe_intermediate_size", "shared_expert_intermediate_size"), 64),
    "expert_ffn_hidden_size": 64,
}
_EXPERTS: Mapping[str, int] = {
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "top_k_experts", "moe_k"), 2),
    **dict.fromkeys(("n_group", "topk_group"), 1),
}
_STATES: Mapping[str, int] = {
    **dict.fromkeys(("mamba_d_state", "ssm_state_size", "state_size"), 16),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim"), 32),
    **dict.fromkeys(("linear_num_value_heads", "mamba_num_heads"), 4),
    "linear_num_key_heads": 2,
    **dict.fromkeys(("n_groups", "mamba_n_groups"), 1),
}
_HIDDEN, _HEADS, _HEAD_SIZE = 256, 4, 64
_STATE_HEADS = (("mamba_n_heads", "mamba_d_head"), ("n_mamba_heads", "mamba_headdim"))
"""Their product is the hidden size times ``mamba_expand``."""
_GAIN = 1.2


def text_config(config: PretrainedConfig) -> PretrainedConfig:
    """The language model's part of a configuration, as far as transformers makes a language model of it."""
    text = config.get_text_config()
    return text if type(text) in MODEL_FOR_CAUSAL_LM_MAPPING else config


def rope_switch(config: PretrainedConfig) -> int | None:
    """Length above which a row gets other rotary factors (LongRoPE), or None.

    transformers decides by the longest row of a micro-batch, for all of them.
    """
    parameters = getattr(text_config(config), "rope_parameters", None) or {}
    nodes = [parameters, *(each for each in parameters.values() if isinstance(each, dict))]
    lengths = [each["original_max_position_embeddings"] for each in nodes if each.get("rope_type") == "longrope"]
    return min(lengths, default=None)


class Replica:
    """Random weights that are strong, so that all that reaches a token is seen in its output.

    Args:
        config: of the large model; not changed.
        longest_row: tokens.
        trust_remote_code: the model's code comes with it.

    Raises:
        Exception: transformers cannot make a model of this configuration.
        MemoryError: a replica of this kind would be large too.
    """

    def __init__(self, config: PretrainedConfig, longest_row: int, trust_remote_code: bool = False) -> None:
        self.trust_remote_code = trust_remote_code
        config = text_config(config)
        cutting = {name: few for name, few in _TOKENS_SEEN.items() if _number(config, name) < longest_row}
        self.config = self._smallest(_lowered(config, {**cutting, **_SOFT_CAP}))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = self._build(self.config, "eager")
            _strengthen(model)
        self.weights = model.state_dict()

    def model(self, attention: str) -> Any:
        """The model in evaluation mode with one of transformers' attentions; all share the weights.

        Raises:
            Exception: the family does not take this attention.
        """
        with no_init_weights():
            model = self._build(self.config, attention)
        model.load_state_dict(self.weights, assign=True)
        return model.eval()

    def _build(self, config: PretrainedConfig, attention: str) -> Any:
        return AutoModelForCausalLM.from_config(
            copy.deepcopy(config),
            attn_implementation=attention,
            dtype=torch.float32,
            trust_remote_code=self.trust_remote_code,
        )

    def _skeleton(self, config: PretrainedConfig) -> nn.Module:
        with torch.device("meta"):
            return self._build(config, "eager")

    def _smallest(self, config: PretrainedConfig) -> PretrainedConfig:
        """The configuration as it is, if that is affordable, else the smallest of its kind that can be made and run."""
        whole = self._skeleton(config)
        if _parameters(whole) <= AFFORDABLE:
            return config
        for smaller in _smaller(config, whole):
            try:
                if _parameters(self._skeleton(smaller)) > AFFORDABLE:
                    continue
                self._build(smaller, "eager")(input_ids=torch.ones(1, 2, dtype=torch.int64), use_cache=False)
            except Exception:
                continue
            return smaller
        raise MemoryError(f"no replica of {type(whole).__name__} has fewer than {AFFORDABLE} parameters")


def _number(config: PretrainedConfig, name: str) -> float:
    value = getattr(config, name, None)
    return value if isinstance(value, int | float) else 0


def _parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _lowered(config: PretrainedConfig, values: Mapping[str, Any]) -> PretrainedConfig:
    """A copy with these values where the configuration has larger ones."""
    changed = copy.deepcopy(config)
    for name, value in values.items():
        found = getattr(changed, name, None)
        if isinstance(found, list | tuple) and all(isinstance(each, int | float) for each in found):  # by layer
            setattr(changed, name, [min(each, value) for each in found])
        elif isinstance(found, int | float) and not isinstance(found, bool) and found > value:
            setattr(changed, name, value)
    return changed


def _smaller(config: PretrainedConfig, whole: nn.Module) -> Iterator[PretrainedConfig]:
    """Configurations of the same kind, the smallest first; not every one can be made, nor run."""
    tokens = {name: 0 for name, value in vars(config).items() if name.endswith("_token_id") and isinstance(value, int)}
    layers = _kinds_of_layers(whole)
    for values in ({**_STATES, **_WIDTHS, **_EXPERTS}, {**_STATES, **_EXPERTS}, {}):
        narrow = _first_layers(_lowered(config, {**tokens, **_TOKENS, **values}), layers)
        yield _few_heads(narrow)
        yield narrow


def _few_heads(config: PretrainedConfig) -> PretrainedConfig:
    """The same with narrow hidden states, and few attention heads of which as many share a key."""
    few = copy.deepcopy(config)
    heads = getattr(few, "num_attention_heads", None)
    if not isinstance(heads, int) or heads <= _HEADS:
        return few
    few.hidden_size, few.num_attention_heads = _HIDDEN, _HEADS
    for name in ("num_key_value_heads", "num_kv_heads"):  # Falcon's
        if getattr(few, name, None) is not None:
            setattr(few, name, max(1, _HEADS * getattr(few, name) // heads))
    if getattr(few, "head_dim", None) is not None and "head_dim" in vars(few):  # Falcon's follows from the others
        few.head_dim = _HEAD_SIZE
    inner = _HIDDEN * int(getattr(few, "mamba_expand", None) or 1)
    if getattr(few, "mamba_d_ssm", None) is not None:  # Falcon-H1's name of it
        few.mamba_d_ssm = inner
    for count, size in _STATE_HEADS:
        if isinstance(getattr(few, count, None), int) and isinstance(getattr(few, size, None), int):
            setattr(few, size, min(inner, getattr(few, size)))
            setattr(few, count, inner // getattr(few, size))
    if getattr(few, "attention_hidden_size", None) is not None:  # Zamba2: hidden states beside the embeddings
        few.attention_hidden_size, few.attention_head_dim = 2 * _HIDDEN, 2 * _HIDDEN // _HEADS
    return few


def _kinds_of_layers(model: nn.Module) -> int | None:
    """Number of first layers that hold all kinds of layers; None if the model does not list its layers."""
    count = getattr(model.config, "num_hidden_layers", None)
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            kinds = [_kind(layer) for layer in module]
            return max(kinds.index(kind) for kind in kinds) + 1
    return None


def _kind(layer: nn.Module) -> tuple[Any, ...]:
    """A layer's kind: the classes of its parts, and their settings except the layer's number."""
    return tuple(
        (
            name,
            type(part),
            *(
                (key, value)
                for key, value in sorted(vars(part).items())
                if isinstance(value, bool | int | float | str | None) and key not in ("layer_idx", "layer_id")
            ),
        )
        for name, part in layer.named_modules()
    )


def _first_layers(config: PretrainedConfig, layers: int | None) -> PretrainedConfig:
    """A configuration of the first layers alone; what it says layer by layer is cut likewise."""
    count = getattr(config, "num_hidden_layers", None)
    if layers is None or count is None:
        return config
    for name, value in list(vars(config).items()):
        if isinstance(value, list | tuple) and len(value) == count:
            setattr(config, name, list(value)[:layers])
    config.num_hidden_layers = layers
    return config


@torch.no_grad()
def _strengthen(model: nn.Module) -> None:
    """Draw matrices so large, at least, that a layer passes on more than it gets; move what starts doing nothing."""
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.add_(torch.randn_like(parameter) * 0.1)
        else:
            strength = max(parameter.std().item(), _GAIN * parameter.shape[-1] ** -0.5)
            parameter.copy_(torch.randn_like(parameter) * strength)
