"""The planner: exact counts of parameters, arithmetic by hand, verdicts and the command."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import main_ppo_config, sft_config
from transformers import (
    AutoConfig,
    Gemma2Config,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

from hpd_verl.tools.plan.__main__ import describe, main
from hpd_verl.tools.plan.memory import ALLOWANCE, complaints, plan_memory, what_helps
from hpd_verl.tools.plan.model_size import ModelSize, model_size, read_config
from hpd_verl.tools.plan.run import GIB, PlannedRun
from hpd_verl.tools.plan.work import plan_work


def shape(hidden: int, intermediate: int, layers: int, heads: int, key_heads: int, vocabulary: int) -> dict[str, Any]:
    return {
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": key_heads,
        "vocab_size": vocabulary,
    }


QWEN_1_5B = Qwen2Config(**shape(1536, 8960, 28, 12, 2, 151_936), tie_word_embeddings=True)
QWEN_7B = Qwen2Config(**shape(3584, 18_944, 28, 28, 4, 152_064), tie_word_embeddings=False)
MODELS: dict[str, tuple[PretrainedConfig, int]] = {
    "Qwen2.5-1.5B": (QWEN_1_5B, 1_543_714_304),
    "Qwen2.5-7B": (QWEN_7B, 7_615_616_512),
    "Llama-3.2-1B": (
        LlamaConfig(**shape(2048, 8192, 16, 32, 8, 128_256), head_dim=64, tie_word_embeddings=True),
        1_235_814_400,
    ),
    "Qwen3-0.6B": (
        Qwen3Config(**shape(1024, 3072, 28, 16, 8, 151_936), head_dim=128, tie_word_embeddings=True),
        596_049_920,
    ),
    "Mistral-7B-v0.3": (MistralConfig(**shape(4096, 14_336, 32, 32, 8, 32_768)), 7_248_023_552),
    "gemma-2-2b": (Gemma2Config(**shape(2304, 9216, 26, 8, 4, 256_000), head_dim=256), 2_614_341_888),
    "Phi-3-mini": (Phi3Config(**shape(3072, 8192, 32, 32, 32, 32_064), pad_token_id=0), 3_821_079_552),
}


DOCS = Path(__file__).resolve().parents[2] / "docs"


@pytest.fixture(scope="module")
def student() -> ModelSize:
    return model_size("Qwen2.5-1.5B", QWEN_1_5B)


@pytest.fixture(scope="module")
def teacher() -> ModelSize:
    return model_size("Qwen2.5-7B", QWEN_7B)


@pytest.mark.parametrize("name", MODELS)
def test_parameters_are_those_that_the_models_cards_say(name: str) -> None:
    config, parameters = MODELS[name]
    size = model_size(name, config)
    assert size.parameters == size.active == parameters
    assert size.layers == config.num_hidden_layers
    assert size.body == parameters - size.embedding * (1 if size.tied else 2)


def test_experts_count_once_in_total_and_by_choice_in_active() -> None:
    """Qwen3-30B-A3B: 30.5 billion, 3.3 of them active."""
    config = Qwen3MoeConfig(
        **shape(2048, 6144, 48, 32, 4, 151_936),
        head_dim=128,
        moe_intermediate_size=768,
        num_experts=128,
        num_experts_per_tok=8,
        tie_word_embeddings=False,
    )
    size = model_size("Qwen3-30B-A3B", config)
    experts = 48 * 128 * 3 * 2048 * 768
    assert size.parameters == 30_532_122_624
    assert size.active == size.parameters - experts + experts * 8 // 128
    assert size.intermediate == 8 * 768


def test_memory_by_hand(student: ModelSize, teacher: ModelSize) -> None:
    run = PlannedRun(gpus=4, tokens=8192, rows=1000, prompt_tokens=24, response_tokens=1000, batch_size=64)
    phases = plan_memory(student, teacher, run).phases
    backward, output = phases["backward"], phases["output layer"]
    assert backward["student's weights"] == 1_543_714_304  # 4 bytes, over 4 GPUs
    assert backward["optimiser"] == 2 * 1_543_714_304
    assert backward["gradients"] == 1_543_714_304  # two micro-batches: those of the first are there
    assert backward["teacher's whole output layer"] == 2 * 152_064 * 3584
    assert backward["teacher's features"] == 16 * 1000 * (2 * 3584 + 8)
    assert output["activations"] == 2 * 8192 * 1536 * 28  # the layers' inputs
    assert output["output layer's gradient"] == 2 * 151_936 * 1536  # 8000 response tokens: one chunk
    assert backward["CUDA, NCCL, gaps (allowance)"] == ALLOWANCE
    assert plan_memory(student, teacher, run).machine == {"teacher's weights": 2 * 7_615_616_512}


def test_a_served_teacher_by_hand(student: ModelSize, teacher: ModelSize) -> None:
    """Of the teacher there is its output layer, and the hidden states of two batches, prompts included."""
    run = PlannedRun(gpus=4, tokens=8192, rows=1000, prompt_tokens=24, response_tokens=1000, batch_size=64)
    served = plan_memory(student, teacher, replace(run, teacher_served=True))
    assert served.machine == {"the teacher's hidden states": 2 * 64 * 1024 * 2 * 3584}
    beside = plan_memory(student, teacher, run).phases
    gone = {"teacher's layers, gathered", "teacher's activations"}
    assert served.phases["teacher"] == {name: size for name, size in beside["teacher"].items() if name not in gone}
    assert served.phases["backward"] == beside["backward"]
    operations = plan_work(student, teacher, replace(run, teacher_served=True)).operations
    assert operations["teacher"] == 3 * 1000 * 2 * 152_064 * 3584 * 1000  # three epochs of the output layer


def test_several_teachers_by_hand(student: ModelSize, teacher: ModelSize) -> None:
    """All weights in the machines' memory, all output layers on each GPU, a gradient of the student's for each."""
    run = PlannedRun(gpus=4, batch_size=64, response_tokens=1000, prompt_tokens=24)
    one, two = plan_memory(student, teacher, run), plan_memory(student, teacher, run, [student])
    weights = {"teacher's weights": 2 * teacher.parameters, "other teachers' weights": 2 * student.parameters}
    assert two.machine == weights
    assert two.phases["backward"]["other teachers' output layers"] == 2 * student.output
    gradients = [each.phases["output layer"]["output layer's gradient"] for each in (one, two)]
    assert gradients[1] - gradients[0] == 2 * student.output


def test_gpus_that_share_a_sequence(student: ModelSize, teacher: ModelSize, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each has its part of a row's tokens, and of the batch's features; docs/cost.md holds what its script writes."""
    alone = PlannedRun(tokens=32_768, prompt_tokens=1024, response_tokens=31_744, batch_size=32)
    shared = replace(alone, tokens=8192, ulysses=4)
    memory = plan_memory(student, teacher, alone), plan_memory(student, teacher, shared)
    inputs = [each.phases["output layer"]["activations"] for each in memory]
    assert inputs == [2 * tokens * 1536 * 28 for tokens in (32_768, 8192)]
    features = [each.phases["output layer"]["teacher's features"] for each in memory]
    assert features == [32 * 31_744 * (2 * 3584 + 8) / 8] * 2
    helping = dict(what_helps(student, teacher, alone))
    named = "actor_rollout_ref.actor.ulysses_sequence_parallel_size=2 actor_rollout_ref.actor.ppo_max_token_len_per_gpu"
    saved = memory[0].peak - plan_memory(student, teacher, replace(alone, tokens=16_384, ulysses=2)).peak
    assert helping[f"{named}=16384"] == saved > 2 * GIB
    assert not any("ulysses_sequence_parallel_size=8" in name for name, _ in what_helps(student, teacher, shared))
    monkeypatch.syspath_prepend(str(DOCS))
    import long_contexts

    assert long_contexts.table() in (DOCS / "cost.md").read_text()


