"""What verl asks of a model and some families do not say is given to it, and saved configurations are as they were."""

import inspect
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    CTRLConfig,
    GPT2Config,
    GPTBigCodeConfig,
    LlamaConfig,
    MambaConfig,
    OPTConfig,
    PretrainedConfig,
    PreTrainedModel,
)
from verl.utils import model as verl_model
from verl.utils.checkpoint import fsdp_checkpoint_manager
from verl.utils.fsdp_utils import _select_fsdp2_wrap_targets
from verl.workers.engine.fsdp import transformer_impl

from hpd_verl.engine import on_meta
from hpd_verl.engine.families import head_counts, head_size, layers_to_wrap, register

register()

LAYERS = {"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 32, "vocab_size": 40}
OLD = {"n_layer": 2, "n_head": 4, "n_embd": 32, "vocab_size": 40}
FAMILIES: list[tuple[PretrainedConfig, tuple[int, int], list[str]]] = [
    (LlamaConfig(**LAYERS, num_key_value_heads=2), (4, 2), ["LlamaDecoderLayer"]),
    (GPT2Config(**OLD), (4, 4), ["GPT2Block"]),
    (GPTBigCodeConfig(**OLD, multi_query=True), (4, 1), ["GPTBigCodeBlock"]),
    (OPTConfig(**LAYERS, ffn_dim=48, word_embed_proj_dim=32), (4, 4), ["OPTDecoderLayer"]),
    (BloomConfig(hidden_size=32, n_layer=2, n_head=4, vocab_size=40), (4, 4), ["BloomBlock"]),
    (CTRLConfig(**OLD, dff=48), (4, 4), ["EncoderLayer"]),
    (MambaConfig(hidden_size=32, num_hidden_layers=2, vocab_size=40, state_size=8), (1, 1), ["MambaBlock"]),
]


@pytest.mark.parametrize(("config", "heads", "layers"), FAMILIES, ids=[each.model_type for each, _, _ in FAMILIES])
def test_verl_gets_what_it_asks_for(config: PretrainedConfig, heads: tuple[int, int], layers: list[str]) -> None:
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    before = model.config.to_dict()
    assert head_counts(model.config) == heads
    transformer_impl.apply_monkey_patch(model=model, use_remove_padding=False)
    assert model.config.to_dict() == before
    assert model._no_split_modules == layers
    wrapped = [type(module).__name__ for module in _select_fsdp2_wrap_targets(model, model._no_split_modules)]
    assert wrapped.count(layers[0]) == 2


def test_the_class_with_an_output_layer() -> None:
    """verl finds a class by ForCausalLM in its name."""
    config = GPT2Config(**OLD, architectures=["GPT2LMHeadModel"])
    assert verl_model.get_hf_auto_model_class(config) is AutoModelForCausalLM
    assert on_meta.build(config).get_output_embeddings() is not None


def test_sizes_of_heads() -> None:
    assert head_size(LlamaConfig(**LAYERS, head_dim=16)) == 16
    assert head_size(GPT2Config(**OLD)) == 8


def test_a_model_without_layers_has_none_to_wrap() -> None:
    assert layers_to_wrap(torch.nn.Linear(2, 2)) == []


def test_applying_twice_changes_nothing() -> None:
    def patched() -> list[Any]:
        manager = fsdp_checkpoint_manager.FSDPCheckpointManager
        return [transformer_impl.apply_monkey_patch, manager.save_checkpoint, verl_model.get_hf_auto_model_class]

    before = patched()
    register()
    assert patched() == before


def test_verl_still_asks_for_what_the_patches_mend() -> None:
    """These fail when verl changes under a patch: then look whether the patch can go."""
    ask = inspect.getsource(inspect.unwrap(transformer_impl.apply_monkey_patch))
    save = inspect.getsource(inspect.unwrap(fsdp_checkpoint_manager.FSDPCheckpointManager.save_checkpoint))
    assert "text_config.num_key_value_heads" in ask
    assert "LMHeadModel" not in inspect.getsource(verl_model)
    assert "from verl.utils.model import get_hf_auto_model_class" in inspect.getsource(transformer_impl)
    assert '"ForCausalLM" in model_config.architectures[0]' in save
