"""Files of a student that training ignores but that change the saved or served model."""

from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
from verl.workers.config import HFModelConfig

from hpd_verl.engine.saved_model import ADAPTER, weight_names
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
        name = _own_output_layer(model, folder)
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


def _own_output_layer(model: HFModelConfig, folder: Path) -> str | None:
    """The name of an output layer in the folder's files that is not the embeddings; None without one."""
    names = weight_names(model.hf_config, model.trust_remote_code)
    files = _files_of(folder, names) if names is not None else None
    if names is None or files is None:
        return None
    with safe_open(files[0], "pt") as first, safe_open(files[1], "pt") as second:
        output, embeddings = first.get_slice(names[0]), second.get_slice(names[1])
        if output.get_shape() != embeddings.get_shape():
            return names[0]
        for start in range(0, output.get_shape()[0], _ROWS):
            if not torch.equal(output[start : start + _ROWS], embeddings[start : start + _ROWS]):
                return names[0]
    return None


def _files_of(folder: Path, names: tuple[str, str]) -> tuple[Path, Path] | None:
    """The safetensors files of two tensors; None if one is missing or the files have another format."""
    single, index = folder / SAFE_WEIGHTS_NAME, folder / SAFE_WEIGHTS_INDEX_NAME
    places: dict[str, Any] = {}
    if single.is_file():
        with safe_open(single, "pt") as tensors:
            places = dict.fromkeys(tensors.keys(), SAFE_WEIGHTS_NAME)
    elif index.is_file():
        places = read_json(index).get("weight_map", {})
    if names[0] not in places or names[1] not in places:
        return None
    return folder / places[names[0]], folder / places[names[1]]
