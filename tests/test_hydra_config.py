"""``algorithm=hpd`` is a Hydra choice; runs that do not name it compose as without the plugin."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow


def compose(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "verl.trainer.main_ppo", *arguments]
    inherited = {name: value for name, value in os.environ.items() if name != "VERL_PLATFORM"}
    return subprocess.run(
        command, cwd=folder, env={**inherited, **environment}, capture_output=True, text=True, timeout=120, check=False
    )


def test_other_runs_compose_byte_identically(tmp_path: Path) -> None:
    arguments = ("algorithm.adv_estimator=grpo", "data.train_batch_size=7", "--cfg", "job")
    with_plugin = compose(tmp_path, *arguments)
    without_plugin = compose(tmp_path, *arguments, VERL_USE_EXTERNAL_PLUGINS="none")
    assert with_plugin.returncode == without_plugin.returncode == 0
    assert with_plugin.stdout == without_plugin.stdout


def test_unknown_algorithm_lists_the_choices(tmp_path: Path) -> None:
    run = compose(tmp_path, "algorithm=nope", "--cfg", "job")
    assert run.returncode != 0
    assert "Could not find 'algorithm/nope'" in run.stderr
    assert "hpd" in run.stderr


def test_command_line_wins_over_the_algorithm_and_the_platform(tmp_path: Path) -> None:
    arguments = ("actor_rollout_ref.actor.strategy=fsdp", "reward.num_workers=3", "algorithm.hpd.forward_coef=0.5")
    run = compose(tmp_path, "algorithm=hpd", *arguments, "--cfg", "job", VERL_PLATFORM="cpu")
    assert run.returncode == 0, run.stderr
    for line in (
        "    strategy: fsdp\n",
        "  num_workers: 3\n",
        "    forward_coef: 0.5\n",
        "attn_implementation: packed_sdpa\n",
    ):
        assert line in run.stdout


def test_dynamic_batches_unless_a_micro_batch_size_is_given(tmp_path: Path) -> None:
    for arguments, expected in (((), "true"), (("actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=2",), "false")):
        run = compose(tmp_path, "algorithm=hpd", *arguments, "--cfg", "job", "--resolve")
        assert f"log_prob_use_dynamic_bsz: {expected}" in run.stdout
