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


def test_importing_our_own_first(tmp_path: Path) -> None:
    """The module that registers with Hydra may be the first to import it."""
    command = [
        sys.executable,
        "-c",
        "import verl, sys; assert 'hydra' not in sys.modules; import hpd_verl.hydra_config",
    ]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert run.returncode == 0, run.stderr


def test_a_ray_that_is_there_is_told_nothing(tmp_path: Path) -> None:
    """A Ray that a run on a CPU starts is told its logical CPUs and GPUs; another Ray would refuse that."""
    arguments = (
        "algorithm=hpd",
        "trainer.n_gpus_per_node=2",
        "--cfg",
        "job",
        "--resolve",
        "--package",
        "ray_kwargs.ray_init",
    )
    alone = compose(tmp_path, *arguments, VERL_PLATFORM="cpu")
    assert {"num_gpus: 2", "num_cpus: 8"} <= set(alone.stdout.split("\n"))
    joins = compose(tmp_path, *arguments, VERL_PLATFORM="cpu", RAY_ADDRESS="10.0.0.1:6379")
    assert {"num_gpus: null", "num_cpus: null"} <= set(joins.stdout.split("\n"))
