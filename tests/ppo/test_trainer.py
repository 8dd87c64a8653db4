"""What the trainer leaves out of a run that needs no rollout server."""

import pytest
from conftest import Tiny
from hydra import compose, initialize_config_module

from hpd_verl.ppo.trainer import HPDTrainer


@pytest.mark.parametrize(("fraction", "workers"), [(0.0, 0), (0.5, 1)])
def test_reward_workers_only_beside_a_rollout_server(tiny: Tiny, fraction: float, workers: int) -> None:
    """Demonstrations earn no reward, so no process waits to give one."""
    with initialize_config_module("verl.trainer.config", version_base=None):
        config = compose(
            "ppo_trainer",
            overrides=[
                "algorithm=hpd",
                f"algorithm.hpd.on_policy_fraction={fraction}",
                f"actor_rollout_ref.model.path={tiny.student}",
                f"actor_rollout_ref.ref.model.path={tiny.teacher}",
                f"data.train_files={tiny.train}",
                "data.max_prompt_length=16",
                "data.max_response_length=16",
            ],
        )
    trainer = HPDTrainer(config)
    assert trainer.serves_rollouts == (workers > 0)
    assert trainer.config.reward.num_workers == workers
