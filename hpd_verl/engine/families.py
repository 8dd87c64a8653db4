"""Attributes that verl reads from a model and that some families lack or name otherwise.

verl chooses a model's class by its name, which GPT-2 and its like do not have. Before it changes attention for sequence
parallelism it reads two counts of heads: OPT, Bloom and others have no count of key-value heads, state-space models no
heads at all. FSDP2 wraps the layers that ``_no_split_modules`` names: CTRL names none, Mamba one within the other.
"""

from collections.abc import Callable
from typing import Any

from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from wrapt import register_post_import_hook

from hpd_verl.run.replacing import replace

_ENGINE = "verl.workers.engine.fsdp.transformer_impl"
_CHECKPOINTS = "verl.utils.checkpoint.fsdp_checkpoint_manager"
_LM_HEAD = "LMHeadModel"
"""In the class names of GPT-2, GPT and CTRL, where later families have ForCausalLM."""


def head_counts(config: PretrainedConfig) -> tuple[int, int]:
    """Heads of queries, and of keys and values, of a language model; 1 where it has none."""
    text = config.get_text_config()
    heads = getattr(text, "num_attention_heads", None) or 1
    key_heads = getattr(text, "num_key_value_heads", None) or getattr(text, "num_kv_heads", None)
    return heads, key_heads or (1 if getattr(text, "multi_query", False) else heads)


def divides_heads(ranks: int, heads: int, key_heads: int) -> bool:
    """Whether Ulysses can share out a model's heads among so many ranks; where there are fewer keys it repeats them."""
    return heads % ranks == 0 and (key_heads % ranks == 0 or ranks % key_heads == 0)


def head_size(config: PretrainedConfig) -> int:
    """Size of an attention head, by a configuration."""
    text = config.get_text_config()
    return int(getattr(text, "head_dim", None) or text.hidden_size // head_counts(config)[0])


def layers_to_wrap(model: nn.Module) -> list[str]:
    """Class names of the layers that FSDP wraps: the model's own, but none within another; else its lists' elements."""
    named = set(getattr(model, "_no_split_modules", None) or [])
    found = _outermost(model, lambda name, module: type(module).__name__ in named)
    if not found:
        parents = {f"{name}." for name, module in model.named_modules() if isinstance(module, nn.ModuleList)}
        found = _outermost(model, lambda name, module: any(name.rpartition(".")[0] + "." == each for each in parents))
    return found


def _outermost(model: nn.Module, is_wanted: Callable[[str, nn.Module], bool]) -> list[str]:
    """Class names of the wanted modules with parameters that lie within no other wanted one."""
    found: dict[str, None] = {}
    inside: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if is_wanted(name, module) and not name.startswith(inside) and any(True for _ in module.parameters()):
            inside = (*inside, f"{name}.")
            found[type(module).__name__] = None
    return list(found)


def _with_output_layer(original: Callable[..., Any]) -> Callable[..., Any]:
    """verl takes the class without an output layer where a name does not have ForCausalLM."""

    def get_hf_auto_model_class(hf_config: PretrainedConfig) -> Any:
        found = original(hf_config)
        return AutoModelForCausalLM if found is AutoModel and _LM_HEAD in hf_config.architectures[0] else found

    return get_hf_auto_model_class


def _for_wrapping(original: Callable[..., Any]) -> Callable[..., Any]:
    """verl's function reads counts of heads from the configuration, which must be saved as it was.

    It is the last of verl's that has the model to itself before FSDP wraps it.
    """

    def apply_monkey_patch(model: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
        model._no_split_modules = layers_to_wrap(model)
        config = model.config.get_text_config()
        counts = dict(zip(("num_attention_heads", "num_key_value_heads"), head_counts(config), strict=True))
        absent = {name: count for name, count in counts.items() if not hasattr(config, name)}
        for name, count in absent.items():
            setattr(config, name, count)
        try:
            return original(model, *args, **kwargs)
        finally:
            for name in absent:
                delattr(config, name)

    return apply_monkey_patch


def _saves_lm_heads(original: Callable[..., Any]) -> Callable[..., Any]:
    """verl saves hf_model by the architecture's name; transformers then writes the right one into config.json."""

    def save_checkpoint(self: Any, *args: Any, **kwargs: Any) -> Any:
        config = self.model.config
        named = config.architectures
        if self.should_save_hf_model and named and _LM_HEAD in named[0]:
            config.architectures = [named[0].replace(_LM_HEAD, "ForCausalLM")]
        try:
            return original(self, *args, **kwargs)
        finally:
            config.architectures = named

    return save_checkpoint


def register() -> None:
    """Tell verl in this process. Idempotent."""
    from verl.utils import model as verl_model  # the planner reads sizes of heads without verl

    replace(verl_model, "get_hf_auto_model_class", _with_output_layer)
    register_post_import_hook(lambda engine: replace(engine, "apply_monkey_patch", _for_wrapping), _ENGINE)
    register_post_import_hook(
        lambda checkpoints: replace(checkpoints.FSDPCheckpointManager, "save_checkpoint", _saves_lm_heads), _CHECKPOINTS
    )
