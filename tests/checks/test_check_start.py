"""All checks of main_ppo together, on real files: what only the student and the run's settings show."""

from pathlib import Path

import pytest
from conftest import Tiny, main_ppo_config, make_model

from hpd_verl.checks.start import check_main_ppo, main_ppo_passes


def test_head_sizes_that_vllm_lacks_on_a_cpu(tiny: Tiny, tmp_path: Path) -> None:
    """Demonstrations alone need no vLLM."""
    small = make_model(tmp_path / "small", seed=3, head_dim=24)
    settings = [*tiny.main_ppo, f"actor_rollout_ref.model.path={small}"]
    settings += [f"trainer.default_local_dir={tmp_path / 'checkpoints'}"]
    rollouts = main_ppo_config(*settings, "algorithm.hpd.on_policy_fraction=0.5")
    check_main_ppo(main_ppo_config(*settings))
    message = r"^actor_rollout_ref\.model\.path=.*/small: attention heads of 24; vLLM on a CPU supports 32"
    with pytest.raises(ValueError, match=message):
        check_main_ppo(rollouts)


@pytest.mark.parametrize(
    ("sizes", "share", "fixed"),
    [
        ({}, True, None),
        ({"actor.ppo": 1}, False, None),
        ({"actor.ppo": 4}, True, "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=4"),
        ({"actor.ppo": 1, "ref.log_prob": 4}, True, "actor_rollout_ref.ref.log_prob_micro_batch_size_per_gpu=4"),
        (
            {"actor.ppo": 1, "rollout.log_prob": 2},
            True,
            "actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu=2",
        ),
    ],
)
def test_rows_share_micro_batches_of_any_pass(sizes: dict[str, int], share: bool, fixed: str | None) -> None:
    """What the teacher's passes and those before an update take together counts as what the update does."""
    settings = [f"actor_rollout_ref.{name}_micro_batch_size_per_gpu={size}" for name, size in sizes.items()]
    config = main_ppo_config("data.train_files=none", *settings)
    for pipeline in ("one_pass", "staged"):
        passes = main_ppo_passes(config, pipeline)
        assert (passes.rows_share, passes.fixed_rows) == (share, fixed)
        assert passes.one_row.startswith("actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=1")
