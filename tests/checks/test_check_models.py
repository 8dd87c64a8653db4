"""Models are checked before they load: their files, the chat template, and how student and teacher fit each other."""

import json
import logging
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import WORDS, Tiny, make_model, make_tokenizer
from omegaconf import OmegaConf
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    CTRLConfig,
    LlamaConfig,
    PretrainedConfig,
)

from hpd_verl.checks.models import ModelUse, check_models, check_weights

STUDENT, TEACHER = "actor_rollout_ref.model.path", "actor_rollout_ref.ref.model.path"
USES = (
    ModelUse(STUDENT, "actor_rollout_ref.actor.fsdp_config"),
    ModelUse(TEACHER, "actor_rollout_ref.ref.fsdp_config"),
)


def check(student: Path, teacher: Path | None, needed_context: int = 128, **teacher_node: Any) -> None:
    student_node = {"_target_": "verl.workers.config.HFModelConfig", "path": str(student)}
    check_models(
        student=OmegaConf.create(student_node),
        teacher=OmegaConf.create({"path": teacher and str(teacher), **teacher_node}),
        uses=(
            ModelUse(STUDENT, "actor_rollout_ref.actor.fsdp_config"),
            ModelUse(TEACHER, "actor_rollout_ref.ref.fsdp_config"),
        ),
        needed_context=needed_context,
    )


def test_models_that_fit(tiny: Tiny) -> None:
    check(tiny.student, tiny.teacher)


def test_an_adapter_that_verl_would_not_load(tiny: Tiny, tmp_path: Path) -> None:
    adapter = str(tmp_path)
    message = rf"^actor_rollout_ref\.ref\.model\.lora_adapter_path={adapter}: verl loads an adapter only if lora"
    with pytest.raises(ValueError, match=message):
        check(tiny.student, tiny.teacher, lora_adapter_path=adapter)


def test_missing_teacher_folder(tiny: Tiny, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"actor_rollout_ref\.ref\.model\.path=.*nowhere: no such folder; give "):
        check(tiny.student, tmp_path / "nowhere")


def test_folder_without_a_model(tiny: Tiny, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"actor_rollout_ref\.ref\.model\.path=.*: cannot load its configuration"):
        check(tiny.student, tmp_path)


def test_short_context(tiny: Tiny) -> None:
    with pytest.raises(ValueError, match=r"ref\.model\.path=.*: its context has 128 tokens, .* = 129; shorten them"):
        check(tiny.student, tiny.teacher, needed_context=129)


def test_disagreeing_tokenizers(tiny: Tiny, tmp_path: Path) -> None:
    swapped = [*WORDS[:9], *reversed(WORDS[9:])]
    other = make_model(tmp_path / "other", seed=3, words=swapped)
    with pytest.raises(ValueError, match=r"tokenizers disagree at 20 token ids \(id 9: student '0', teacher '19'"):
        check(tiny.student, other)


def test_student_as_its_own_teacher_is_warned_of(tiny: Tiny, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        check(tiny.student, tiny.student)
    assert "student and teacher start equal" in caplog.text


def test_no_teacher(tiny: Tiny) -> None:
    check(tiny.student, None)


def without_template(folder: Path) -> None:
    make_tokenizer(WORDS).save_pretrained(folder)
    (folder / "chat_template.jinja").unlink()


def refusing_template(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text("{{ raise_exception('no such role') }}")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without_template, "its tokenizer has no chat template; "),
        (
            refusing_template,
            "its chat template cannot write a question and an answer: .*no such role; set ",
        ),
    ],
)
def test_chat_template(change: Callable[[Path], None], message: str, tiny: Tiny, tmp_path: Path) -> None:
    student = Path(shutil.copytree(tiny.student, tmp_path / "student"))
    change(student)
    with pytest.raises(ValueError, match=rf"^actor_rollout_ref\.model\.path=.*: {message}"):
        check(student, tiny.teacher)
    check(tiny.student, student)  # the teacher's is never used


def shards(folder: Path) -> None:
    """The weights in two files with an index."""
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    parts = {"model-1.safetensors": names[:5], "model-2.safetensors": names[5:]}
    for file, part in parts.items():
        save_file({name: tensors[name] for name in part}, folder / file, metadata={"format": "pt"})
    index = {"weight_map": {name: file for file, part in parts.items() for name in part}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "model.safetensors").unlink()


def torch_file(folder: Path, legacy: bool = False) -> None:
    tensors = load_file(folder / "model.safetensors")
    torch.save(tensors, folder / "pytorch_model.bin", _use_new_zipfile_serialization=not legacy)
    (folder / "model.safetensors").unlink()


def cut(file: Path, size: int) -> None:
    os.truncate(file, size)


