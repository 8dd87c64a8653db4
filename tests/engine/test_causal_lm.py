"""The output layer of real transformers models, replaced by a function for one call; unknown ones are refused."""

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import (
    CohereConfig,
    Gemma2Config,
    GPT2Config,
    GPTNeoXConfig,
    GraniteConfig,
    Llama4ForCausalLM,
    Llama4TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PhiConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

from hpd_verl.engine.causal_lm import check_head, offer_head, output_head
from hpd_verl.head.distillation_head import distillation_head
from hpd_verl.head.output_head import OutputHead
from hpd_verl.objectives import RowObjectives

VOCABULARY, SHARED = 40, 33
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GPT2_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "n_positions": 64,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 2,
    "initializer_range": 0.3,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def build(config: PretrainedConfig) -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()


def with_bias(config: PretrainedConfig) -> PreTrainedModel:
    """A model whose output layer has a bias that is not 0."""
    model = build(config)
    layer = model.get_output_embeddings()
    bias = torch.linspace(-1, 1, VOCABULARY)
    layer.bias = nn.Parameter(bias)
    return model


def with_lora() -> PreTrainedModel:
    """Llama with adapters that are not 0; only they are trained."""
    torch.manual_seed(1)
    model = get_peft_model(
        build(LlamaConfig(**SIZES)), LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear")
    )
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    return model.eval()


FAMILIES: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": lambda: build(LlamaConfig(**SIZES, tie_word_embeddings=False)),
    "llama-tied": lambda: build(LlamaConfig(**SIZES, tie_word_embeddings=True)),
    "llama-lora": with_lora,
    "qwen2": lambda: build(Qwen2Config(**SIZES, tie_word_embeddings=True)),
    "qwen3": lambda: build(Qwen3Config(**SIZES)),
    "gemma2-soft-cap": lambda: build(Gemma2Config(**SIZES, final_logit_softcapping=3.0)),
    "cohere-scale": lambda: build(CohereConfig(**SIZES, logit_scale=0.3)),
    "granite-scaling": lambda: build(GraniteConfig(**SIZES, logits_scaling=3.0)),
    "gpt2": lambda: build(GPT2Config(**GPT2_SIZES)),
    "gpt-neox": lambda: build(GPTNeoXConfig(**SIZES)),
    "phi-bias": lambda: with_bias(PhiConfig(**SIZES)),
    "llama-bias": lambda: with_bias(LlamaConfig(**SIZES)),
}
each_family = pytest.mark.parametrize("family", FAMILIES)


def inputs(rows: int = 2, length: int = 7) -> dict[str, Any]:
    """As verl's engine calls a model, in several rows."""
    random = torch.Generator().manual_seed(3)
    return {
        "input_ids": torch.randint(SHARED, (rows, length), generator=random),
        "position_ids": torch.arange(length).repeat(rows, 1),
        "use_cache": False,
    }


def cross_entropy_head(labels: Tensor) -> Callable[[Tensor, OutputHead], Tensor]:
    """The mean negative log-likelihood of the labels, by ``distillation_head``."""

    def head(hidden: Tensor, layer: OutputHead) -> Tensor:
        n = labels.numel()
        return distillation_head(
            hidden=hidden.flatten(0, 1),
            head=layer,
            labels=labels.flatten(),
            uniforms=torch.empty(n, 0, dtype=torch.float64),
            token_scale=torch.full((n,), 1 / n, dtype=torch.float64),
            is_rollout=torch.zeros(n, dtype=torch.bool),
            teacher=None,
            objectives=RowObjectives.of("sft"),
            chunk_size=4,
        ).loss

    return head


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None}


@each_family
def test_plain_forward_is_unchanged(family: str) -> None:
    """Output and gradients of the same call are bit-identical, for positional and for keyword arguments."""
    model = FAMILIES[family]()
    plain = model(**inputs())
    positional = model(inputs()["input_ids"]).logits
    expected = gradients(model, plain.logits.square().mean())
    offer_head(model, SHARED)
    offered = model(**inputs())
    assert type(offered) is type(plain)
    assert torch.equal(offered.logits, plain.logits)
    assert torch.equal(model(inputs()["input_ids"]).logits, positional)
    found = gradients(model, offered.logits.square().mean())
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@each_family
def test_the_signature_is_unchanged(family: str) -> None:
    """transformers reads it, for example to see what to pass while it generates."""
    model = FAMILIES[family]()
    before = list(inspect.signature(model.forward).parameters)
    offer_head(model, SHARED)
    assert list(inspect.signature(model.forward).parameters) == before
    assert "head" not in before
    model.generate(input_ids=torch.tensor([[3, 4, 5]]), max_new_tokens=2, do_sample=False)


@each_family
def test_known_output_layers_pass_the_check(family: str) -> None:
    model = FAMILIES[family]()
    offer_head(model, SHARED)
    check_head(model)


