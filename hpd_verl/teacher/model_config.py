"""The teacher's model node, as it follows from the student's, and the vocabulary that both share."""

from typing import Any

from omegaconf import DictConfig, OmegaConf, open_dict
from verl.workers.config import HFModelConfig

from hpd_verl.config import HPDConfig
from hpd_verl.several_teachers import NODE, STUDENT


def teacher_model_config(student: DictConfig, teacher: DictConfig) -> DictConfig:
    """The teacher's model node: the student's, without what belongs to the student alone, under its own.

    Where its path is ``student`` it is the student as it was at the start, its adapter included.

    Without a path, where no objective needs a teacher, it is the student's own model, which then never loads.
    """
    model = OmegaConf.create(OmegaConf.to_container(student, resolve=True))
    assert isinstance(model, DictConfig)
    if not teacher.get("path"):
        return model
    own: dict[str, Any] = {"enable_gradient_checkpointing": False, "enable_activation_offload": False}
    is_student = teacher.path == STUDENT
    if not is_student:
        own |= {"hf_config_path": None, "tokenizer_path": None}
    if not is_student or not model.get("lora_adapter_path"):  # an adapter that training begins adds nothing at first
        own |= {"lora_rank": 0, "lora": {"rank": 0}, "lora_adapter_path": None}
    merged = OmegaConf.merge(model, own, teacher, {"path": student.path} if is_student else {})
    assert isinstance(merged, DictConfig)
    return merged


SEVERAL = "several"
"""Beside a trainer's node of its teacher's model: those of several teachers, by name. No setting itself."""


def teacher_nodes(parent: DictConfig, hpd: HPDConfig) -> dict[str, DictConfig]:
    """The teachers' model nodes by name, as they stand in the configuration; a single one has the empty name.

    Those of several are made at the first call, as ``SEVERAL``: what the trainer's node has, and a path of their own.

    Args:
        parent: of the trainer's node of its teacher's model, ``teacher`` or ``actor_rollout_ref.ref``.
        hpd: the algorithm's settings.
    """
    if hpd.teachers is None:
        return {"": parent.model}
    if SEVERAL not in parent:
        with open_dict(parent):
            parent[SEVERAL] = {
                name: OmegaConf.merge(parent.model, {"path": each.path}) for name, each in hpd.teachers.items()
            }
    return {name: parent[SEVERAL][name] for name in hpd.teachers}


def teacher_name(name: str, single: str) -> str:
    """What the settings of a teacher's model are called.

    Args:
        name: of ``teacher_nodes``.
        single: of the trainer's own, as ``teacher.model``.
    """
    return f"{NODE}.{name}" if name else single


def shared_vocabulary_size(student: HFModelConfig, teacher: HFModelConfig) -> int:
    """The number of the teacher's logits that the student has too. Either may be padded beyond the tokenizer."""
    return min(student.hf_config.vocab_size, teacher.hf_config.vocab_size)
