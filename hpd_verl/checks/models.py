"""Student and teacher before their weights load: their files, and whether they fit each other and the data."""

import inspect
import json
import logging
import re
import struct
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
from omegaconf import DictConfig, OmegaConf
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel
from transformers.modeling_utils import load_state_dict
from verl.utils.config import omega_conf_to_dataclass
from verl.workers.config import HFModelConfig

from hpd_verl.checks.architecture import check_architecture
from hpd_verl.checks.vocabulary import check_vocabularies
from hpd_verl.data.chat_template import ChatTemplate
from hpd_verl.data.files import is_remote
from hpd_verl.engine import on_meta
from hpd_verl.engine.families import divides_heads, head_counts, layers_to_wrap
from hpd_verl.engine.saved_model import ADAPTER
from hpd_verl.engine.weight_files import ADAPTER_WEIGHTS, in_folder, weight_files
from hpd_verl.errors import one_line, require
from hpd_verl.run.checkpoint import read_json
from hpd_verl.several_teachers import STUDENT
from hpd_verl.teacher.model_config import teacher_model_config
from hpd_verl.teacher.served.output_layer import plain_config

logger = logging.getLogger(__name__)

_LFS_POINTER = b"version https://git-lfs"
_PICKLE = b"\x80"
"""First byte of a file of torch.save before it wrote zip archives."""


