"""``algorithm=hpd`` is a Hydra choice; runs that do not name it compose as without the plugin."""

import os
import subprocess
import sys
from multiprocessing.context import ForkServerContext
from pathlib import Path

import pytest
from conftest import run_module

pytestmark = pytest.mark.slow


def compose(folder: Path, processes: ForkServerContext, *arguments: str, **environment: str) -> tuple[int, str]:
    """Exit code and output of main_ppo with these words and variables, and without a platform unless they name one."""
    inherited = {name: value for name, value in os.environ.items() if name != "VERL_PLATFORM"}
    output = folder / "output.txt"
    output.write_text("")
    words = ("verl.trainer.main_ppo", list(arguments), folder, inherited | environment, output)
    process = processes.Process(target=run_module, args=words)
    process.start()
    process.join(120)
    assert process.exitcode is not None
    return process.exitcode, output.read_text()


def test_other_runs_compose_byte_identically(tmp_path: Path, processes: ForkServerContext) -> None:
    arguments = ("algorithm.adv_estimator=grpo", "data.train_batch_size=7", "--cfg", "job")
    command = [sys.executable, "-m", "verl.trainer.main_ppo", *arguments]
    environment = {name: value for name, value in os.environ.items() if name != "VERL_PLATFORM"}
    environment["VERL_USE_EXTERNAL_PLUGINS"] = "none"
    without_plugin = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert without_plugin.returncode == 0, without_plugin.stderr
    assert compose(tmp_path, processes, *arguments) == (0, without_plugin.stdout)


def test_unknown_algorithm_lists_the_choices(tmp_path: Path, processes: ForkServerContext) -> None:
    code, output = compose(tmp_path, processes, "algorithm=nope", "--cfg", "job")
    assert code != 0
    assert "Could not find 'algorithm/nope'" in output
    assert "hpd" in output


def test_command_line_wins_over_the_algorithm_and_the_platform(tmp_path: Path, processes: ForkServerContext) -> None:
    arguments = ("actor_rollout_ref.actor.strategy=fsdp", "reward.num_workers=3", "algorithm.hpd.forward_coef=0.5")
    code, output = compose(tmp_path, processes, "algorithm=hpd", *arguments, "--cfg", "job", VERL_PLATFORM="cpu")
    assert code == 0, output
    for line in (
        "    strategy: fsdp\n",
        "  num_workers: 3\n",
        "    forward_coef: 0.5\n",
        "    enable_sleep_mode: false\n",
    ):
        assert line in output


def test_dynamic_batches_unless_a_micro_batch_size_is_given(tmp_path: Path, processes: ForkServerContext) -> None:
    for arguments, expected in (((), "true"), (("actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=2",), "false")):
        _, output = compose(tmp_path, processes, "algorithm=hpd", *arguments, "--cfg", "job", "--resolve")
        assert f"log_prob_use_dynamic_bsz: {expected}" in output


def test_importing_our_own_first(tmp_path: Path) -> None:
    """The module that registers with Hydra may be the first to import it."""
    command = [
        sys.executable,
        "-c",
        "import verl, sys; assert 'hydra' not in sys.modules; import hpd_verl.hydra_config",
    ]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert run.returncode == 0, run.stderr


def test_a_ray_that_is_there_is_told_nothing(tmp_path: Path, processes: ForkServerContext) -> None:
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
    _, alone = compose(tmp_path, processes, *arguments, VERL_PLATFORM="cpu")
    assert {"num_gpus: 2", "num_cpus: 8"} <= set(alone.split("\n"))
    _, joins = compose(tmp_path, processes, *arguments, VERL_PLATFORM="cpu", RAY_ADDRESS="10.0.0.1:6379")
    assert {"num_gpus: null", "num_cpus: null"} <= set(joins.split("\n"))