def test_operations_by_hand(student: ModelSize, teacher: ModelSize) -> None:
    run = PlannedRun(gpus=1, rows=10, epochs=2, prompt_tokens=100, response_tokens=300, gradient_checkpointing=False)
    work = plan_work(student, teacher, run)
    layers, output = 1_543_714_304 - 151_936 * 1536, 151_936 * 1536
    attention = 4 * 12 * 128 * 28 * 400 * 400 / 2
    assert work.operations["student"] == 20 * 3 * (2 * layers * 400 + attention)
    assert work.operations["student's output layer"] == 20 * 6 * output * 300
    assert work.hours["student"] == pytest.approx(work.operations["student"] / (0.4 * 989e12) / 3600)
    # A store: the teacher runs in the first epoch alone.
    stored = plan_work(student, teacher, replace(run, teacher_cache="disk"))
    assert stored.operations["teacher"] == work.operations["teacher"] / 2
    assert stored.store_bytes == 10 * 64 + 3000 * (2 * 3584 + 8) + 2 * 152_064 * 3584
    assert "teacher" not in plan_work(student, None, run).operations


def test_what_does_not_fit_is_said_with_what_helps(student: ModelSize, teacher: ModelSize) -> None:
    run = PlannedRun(gpus=1, memory=24)
    memory = plan_memory(student, teacher, run)
    why = complaints(memory, run)
    assert any("phase 'backward' needs" in each and "of 24 GiB" in each for each in why)
    helping = dict(what_helps(student, teacher, run))
    assert list(helping.values()) == sorted(helping.values(), reverse=True)
    assert helping["2 GPUs"] > 8 * GIB
    # What is promised is what the plan of that setting says.
    saved = helping["actor_rollout_ref.actor.fsdp_config.offload_policy=true"]
    assert plan_memory(student, teacher, replace(run, offload_policy=True)).peak == pytest.approx(memory.peak - saved)
    assert "actor_rollout_ref.model.enable_gradient_checkpointing=true" not in helping  # it is on
    lines = "\n".join(describe(student, teacher, run, memory, plan_work(student, teacher, run), why))
    assert "does not fit: phase" in lines
    assert "  2 GPUs: " in lines