@dataclass(frozen=True)
class ModelUse:
    """How a run uses a model, and the names of its settings."""

    setting: str
    """Setting of its path, such as ``teacher.model.path``."""
    engine: str
    """Node of its engine, such as ``teacher.engine``."""
    one_pass: bool = True
    """The loss takes the place of its output layer."""
    ulysses: int = 1
    """Ranks that share a sequence."""
    layers: Any = None
    """Its engine's wrap_policy.transformer_layer_cls_to_wrap: classes that FSDP wraps."""
    served: bool = False
    """Servers run it; here are its configuration, its tokenizer and its output layer."""

    @property
    def node(self) -> str:
        return self.setting.removesuffix(".path")


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
            raise ValueError("is not a complete safetensors file")
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
    """Check that a file of weights is complete; ``names`` are the tensors that the index expects there.

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
            raise ValueError(f"lacks {len(missing)} tensors of its index, such as {min(missing)}")
    elif not zipfile.is_zipfile(file) and not start.startswith(_PICKLE):
        raise ValueError("is not a complete file of torch.save")


def check_weights(setting: str, folder: Path) -> list[Path]:
    """Check that the weights in a model's folder are complete, by sizes and headers; no tensor is read.

    Returns:
        The files.

    Raises:
        ValueError: there are none, or a file is missing or cut short.
    """
    config = folder / "config.json"
    explicit = read_json(config).get("transformers_weights") if config.is_file() else None
    _, files = weight_files(f"{setting}={folder}", in_folder(folder), explicit)
    for file, names in files.items():
        try:
            _check_weights_file(folder / file, names)
        except ValueError as error:
            raise ValueError(f"{setting}={folder}: {file} {error}; copy or download the model again") from error
    return [folder / file for file in files]


def _check_no_adapter(use: ModelUse, folder: Path) -> None:
    """An adapter's folder is no model's: transformers would load the base that it names, verl's tokenizer its own.

    Raises:
        ValueError: the folder holds an adapter.
    """
    if not (folder / ADAPTER).is_file():
        return
    try:
        settings = dict(json.loads((folder / ADAPTER).read_bytes()))
    except (ValueError, TypeError):
        settings = {}
    base, rank = settings.get("base_model_name_or_path") or "BASE", settings.get("r") or "RANK"
    raise ValueError(
        f"{use.setting}={folder}: an adapter, not a model; give {use.setting}={base}, ++{use.node}.lora_adapter_path="
        f"{folder} and ++{use.node}.lora_rank={rank}, or merge it into its base"
    )


def load_model_config(node: DictConfig, setting: str) -> HFModelConfig:
    """Tokenizer and configuration of a model, without its weights.

    Raises:
        ValueError: they cannot be loaded; the message names the setting.
    """
    path = str(node.path)
    if path.startswith("~"):
        raise ValueError(f"{setting}={path}: the shell does not expand ~ after =; write the whole path, or $HOME")
    if path.startswith(("/", "./", "../")) and not Path(path).exists():
        raise ValueError(f"{setting}={path}: no such folder; give an existing folder, or a hub name")
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
            f"{setting}={model.path}: its tokenizer has no chat template; choose an instruction-tuned model, or set "
            f"{node}.custom_chat_template"
        )
    written = str(tokenizer.chat_template)
    known = {*inspect.signature(tokenizer.apply_chat_template).parameters, *re.findall(r"\w+", written)}
    for name, value in template_kwargs.items():
        require(
            name in known,
            f"data.apply_chat_template_kwargs.{name}",
            value,
            "the student's chat template does not read it; correct the name, or leave it out",
        )
    try:
        ChatTemplate(tokenizer, template_kwargs).turn_end([{"role": "user", "content": "question"}])
    except Exception as error:  # templates are programs: any error of Jinja or of what they call
        raise ValueError(
            f"{setting}={model.path}: its chat template cannot write a question and an answer: {one_line(error)}; "
            f"set {node}.custom_chat_template"
        ) from error


def _check_overrides(use: ModelUse, model: HFModelConfig) -> None:
    """Every name that the run gives other values for is one of the model's configuration.

    Raises:
        Refused: one is not, and nothing would read it.
    """
    own = AutoConfig.from_pretrained(model.local_hf_config_path, trust_remote_code=model.trust_remote_code)
    node, overrides = f"{use.node}.override_config", model.override_config
    if "model_config" in overrides:  # verl reads nothing beside it, but for the attention
        for key, value in overrides.items():
            require(
                key in ("model_config", "attn_implementation"),
                f"{node}.{key}",
                value,
                f"not read together with {node}.model_config; write it there, or leave model_config out",
            )
        node, overrides = f"{node}.model_config", dict(overrides["model_config"] or {})
        require(
            "attn_implementation" not in overrides,
            f"{node}.attn_implementation",
            overrides.get("attn_implementation"),
            f"not read there; set {use.node}.override_config.attn_implementation",
        )

    def check(part: Any, values: Mapping[str, Any], name: str) -> None:
        for key, value in values.items():
            known = hasattr(part, key) or (isinstance(part, dict) and key in part)
            require(
                known or key == "attn_implementation",
                f"{name}.{key}",
                value,
                f"the configuration of {use.setting} has no such name; correct it, or leave it out",
            )
            inner = getattr(part, key, None)
            if isinstance(value, Mapping) and isinstance(inner, PretrainedConfig):
                check(inner, value, f"{name}.{key}")

    check(own, overrides, node)


def _check_build(use: ModelUse, model: HFModelConfig) -> PreTrainedModel:
    """``check_architecture`` of a run's model, with the wrapping that the run asks for; its attention is chosen later.

    Args:
        use: how it is used.
        model: its configuration.
    """
    config, checkpointing = model.hf_config, f"{use.node}.enable_gradient_checkpointing"
    try:
        built = check_architecture(
            use.setting,
            model.path,
            config,
            one_pass=use.one_pass,
            gradient_checkpointing=checkpointing if model.enable_gradient_checkpointing else None,
            trust_remote_code=model.trust_remote_code,
        )
    except on_meta.CannotBuild as error:
        raise ValueError(
            f"{use.setting}={model.path}: transformers cannot build it: {one_line(error)}; choose another model"
        ) from error
    _check_wrapping(use, built)
    heads, key_heads = head_counts(config)
    require(
        divides_heads(use.ulysses, heads, key_heads),
        f"{use.engine.removesuffix('.fsdp_config').removeprefix('teacher.')}.ulysses_sequence_parallel_size",
        use.ulysses,
        f"must divide the {heads} heads and {key_heads} key heads of {use.setting}",
    )
    return built


def _check_context(use: ModelUse, model: HFModelConfig, needed_context: int, has_own_prompts: bool) -> None:
    context = getattr(model.hf_config, "max_position_embeddings", None)
    if context is not None and context < needed_context:
        name = "max_teacher_prompt_length" if has_own_prompts else "max_prompt_length"
        raise ValueError(
            f"{use.setting}={model.path}: its context has {context} tokens, but data.{name} + "
            f"data.max_response_length = {needed_context}; shorten them or choose another model"
        )


def _check_served(use: ModelUse, model: HFModelConfig) -> None:
    """A teacher that servers run, however they keep its weights: its output layer is understood.

    Raises:
        ValueError: it is not.
    """
    require(
        model.lora_adapter_path is None,
        f"{use.node}.lora_adapter_path",
        model.lora_adapter_path,
        "a served teacher (algorithm.hpd.teacher_server) is whole on its servers; leave it out",
    )
    config = plain_config(model.hf_config)
    try:
        check_architecture(use.setting, model.path, config, trust_remote_code=model.trust_remote_code)
    except on_meta.CannotBuild as error:
        raise ValueError(
            f"{use.setting}={model.path}: transformers cannot build it: {one_line(error)}; choose another model"
        ) from error


def _check_wrapping(use: ModelUse, built: PreTrainedModel) -> None:
    """FSDP wraps layers by their classes' names."""
    setting, known = f"{use.engine}.wrap_policy.transformer_layer_cls_to_wrap", layers_to_wrap(built)
    wanted = [use.layers] if isinstance(use.layers, str) else list(use.layers or known)
    require(
        {type(module).__name__ for module in built.modules()}.issuperset(wanted),
        setting,
        use.layers,
        f"not all are layer classes of {use.setting}; choose from {', '.join(known)}, or leave it out",
    )
    require(bool(wanted), use.setting, type(built).__name__, "it has no layers; choose a language model")


