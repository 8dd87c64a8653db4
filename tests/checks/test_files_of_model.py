"""Files of a student that say something else than what would be saved or served, and the folders around a run."""

import json
import shutil
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import Tiny, make_awkward_model, make_model
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from hpd_verl.checks.files_of_model import check_student_files
from hpd_verl.checks.folders import check_temporary_folders


def student(folder: Path, **settings: Any) -> Any:
    """What is read of verl's configuration of a model."""
    return SimpleNamespace(
        path=str(folder),
        local_path=str(folder),
        hf_config=AutoConfig.from_pretrained(folder),
        trust_remote_code=False,
        **{"lora_adapter_path": None, "lora_rank": 0, "lora_alpha": 16, **settings},
    )


def test_a_server_would_take_the_embeddings_for_an_own_output_layer(tiny: Tiny, tmp_path: Path) -> None:
    """In one file or several; without a server, or where both are the same, nothing is wrong."""
    own = make_awkward_model(tiny.student, tmp_path / "own")
    message = r"^model\.path=.*own: its config\.json has tie_word_embeddings=true, but lm_head\.weight differs"
    check_student_files(student(own), "model.path", serves_rollouts=False)
    with pytest.raises(ValueError, match=message):
        check_student_files(student(own), "model.path", serves_rollouts=True)
    tensors = load_file(own / "model.safetensors")
    parts = {name: f"model-{'lm_head' in name}.safetensors" for name in tensors}
    for part in set(parts.values()):
        save_file({name: tensor for name, tensor in tensors.items() if parts[name] == part}, own / part)
    (own / "model.safetensors.index.json").write_text(json.dumps({"weight_map": parts}))
    (own / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=message):
        check_student_files(student(own), "model.path", serves_rollouts=True)

    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, own / "model.safetensors")
    check_student_files(student(own), "model.path", serves_rollouts=True)
    tied = make_model(tmp_path / "tied", seed=1, tie_word_embeddings=True)
    check_student_files(student(tied), "model.path", serves_rollouts=True)
    check_student_files(student(tiny.student), "model.path", serves_rollouts=True)


@pytest.mark.parametrize("content", ["[" * 100_000, "{", "[1]", "\udcff"])
def test_generation_settings_that_cannot_be_read(content: str, tiny: Tiny, tmp_path: Path) -> None:
    """transformers would go on without them."""
    folder = Path(shutil.copytree(tiny.student, tmp_path / "student"))
    (folder / "generation_config.json").write_text(content, errors="surrogateescape")
    with pytest.raises(ValueError, match=r"^model\.path=.*: generation_config\.json is not (JSON|a JSON object)"):
        check_student_files(student(folder), "model.path", serves_rollouts=False)


def test_an_adapter_goes_on_with_its_own_rank_and_alpha(tiny: Tiny, tmp_path: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(tiny.student, dtype=torch.float32)
    get_peft_model(base, LoraConfig(r=8, lora_alpha=12, target_modules=["q_proj"])).save_pretrained(str(tmp_path))
    node = {"lora_adapter_path": str(tmp_path), "lora_rank": 8, "lora_alpha": 12}
    check_student_files(student(tiny.student, **node), "model.path", serves_rollouts=False)
    for changed, message in (
        ({"lora_rank": 4}, r"^model\.lora_rank=4: .* has r=8; set model\.lora_rank=8"),
        ({"lora_alpha": 16}, r"^model\.lora_alpha=16: .* has lora_alpha=12; set model\.lora_alpha=12"),
    ):
        with pytest.raises(ValueError, match=message):
            check_student_files(student(tiny.student, **node | changed), "model.path", serves_rollouts=False)
    (tmp_path / "adapter_config.json").write_text("[" * 100_000)
    with pytest.raises(ValueError, match=r"^model\.lora_adapter_path=.*: adapter_config\.json is not JSON"):
        check_student_files(student(tiny.student, **node), "model.path", serves_rollouts=False)


def test_a_folder_for_temporary_files_that_is_not_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    check_temporary_folders("TMPDIR", "RAY_TMPDIR")
    monkeypatch.setenv("RAY_TMPDIR", f"{tmp_path}/nowhere")
    check_temporary_folders("TMPDIR")
    with pytest.raises(ValueError, match=r"^RAY_TMPDIR=.*nowhere: no such folder; create it, or unset the variable$"):
        check_temporary_folders("TMPDIR", "RAY_TMPDIR")

    def nothing() -> str:
        raise FileNotFoundError(2, "No usable temporary directory found in ['/tmp']")

    monkeypatch.setattr(tempfile, "gettempdir", nothing)
    with pytest.raises(ValueError, match=r"^TMPDIR=: No usable temporary directory found.*; set it to a writable fo"):
        check_temporary_folders()