def test_the_server_needs_room_for_a_row(student: ModelSize, teacher: ModelSize) -> None:
    run = PlannedRun(on_policy_fraction=0.25, gpu_memory_utilization=0.06, memory=80)
    (why,) = complaints(plan_memory(student, teacher, run), run)
    assert "the rollout server's cache holds" in why
    run = replace(run, gpu_memory_utilization=0.9)
    memory = plan_memory(student, teacher, replace(run, gpus=1))
    assert memory.peak_phase == "rollouts"
    names = [name for name, _ in what_helps(student, teacher, replace(run, gpus=1))]
    assert any("gpu_memory_utilization=0.8" in name for name in names)
    assert any("optimizer_offload=true" in name for name in names)


@pytest.mark.parametrize(
    "change",
    [{"gpus": 16}, {"tokens": 8192}, {"lora_rank": 32}, {"token_chunk_size": 1024}, {"offload_policy": True}],
)
def test_each_setting_lowers_what_it_is_said_to(student: ModelSize, teacher: ModelSize, change: dict[str, Any]) -> None:
    run = PlannedRun(response_tokens=4000)
    assert plan_memory(student, teacher, replace(run, **change)).peak < plan_memory(student, teacher, run).peak


@pytest.mark.parametrize("trainer", ["main_ppo", "lean"])
def test_what_helps_is_taken_by_the_trainer(trainer: str, student: ModelSize, teacher: ModelSize) -> None:
    """Every setting's name, as an override of the trainer's configuration."""
    share = 0.25 if trainer == "main_ppo" else 0.0
    run = PlannedRun(gpus=1, trainer=trainer, on_policy_fraction=share, gradient_checkpointing=False, attention="sdpa")
    with_server = [name for name, _ in what_helps(student, teacher, replace(run, gpu_memory_utilization=0.9))]
    names = {name.split(",")[0] for name in with_server}
    names |= {name.split(",")[0] for name, _ in what_helps(student, teacher, replace(run, on_policy_fraction=0.0))}
    overrides = [each for name in names if "=" in name for each in name.split()]
    assert len(overrides) >= (6 if trainer == "main_ppo" else 4)
    (main_ppo_config if trainer == "main_ppo" else sft_config)(*overrides)


def write_config(folder: Path, config: PretrainedConfig) -> str:
    config.save_pretrained(folder)
    return str(folder)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    models = write_config(tmp_path / "ünïcode student", QWEN_1_5B), write_config(tmp_path / "teacher", QWEN_7B)
    assert sorted(file.name for file in (tmp_path / "teacher").iterdir()) == ["config.json"]  # nothing else is needed
    with pytest.raises(SystemExit) as ended:
        main([*models])
    assert ended.value.code == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("fits: at most ")
    with pytest.raises(SystemExit) as ended:
        main([*models, "--memory", "10", "--json", "--trainer", "lean"])
    assert ended.value.code == 1
    plan = json.loads(capsys.readouterr().out)
    assert plan["fits"] is False
    assert plan["student"]["parameters"] == 1_543_714_304
    assert plan["what_helps"]["engine.offload_policy=true"] > 0
    assert max(sum(parts.values()) for parts in plan["phases"].values()) == pytest.approx(plan["peak_bytes"], abs=20)


