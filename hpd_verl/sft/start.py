"""Start of the commands of configs/sft_trainer.yaml: the checks, the choices about both models, the teacher."""

import os
import sys
from collections.abc import Sequence
from functools import partial

from omegaconf import DictConfig, OmegaConf
from verl.utils.config import omega_conf_to_dataclass
from verl.utils.device import auto_set_device
from verl.workers.config import TrainingWorkerConfig

from hpd_verl.checks.row_layouts import choose_row_layout, model_nodes, write_row_layout
from hpd_verl.checks.start import check_sft_run, sft_passes
from hpd_verl.config import HPDConfig
from hpd_verl.engine.ranks import on_rank_zero
from hpd_verl.run.choices import with_dtype
from hpd_verl.sft.demonstrations import DemonstrationDataset
from hpd_verl.teacher.model_config import teacher_model_config, teacher_nodes
from hpd_verl.teacher.settings import TeacherSettings
from hpd_verl.teacher.store.size import log_size

ALONE = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
"""Environment of torch.distributed for one process that torchrun did not start."""


def teacher_worker_config(config: DictConfig) -> TrainingWorkerConfig:
    """verl's configuration of the teacher: the student's engine, for forward passes only, under ``teacher.engine``."""
    student = config.engine.copy()
    OmegaConf.set_struct(student, False)  # the teacher's engine may have keys that the student's has not
    engine = OmegaConf.merge(student, config.teacher.engine, {"forward_only": True})
    assert isinstance(engine, DictConfig)
    engine_config = omega_conf_to_dataclass(with_dtype(engine))
    engine_config.use_dynamic_bsz = config.data.use_dynamic_bsz
    engine_config.infer_max_token_len_per_gpu = config.data.max_token_len_per_gpu
    engine_config.infer_micro_batch_size_per_gpu = config.data.micro_batch_size_per_gpu
    return TrainingWorkerConfig(
        model_type="language_model",
        model_config=omega_conf_to_dataclass(config.model),
        engine_config=engine_config,
        optimizer_config=omega_conf_to_dataclass(config.optim),
        checkpoint_config=omega_conf_to_dataclass(config.checkpoint),
    )


def log_store_size(config: DictConfig, hpd: HPDConfig, datasets: Sequence[DemonstrationDataset]) -> None:
    """Log how much the teacher's features of these rows take, and how much of that is kept."""
    rows = [dataset.rows for dataset in datasets]
    log_size(hpd, config.model, teacher_nodes(config.teacher, hpd), rows, config.data.max_response_length)


def write_row_layouts(config: DictConfig) -> None:
    """Choose attention and packing of all models, and write them into the configuration; all ranks together.

    Raises:
        ValueError: what is set is wrong for a model, or nothing is right.
    """
    passes = sft_passes(config)
    teachers = teacher_nodes(config.teacher, HPDConfig.from_config(config.algorithm.hpd))
    for model in model_nodes(config.model, teachers, ("model", "teacher.model")):
        write_row_layout(model, on_rank_zero(partial(choose_row_layout, model, passes)))


def teacher_settings(config: DictConfig, hpd: HPDConfig | None = None) -> TeacherSettings:
    """What the teacher, or several of them, is made of.

    Args:
        config: the composed configuration.
        hpd: the algorithm's settings; None: those of the configuration.
    """
    hpd = hpd or HPDConfig.from_config(config.algorithm.hpd)
    model = omega_conf_to_dataclass(teacher_model_config(config.model, config.teacher.model))
    several = {
        name: omega_conf_to_dataclass(teacher_model_config(config.model, node))
        for name, node in teacher_nodes(config.teacher, hpd).items()
        if name
    }
    return TeacherSettings(teacher_worker_config(config), model, several)


def checked(config: DictConfig, fills_store: bool = False) -> None:
    """Check settings, data and models before anything loads; one line and the end of the process if they do not fit.

    The first rank of each machine checks for all of it. The others wait for it where the ranks meet, and torchrun ends
    them with it.

    Args:
        config: the composed configuration.
        fills_store: the teacher's store is to be filled, without training.
    """
    auto_set_device(config)
    if int(os.environ.get("LOCAL_RANK", "0")) != 0:
        return
    try:
        check_sft_run(config, int(os.environ.get("WORLD_SIZE", "1")), fills_store)
    except ValueError as error:
        sys.exit(f"Error: {error}")
