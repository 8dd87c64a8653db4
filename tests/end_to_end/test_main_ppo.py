"""The real command on tiny models: verl, Ray, TransferQueue and vLLM run for real."""

import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from conftest import RunMainPPO, Tiny, make_awkward_model, make_nan_model, make_rows, write_parquet
from peft import PeftModel
from transformers import AutoModelForCausalLM, GenerationConfig

from hpd_verl.run import stopping
from hpd_verl.tools.export import export

UPDATES = ("actor_rollout_ref.actor.ppo_mini_batch_size=4", "actor_rollout_ref.actor.ppo_epochs=2")
"""Four of each batch: two mini-batches, two epochs."""
MIXTURE = (
    r"algorithm.hpd.objective={hpd_exact: 1.0, hpd: 0.5, cross_entropy.py\:smoothed_label: 0.1}",
    "+algorithm.hpd.smoothed_label.smoothing=0.2",
    "algorithm.hpd.exact_kl_metrics=true",
)
"""Over the vocabulary and over tokens, with the objective of CONTRIBUTING.md."""


def test_the_split_of_a_batch_does_not_change_the_gradient(run_main_ppo: RunMainPPO, tmp_path: Path) -> None:
    """Pipeline, ranks, micro-batches, packing, recomputation, offload, store: same losses and gradient norms.

    And each saves what it trained.

    On demonstrations alone, which need no rollout server. Two epochs on 16 rows: the first run stores the teacher,
    from which the second epoch takes it; the second run does not even load it.
    """
    cache = (
        "algorithm.hpd.teacher_cache=disk",
        f"algorithm.hpd.teacher_cache_dir={tmp_path / 'teacher'}",
        "algorithm.hpd.teacher_cache_dtype=float32",
        "algorithm.hpd.teacher_cache_max_gib=0.01",
    )
    two_ranks = "trainer.n_gpus_per_node=2"
    variants = {
        "one pass, filling a store": cache,
        "one pass with a full store, 2 ranks, padded, micro-batch 1, no gradient checkpointing, offload": (
            *cache,
            two_ranks,
            "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=1",
            "actor_rollout_ref.model.use_remove_padding=false",
            "actor_rollout_ref.model.enable_gradient_checkpointing=false",
            "actor_rollout_ref.actor.fsdp_config.param_offload=true",
            "actor_rollout_ref.actor.fsdp_config.optimizer_offload=true",
        ),
        "staged, 2 ranks of one sequence (Ulysses), micro-batch 4, offload of the teacher": (
            *("algorithm.hpd.pipeline=staged", two_ranks),
            "actor_rollout_ref.actor.ulysses_sequence_parallel_size=2",
            "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=4",
            "actor_rollout_ref.ref.fsdp_config.param_offload=true",
        ),
    }
    shared = (
        *("data.train_max_samples=16", "trainer.total_training_steps=4", "trainer.resume_mode=disable"),
        *("trainer.save_freq=4", "actor_rollout_ref.actor.checkpoint.save_contents=[model,hf_model]"),
    )
    runs = {}
    for name, overrides in variants.items():
        run = runs[name] = run_main_ppo(*shared, *overrides)
        assert run.returncode == 0, (name, run.output[-3000:])
        assert "vLLMHttpServer" not in run.output
        assert len(run.steps) == 4
        assert "huggingface: its log-probs are the trained model's" in run.output, name
        for step in run.steps:
            assert step["hpd/on_policy_fraction"] == 0
            assert step["hpd/response_tokens"] > 0
            assert step["hpd/reverse_kl_k1"] != 0
            assert step["actor/grad_norm"] > 0
    filling, full, *_ = runs.values()
    for name, run in runs.items():
        for step, reference in zip(run.steps, filling.steps, strict=True):
            for metric in ("hpd/loss", "actor/grad_norm"):
                assert step[metric] == pytest.approx(reference[metric], rel=2e-4), (name, metric)
    assert filling.steps[0]["hpd/teacher_cache_hit_fraction"] == 0
    assert filling.steps[-1]["hpd/teacher_cache_hit_fraction"] >= 0.5
    assert filling.steps[-1]["hpd/teacher_cache_rows"] <= 16
    assert [step["hpd/teacher_cache_hit_fraction"] for step in full.steps] == [1, 1, 1, 1]
    assert [step["hpd/teacher_is_loaded"] for step in full.steps] == [0, 0, 0, 0]