def _check_tensors(use: ModelUse, model: HFModelConfig, built: PreTrainedModel, files: list[Path]) -> None:
    """Check that the files hold the tensors of the model's configuration.

    Raises:
        ValueError: some are missing, or have another shape.
    """
    remedy = "copy or download the model again, or correct its config.json"
    try:
        found = on_meta.match_weights(built, files)
    except Exception as error:  # whatever transformers' conversion of weights raises
        raise ValueError(
            f"{use.setting}={model.path}: its weights cannot be read: {one_line(error)}; {remedy}"
        ) from error
    if found.mismatched:
        name, in_file, by_config = found.mismatched[0]
        raise ValueError(
            f"{use.setting}={model.path}: {len(found.mismatched)} tensors with another size than in its config.json, "
            f"such as {name} with {_shape(in_file)} for {_shape(by_config)}; {remedy}"
        )
    if found.missing:
        raise ValueError(
            f"{use.setting}={model.path}: its files lack {len(found.missing)} tensors, such as {found.missing[0]}; "
            f"transformers would initialise them at random; {remedy}"
        )


def _shape(sizes: tuple[int, ...]) -> str:
    return " x ".join(map(str, sizes))


def _check_lora(use: ModelUse, model: HFModelConfig, built: PreTrainedModel) -> None:
    """Check an adapter as verl makes or loads it: its modules exist, and FSDP and the loss support them.

    Raises:
        ValueError: it cannot be.
    """
    special = {"the embedding": built.get_input_embeddings(), "the output layer": built.get_output_embeddings()}
    path, folder = f"{use.node}.lora_adapter_path", model.lora_adapter_path
    if folder is None:
        setting, value = f"{use.node}.target_modules", model.target_modules
        config: Any = peft.LoraConfig(
            task_type=peft.TaskType.CAUSAL_LM,
            r=model.lora_rank,
            target_modules=model.target_modules,
            target_parameters=model.target_parameters,
            exclude_modules=model.exclude_modules,
        )
    else:
        setting, value = path, folder
        if is_remote(folder):
            return
        if not (Path(folder) / ADAPTER).is_file():
            raise ValueError(f"{path}={folder}: no {ADAPTER} there; give the folder of an adapter that peft saved")
        try:
            config = peft.PeftConfig.from_pretrained(folder)
        except Exception as error:  # whatever peft raises on what the file may hold
            raise ValueError(f"{path}={folder}: {ADAPTER} cannot be read: {one_line(error)}") from error
        if not isinstance(config, peft.LoraConfig) or config.modules_to_save:
            raise ValueError(
                f"{path}={folder}: not only LoRA ({config.peft_type}, modules_to_save={config.modules_to_save}); "
                "merge it into its base"
            )
    try:
        adapted = peft.get_peft_model(built, config)
    except Exception as error:  # peft has many words for modules that are not there
        raise ValueError(f"{setting}={value}: peft cannot adapt {type(built).__name__}: {one_line(error)}") from error
    for module in adapted.modules():
        base = module.get_base_layer() if isinstance(module, BaseTunerLayer) else None
        for name, layer in special.items():
            require(
                base is None or base is not layer,
                setting,
                value,
                f"an adapter on {name} is not supported; leave it out",
            )
    if folder is not None:
        _check_adapter_tensors(path, Path(folder), adapted)


