"""Models are checked before they load: their files, the chat template, and how student and teacher fit each other."""

import json
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import WORDS, Tiny, make_model, make_tokenizer
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file

from hpd_verl.checks.models import check_models, check_weights

STUDENT, TEACHER = "actor_rollout_ref.model.path", "actor_rollout_ref.ref.model.path"


def check(student: Path, teacher: Path | None, needed_context: int = 128, **teacher_node: Any) -> None:
    student_node = {"_target_": "verl.workers.config.HFModelConfig", "path": str(student)}
    check_models(
        student=OmegaConf.create(student_node),
        teacher=OmegaConf.create({"path": teacher and str(teacher), **teacher_node}),
        student_setting=STUDENT,
        teacher_setting=TEACHER,
        needed_context=needed_context,
    )


def test_models_that_fit(tiny: Tiny) -> None:
    check(tiny.student, tiny.teacher)


def test_an_adapter_that_verl_would_not_load(tiny: Tiny, tmp_path: Path) -> None:
    adapter = str(tmp_path)
    message = rf"^actor_rollout_ref\.ref\.model\.lora_adapter_path={adapter}: verl loads an adapter only where lora"
    with pytest.raises(ValueError, match=message):
        check(tiny.student, tiny.teacher, lora_adapter_path=adapter)
    check(tiny.student, tiny.teacher, lora_adapter_path=adapter, lora_rank=4)


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
    assert "the gap between them starts at zero" in caplog.text


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
        (without_template, "its tokenizer has no chat template, which prompts and demonstrations are written with; "),
        (
            refusing_template,
            "its chat template cannot write a question and an answer: .*no such role; give another by ",
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
        ([lambda folder: (folder / "model.safetensors").unlink()], "no weights there; give a folder with model.safet"),
        ([lambda folder: cut(folder / "model.safetensors", 9999)], "model.safetensors has 9999 bytes where its header"),
        ([lambda folder: cut(folder / "model.safetensors", 99)], "model.safetensors is not a whole safetensors file"),
        ([lambda folder: cut(folder / "model.safetensors", 0)], "model.safetensors is not a whole safetensors file"),
        (
            [pointer],
            r"model.safetensors is a Git LFS pointer, not the file itself \(git lfs pull fetches it",
        ),
        ([shards, lambda folder: (folder / "model-2.safetensors").unlink()], "model-2.safetensors is missing; copy or"),
        ([shards, lambda folder: cut(folder / "model-2.safetensors", 9999)], "model-2.safetensors has 9999 bytes"),
        ([shard_with_other_tensors], r"model-2.safetensors lacks 16 tensors that the index names, as model\.layers"),
        (
            [shards, lambda folder: cut(folder / "model.safetensors.index.json", 50)],
            "model.safetensors.index.json is",
        ),
        ([torch_file, lambda folder: cut(folder / "pytorch_model.bin", 9999)], "pytorch_model.bin is not a whole file"),
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