def test_killed_run_resumes_to_the_same_losses(run_main_ppo: RunMainPPO, tmp_path: Path) -> None:
    """SIGKILL some steps after a checkpoint, then SIGTERM: the same command goes on, with the same losses, exactly.

    After SIGTERM from the step that was under way. With room for one checkpoint, of which old ones are removed whole.
    """
    steps = ("trainer.total_training_steps=60", "trainer.total_epochs=100")
    overrides = (*steps, "trainer.save_freq=20", "trainer.max_actor_ckpt_to_keep=1")
    killed = run_main_ppo(*overrides, kill_after_step=36)
    assert killed.returncode != 0
    # As a kill in the middle of a save leaves it: a newer folder without its end, and an empty tracker.
    root = tmp_path / "checkpoints"
    (root / "global_step_90" / "actor").mkdir(parents=True)
    (root / "latest_checkpointed_iteration.txt").write_text("")
    stopped = run_main_ppo(*overrides, terminate_after_step=2)
    assert stopped.returncode == stopping.EXIT_CODE, stopped.output[-3000:]
    last = int(stopped.steps[-1]["training/global_step"])
    assert f"Stopped by SIGTERM after step {last} of 60: {root}/global_step_{last}, exit code 75" in stopped.output
    assert [marker.parent.name for marker in root.glob("*/complete")] == [f"global_step_{last}"]
    resumed = run_main_ppo(*overrides)
    assert resumed.returncode == 0, resumed.output[-3000:]
    rest = stopped.steps + resumed.steps
    assert [int(step["training/global_step"]) for step in rest] == list(range(21, 61))
    again = killed.losses()[20:]
    assert len(again) >= 16
    assert len(stopped.steps) < len(again), "the run was not ended in time to compare what follows"
    assert (stopped.losses() + resumed.losses())[: len(again)] == again
    assert sorted(folder.name for folder in root.glob("global_step_*")) == ["global_step_60", "global_step_90"]


def test_mixed_batches_with_vllm(run_main_ppo: RunMainPPO, tiny: Tiny, tmp_path: Path) -> None:
    """Half of each batch is rolled out by vLLM with the current weights; validation runs before and after.

    Several updates of a staged batch use the clipped ratio.
    """
    rows = make_rows(64)
    for row in rows[1:]:  # all prompts but one are too long
        row["prompt"][0]["content"] = row["prompt"][0]["content"].replace("?", "plus 0 ?")
    for row in rows[2::2]:
        row["prompt"].append({"role": "assistant", "content": "1 plus"})  # which demonstration and rollout continue
    run = run_main_ppo(
        f"data.train_files={write_parquet(rows, tmp_path / 'long.parquet')}",
        "trainer.resume_mode=disable",
        "algorithm.hpd.on_policy_fraction=0.5",
        "algorithm.hpd.on_policy_objective=opd",
        f"data.val_files={tiny.validation}",
        f"reward.custom_reward_function.path={tiny.reward}",
        "trainer.val_before_train=true",
        "trainer.test_freq=2",
        "data.max_prompt_length=9",
        *UPDATES,
    )
    assert run.returncode == 0, run.output[-3000:]
    assert [step["hpd/on_policy_fraction"] for step in run.steps] == [0.5, 0.5]
    assert sum(step["hpd/truncated_prompts"] for step in run.steps) >= 15  # of 16 demonstrations and rollouts
    for step in run.steps:  # the server has the student's weights, at step 2 the updated ones
        assert step["training/rollout_probs_diff_max"] < 1e-4
        assert 0 < step["hpd/rollout_log_prob_difference"] < 1e-4
        assert "actor/pg_clipfrac" in step
        assert step["actor/grad_norm"] > 0
    assert any(name.startswith("val-core/tests/addition") for name in run.steps[-1])
    assert "Initial validation metrics" in run.output


