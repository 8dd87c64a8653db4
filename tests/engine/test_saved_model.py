"""What is written of an engine's parameters is, to plain transformers and peft, the model that was trained."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_model
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Gemma2Config,
    GenerationConfig,
    GPT2Config,
    LlamaConfig,
    Qwen2MoeConfig,
)

from hpd_verl.engine.saved_model import (
    LogProbs,
    SavedModelError,
    adapter_settings,
    as_loaded,
    check_adapter,
    check_written,
    compare,
    end_tokens,
    plain_log_probs,
    plain_model,
    savable,
    token_rows,
    write_adapter,
    write_model,
)

SIZES: dict[str, Any] = {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
GROUPED: dict[str, Any] = {**SIZES, "intermediate_size": 48, "num_key_value_heads": 1, "initializer_range": 0.3}
FAMILIES: dict[str, Any] = {
    "llama": LlamaConfig(**GROUPED),
    "llama tied": LlamaConfig(**GROUPED, tie_word_embeddings=True),
    "gemma2 tied": Gemma2Config(**GROUPED, head_dim=16),
    "gpt2 tied": GPT2Config(vocab_size=61, n_embd=32, n_layer=2, n_head=2, initializer_range=0.3),
    "experts": Qwen2MoeConfig(
        **GROUPED, moe_intermediate_size=16, shared_expert_intermediate_size=16, num_experts=4, num_experts_per_tok=2
    ),
}
ROWS = [[5, 17, 3, 44, 9, 21], [7, 60, 2], list(range(10, 30))]
LINEAR = ["q_proj", "down_proj"]
ADAPTERS: dict[str, LoraConfig] = {
    "plain": LoraConfig(r=4, lora_alpha=24, target_modules=LINEAR),
    "rslora": LoraConfig(r=4, lora_alpha=24, use_rslora=True, target_modules=LINEAR),
    "dora": LoraConfig(r=4, lora_alpha=24, use_dora=True, target_modules=LINEAR),
    "ranks and alphas by layer": LoraConfig(
        r=4, lora_alpha=24, target_modules=LINEAR, rank_pattern={"q_proj": 2}, alpha_pattern={"down_proj": 5}
    ),
    "some layers": LoraConfig(r=4, lora_alpha=24, target_modules=LINEAR, layers_to_transform=[1]),
    "a whole module": LoraConfig(r=4, lora_alpha=24, target_modules=LINEAR, modules_to_save=["lm_head"]),
    "embeddings and output layer": LoraConfig(r=4, lora_alpha=24, target_modules=["embed_tokens", "lm_head"]),
}


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(7)


def trained(model: Any, dtype: str = "float32") -> LogProbs:
    return LogProbs(ROWS, plain_log_probs(model.eval(), ROWS), dtype)


def a_copy(model: Any) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def with_adapter(config: Any, adapter: LoraConfig) -> Any:
    """A trained adapter upon its base."""
    model = get_peft_model(AutoModelForCausalLM.from_config(config), adapter)
    for name, parameter in model.named_parameters():
        if "lora_" in name or "modules_to_save" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    return model


@pytest.mark.parametrize("own_head", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_whole_model(family: str, own_head: bool, tmp_path: Path) -> None:
    """Also where the configuration says that the output layer is the embeddings, and it is not."""
    config = FAMILIES[family]
    model = AutoModelForCausalLM.from_config(config)
    if own_head:
        head = model.get_output_embeddings()
        head.weight = torch.nn.Parameter(torch.randn_like(head.weight))
    reference = trained(model)
    config = AutoConfig.for_model(**{**config.to_dict(), "architectures": [type(model).__name__]})
    written = plain_model(config, model.state_dict())
    write_model(written, tmp_path, GenerationConfig(eos_token_id=[3, 4]), "here")
    assert check_written(tmp_path, reference, torch.float32).startswith("its log-probs are the trained model's")
    tied = json.loads((tmp_path / "config.json").read_text()).get("tie_word_embeddings", config.tie_word_embeddings)
    assert tied == ("tied" in family and not own_head)
    assert GenerationConfig.from_pretrained(tmp_path).eos_token_id == [3, 4]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", ADAPTERS)
def test_an_adapter(kind: str, tied: bool, tmp_path: Path) -> None:
    """Merged and by itself, peft's own adapted model is the reference; the engine's parameters stay as they are."""
    config = LlamaConfig(**GROUPED, tie_word_embeddings=tied, architectures=["LlamaForCausalLM"])
    model = with_adapter(config, ADAPTERS[kind])
    before, reference = a_copy(model), trained(model)
    content = model.peft_config["default"].to_dict()
    content |= {"init_lora_weights": "pissa", "megatron_core": "antigravity"}  # how it began, and code
    settings = adapter_settings(json.loads(json.dumps(content, default=list)))
    merged = plain_model(AutoConfig.for_model(**config.to_dict()), model.state_dict(), settings)
    write_model(merged, tmp_path / "merged", GenerationConfig(), "here")
    check_written(tmp_path / "merged", reference, torch.float32)
    write_adapter(config, model.state_dict(), settings, tmp_path / "adapter", torch.float32)
    base = plain_model(
        AutoConfig.for_model(**config.to_dict()),
        {
            name.removeprefix("base_model.model.").replace(".base_layer.", ".").replace(".original_module.", "."): each
            for name, each in before.items()
            if ".lora_" not in name and ".modules_to_save." not in name
        },
    )
    check_adapter(tmp_path / "adapter", as_loaded(base), reference, torch.float32)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_an_adapter_with_other_settings_is_another_model(tmp_path: Path) -> None:
    config = LlamaConfig(**GROUPED, architectures=["LlamaForCausalLM"])
    model = with_adapter(config, ADAPTERS["plain"])
    reference = trained(model)
    wrong = adapter_settings({"r": 4, "lora_alpha": 8, "target_modules": LINEAR})
    write_model(plain_model(config, model.state_dict(), wrong), tmp_path, GenerationConfig(), "here")
    with pytest.raises(SavedModelError, match="differ from the trained model's by"):
        check_written(tmp_path, reference, torch.float32)
    with pytest.raises(RuntimeError):  # modules that the adapter has not
        plain_model(config, model.state_dict(), adapter_settings({"r": 4, "target_modules": ["q_proj"]}))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rounding_is_told_from_another_model(dtype: str, tmp_path: Path) -> None:
    """Weights and products of either dtype; a layer that is lost is seen in both."""
    make_model(tmp_path / "model", seed=3)
    load: Callable[..., Any] = AutoModelForCausalLM.from_pretrained
    rows = token_rows(AutoConfig.from_pretrained(tmp_path / "model"), [0, 1, 2], 128)
    engine = load(tmp_path / "model", dtype=getattr(torch, dtype))
    reference = LogProbs(rows, plain_log_probs(engine, rows), dtype)
    for written in (torch.float32, torch.bfloat16):
        exported = load(tmp_path / "model", dtype=torch.float32).to(written).float()
        compare(exported, reference, written)
        broken = load(tmp_path / "model", dtype=torch.float32)
        with torch.no_grad():
            broken.model.layers[1].mlp.down_proj.weight.zero_()
        with pytest.raises(SavedModelError):
            compare(broken, reference, written)
        with torch.no_grad():
            broken.model.norm.weight[0] = float("nan")
        with pytest.raises(SavedModelError):
            compare(broken, reference, written)


def test_rows_of_tokens_are_ordinary_and_fit(tmp_path: Path) -> None:
    config = LlamaConfig(**GROUPED)
    rows = token_rows(config, [0, 1, 2], 12)
    assert rows == token_rows(config, [0, 1, 2], 12)
    assert [len(row) for row in rows] == [12, 9, 12, 12]
    assert {token for row in rows for token in row} <= set(range(3, 61))


def test_log_probs_of_a_damaged_file_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "log_probs.json"
    assert LogProbs.read(file) is None
    whole = LogProbs([[1, 2, 3]], [[-1.5, -0.5]], "bfloat16")
    whole.write(file)
    assert LogProbs.read(file) == whole
    content = json.loads(file.read_text())
    damages: tuple[dict[str, Any], ...] = (
        {"rows": [[1, "2", 3]]},
        {"rows": [[1, 2]]},
        {"rows": 5},
        {"values": [[1.0, None]]},
        {"values": []},
        {"dtype": "load"},
    )
    for damage in damages:
        file.write_text(json.dumps(content | damage))
        with pytest.raises(ValueError, match=r"log_probs\.json holds no log-probs"):
            LogProbs.read(file)
    for text in ("[" * 100_000, "[1]", "", "\udc80"):
        file.write_text(text, errors="surrogateescape")
        with pytest.raises(ValueError, match=r"^log_probs\.json is not (JSON|a JSON object)"):
            LogProbs.read(file)


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ({"temperature": 0.9, "top_p": 0.6}, {"do_sample": True, "temperature": 0.9, "top_p": 0.6}),
        ({"top_k": 40, "do_sample": False}, {"do_sample": True, "top_k": 40}),
        ({"min_p": 0.1}, {"do_sample": True, "min_p": 0.1}),
        ({"num_beams": 1, "early_stopping": True}, {"early_stopping": None}),
        ({"max_length": 50}, {"max_length": 50, "do_sample": None}),
    ],
)
def test_generation_settings_can_be_saved(given: dict[str, Any], kept: dict[str, Any], tmp_path: Path) -> None:
    """Temperature and the like without do_sample, which transformers refuses to save."""
    generation = GenerationConfig(eos_token_id=[3, 4], pad_token_id=0)
    for name, value in given.items():
        setattr(generation, name, value)
    savable(generation, "here").save_pretrained(tmp_path)
    written = GenerationConfig.from_pretrained(tmp_path)
    assert (written.eos_token_id, written.pad_token_id) == ([3, 4], 0)
    for name, value in kept.items():
        assert getattr(written, name) == value, name


def test_end_tokens_of_several_places() -> None:
    assert end_tokens(None, None) is None
    assert end_tokens(None, 3, [3]) == 3
    assert end_tokens(7, [3, 4], 4) == [7, 3, 4]


@pytest.mark.parametrize("content", [{}, {"r": 0}, {"r": True}, {"r": "8"}, {"r": 2.5}])
def test_an_adapter_without_a_rank_is_refused(content: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="no rank of an adapter"):
        adapter_settings({"target_modules": LINEAR, **content})


def test_peft_loads_the_adapter_by_its_folder(tmp_path: Path) -> None:
    """Names, dtype and settings are those of peft's own saving."""
    config = LlamaConfig(**GROUPED, architectures=["LlamaForCausalLM"])
    model = with_adapter(config, ADAPTERS["plain"])
    settings = adapter_settings(model.peft_config["default"].to_dict(), "base/model")
    write_adapter(config, model.state_dict(), settings, tmp_path / "ours", torch.bfloat16)
    model.save_pretrained(str(tmp_path / "pefts"))
    ours, pefts = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("ours", "pefts"))
    assert ours.keys() == pefts.keys()
    assert {tensor.dtype for tensor in ours.values()} == {torch.bfloat16}
    content = json.loads((tmp_path / "ours" / "adapter_config.json").read_text())
    assert (content["base_model_name_or_path"], content["r"], content["lora_alpha"]) == ("base/model", 4, 24)
    assert content["inference_mode"]
    base = AutoModelForCausalLM.from_config(config)
    assert isinstance(PeftModel.from_pretrained(base, str(tmp_path / "ours")), PeftModel)
