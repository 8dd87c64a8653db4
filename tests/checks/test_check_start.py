"""All checks of main_ppo together, on real files: what only the student and the run's settings show."""

from pathlib import Path

import pytest
from conftest import Tiny, make_model
from hydra import compose, initialize_config_module

from hpd_verl.checks.start import check_main_ppo


def test_head_sizes_that_vllm_lacks_on_a_cpu(tiny: Tiny, tmp_path: Path) -> None:
    """Demonstrations alone need no vLLM."""
    small = make_model(tmp_path / "small", seed=3, head_dim=24)
    settings = [
        "algorithm=hpd",
        f"actor_rollout_ref.model.path={small}",
        f"actor_rollout_ref.ref.model.path={tiny.teacher}",
        f"data.train_files={tiny.train}",
        "data.train_batch_size=8",
        "data.max_prompt_length=16",
        "data.max_response_length=16",
        f"trainer.default_local_dir={tmp_path / 'checkpoints'}",
    ]
    with initialize_config_module("verl.trainer.config", version_base=None):
        demonstrations = compose("ppo_trainer", settings)
        rollouts = compose("ppo_trainer", [*settings, "algorithm.hpd.on_policy_fraction=0.5"])
    check_main_ppo(demonstrations)
    message = r"^actor_rollout_ref\.model\.path=.*/small: attention heads of 24, and vLLM generates on a CPU with 32"
    with pytest.raises(ValueError, match=message):
        check_main_ppo(rollouts)
