"""The student that both trainers start from."""

from pathlib import Path

import pytest
import torch
from conftest import Tiny, main_ppo_config, sft_config
from torch import nn
from torch.distributed.tensor import DTensor

from hpd_verl.ppo.worker import HPDWorkerWithoutRollout
from hpd_verl.sft.trainer import HPDSFTTrainer

pytestmark = pytest.mark.usefixtures("process_group")


def by_main_ppo(tiny: Tiny, folder: Path, seed: int, pipeline: str) -> nn.Module:
    settings = [f"algorithm.hpd.pipeline={pipeline}", f"algorithm.hpd.seed={seed}"]
    config = main_ppo_config(*tiny.main_ppo, "actor_rollout_ref.model.lora_rank=4", *settings)
    worker = HPDWorkerWithoutRollout(config=config.actor_rollout_ref, role="actor_rollout_ref")
    worker.init_model()
    return worker.actor.engine.module


def by_sft_trainer(tiny: Tiny, folder: Path, seed: int, pipeline: str) -> nn.Module:
    settings = [f"trainer.default_local_dir={folder}", "model.lora_rank=4", f"algorithm.hpd.seed={seed}"]
    return HPDSFTTrainer(sft_config(*tiny.sft, *settings)).engine.module


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
