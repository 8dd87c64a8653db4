"""The teacher's model node, as it follows from the student's, and the vocabulary that both share."""

from omegaconf import DictConfig, OmegaConf
from verl.workers.config import HFModelConfig


def teacher_model_config(student: DictConfig, teacher: DictConfig) -> DictConfig:
    """The teacher's model node: the student's, without what belongs to the student alone, under its own.

    Without a path, where no objective needs a teacher, it is the student's own model, which then never loads.
    """
    model = OmegaConf.create(OmegaConf.to_container(student, resolve=True))
    assert isinstance(model, DictConfig)
    if not teacher.get("path"):
        return model
    own = {
        "hf_config_path": None,
        "tokenizer_path": None,
        "lora_rank": 0,
        "lora": {"rank": 0},
        "lora_adapter_path": None,
        "enable_gradient_checkpointing": False,
        "enable_activation_offload": False,
    }
    merged = OmegaConf.merge(model, own, teacher)
    assert isinstance(merged, DictConfig)
    return merged


def shared_vocabulary_size(student: HFModelConfig, teacher: HFModelConfig) -> int:
    """The number of the teacher's logits that the student has too. Either may be padded beyond the tokenizer."""
    return min(student.hf_config.vocab_size, teacher.hf_config.vocab_size)
