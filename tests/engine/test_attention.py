"""packed_attention gives what a model computes for each sequence alone, and nothing leaks between packed sequences."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from hpd_verl.engine import attention

KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {}),
    "a window": ("mistral", {"sliding_window": 4}),
    "a window that the layer does not hand on": (
        "qwen2_moe",
        {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1, "num_experts": 4},
    ),
    "a soft cap, and windows": ("gemma2", {"attn_logit_softcapping": 2.0, "sliding_window": 4}),
    "sinks": ("gpt_oss", {"sliding_window": 4, "num_local_experts": 4}),
}


def models(kind: str) -> tuple[Any, Any]:
    """The same weights with packed_attention and with eager attention."""
    family, values = KINDS[kind]
    config = AutoConfig.for_model(
        family,
        vocab_size=32,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        initializer_range=0.3,
        pad_token_id=0,
        **values,
    )
    torch.manual_seed(0)
    packed = AutoModelForCausalLM.from_config(copy.deepcopy(config), attn_implementation=attention.NAME)
    for parameter in packed.parameters():  # sinks start at nothing
        torch.nn.init.normal_(parameter, std=0.3)
    alone = AutoModelForCausalLM.from_config(config, attn_implementation="eager")  # writes the name into it
    alone.load_state_dict(packed.state_dict())
    return packed, alone


def assert_same(found: Tensor, expected: Tensor, packed: Any, alone: Any) -> None:
    """Of logits [tokens, vocabulary], and of all gradients of a loss of theirs."""
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    for output in (found, expected):
        (output.log_softmax(-1)[:, 3].sum() / len(output)).backward()
    for (name, parameter), other in zip(packed.named_parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, other.grad, rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.parametrize("kind", KINDS)
def test_packed_equals_alone(kind: str) -> None:
    """Logits and gradients of three packed sequences equal those of each by itself under eager attention."""
    packed, alone = models(kind)
    sequences = [torch.randint(32, (length,)) for length in (7, 1, 10)]
    ids = torch.cat(sequences).unsqueeze(0)
    position_ids = torch.cat([torch.arange(len(sequence)) for sequence in sequences]).unsqueeze(0)
    logits = packed(input_ids=ids, position_ids=position_ids, use_cache=False).logits[0]
    expected = torch.cat([alone(input_ids=sequence.unsqueeze(0), use_cache=False).logits[0] for sequence in sequences])
    assert_same(logits, expected, packed, alone)


@pytest.mark.parametrize("kind", KINDS)
def test_padded_batches_use_their_mask(kind: str) -> None:
    packed, alone = models(kind)
    sequences = [torch.randint(32, (length,)) for length in (9, 5)]
    ids = torch.nn.utils.rnn.pad_sequence(sequences, batch_first=True)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(each) for each in sequences], batch_first=True)
    logits = packed(input_ids=ids, attention_mask=mask, use_cache=False).logits[mask.bool()]
    expected = torch.cat([alone(input_ids=sequence.unsqueeze(0), use_cache=False).logits[0] for sequence in sequences])
    assert_same(logits, expected, packed, alone)


def test_nothing_tells_sequences_apart() -> None:
    query = torch.zeros(1, 2, 3, 8)
    with pytest.raises(ValueError, match="Module passes on neither position_ids nor a mask"):
        attention.packed_attention(torch.nn.Module(), query, query, query, None)


@pytest.mark.parametrize("name", [attention.NAME, attention.FORMER_NAME])
def test_saved_models_load_without_it(name: str, tmp_path: Path) -> None:
    """verl sets the attention's name on the configuration; a saved one does not carry it."""
    from transformers import LlamaConfig

    config = LlamaConfig(hidden_size=32, num_attention_heads=4)
    config.attn_implementation = name
    config.save_pretrained(tmp_path)
    assert name not in (tmp_path / "config.json").read_text()
    config.attn_implementation = "sdpa"
    assert config.to_dict()["attn_implementation"] == "sdpa"


def test_verl_still_writes_the_name() -> None:
    """Fails when verl no longer sets it on the configuration: then the patch of to_dict can go."""
    import inspect

    from verl.utils import model

    assert "setattr(module_config, key, val)" in inspect.getsource(model.update_model_config)
