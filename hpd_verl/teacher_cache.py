"""Fill the teacher's store ahead of training, so that training never runs the teacher.

    torchrun --standalone --nproc_per_node=8 -m hpd_verl.teacher_cache \
        model.path=STUDENT teacher.model.path=TEACHER data.train_files=train.parquet \
        algorithm.hpd.teacher_cache_dir=DIR

With one process, ``python -m hpd_verl.teacher_cache``. Settings are those of the lean trainer
(configs/sft_trainer.yaml); data.* and algorithm.hpd.temperature must be those of the training. ``data.val_files`` are
stored too, if given. Rows that are stored already are skipped.
"""

import os

import hydra
import torch.distributed
from omegaconf import DictConfig, open_dict
from torch.utils.data import DataLoader, DistributedSampler
from tqdm import tqdm
from verl.utils.config import omega_conf_to_dataclass
from verl.utils.dataset.dataset_utils import SFTTensorCollator
from verl.utils.distributed import destroy_global_process_group, initialize_global_process_group

from hpd_verl.config import HPDConfig
from hpd_verl.hydra_config import config_dir
from hpd_verl.sft_trainer import as_batch, checked, lazy_teacher, read_demonstrations
from hpd_verl.teacher import Teacher

ALONE = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
"""Environment of torch.distributed for one process that torchrun did not start."""


def fill(config: DictConfig) -> dict[str, float]:
    """Take the features of every row and store them.

    Returns:
        The store's metrics.
    """
    hpd = HPDConfig.from_config(config.algorithm.hpd)
    model = omega_conf_to_dataclass(config.model)
    worker = lazy_teacher(config)
    vocabulary_size = min(model.hf_config.vocab_size, worker.model_config.hf_config.vocab_size)
    teacher = Teacher(worker, hpd, vocabulary_size, model.tokenizer)
    data = config.data
    for files, max_samples in ((data.train_files, data.train_max_samples), (data.val_files, data.val_max_samples)):
        if not files:
            continue
        rows = read_demonstrations(config, model, files, max_samples)
        loader = DataLoader(
            rows,
            batch_size=config.data.train_batch_size // torch.distributed.get_world_size(),
            sampler=DistributedSampler(rows, shuffle=False),  # pads, so that ranks take equally many batches
            collate_fn=SFTTensorCollator(config.data.pad_mode),
            num_workers=config.data.num_workers,
        )
        for batch in tqdm(loader, desc=str(files), unit="batch", disable=torch.distributed.get_rank() != 0):
            teacher.features(as_batch(config, model, batch, step=0))
    return teacher.metrics()


@hydra.main(config_path=str(config_dir()), config_name="sft_trainer", version_base=None)
def main(config: DictConfig) -> None:
    """Fill the store and report what it holds."""
    with open_dict(config):
        config.algorithm.hpd.teacher_cache = "disk"
    for name, value in ALONE.items():
        os.environ.setdefault(name, value)
    checked(config, fills_store=True)
    initialize_global_process_group()
    metrics = fill(config)
    if torch.distributed.get_rank() == 0:
        print(
            f"{config.algorithm.hpd.teacher_cache_dir}: {metrics['hpd/teacher_cache_rows']:.0f} distinct rows, "
            f"{metrics['hpd/teacher_cache_gib']:.3f} GiB, {metrics['hpd/teacher_cache_refused_rows']:.0f} not stored"
        )
    destroy_global_process_group()


if __name__ == "__main__":
    main()
