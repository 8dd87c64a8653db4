"""Student and teacher before their weights load: their files, and whether they fit each other and the data."""

import json
import logging
import struct
import zipfile
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, WEIGHTS_INDEX_NAME, WEIGHTS_NAME
from verl.utils.config import omega_conf_to_dataclass
from verl.workers.config import HFModelConfig

from hpd_verl.checks.vocabulary import check_vocabularies
from hpd_verl.data.chat_template import ChatTemplate
from hpd_verl.data.files import is_remote, one_line
from hpd_verl.teacher.model_config import teacher_model_config

logger = logging.getLogger(__name__)

_LFS_POINTER = b"version https://git-lfs"
_PICKLE = b"\x80"
"""First byte of a file of torch.save before it wrote zip archives."""


def _safetensors_names(file: Path) -> set[str]:
    """Names of the tensors in a file that is as long as its header says.

    Raises:
        ValueError: what is wrong with the file.
    """
    size = file.stat().st_size
    with open(file, "rb") as stream:
        start = stream.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else size
        if length > size - 8:
            raise ValueError("is not a whole safetensors file")
        try:
            header = json.loads(stream.read(length))
            tensors = {name: entry["data_offsets"] for name, entry in header.items() if name != "__metadata__"}
            end = 8 + length + max((int(offsets[1]) for offsets in tensors.values()), default=0)
        except (ValueError, TypeError, KeyError, AttributeError, IndexError, RecursionError):
            raise ValueError("is not a safetensors file") from None
    if end != size:
        raise ValueError(f"has {size} bytes where its header says {end}")
    return set(tensors)


def _check_weights_file(file: Path, names: set[str]) -> None:
    """Check that a file of weights is whole; ``names`` are the tensors that the index expects there.

    Raises:
        ValueError: what is wrong with the file.
    """
    if not file.is_file():
        raise ValueError("is missing")
    with open(file, "rb") as stream:
        start = stream.read(len(_LFS_POINTER))
    if start == _LFS_POINTER:
        raise ValueError("is a Git LFS pointer, not the file itself (git lfs pull fetches it)")
    if file.suffix == ".safetensors":
        missing = names - _safetensors_names(file)
        if missing:
            raise ValueError(f"lacks {len(missing)} tensors that the index names, as {min(missing)}")
    elif not zipfile.is_zipfile(file) and not start.startswith(_PICKLE):
        raise ValueError("is not a whole file of torch.save")


def check_weights(setting: str, folder: Path) -> None:
    """Check that the weights in a model's folder are there and whole, by sizes and headers; no tensor is read.

    Raises:
        ValueError: there are none, or a file is missing or cut short.
    """
    remedy = "copy or download the model again"
    for name in (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME, WEIGHTS_NAME, WEIGHTS_INDEX_NAME):  # as transformers looks
        found = folder / name
        if not found.is_file():
            continue
        files: dict[str, set[str]] = {} if name.endswith(".json") else {name: set()}
        if name.endswith(".json"):
            try:
                for tensor, file in json.loads(found.read_bytes())["weight_map"].items():
                    files.setdefault(file, set()).add(tensor)
            except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
                raise ValueError(f"{setting}={folder}: {name} is not an index of weights; {remedy}") from None
        for file, names in files.items():
            try:
                _check_weights_file(folder / file, names)
            except ValueError as error:
                raise ValueError(f"{setting}={folder}: {file} {error}; {remedy}") from error
        return
    if (folder / "adapter_config.json").is_file() or _names_its_weights(folder):
        return
    raise ValueError(
        f"{setting}={folder}: no weights there; give a folder with {SAFE_WEIGHTS_NAME} or {WEIGHTS_NAME}, "
        "whole or in parts with their index"
    )


def _names_its_weights(folder: Path) -> bool:
    """Whether the configuration names a file of weights of its own, which transformers then takes."""
    file = folder / "config.json"
    return file.is_file() and json.loads(file.read_bytes()).get("transformers_weights") is not None


def load_model_config(node: DictConfig, setting: str) -> HFModelConfig:
    """Tokenizer and configuration of a model, without its weights.

    Raises:
        ValueError: they cannot be loaded; the message names the setting.
    """
    path = str(node.path)
    if path.startswith("~"):
        raise ValueError(f"{setting}={path}: the shell leaves ~ as it is after =; write the whole path, or $HOME")
    if path.startswith(("/", "./", "../")) and not Path(path).exists():
        raise ValueError(f"{setting}={path}: no such folder; give a folder that is there, or a hub name")
    try:
        return omega_conf_to_dataclass(node)
    except Exception as error:  # Hydra wraps whatever Hugging Face raised
        cause = error.__cause__ or error
        raise ValueError(f"{setting}={path}: cannot load its configuration or tokenizer: {one_line(cause)}") from error


