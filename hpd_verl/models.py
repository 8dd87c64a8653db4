"""Student and teacher before their weights load: their configurations, and whether they fit each other."""

import logging
from pathlib import Path

from omegaconf import DictConfig, OmegaConf
from verl.utils.config import omega_conf_to_dataclass
from verl.workers.config import HFModelConfig

from hpd_verl.vocabulary import shared_vocabulary_size

logger = logging.getLogger(__name__)
logger.setLevel(logging.INFO)


def teacher_model_config(student: DictConfig, teacher: DictConfig) -> DictConfig:
    """The teacher's model node: the student's, without what belongs to the student alone, under its own."""
    own = {
        "hf_config_path": None,
        "tokenizer_path": None,
        "lora_rank": 0,
        "lora": {"rank": 0},
        "lora_adapter_path": None,
        "enable_gradient_checkpointing": False,
        "enable_activation_offload": False,
    }
    model = OmegaConf.create(OmegaConf.to_container(student, resolve=True))
    merged = OmegaConf.merge(model, own, teacher)
    assert isinstance(merged, DictConfig)
    return merged


def load_model_config(node: DictConfig, setting: str) -> HFModelConfig:
    """Tokenizer and configuration of a model, without its weights.

    Raises:
        ValueError: they cannot be loaded; the message names the setting.
    """
    path = str(node.path)
    if path.startswith(("/", "./", "../", "~")) and not Path(path).expanduser().exists():
        raise ValueError(f"{setting}={path}: no such folder")
    try:
        return omega_conf_to_dataclass(node)
    except Exception as error:  # Hydra wraps whatever Hugging Face raised
        cause = error.__cause__ or error
        raise ValueError(f"{setting}={path}: cannot load its configuration or tokenizer: {cause}") from error


def check_models(
    student: DictConfig, teacher: DictConfig, student_setting: str, teacher_setting: str, needed_context: int
) -> None:
    """Check student and teacher against each other and the data's lengths.

    Args:
        student, teacher: their model nodes; the teacher's holds what differs from the student's.
        student_setting, teacher_setting: names of their path settings, for errors.
        needed_context: data.max_prompt_length + data.max_response_length, tokens.

    Raises:
        ValueError: one sentence that names the setting, what was found and what to do.
    """
    teacher_model = load_model_config(teacher_model_config(student, teacher), teacher_setting)
    if teacher_model.lora_adapter_path is not None and teacher_model.lora_rank <= 0:
        adapter = f"{teacher_setting.removesuffix('path')}lora_adapter_path={teacher_model.lora_adapter_path}"
        raise ValueError(
            f"{adapter}: verl loads an adapter only where lora_rank is above 0; set lora_rank beside it, or leave both"
        )
    student_model = load_model_config(student, student_setting)
    if student_model.path == teacher_model.path:
        logger.warning(
            "%s and %s are both %s: the gap between them starts at zero",
            student_setting,
            teacher_setting,
            student_model.path,
        )
    shared_vocabulary_size(
        student_model.tokenizer,
        teacher_model.tokenizer,
        student_model.hf_config.vocab_size,
        teacher_model.hf_config.vocab_size,
        f"{teacher_setting} (teacher) and {student_setting} (student)",
    )
    for setting, model in ((teacher_setting, teacher_model), (student_setting, student_model)):
        context = getattr(model.hf_config, "max_position_embeddings", None)
        if context is not None and context < needed_context:
            raise ValueError(
                f"{setting}={model.path}: its context has {context} tokens, but data.max_prompt_length + "
                f"data.max_response_length = {needed_context}; shorten them or choose another model"
            )
