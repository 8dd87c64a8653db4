"""What the commands of configs/sft_trainer.yaml share: rows and batches of demonstrations, the teacher, the checks."""

import math
import os
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from tensordict import TensorDict
from torch import Tensor
from torch.utils.data import Dataset
from verl.utils import tensordict_utils as tu
from verl.utils.config import omega_conf_to_dataclass
from verl.utils.device import auto_set_device
from verl.workers.config import HFModelConfig, TrainingWorkerConfig

from hpd_verl.checks.row_layouts import choose_row_layout, model_nodes, write_row_layout
from hpd_verl.checks.start import check_sft_run, sft_passes
from hpd_verl.config import HPDConfig, with_dtype
from hpd_verl.data import fields
from hpd_verl.data.dataset import DEMONSTRATION, HPDDataset
from hpd_verl.data.demonstration import SequenceBuilder, demonstration_of
from hpd_verl.data.row import TOOLS, tools_of
from hpd_verl.engine.ranks import on_rank_zero
from hpd_verl.teacher.colocated import TeacherWorker
from hpd_verl.teacher.model_config import teacher_model_config
from hpd_verl.teacher.size import log_size

ALONE = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
"""Environment of torch.distributed for one process that torchrun did not start."""


class DemonstrationDataset(Dataset[dict[str, Tensor]]):
    """Demonstrations as token sequences.

    Args:
        rows: the checked rows.
        sequences: how a row becomes tokens.
    """

    def __init__(self, rows: HPDDataset, sequences: SequenceBuilder) -> None:
        self.rows = rows
        self.sequences = sequences

    def __len__(self) -> int:
        return len(self.rows.dataframe)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        row = self.rows.row(index)
        where = f"row {index}"
        answer = demonstration_of(row.get(DEMONSTRATION), where)
        tensors, flags = self.sequences.build(row[self.rows.prompt_key], answer, where, tools_of(row.get(TOOLS)))
        columns = {fields.ROW: index, fields.IS_ROLLOUT: 0, **flags}
        return tensors | {name: torch.tensor([int(value)]) for name, value in columns.items()}


class PaddedRows(Dataset[dict[str, Tensor]]):
    """Rows filled up to a multiple, by copies that ``fields.IS_PADDING`` marks and that have row numbers of their own.

    Args:
        rows: the rows.
        multiple: of what the length becomes a multiple.
    """

    def __init__(self, rows: DemonstrationDataset, multiple: int) -> None:
        self.rows = rows
        self.length = math.ceil(len(rows) / multiple) * multiple

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        flags = {fields.ROW: index, fields.IS_PADDING: int(index >= len(self.rows))}
        return self.rows[index % len(self.rows)] | {name: torch.tensor([value]) for name, value in flags.items()}


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


def read_demonstrations(
    config: DictConfig, model: HFModelConfig, files: Any, max_samples: int = -1
) -> DemonstrationDataset:
    """The rows of ``files`` (a path or a list of them), checked, as sequences of the student's tokens."""
    data = OmegaConf.merge(config.data, {"train_files": files})  # validation rows need demonstrations too
    files = [files] if isinstance(files, str) else list(files)
    rows = HPDDataset(files, model.tokenizer, data, max_samples=max_samples)
    sequences = SequenceBuilder(
        model, data.apply_chat_template_kwargs, data.max_prompt_length, data.max_response_length
    )
    return DemonstrationDataset(rows, sequences)


def log_store_size(config: DictConfig, hpd: HPDConfig, datasets: Sequence[DemonstrationDataset]) -> None:
    """Log how much the teacher's features of these rows take, and how much of that is kept."""
    rows = [dataset.rows for dataset in datasets]
    log_size(hpd, config.model, config.teacher.model, rows, config.data.max_response_length)


def as_batch(config: DictConfig, model: HFModelConfig, tensors: Mapping[str, Any], step: int) -> TensorDict:
    """Collated rows with the settings that verl's passes read."""
    data = config.data
    settings = {
        "use_dynamic_bsz": data.use_dynamic_bsz,
        "max_token_len_per_gpu": data.max_token_len_per_gpu,
        "micro_batch_size_per_gpu": data.micro_batch_size_per_gpu,
        "temperature": config.algorithm.hpd.temperature,
        "global_batch_size": data.train_batch_size,
        "pad_mode": data.pad_mode,
        "pad_token_id": model.tokenizer.pad_token_id,
        fields.STEP: step,
    }
    return tu.get_tensordict(tensor_dict=dict(tensors), non_tensor_dict=settings)


def write_row_layouts(config: DictConfig) -> None:
    """Choose attention and packing of both models, and write them into the configuration; all ranks together.

    Raises:
        ValueError: what is set is wrong for a model, or nothing is right.
    """
    passes = sft_passes(config)
    for model in model_nodes(config.model, config.teacher.model, ("model", "teacher.model")):
        write_row_layout(model, on_rank_zero(partial(choose_row_layout, model, passes)))


def lazy_teacher(config: DictConfig) -> TeacherWorker:
    """The teacher's worker, its model not loaded yet."""
    model = omega_conf_to_dataclass(teacher_model_config(config.model, config.teacher.model))
    return TeacherWorker(teacher_worker_config(config), model=model, lazy=True)


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
