"""Families of causal language models as tiny random ones, and the lean trainer's gradient beside plain transformers'.

    python tests/families.py                     # every family: 2 to 4 seconds each
    python tests/families.py qwen3_next gemma2   # some of them

One step of the real trainer on rows of different lengths in one micro-batch, against each row alone through eager
attention. Prints a line a family: right, refused with its line, or WRONG; ends with 1 if any is WRONG.
"""

import argparse
import os
import random
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ |= {"VERL_PLATFORM": "cpu", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}

import torch
from conftest import sft_config
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PretrainedConfig

LONGEST = 128
"""Tokens of prompt and response that the trainer is told."""
TOLERANCE = 1e-3
"""Relative, of loss and gradient: right ones are off by less than 1e-5, wrong ones by 2e-3 and more."""

_SMALL: dict[str, Any] = {
    "vocab_size": 272,
    "vocab_size_per_layer_input": 272,
    "hidden_size_per_layer_input": 8,
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx"), 256),
    **dict.fromkeys(("hidden_size", "n_embd", "d_model"), 32),
    **dict.fromkeys(("intermediate_size", "n_inner", "ffn_dim", "dff", "ffn_hidden_size"), 48),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers"), 4),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "linear_num_key_heads", "index_n_heads"), 2),
    **dict.fromkeys(("head_dim", "global_head_dim", "rotary_dim", "index_head_dim"), 8),
    **dict.fromkeys(("initializer_range", "init_std"), 0.3),
    **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1},
    **dict.fromkeys(("sliding_window", "window_size"), 5),
    **{"attention_chunk_size": 6, "local_attention": 10, "keep_window_size": 4, "attn_logit_softcapping": 2.0},
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "expert_ffn_hidden_size"), 24),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "zero_expert_num"), 2),
    **dict.fromkeys(("n_shared_experts", "n_group", "topk_group", "first_k_dense_replace", "mamba_n_groups"), 1),
    **dict.fromkeys(("router_jitter_noise", "input_jitter_noise"), 0.0),
    **{"q_lora_rank": 16, "kv_lora_rank": 16, "index_topk": 6, "logit_scale": 0.5},
    **dict.fromkeys(("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"), 8),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim"), 8),
    **dict.fromkeys(("linear_num_value_heads", "mamba_n_heads", "mamba_num_heads"), 4),
    **dict.fromkeys(("mamba_d_head", "mamba_head_dim"), 16),
    **dict.fromkeys(("mamba_d_state", "ssm_state_size", "state_size", "block_size"), 8),
    **dict.fromkeys(("mamba_chunk_size", "chunk_size"), 64),
}
"""Given to a configuration where its class has such a key."""

_WINDOWS = {"layer_types": ["full_attention", "sliding_attention"] * 2}
_KINDS_OF_LAYERS: dict[str, dict[str, Any]] = {
    **{
        name: {"use_sliding_window": True, "max_window_layers": 2, **_WINDOWS}
        for name in ("qwen2", "qwen3", "qwen2_moe")
    },
    "smollm3": {"use_sliding_window": True, **_WINDOWS},
    "laguna": _WINDOWS,
    "mellum": _WINDOWS,
    **{name: {"num_key_value_heads": 4} for name in ("deepseek_v2", "deepseek_v3", "glm4_moe_lite", "glm_moe_dsa")},
    "bamba": {"attn_layer_indices": [1, 3]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"] * 2},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2, "num_dense_layers": 1},
    "nemotron_h": {"n_groups": 1, "layers_block_type": ["mamba", "attention", "moe", "mamba"]},
    "falcon_h1": {"mamba_d_ssm": 64},
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "phimoe": {"sliding_window": 5},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8},
        "ffn_config": {"ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 32},
    },
}
"""At least one layer of each kind that the family has."""