@pytest.mark.parametrize(
    ("arguments", "found"),
    [
        (["/no/such/folder"], "STUDENT=/no/such/folder: no such folder"),
        (["no-such-owner/no-such-model"], "STUDENT=no-such-owner/no-such-model: no configuration"),
        (["STUDENT", "--gpus", "0"], "--gpus=0: give a number above 0"),
        (["STUDENT", "--memory", "nan"], "--memory=nan: give a number above 0"),
        (["STUDENT", "--utilization", "40"], "--utilization=40.0: give a share"),
        (["STUDENT", "--tokens", "100"], "--tokens=100: a row has 1200"),
        (
            ["STUDENT", "--tokens", "500", "--ulysses", "2"],
            "--tokens=500: a row has 1200 on average; a micro-batch holds",
        ),
        (["STUDENT", "--ulysses", "3"], "--ulysses=3: must divide --gpus=8"),
        (["STUDENT", "--ulysses", "8"], "--ulysses=8: STUDENT has 12 heads, 2 of keys, which it must divide"),
        (["STUDENT", "--ulysses", "2", "--attention", "sdpa"], "--attention=sdpa: Ulysses shares out"),
        (["STUDENT", "--trainer", "lean", "--on_policy_fraction", "0.5"], "--trainer=lean: it has no rollouts"),
        (["STUDENT", "--store_is_full"], "--store_is_full: there is no store"),
    ],
)
def test_bad_input_is_one_line(arguments: list[str], found: str, tmp_path: Path) -> None:
    student = write_config(tmp_path / "student", QWEN_1_5B)
    with pytest.raises(SystemExit) as ended:
        main([student if each == "STUDENT" else each for each in arguments])
    assert str(ended.value.code).startswith(f"Error: {found}")
    assert "\n" not in str(ended.value.code)


@pytest.mark.parametrize(
    "content",
    [
        *("", "{", "[]", "{}", '{"model_type": "clip"}', '{"model_type": "nothing"}'),
        *('{"model_type": "qwen2", "hidden_size": "64"}', '{"model_type": "qwen2", "hidden_size": -64}'),
        *('{"model_type": "qwen2", "num_attention_heads": 0}', '{"model_type": "qwen2", "num_hidden_layers": 0}'),
        '{"model_type": "other", "auto_map": {"AutoConfig": "a.B"}}',
    ],
)
def test_a_strange_config_is_one_line(content: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(SystemExit) as ended:
        main([str(tmp_path)])
    assert str(ended.value.code).startswith(f"Error: STUDENT={tmp_path}: ")
    assert "\n" not in str(ended.value.code)


@pytest.mark.parametrize(
    ("config", "arguments", "message"),
    [
        ({"quantization_config": {"quant_method": "gptq"}}, [], "STUDENT={}: its weights are quantised (gptq); give"),
        (
            {"architectures": ["Qwen2ForSequenceClassification"]},
            [],
            "STUDENT={}: Qwen2ForSequenceClassification has",
        ),
        ({"model_type": "ctrl", "architectures": ["CTRLLMHeadModel"]}, [], "--gradient_checkpointing=True: CTRLLMHead"),
        ({"model_type": "ctrl", "architectures": ["CTRLLMHeadModel"]}, ["--no-gradient_checkpointing"], None),
        ({"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}, [], None),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_what_the_trainers_refuse(config: dict[str, Any], arguments: list[str], message: str, tmp_path: Path) -> None:
    """By their own function; what they take is planned."""
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 2, "dff": 48, "vocab_size": 40, "hidden_size": 32}
    sizes |= {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2, "intermediate_size": 48}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen2", **sizes, **config}))
    with pytest.raises(SystemExit) as ended:
        main([str(tmp_path), "--rows", "8", *arguments])
    if message is None:
        assert ended.value.code == 0
    else:
        assert str(ended.value.code).startswith(f"Error: {message.format(tmp_path)}")


@pytest.mark.slow
def test_the_process(tmp_path: Path) -> None:
    """With torch and transformers alone: verl is asked only for the class that a configuration names."""
    student = write_config(tmp_path, AutoConfig.for_model("llama", **shape(64, 96, 2, 2, 2, 128)))
    program = "import sys, runpy; sys.argv = ['plan', sys.argv[1]]\n"
    program += (
        "try: runpy.run_module('hpd_verl.tools.plan', run_name='__main__')\nfinally: print('verl' in sys.modules)"
    )
    command = [sys.executable, "-c", program, student]
    run = subprocess.run(command, capture_output=True, text=True, timeout=100, env={**os.environ})
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines()[-2].startswith("fits: ")
    assert run.stdout.splitlines()[-1] == "False"


def test_a_config_file_may_be_named_itself(tmp_path: Path) -> None:
    folder = write_config(tmp_path, QWEN_1_5B)
    assert model_size("x", read_config(f"{folder}/config.json")).parameters == 1_543_714_304