@each_family
@pytest.mark.parametrize("how", ["bfloat16", "autocast"])
def test_known_output_layers_pass_the_check_in_low_precision(family: str, how: str) -> None:
    """Weights in bfloat16, and weights in float32 with products in bfloat16."""
    model = FAMILIES[family]()
    offer_head(model, SHARED)
    if how == "bfloat16":
        check_head(model.to(torch.bfloat16))
    else:
        with torch.autocast("cpu", torch.bfloat16):
            check_head(model)


@each_family
def test_cross_entropy_by_the_head(family: str) -> None:
    """Loss and all parameters' gradients are those of plain logits, cut to the shared vocabulary."""
    model = FAMILIES[family]().double()
    labels = torch.roll(inputs()["input_ids"], -1, 1)
    logits = model(**inputs()).logits[..., :SHARED]
    loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
    expected = gradients(model, loss)

    offer_head(model, SHARED)
    by_head = model(**inputs(), head=cross_entropy_head(labels))
    assert by_head.item() == pytest.approx(loss.item(), rel=1e-6)
    found = gradients(model, by_head)
    assert found.keys() == expected.keys()
    assert any(gradient.abs().max() > 1e-3 for gradient in expected.values())
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-6, atol=1e-9, msg=partial("{}: {}".format, name))


def test_the_head_sees_hidden_states_and_the_layer() -> None:
    """What it returns is returned as it is."""
    model = build(GraniteConfig(**SIZES, logits_scaling=4.0))
    offer_head(model, SHARED)
    answer = object()
    seen = []

    def head(hidden: Tensor, layer: OutputHead) -> object:
        seen.append((hidden, layer))
        return answer

    assert model(**inputs(), head=head) is answer
    ((hidden, layer),) = seen
    assert hidden.shape == (2, 7, 32)
    assert layer.weight is model.lm_head.weight
    assert (layer.vocabulary_size, layer.scale, layer.soft_cap, layer.bias) == (SHARED, 0.25, None, None)
    assert output_head(model).vocabulary_size == VOCABULARY


class _LouderLlama(LlamaForCausalLM):
    """Does something to its logits that its configuration does not tell."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        output.logits = output.logits * 1.1
        return output


class _NaNLlama(LlamaForCausalLM):
    """NaN that its hidden states do not have."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        output.logits = output.logits * float("nan")
        return output


@pytest.mark.parametrize("model_class", [_LouderLlama, _NaNLlama])
@pytest.mark.parametrize("how", ["float32", "bfloat16", "autocast"])
def test_a_model_that_does_more_is_refused(model_class: type[LlamaForCausalLM], how: str) -> None:
    torch.manual_seed(0)
    model = model_class(LlamaConfig(**SIZES)).eval().to(torch.bfloat16 if how == "bfloat16" else torch.float32)
    offer_head(model, SHARED)
    message = (
        rf"algorithm\.hpd\.pipeline=one_pass: the output layer of {model_class.__name__} does more than a linear "
        r"layer, .* \(logits differ by .*\); main_ppo trains it with algorithm\.hpd\.pipeline=staged"
    )
    with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"), pytest.raises(ValueError, match=message):
        check_head(model)


def test_a_model_of_nan_is_left_to_the_first_step() -> None:
    """There the rows are named."""
    model = build(LlamaConfig(**SIZES))
    nn.init.constant_(model.model.layers[1].mlp.up_proj.weight, float("nan"))
    offer_head(model, SHARED)
    check_head(model)


def test_another_output_layer_is_refused() -> None:
    model = build(LlamaConfig(**SIZES))
    model.lm_head = nn.Sequential(nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, VOCABULARY))
    with pytest.raises(ValueError, match=r"of LlamaForCausalLM is torch\.\S+\.Sequential, not a linear layer; main"):
        offer_head(model, SHARED)


def test_an_adapter_on_the_output_layer_is_refused() -> None:
    model = get_peft_model(build(LlamaConfig(**SIZES)), LoraConfig(task_type="CAUSAL_LM", target_modules=["lm_head"]))
    with pytest.raises(ValueError, match=r"of LlamaForCausalLM is peft\.\S+\.Linear, not a linear layer; main_ppo"):
        offer_head(model, SHARED)


def test_a_body_that_is_not_named() -> None:
    """transformers names Llama 4's body by a prefix that its text model does not have."""
    torch.manual_seed(0)
    model = Llama4ForCausalLM(Llama4TextConfig(**SIZES, intermediate_size_mlp=48, num_local_experts=2)).eval()
    assert model.base_model is model
    offer_head(model, SHARED)
    check_head(model)


def test_a_model_without_a_body_of_its_own_is_refused() -> None:
    model = build(LlamaConfig(**SIZES))
    model.base_model_prefix, model.second = "absent", build(LlamaConfig(**SIZES)).model
    with pytest.raises(ValueError, match=r"LlamaForCausalLM has no part 'absent' that .*main_ppo trains it with"):
        offer_head(model, SHARED)