FAMILIES = [
    "apertus",
    "arcee",
    "bamba",
    "bitnet",
    "bloom",
    "codegen",
    "cohere",
    "cohere2",
    "cohere2_moe",
    "ctrl",
    "dbrx",
    "deepseek_v2",
    "deepseek_v3",
    "deepseek_v4",
    "dots1",
    "ernie4_5",
    "exaone4",
    "exaone_moe",
    "falcon",
    "falcon_h1",
    "falcon_mamba",
    "flex_olmo",
    "gemma",
    "gemma2",
    "gemma3_text",
    "gemma3n_text",
    "gemma4_text",
    "glm",
    "glm4",
    "glm4_moe",
    "glm4_moe_lite",
    "glm_moe_dsa",
    "gpt2",
    "gpt_neox",
    "gpt_neox_japanese",
    "gpt_oss",
    "gptj",
    "granite",
    "granitemoe",
    "granitemoehybrid",
    "granitemoeshared",
    "helium",
    "hrm_text",
    "hunyuan_v1_dense",
    "hunyuan_v1_moe",
    "hy_v3",
    "hyperclovax",
    "jais2",
    "jamba",
    "jetmoe",
    "laguna",
    "lfm2",
    "lfm2_moe",
    "llama",
    "llama4_text",
    "mamba",
    "mellum",
    "minimax",
    "minimax_m2",
    "ministral",
    "mistral",
    "mixtral",
    "modernbert-decoder",
    "nanochat",
    "nemotron",
    "nemotron_h",
    "olmo",
    "olmo2",
    "olmo3",
    "olmoe",
    "openai-gpt",
    "opt",
    "phi",
    "phi3",
    "phimoe",
    "qwen2",
    "qwen2_moe",
    "qwen3",
    "qwen3_5_moe_text",
    "qwen3_5_text",
    "qwen3_moe",
    "qwen3_next",
    "rwkv",
    "seed_oss",
    "smollm3",
    "solar_open",
    "starcoder2",
    "xlstm",
]


def tiny_config(family: str) -> PretrainedConfig:
    """A configuration of 4 layers, with windows of 5 tokens, chunks of 6 and soft caps of 2 where it has such."""
    kind = CONFIG_MAPPING[family]
    default = kind().to_dict()
    sizes = {key: value for key, value in _SMALL.items() if key in default or key in getattr(kind, "attribute_map", {})}
    sizes |= {key: 0.0 for key, value in default.items() if "drop" in key and isinstance(value, float)}
    if layers := list(dict.fromkeys(default.get("layer_types") or [])):
        sizes["layer_types"] = [layers[layer % len(layers)] for layer in range(4)]
    return kind(**sizes | _KINDS_OF_LAYERS.get(family, {}))


