"""Files of a student that training ignores but that change the saved or served model."""

from pathlib import Path

import torch
from safetensors import safe_open
from verl.workers.config import HFModelConfig

from hpd_verl.engine.saved_model import ADAPTER, weight_names
from hpd_verl.engine.weight_files import in_folder, weight_files
from hpd_verl.errors import require
from hpd_verl.run.checkpoint import read_json

_ROWS = 4096


def check_student_files(model: HFModelConfig, setting: str, serves_rollouts: bool) -> None:
    """Check generation settings, the adapter to go on with, and the output layer of a student in a folder.

    Args:
        model: the student's configuration.
        setting: the name of its path setting.
        serves_rollouts: a server gets its weights, which knows its config.json only.

    Raises:
        ValueError: one line that names the setting, what was found and what to do.
    """
    folder = Path(model.local_path)
    file = folder / "generation_config.json"
    if file.is_file():
        try:
            read_json(file)
        except ValueError as error:
            raise ValueError(f"{setting}={model.path}: {error}; correct the file, or remove it") from error
    if model.lora_adapter_path is not None:
        _check_adapter(model, setting.removesuffix("path"))
    if serves_rollouts and model.hf_config.get_text_config().tie_word_embeddings and folder.is_dir():
        name = _own_output_layer(model, folder, setting)
        require(
            name is None,
            setting,
            model.path,
            f"its config.json has tie_word_embeddings=true, but {name} differs from the embeddings that the rollout "
            "server would use; write tie_word_embeddings=false into its config.json",
        )


def _check_adapter(model: HFModelConfig, node: str) -> None:
    """verl keeps the adapter's own rank and alpha; other settings would be ignored."""
    folder = Path(str(model.lora_adapter_path))
    if not (folder / ADAPTER).is_file():
        return
    try:
        adapter = read_json(folder / ADAPTER)
    except ValueError as error:
        raise ValueError(f"{node}lora_adapter_path={folder}: {error}; copy the adapter again") from error
    for name, key in (("lora_rank", "r"), ("lora_alpha", "lora_alpha")):
        found, own = getattr(model, name), adapter.get(key)
        require(
            found == own,
            f"{node}{name}",
            found,
            f"the adapter in {node}lora_adapter_path has {key}={own}; set {node}{name}={own}",
        )


def _own_output_layer(model: HFModelConfig, folder: Path, setting: str) -> str | None:
    """The name of an output layer in the folder's files that is not the embeddings; None without one."""
    names = weight_names(model.hf_config, model.trust_remote_code)
    if names is None:
        return None
    explicit = getattr(model.hf_config, "transformers_weights", None)
    _, weights = weight_files(f"{setting}={model.path}", in_folder(folder), explicit)
    files: dict[str, Path] = {}
    for file in (folder / name for name in weights if name.endswith(".safetensors")):
        with safe_open(file, "pt") as tensors:
            files |= dict.fromkeys(tensors.keys(), file)
    if not files.keys() >= {*names}:
        return None
    with safe_open(files[names[0]], "pt") as first, safe_open(files[names[1]], "pt") as second:
        output, embeddings = first.get_slice(names[0]), second.get_slice(names[1])
        if output.get_shape() != embeddings.get_shape():
            return names[0]
        for start in range(0, output.get_shape()[0], _ROWS):
            if not torch.equal(output[start : start + _ROWS], embeddings[start : start + _ROWS]):
                return names[0]
    return None
