"""The student that both trainers start from."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from conftest import Tiny
from hydra import compose, initialize_config_dir, initialize_config_module
from torch import nn
from torch.distributed.tensor import DTensor
from verl.utils.distributed import destroy_global_process_group, initialize_global_process_group

from hpd_verl.hydra_config import config_dir
from hpd_verl.ppo.worker import HPDWorkerWithoutRollout
from hpd_verl.sft.start import ALONE
from hpd_verl.sft.trainer import HPDSFTTrainer


@pytest.fixture(autouse=True, scope="module")
def process_group() -> Iterator[None]:
    kept = dict(os.environ)
    os.environ.update(ALONE)
    initialize_global_process_group()
    yield
    destroy_global_process_group()
    os.environ.clear()
    os.environ.update(kept)


def by_main_ppo(tiny: Tiny, folder: Path, seed: int, pipeline: str) -> nn.Module:
    overrides = [
        "algorithm=hpd",
        f"actor_rollout_ref.model.path={tiny.student}",
        f"actor_rollout_ref.ref.model.path={tiny.teacher}",
        f"data.train_files={tiny.train}",
        "data.max_prompt_length=16",
        "data.max_response_length=16",
        "actor_rollout_ref.model.lora_rank=4",
        f"algorithm.hpd.pipeline={pipeline}",
        f"algorithm.hpd.seed={seed}",
    ]
    with initialize_config_module("verl.trainer.config", version_base=None):
        config = compose("ppo_trainer", overrides=overrides)
    worker = HPDWorkerWithoutRollout(config=config.actor_rollout_ref, role="actor_rollout_ref")
    worker.init_model()
    return worker.actor.engine.module


def by_sft_trainer(tiny: Tiny, folder: Path, seed: int, pipeline: str) -> nn.Module:
    overrides = [
        f"model.path={tiny.student}",
        f"teacher.model.path={tiny.teacher}",
        f"data.train_files={tiny.train}",
        "data.train_batch_size=8",
        "data.max_prompt_length=16",
        "data.max_response_length=16",
        f"trainer.default_local_dir={folder}",
        "model.lora_rank=4",
        f"algorithm.hpd.seed={seed}",
    ]
    with initialize_config_dir(str(config_dir()), version_base=None):
        config = compose("sft_trainer", overrides=overrides)
    return HPDSFTTrainer(config).engine.module


@pytest.mark.parametrize(
    ("make", "pipeline"), [(by_main_ppo, "one_pass"), (by_main_ppo, "staged"), (by_sft_trainer, "one_pass")]
)
def test_lora_starts_from_the_runs_seed(make: object, pipeline: str, tiny: Tiny, tmp_path: Path) -> None:
    """Whatever was drawn before; another seed gives another start."""
    assert callable(make)

    def start(seed: int) -> torch.Tensor:
        torch.rand(seed)
        parameters = [
            (each.full_tensor() if isinstance(each, DTensor) else each).detach().flatten()
            for name, each in make(tiny, tmp_path, seed, pipeline).named_parameters()
            if "lora_A" in name
        ]
        return torch.cat(parameters)

    first, again, other = start(1), start(1), start(2)
    assert first.any()
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
