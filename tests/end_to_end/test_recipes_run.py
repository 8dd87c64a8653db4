"""The recipes on tiny models through their variables: two real steps each.

hpd.sh of math runs within hpd_then_opd.sh, one_gpu.sh within lora.sh.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import Tiny, read_steps

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
Recipe = Callable[..., list[dict[str, float]]]


@pytest.fixture
def run_recipe(tiny: Tiny, tmp_path: Path) -> Recipe:
    """Run a recipe to its end; returns its steps' metrics."""

    def run(script: str, **variables: Any) -> list[dict[str, float]]:
        log = tmp_path / f"{Path(script).stem}.jsonl"
        settings = {
            "STUDENT": tiny.student,
            "TEACHER": tiny.teacher,
            "TRAIN_FILE": tiny.train,
            "VAL_FILE": tiny.validation,
            "REWARD": tiny.reward,
            "NGPUS_PER_NODE": 1,
            "BATCH_SIZE": 4,
            "STEPS": 2,
            "LR": 1e-2,
            "MAX_PROMPT_LENGTH": 16,
            "MAX_RESPONSE_LENGTH": 16,
            "MAX_TOKENS_PER_GPU": 256,
            "SAVE_FREQ": 2,
            "TEST_FREQ": -1,
            "OUT_DIR": tmp_path / Path(script).stem,
            "VERL_FILE_LOGGER_PATH": log,
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        } | variables
        result = subprocess.run(
            ["bash", EXAMPLES / script],
            cwd=tmp_path,
            env=os.environ | {name: str(value) for name, value in settings.items()},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=400,
        )
        assert result.returncode == 0, result.stdout[-3000:]
        return read_steps(log)

    return run


def assert_learned(steps: list[dict[str, float]]) -> None:
    assert len(steps) == 2
    assert all(step["actor/grad_norm"] > 0 for step in steps)


def test_hpd_then_opd(run_recipe: Recipe, tmp_path: Path) -> None:
    """Demonstrations at step 1, rollouts at step 2; validation by rewards, several answers a problem; wandb offline."""
    steps = run_recipe("math/hpd_then_opd.sh", MIX_STEPS=2, TEST_FREQ=2, VAL_N=2, ROLLOUTS=2)
    assert_learned(steps)
    assert [step["hpd/on_policy_fraction"] for step in steps] == [0, 1]
    assert [step["hpd/left_out_prompts"] for step in steps] == [0, 2]
    assert "hpd/rollout_log_prob_difference" not in steps[0]
    assert 0 < steps[1]["hpd/rollout_log_prob_difference"] < 1e-4, "vLLM computes another model"
    assert any(name.startswith("val-core/tests/addition") and name.endswith("mean@2") for name in steps[-1])
    checkpoint = tmp_path / "hpd_then_opd" / "global_step_2"
    assert (checkpoint / "actor" / "huggingface" / "model.safetensors").is_file()
    assert list((tmp_path / "hpd_then_opd").glob("wandb/offline-run-*"))


def test_opd(run_recipe: Recipe) -> None:
    """Several rollouts a prompt: 4 prompts, 8 sequences."""
    steps = run_recipe("math/opd.sh", ROLLOUTS=2)
    assert_learned(steps)
    assert [step["hpd/on_policy_fraction"] for step in steps] == [1, 1]
    assert all(0 < step["hpd/rollout_log_prob_difference"] < 1e-4 for step in steps)


def test_self_distillation(run_recipe: Recipe) -> None:
    """The student at its current weights teaches: with the solution in its context, so that there is a gap."""
    steps = run_recipe("math/self_distillation.sh", ROLLOUTS=1, MAX_TEACHER_PROMPT_LENGTH=64, TEACHER_EMA=0)
    assert_learned(steps)
    assert all(abs(step["hpd/reverse_kl_k1"]) > 1e-3 for step in steps)


def test_code(run_recipe: Recipe) -> None:
    assert_learned(run_recipe("code/hpd.sh"))


def test_lora(run_recipe: Recipe, tmp_path: Path) -> None:
    """On one GPU, with a validation loss."""
    steps = run_recipe("math/lora.sh", TEST_FREQ=2)
    assert_learned(steps)
    assert steps[-1]["val/hpd/loss"] != 0
    saved = json.loads((tmp_path / "lora" / "global_step_2" / "lora_train_meta.json").read_text())
    assert saved["r"] == 64


def test_dialogue(run_recipe: Recipe, tmp_path: Path) -> None:
    assert_learned(run_recipe("dialogue/hpd.sh"))
    assert (tmp_path / "hpd" / "global_step_2" / "huggingface" / "model.safetensors").is_file()


def test_strong_teacher_is_stored_ahead(run_recipe: Recipe, tmp_path: Path) -> None:
    """One script stores the teacher, the other trains without loading it, validation included."""
    store = {"STORE_DIR": tmp_path / "store", "STORE_GIB": 0.01}
    assert run_recipe("math/store_teacher.sh", **store) == []
    steps = run_recipe("math/strong_teacher.sh", TEST_FREQ=2, **store)
    assert_learned(steps)
    assert [step["hpd/teacher_cache_hit_fraction"] for step in steps] == [1, 1]
    assert [step["hpd/teacher_is_loaded"] for step in steps] == [0, 0]
    assert steps[-1]["val/hpd/loss"] != 0