def _check_adapter_tensors(setting: str, folder: Path, adapted: Any) -> None:
    file = next((folder / name for name in ADAPTER_WEIGHTS if (folder / name).is_file()), None)
    if file is None:
        raise ValueError(f"{setting}={folder}: no weights there; give a folder with {ADAPTER_WEIGHTS[0]}")
    try:
        _check_weights_file(file, set())
    except ValueError as error:
        raise ValueError(f"{setting}={folder}: {file.name} {error}; copy the adapter again") from error
    found = {name: tuple(tensor.shape) for name, tensor in load_state_dict(str(file), map_location="meta").items()}
    for name, tensor in peft.get_peft_model_state_dict(adapted).items():
        if found.get(name) != tuple(tensor.shape):
            has = "is missing" if name not in found else f"has {_shape(found[name])} for {_shape(tuple(tensor.shape))}"
            raise ValueError(f"{setting}={folder}: not an adapter of this model: {name} {has}; choose its base")


def check_models(
    student: DictConfig,
    teacher: DictConfig,
    uses: tuple[ModelUse, ModelUse],
    needed_context: int,
    template_kwargs: dict[str, Any] | None = None,
    teacher_context: int | None = None,
) -> HFModelConfig:
    """Check student and teacher, their files, and how they fit each other and the data's lengths.

    A model that is not in a folder (a name on the hub) is checked without its weights.

    Args:
        student, teacher: their model nodes; the teacher's holds what differs from the student's, and no path where
            no objective needs a teacher.
        uses: of student and teacher.
        needed_context: data.max_prompt_length + data.max_response_length, tokens.
        template_kwargs: data.apply_chat_template_kwargs.
        teacher_context: data.max_teacher_prompt_length + data.max_response_length, where the teacher has prompts of its
            own; None: as the student.

    Returns:
        The student's configuration with its tokenizer.

    Raises:
        ValueError: one sentence that names the setting, what was found and what to do.
    """
    nodes = [(uses[0], student)]
    if teacher.get("path"):
        nodes.append((uses[1], teacher_model_config(student, teacher)))
    models: dict[str, HFModelConfig] = {}
    for use, node in nodes:
        _check_no_adapter(use, Path(str(node.path)))
        models[use.setting] = model = load_model_config(node, use.setting)
        require(
            model.lora_adapter_path is None or model.lora_rank > 0,
            f"{use.node}.lora_adapter_path",
            model.lora_adapter_path,
            "verl loads an adapter only if lora_rank is above 0; set lora_rank too, or leave both out",
        )
        _check_overrides(use, model)
        context = needed_context if use is uses[0] or teacher_context is None else teacher_context
        if use.served:
            _check_served(use, model)
            _check_context(use, model, context, context != needed_context)
            continue
        files = check_weights(use.setting, Path(model.local_path)) if Path(model.local_path).is_dir() else []
        built = _check_build(use, model)
        if files:
            _check_tensors(use, model, built, files)
        if model.lora_rank > 0:
            _check_lora(use, model, built)
        _check_context(use, model, context, context != needed_context)
    student_model = models[uses[0].setting]
    _check_chat_template(student_model, uses[0].setting, dict(template_kwargs or {}))
    if uses[1].setting in models:
        teacher_model = models[uses[1].setting]
        if student_model.path == teacher_model.path and teacher.path != STUDENT:
            logger.warning(
                "%s and %s are both %s: student and teacher start equal",
                *models,
                student_model.path,
            )
        check_vocabularies(
            student_model.tokenizer,
            teacher_model.tokenizer,
            student_model.hf_config.vocab_size,
            teacher_model.hf_config.vocab_size,
            f"{uses[1].setting}={teacher_model.path}, {uses[0].setting}={student_model.path}",
        )
    return student_model


def is_remote_model(node: DictConfig) -> bool:
    """Whether a model would have to be fetched, as from hdfs://."""
    return is_remote(str(node.get("path")))


def without_copies(node: DictConfig) -> DictConfig:
    """The model node without verl's copy to shared memory, which belongs on the workers' machines."""
    copied = OmegaConf.create(OmegaConf.to_container(node, resolve=True))
    assert isinstance(copied, DictConfig)
    if "use_shm" in copied:
        copied.use_shm = False
    return copied
