"""packed_sdpa gives what a model computes for each sequence alone, and nothing leaks between packed sequences."""

from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from hpd_verl.engine import attention


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3", "mistral"])
@pytest.mark.parametrize("window", [None, 4])
def test_packed_equals_alone(model_type: str, window: int | None) -> None:
    """Logits and gradients of three packed sequences equal those of each by itself under eager attention."""
    config = AutoConfig.for_model(
        model_type,
        vocab_size=32,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
    )
    config.sliding_window = window if model_type == "mistral" else None
    torch.manual_seed(0)
    packed = AutoModelForCausalLM.from_config(config, attn_implementation=attention.NAME)
    alone = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    alone.load_state_dict(packed.state_dict())
    sequences = [torch.randint(32, (length,)) for length in (7, 1, 10)]

    ids = torch.cat(sequences).unsqueeze(0)
    position_ids = torch.cat([torch.arange(len(sequence)) for sequence in sequences]).unsqueeze(0)
    logits = packed(input_ids=ids, position_ids=position_ids, use_cache=False).logits[0]
    expected = torch.cat([alone(input_ids=sequence.unsqueeze(0), use_cache=False).logits[0] for sequence in sequences])
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)
    for output in (logits, expected):
        (output.log_softmax(-1)[:, 3].sum() / len(output)).backward()
    for (name, parameter), other in zip(packed.named_parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, other.grad, rtol=1e-3, atol=1e-6, msg=name)


def test_padded_batches_use_their_mask() -> None:
    config = AutoConfig.for_model(
        "llama", vocab_size=32, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention.NAME)
    ids = torch.randint(32, (2, 9))
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    position_ids = (mask.cumsum(-1) - 1).clamp_min(0)
    logits = model(input_ids=ids, attention_mask=mask, position_ids=position_ids, use_cache=False).logits
    alone = model(input_ids=ids[:1, 4:], position_ids=position_ids[:1, 4:], use_cache=False).logits
    torch.testing.assert_close(logits[0, 4:], alone[0], rtol=1e-4, atol=1e-5)


def test_saved_models_load_without_it(tmp_path: Path) -> None:
    """verl sets the attention's name on the configuration; a saved one does not carry it."""
    from transformers import LlamaConfig

    config = LlamaConfig(hidden_size=32, num_attention_heads=4)
    config.attn_implementation = attention.NAME
    config.save_pretrained(tmp_path)
    assert attention.NAME not in (tmp_path / "config.json").read_text()
    config.attn_implementation = "sdpa"
    assert config.to_dict()["attn_implementation"] == "sdpa"


def test_verl_still_writes_the_name() -> None:
    """Fails when verl no longer sets it on the configuration: then the patch of to_dict can go."""
    import inspect

    from verl.utils import model

    assert "setattr(module_config, key, val)" in inspect.getsource(model.update_model_config)