def _check_chat_template(model: HFModelConfig, setting: str, template_kwargs: dict[str, Any]) -> None:
    tokenizer = model.tokenizer
    if model.custom_chat_template is not None:
        tokenizer.chat_template = model.custom_chat_template
    node = setting.removesuffix(".path")
    if not tokenizer.chat_template:
        raise ValueError(
            f"{setting}={model.path}: its tokenizer has no chat template, which prompts and demonstrations are written "
            f"with; choose an instruction-tuned model, or give one by {node}.custom_chat_template"
        )
    try:
        ChatTemplate(tokenizer, template_kwargs).turn_end([{"role": "user", "content": "question"}])
    except Exception as error:  # templates are programs: any error of Jinja or of what they call
        raise ValueError(
            f"{setting}={model.path}: its chat template cannot write a question and an answer: {one_line(error)}; "
            f"give another by {node}.custom_chat_template"
        ) from error


def check_models(
    student: DictConfig,
    teacher: DictConfig,
    student_setting: str,
    teacher_setting: str,
    needed_context: int,
    template_kwargs: dict[str, Any] | None = None,
) -> HFModelConfig:
    """Check student and teacher, their files, and how they fit each other and the data's lengths.

    A model that is not in a folder (a name on the hub) is checked without its weights.

    Args:
        student, teacher: their model nodes; the teacher's holds what differs from the student's, and no path where
            no objective needs a teacher.
        student_setting, teacher_setting: names of their path settings, for errors.
        needed_context: data.max_prompt_length + data.max_response_length, tokens.
        template_kwargs: data.apply_chat_template_kwargs.

    Returns:
        The student's configuration with its tokenizer.

    Raises:
        ValueError: one sentence that names the setting, what was found and what to do.
    """
    models: dict[str, HFModelConfig] = {}
    if teacher.get("path"):
        models[teacher_setting] = teacher_model = load_model_config(
            teacher_model_config(student, teacher), teacher_setting
        )
        if teacher_model.lora_adapter_path is not None and teacher_model.lora_rank <= 0:
            raise ValueError(
                f"{teacher_setting.removesuffix('path')}lora_adapter_path={teacher_model.lora_adapter_path}: verl "
                "loads an adapter only where lora_rank is above 0; set lora_rank beside it, or leave both"
            )
    models[student_setting] = student_model = load_model_config(student, student_setting)
    for setting, model in models.items():
        if Path(model.local_path).is_dir():
            check_weights(setting, Path(model.local_path))
        if not isinstance(getattr(model.hf_config, "vocab_size", None), int):
            raise ValueError(f"{setting}={model.path}: its configuration has no vocab_size; choose a language model")
        context = getattr(model.hf_config, "max_position_embeddings", None)
        if context is not None and context < needed_context:
            raise ValueError(
                f"{setting}={model.path}: its context has {context} tokens, but data.max_prompt_length + "
                f"data.max_response_length = {needed_context}; shorten them or choose another model"
            )
    _check_chat_template(student_model, student_setting, dict(template_kwargs or {}))
    if teacher_setting in models:
        if student_model.path == teacher_model.path:
            logger.warning(
                "%s and %s are both %s: the gap between them starts at zero",
                student_setting,
                teacher_setting,
                student_model.path,
            )
        check_vocabularies(
            student_model.tokenizer,
            teacher_model.tokenizer,
            student_model.hf_config.vocab_size,
            teacher_model.hf_config.vocab_size,
            f"{teacher_setting}={teacher_model.path}, {student_setting}={student_model.path}",
        )
    return student_model


def can_check_here(student: DictConfig, teacher: DictConfig) -> bool:
    """Whether both models can be looked at without fetching them; says so where they cannot."""
    remote = [str(node.path) for node in (student, teacher) if node.get("path") and is_remote(str(node.path))]
    if remote:
        logger.info("not checked before the run starts, for they would have to be fetched: %s", ", ".join(remote))
    return not remote


def without_copies(node: DictConfig) -> DictConfig:
    """The model node without verl's copy to shared memory, which belongs on the workers' machines."""
    copied = OmegaConf.create(OmegaConf.to_container(node, resolve=True))
    assert isinstance(copied, DictConfig)
    if "use_shm" in copied:
        copied.use_shm = False
    return copied