def tiny_model(family: str, seed: int) -> Any:
    """A random model in float32, of which nothing starts at a value at which it does nothing."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(tiny_config(family), attn_implementation="eager", dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def byte_tokenizer() -> Any:
    """Bytes, and the special tokens that verl asks of some families."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    ends = ["<pad>", "<end>", "<turn>"]
    special = ["<|im_end|>", "[e~[", "<|observation|>", "<|user|>", "<|tool_response>", "<｜end▁of▁sentence｜>"]  # noqa: RUF001
    words = [*ends, *special, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE(vocab={word: index for index, word in enumerate(words)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<turn>",
        eos_token="<end>",
        pad_token="<pad>",
        additional_special_tokens=special,
    )
    fast.chat_template = (
        "{% for m in messages %}<turn>{{ m['role'][0] }}{{ m['content'] }}<end>{% endfor %}"
        "{% if add_generation_prompt %}<turn>a{% endif %}"
    )
    return fast


def write_rows(file: Path) -> None:
    """8 rows of 9 to 42 tokens."""
    import pandas as pd

    draw = random.Random(0)

    def text(length: int) -> str:
        return "".join(chr(draw.randrange(33, 127)) for _ in range(length)).replace("<", "_")

    sizes = [(2, 7), (9, 2), (1, 16), (5, 5), (14, 22), (3, 1), (2, 4), (1, 9)]
    rows = [{"prompt": [{"role": "user", "content": text(a)}], "demonstration": text(b)} for a, b in sizes]
    pd.DataFrame(rows).to_parquet(file)


def lean_config(folder: Path, *overrides: str) -> Any:
    """The lean trainer's configuration for the models and rows of a folder."""
    return sft_config(
        f"model.path={folder}/student",
        f"teacher.model.path={folder}/teacher",
        f"data.train_files={folder}/rows.parquet",
        "data.train_batch_size=8",
        f"data.max_prompt_length={LONGEST // 2}",
        f"data.max_response_length={LONGEST // 2}",
        "data.max_token_len_per_gpu=1024",
        "data.num_workers=0",
        "trainer.total_training_steps=1",
        "trainer.logger=[console]",
        f"trainer.default_local_dir={folder}/run",
        "algorithm.hpd.objective=fkl",
        "optim.clip_grad=1e9",
        *overrides,
    )


def reference(folder: Path, rows: list[Any]) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradient of plain transformers, each row alone: the forward KL, a mean over response tokens."""
    student, teacher = (
        AutoModelForCausalLM.from_pretrained(folder / name, attn_implementation="eager", dtype=torch.float32).eval()
        for name in ("student", "teacher")
    )
    loss, count = torch.zeros(()), 0
    for row in rows:
        ids, start, mask = row["input_ids"][None], len(row["prompts"]), row["response_mask"].bool()
        with torch.no_grad():
            log_p = teacher(input_ids=ids, use_cache=False).logits[0, start - 1 : -1].log_softmax(-1)
        log_q = student(input_ids=ids, use_cache=False).logits[0, start - 1 : -1].log_softmax(-1)
        loss = loss + (log_p.exp() * (log_p - log_q)).sum(-1)[mask].sum()
        count += int(mask.sum())
    (loss / count).backward()
    return (loss / count).item(), gradient_of(student)


def gradient_of(model: Any) -> dict[str, Tensor]:
    """Gradients by parameter name, whole, float64."""
    found = {name: each.grad.detach() for name, each in model.named_parameters() if each.grad is not None}
    return {
        name: (grad.full_tensor() if hasattr(grad, "full_tensor") else grad).double() for name, grad in found.items()
    }


def checked_config(family: str, folder: Path, *overrides: str, change: Callable[[Path], None] | None = None) -> Any:
    """The configuration of a run of the lean trainer on tiny models and a few rows, which it accepts.

    Args:
        family: of both models.
        folder: for models, rows and run.
        overrides: of the configuration.
        change: is given the student's folder before it is checked.

    Raises:
        ValueError: the trainer refuses the family.
    """
    from verl.utils.device import auto_set_device

    from hpd_verl.checks.start import check_sft_run

    for name, seed in (("student", 1), ("teacher", 2)):
        tiny_model(family, seed).save_pretrained(folder / name)
        byte_tokenizer().save_pretrained(folder / name)
    if change is not None:
        change(folder / "student")
    write_rows(folder / "rows.parquet")
    config = lean_config(folder, *overrides)
    auto_set_device(config)
    check_sft_run(config)
    return config


def off_by(family: str, folder: Path, *overrides: str) -> float:
    """How far loss and gradient of one step of the lean trainer are from the reference, relative, the larger of both.

    A process group must be there.

    Raises:
        ValueError: the trainer refuses the family.
    """
    from verl.utils.config import omega_conf_to_dataclass

    from hpd_verl.sft.demonstrations import read_demonstrations
    from hpd_verl.sft.trainer import HPDSFTTrainer

    config = checked_config(family, folder, *overrides)
    rows = read_demonstrations(config, omega_conf_to_dataclass(config.model), config.data.train_files)
    loss, expected = reference(folder, [rows[index] for index in range(len(rows))])
    trainer, seen = HPDSFTTrainer(config), {}
    trainer.engine.optimizer.register_step_pre_hook(lambda *_: seen.update(gradient_of(trainer.engine.module)))
    metrics = trainer._train_step(next(iter(trainer.train_dataloader)), 1)
    names = {*seen, *expected}
    zero = torch.zeros(())
    difference = sum((seen.get(name, zero) - expected.get(name, zero)).square().sum() for name in names)
    norm = sum(each.square().sum() for each in expected.values())
    return max(abs(metrics["hpd/loss"] - loss) / abs(loss), float((difference / norm) ** 0.5))


def main() -> None:
    """Each family in this process, one after the other."""
    from verl.utils.distributed import initialize_global_process_group

    from hpd_verl.sft.start import ALONE

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", default=FAMILIES)
    wrong = []
    os.environ.update(ALONE)
    torch.set_num_threads(1)
    initialize_global_process_group()
    for family in parser.parse_args().families:
        with tempfile.TemporaryDirectory() as folder:
            try:
                off = off_by(family, Path(folder))
            except ValueError as error:
                print(f"{family:20} refused  {error}", flush=True)
                continue
        verdict = "right" if off < TOLERANCE else "WRONG"
        wrong += [family] if verdict == "WRONG" else []
        print(f"{family:20} {verdict}    off by {off:.0e}", flush=True)
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
