"""Fill the teacher's store ahead of training, so that training never runs the teacher.

    torchrun --standalone --nproc_per_node=8 -m hpd_verl.sft.fill_store \
        model.path=STUDENT teacher.model.path=TEACHER data.train_files=train.parquet \
        algorithm.hpd.teacher_cache_dir=DIR

With one process, ``hpd-verl fill-store``. Settings are those of the lean trainer
(configs/sft_trainer.yaml); data.* and algorithm.hpd.temperature must be those of the training. ``data.val_files`` are
stored too, if given. Rows that are stored already are skipped: a fill that was stopped goes on by the same command.
"""

import os
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

import hydra
import torch.distributed
from omegaconf import DictConfig, open_dict
from tensordict import TensorDict
from torch.utils.data import DataLoader, DistributedSampler
from tqdm import tqdm
from verl.utils.config import omega_conf_to_dataclass
from verl.utils.dataset.dataset_utils import SFTTensorCollator
from verl.utils.distributed import destroy_global_process_group, initialize_global_process_group

from hpd_verl.config import HPDConfig
from hpd_verl.data import fields
from hpd_verl.data.response_tokens import column
from hpd_verl.engine.sequence_parallel import SequenceGroup
from hpd_verl.errors import Refused
from hpd_verl.hydra_config import config_dir
from hpd_verl.sft.demonstrations import as_batch, read_demonstrations
from hpd_verl.sft.start import ALONE, checked, log_store_size, teacher_settings, write_row_layouts
from hpd_verl.teacher.choice import make_teacher
from hpd_verl.teacher.prompt_date import fix_prompt_date
from hpd_verl.teacher.rows import teacher_rows
from hpd_verl.teacher.several import SeveralTeachers
from hpd_verl.teacher.stored import StoredTeacher


def fill(config: DictConfig) -> dict[str, float]:
    """Take the features of every row and store them.

    Returns:
        The stores' metrics, added up; counts of rows that were not stored are those of all ranks.

    Raises:
        FloatingPointError: the teacher's logits of some rows are not finite. The other rows are stored.
    """
    hpd = HPDConfig.from_config(config.algorithm.hpd)
    write_row_layouts(config)
    model = omega_conf_to_dataclass(config.model)
    data = config.data
    fix_prompt_date(data, hpd, model.tokenizer.chat_template)
    sources = ((data.train_files, data.train_max_samples), (data.val_files, data.val_max_samples))
    datasets = [
        (str(files), read_demonstrations(config, model, files, max_samples)) for files, max_samples in sources if files
    ]
    if torch.distributed.get_rank() == 0:
        log_store_size(config, hpd, [rows for _, rows in datasets])
    settings = teacher_settings(config, hpd)
    first = settings.of(next(iter(hpd.teachers))) if hpd.teachers else settings
    engine = first.worker().engine
    rank, ranks = engine.get_data_parallel_rank(), engine.get_data_parallel_size()
    processes, sharing = torch.distributed.get_world_size(), SequenceGroup.of(engine.ulysses_parallel_group)
    teacher = make_teacher(settings, hpd, model)
    # main sets teacher_cache=disk; of several teachers one may have none
    of_each = list(teacher.teachers.values()) if isinstance(teacher, SeveralTeachers) else [teacher]
    stored = [each for each in of_each if isinstance(each, StoredTeacher)]
    broken: list[str] = []

    def wanted_rows(batch: Mapping[str, Any]) -> tuple[TensorDict, Sequence[int] | None]:
        """Rows as the teachers read them, and which of them this rank asks for."""
        data = teacher_rows(as_batch(config, model, batch, step=0, steps=1))
        wanted = sharing.owned(len(data))
        if fields.TEACHER in data:
            of_row = column(data, fields.TEACHER).tolist()
            rows_of_rank = range(len(data)) if wanted is None else wanted
            wanted = [row for row in rows_of_rank if of_each[of_row[row]] in stored]
        return data, wanted

    for name, rows in datasets:
        loader = DataLoader(
            rows,
            batch_size=config.data.train_batch_size // ranks,
            # Pads, so that ranks take equally many batches.
            sampler=DistributedSampler(rows, num_replicas=ranks, rank=rank, shuffle=False),
            collate_fn=SFTTensorCollator(config.data.pad_mode),
            num_workers=config.data.num_workers,
        )
        bar = tqdm(total=len(rows), desc=name, unit="row", disable=torch.distributed.get_rank() != 0)
        start, before = time.perf_counter(), sum(each.computed_tokens for each in stored)
        batches = (wanted_rows(batch) for batch in loader)
        following = next(batches, None)
        while following is not None:
            (data, wanted), following = following, next(batches, None)
            if following is not None and hpd.teacher_server.prefetch:
                teacher.announce(*following)  # so that servers have work while this batch is written
            features = teacher.features(data, wanted)
            tokens = sum(each.computed_tokens for each in stored) - before
            speed = tokens * processes / (time.perf_counter() - start)
            bar.set_postfix_str(f"{speed:,.0f} tokens/s", refresh=False)
            bar.update(min(len(data) * ranks, len(rows) - bar.n))  # the last batch may be filled up
            broken += [
                f"{name} row {row}"
                for row, found in features.items()
                if not found.tensors["label_log_probs"].isfinite().all()
            ]
        bar.close()
    torch.distributed.barrier()
    for each in stored:
        each.store.refresh()  # what the other ranks stored last
    metrics: dict[str, float] = {}
    for each in stored:
        metrics = {name: metrics.get(name, 0.0) + value for name, value in each.metrics().items()}
    if metrics["hpd/teacher_cache_non_finite_rows"]:
        everywhere: list[list[str]] = [[] for _ in range(torch.distributed.get_world_size())]
        torch.distributed.all_gather_object(everywhere, broken)
        named = sorted({row for rank in everywhere for row in rank})
        raise FloatingPointError(
            f"NaN or infinity in the teacher's features of {metrics['hpd/teacher_cache_non_finite_rows']:.0f} rows "
            f"({', '.join(named[:8])}); they are not stored, and training would stop at them: check the teacher and "
            "its dtype"
        )
    return metrics


@hydra.main(config_path=str(config_dir()), config_name="sft_trainer", version_base=None)
def main(config: DictConfig) -> None:
    """Fill the store and report what it holds."""
    with open_dict(config):
        config.algorithm.hpd.teacher_cache = "disk"
    for name, value in ALONE.items():
        os.environ.setdefault(name, value)
    checked(config, fills_store=True)
    initialize_global_process_group()
    try:
        metrics = fill(config)
    except (FloatingPointError, Refused) as error:
        sys.exit(f"Error: {error}")
    if torch.distributed.get_rank() == 0:
        print(
            f"{config.algorithm.hpd.teacher_cache_dir}: {metrics['hpd/teacher_cache_rows']:.0f} distinct rows, "
            f"{metrics['hpd/teacher_cache_gib']:.3f} GiB, {metrics['hpd/teacher_cache_refused_rows']:.0f} not stored"
        )
    destroy_global_process_group()


if __name__ == "__main__":
    main()