def shard_with_other_tensors(folder: Path) -> None:
    shards(folder)
    save_file({"other": torch.zeros(2)}, folder / "model-2.safetensors")


def pointer(folder: Path) -> None:
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")


@pytest.mark.parametrize(
    "layout", [lambda folder: None, shards, torch_file, lambda folder: torch_file(folder, legacy=True)]
)
def test_whole_weights(layout: Callable[[Path], None], tiny: Tiny, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny.teacher, tmp_path / "teacher"))
    layout(folder)
    check_weights(TEACHER, folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ([lambda folder: (folder / "model.safetensors").unlink()], "no weights there; give a model with model.safete"),
        ([lambda folder: cut(folder / "model.safetensors", 9999)], "model.safetensors has 9999 bytes where its header"),
        (
            [lambda folder: cut(folder / "model.safetensors", 99)],
            "model.safetensors is not a complete safetensors file",
        ),
        ([lambda folder: cut(folder / "model.safetensors", 0)], "model.safetensors is not a complete safetensors file"),
        (
            [pointer],
            r"model.safetensors is a Git LFS pointer, not the file itself \(git lfs pull fetches it",
        ),
        ([shards, lambda folder: (folder / "model-2.safetensors").unlink()], "model-2.safetensors is missing; copy or"),
        ([shards, lambda folder: cut(folder / "model-2.safetensors", 9999)], "model-2.safetensors has 9999 bytes"),
        ([shard_with_other_tensors], r"model-2.safetensors lacks 16 tensors of its index, such as model\.layers"),
        (
            [shards, lambda folder: cut(folder / "model.safetensors.index.json", 50)],
            "model.safetensors.index.json is",
        ),
        (
            [torch_file, lambda folder: cut(folder / "pytorch_model.bin", 9999)],
            "pytorch_model.bin is not a complete file",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_torn_weights(changes: list[Callable[[Path], None]], message: str, tiny: Tiny, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny.teacher, tmp_path / "teacher"))
    for change in changes:
        change(folder)
    with pytest.raises(ValueError, match=rf"^actor_rollout_ref\.ref\.model\.path=.*/teacher: {message}") as refusal:
        check(tiny.student, folder)
    assert "\n" not in str(refusal.value)


def edit(file: Path, **values: Any) -> None:
    file.write_text(json.dumps((json.loads(file.read_text()) if file.exists() else {}) | values))


def copied(model: Path, tmp_path: Path, **config: Any) -> Path:
    """A copy of a model's folder with other values in config.json."""
    folder = Path(shutil.copytree(model, tmp_path / model.name))
    edit(folder / "config.json", **config)
    return folder


def test_an_adapter_instead_of_a_model(tiny: Tiny, tmp_path: Path) -> None:
    """The line says how to give it."""
    folder = Path(shutil.copytree(tiny.teacher, tmp_path / "adapter"))
    (folder / "config.json").unlink()
    edit(folder / "adapter_config.json", base_model_name_or_path=str(tiny.student), r=8)
    message = (
        f"{TEACHER}={folder}: an adapter, not a model; give {TEACHER}={tiny.student}, "
        f"++actor_rollout_ref.ref.model.lora_adapter_path={folder} and ++actor_rollout_ref.ref.model.lora_rank=8, or "
        "merge it into its base"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        check(tiny.student, folder)


@pytest.mark.parametrize("method", ["gptq", "awq", "bitsandbytes", "compressed-tensors", "fp8", "mxfp4"])
def test_quantised_weights(method: str, tiny: Tiny, tmp_path: Path) -> None:
    """Whether or not the method's package is installed."""
    folder = copied(tiny.teacher, tmp_path, quantization_config={"quant_method": method, "bits": 4})
    with pytest.raises(ValueError, match=rf"/teacher: its weights are quantised \({method}\); give unquantised"):
        check(tiny.student, folder)


def without(folder: Path, name: str) -> None:
    """A model's folder whose file lacks a tensor."""
    tensors = load_file(folder / "model.safetensors")
    del tensors[name]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_tensors_that_are_not_those_of_the_configuration(tiny: Tiny, tmp_path: Path) -> None:
    """As a teacher's embedding with fewer rows than its vocabulary."""
    folder = copied(tiny.teacher, tmp_path, vocab_size=64)
    message = (
        "2 tensors with another size than in its config.json, such as lm_head.weight with 36 x 64 for 64 x 64; copy or"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(f'{TEACHER}={folder}: {message}')}"):
        check(tiny.student, folder)
    student = copied(tiny.student, tmp_path)
    without(student, "model.layers.1.mlp.up_proj.weight")
    with pytest.raises(ValueError, match=r"its files lack 1 tensors, such as model\.layers\.1\.mlp\.up_proj\.weight; "):
        check(student, None)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["LlamaModel"]}, "LlamaModel has no output layer over the vocabulary; choose a causal"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification has no output layer"),
        ({"hidden_size": "many"}, "cannot load its configuration or tokenizer: "),
        ({"num_attention_heads": 3}, "cannot load its configuration or tokenizer: "),
        ({"hidden_act": "nothing"}, "transformers cannot build it: "),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_a_model_that_cannot_be_trained(changes: dict[str, Any], message: str, tiny: Tiny, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(STUDENT)}=.*{re.escape(message)}") as refusal:
        check(copied(tiny.student, tmp_path, **changes), None)
    assert "\n" not in str(refusal.value)


def family(folder: Path, kind: type[PretrainedConfig], **config: Any) -> Path:
    """A tiny random model of another family, with the tests' tokenizer."""
    tokenizer = make_tokenizer(WORDS)
    sizes = {"vocab_size": len(tokenizer), "pad_token_id": 0, "bos_token_id": None, "eos_token_id": 1, **config}
    AutoModelForCausalLM.from_config(kind(**sizes)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


WIDER = {"hidden_size": 128, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
CTRL = {"n_embd": 32, "n_layer": 2, "n_head": 2, "dff": 48}


def check_student(student: Path, **node: Any) -> None:
    check_models(
        student=OmegaConf.create({"_target_": "verl.workers.config.HFModelConfig", "path": str(student), **node}),
        teacher=OmegaConf.create({"path": None}),
        uses=USES,
        needed_context=16,
    )


def test_gradient_checkpointing_that_a_family_lacks(tmp_path: Path) -> None:
    folder = family(tmp_path / "model", CTRLConfig, **CTRL)
    eager = {"override_config": {"attn_implementation": "eager"}}
    with pytest.raises(ValueError, match=r"^actor_rollout_ref\.model\.enable_gradient_checkpointing=True: CTRLLMHead"):
        check_student(folder, **eager)
    check_student(folder, enable_gradient_checkpointing=False, **eager)


LORA = "^actor_rollout_ref.model."


@pytest.mark.parametrize(
    ("node", "message"),
    [
        ({"target_modules": ["q_proj", "embed_tokens"]}, f"{LORA}target_modules=.*an adapter on the embedding is not"),
        ({"target_modules": ["q_proj", "lm_head"]}, f"{LORA}target_modules=.*an adapter on the output layer is not su"),
        ({"target_modules": ["nothing"]}, f"{LORA}target_modules=.*: peft cannot adapt LlamaForCausalLM: Target modu"),
        ({"lora_adapter_path": "/nowhere"}, f"{LORA}lora_adapter_path=/nowhere: no adapter_config.json there; give"),
        (
            {"override_config": {"atn_implementation": "sdpa"}},
            f"{LORA}override_config.atn_implementation=sdpa: the c",
        ),
        (
            {"override_config": {"model_config": {"attn_implementation": "sdpa"}}},
            f"{LORA}override_config.model_config.attn_implementation=sdpa: not read there; set ",
        ),
        (
            {"override_config": {"model_config": {}, "attention_bias": True}},
            f"{LORA}override_config.attention_bias=True: not read together with ",
        ),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_lora_and_overrides_that_cannot_be(node: dict[str, Any], message: str, tiny: Tiny) -> None:
    with pytest.raises(ValueError, match=message):
        check_student(tiny.student, lora_rank=4, **node)
    check_student(tiny.student, lora_rank=4, target_modules=["q_proj"])


def test_adapters_that_are_and_are_not_of_the_model(tiny: Tiny, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny.student)
    get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")).save_pretrained(
        str(tmp_path)
    )
    node = {"lora_rank": 4, "lora_adapter_path": str(tmp_path)}
    check_student(tiny.student, **node)
    with pytest.raises(ValueError, match=r"lora_adapter_path=.*: not an adapter of this model: .*A.weight has 4 x 64"):
        check_student(family(tmp_path / "wider", LlamaConfig, **WIDER), **node)
    edit(tmp_path / "adapter_config.json", modules_to_save=["lm_head"])
    with pytest.raises(ValueError, match=r"lora_adapter_path=.*: not only LoRA .*; merge it into its base"):
        check_student(tiny.student, **node)


def test_a_chat_template_that_does_not_read_a_setting(tiny: Tiny) -> None:
    models = (OmegaConf.create({"_target_": "verl.workers.config.HFModelConfig", "path": str(tiny.student)}),)
    with pytest.raises(ValueError, match=r"^data\.apply_chat_template_kwargs\.enable_thinkng=False: the student's ch"):
        check_models(*models, OmegaConf.create({"path": None}), USES, 16, {"enable_thinkng": False})
    check_models(*models, OmegaConf.create({"path": None}), USES, 16, {"m": True})