def test_lora_student_with_an_external_teacher(
    run_main_ppo: RunMainPPO, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The teacher is the model of its own path, not the student without its adapter: the gap is not zero.

    With a mixture of objectives, one of them a user's own, exact divergences in the log, and several updates of one
    pass, which weighs with the current student. The student's own output layer and generation settings are kept.
    Saved, exported merged and as an adapter, the model is the same, and not what it was. What the environment gave to
    the settings is in no file.
    """
    monkeypatch.setenv("HPD_TEST_PROJECT", "project-of-nobody")
    own = make_awkward_model(tiny.student, tmp_path / "student")
    document = Path(__file__).parents[2] / "CONTRIBUTING.md"
    (example,) = re.findall(r"```python\n(.*?)```", document.read_text(), re.DOTALL)
    (tmp_path / "cross_entropy.py").write_text(example)
    lora = (
        f"actor_rollout_ref.model.path={own}",
        "actor_rollout_ref.model.lora_rank=4",
        "trainer.save_freq=2",
        "trainer.project_name=${oc.env:HPD_TEST_PROJECT}",
        "actor_rollout_ref.actor.checkpoint.save_contents=[model,optimizer,extra,hf_model]",
        "actor_rollout_ref.actor.checkpoint.load_contents=[model,optimizer,extra]",
    )
    run = run_main_ppo("trainer.resume_mode=disable", *lora, *MIXTURE, *UPDATES)
    assert run.returncode == 0, run.output[-3000:]
    assert abs(run.steps[0]["hpd/reverse_kl_k1"]) > 0.1
    assert "actor/pg_clipfrac" not in run.steps[0]
    for step in run.steps:
        assert step["hpd/reverse_kl"] > 0
        assert step["hpd/forward_kl"] > 0
        assert step["actor/grad_norm"] > 0

    merged, adapter = tmp_path / "merged", tmp_path / "adapter"
    saved = tmp_path / "checkpoints" / "global_step_2" / "actor" / "huggingface"
    assert f"{saved}: its log-probs are the trained model's" in run.output
    said = export(tmp_path / "checkpoints", merged, dtype="fp32")
    assert "LoRA merged, fp32" in said
    assert "its log-probs are the trained model's" in said
    said = export(tmp_path / "checkpoints" / "global_step_2", adapter, dtype="fp32", lora="adapter")
    assert "its log-probs are the trained model's" in said
    assert not (saved / "adapter_config.json").exists()
    for folder in (saved, merged):
        generation = GenerationConfig.from_pretrained(folder)
        assert (generation.eos_token_id, generation.temperature, generation.do_sample) == ([1, 9], 0.9, True)
    settings = saved.parents[1] / "settings.yaml"
    assert "project_name: ${oc.env:HPD_TEST_PROJECT}\n" in settings.read_text()
    assert "project-of-nobody" not in settings.read_text()
    assert settings.stat().st_mode & 0o777 == 0o600
    tokens = torch.arange(1, 25).view(2, 12)
    student = AutoModelForCausalLM.from_pretrained(own)
    with torch.no_grad():
        before = student(tokens).logits
        after = AutoModelForCausalLM.from_pretrained(merged)(tokens).logits
        at_once = AutoModelForCausalLM.from_pretrained(saved)(tokens).logits
        with_adapter = PeftModel.from_pretrained(student, adapter)(tokens).logits
    torch.testing.assert_close(after, with_adapter, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(after, at_once, rtol=1e-4, atol=1e-4)
    assert (after - before).abs().max() > 0.01
    card = (merged / "README.md").read_text()
    assert str(tiny.teacher) in card
    assert "| LoRA | rank 4, alpha 16 |" in card


def test_nan_logits_stop_the_run(run_main_ppo: RunMainPPO, tiny: Tiny, tmp_path: Path) -> None:
    """A teacher with NaN logits: one error with step and rows, and no checkpoint. Only the driver checks."""
    broken = make_nan_model(tiny.teacher, tmp_path / "broken")
    run = run_main_ppo(f"actor_rollout_ref.ref.model.path={broken}", "trainer.save_freq=1")
    assert run.returncode != 0
    assert "step 1: NaN in the teacher's logits" in run.output
    assert "pipeline one_pass" in run.output
    assert "the trainer checks" not in run.output
    assert not (tmp_path / "checkpoints").exists()


@pytest.mark.parametrize("case", ["setting", "row", "weights"])
def test_what_is_wrong_ends_the_run_at_once(case: str, run_main_ppo: RunMainPPO, tiny: Tiny, tmp_path: Path) -> None:
    """One line from the driver, before Ray starts; test_check_*.py have all that is refused."""
    if case == "setting":
        override, found = "algorithm.hpd.on_policy_fraction=1.5", "give a number"
    elif case == "row":
        rows = make_rows(16)
        rows[5]["demonstration"] = None
        file = write_parquet(rows, tmp_path / "null.parquet")
        override, found = f"data.train_files={file}", "row 5: demonstration is null"
    else:
        torn = Path(shutil.copytree(tiny.teacher, tmp_path / "torn"))
        os.truncate(torn / "model.safetensors", 100_000)
        override, found = f"actor_rollout_ref.ref.model.path={torn}", "model.safetensors has 100000 bytes where its"
    new = case == "setting"
    run = run_main_ppo(override, new_interpreter=new)
    assert run.returncode != 0
    # verl names its platform first, where it is imported.
    assert len(run.output.splitlines()) == (2 if new else 1), run.output
    assert run.output.splitlines()[-1].startswith(f"Error: {override}: {found}")
