"""Both trainers with several teachers, prompts of the teacher's own, and the student among the teachers."""

import shutil
from pathlib import Path

import pytest
from conftest import RunMainPPO, Tiny, make_rows, write_parquet
from test_sft_trainer import RunSFT, run_sft  # noqa: F401 (a fixture)


def rows_of_two(folder: Path, hints: tuple[str, ...]) -> Path:
    """Rows of two teachers; the prompts of those in ``hints`` tell the teacher the answer."""
    rows = []
    for index, row in enumerate(make_rows(64)):
        name, prompt = "code" if index % 3 else "maths", row["prompt"][0]["content"]
        hint = f"{prompt} . is {row['reward_model']['ground_truth']}" if name in hints else prompt
        rows.append({**row, "data_source": name, "teacher_prompt": [{"role": "user", "content": hint}]})
    return write_parquet(rows, folder / "both.parquet")


def test_a_resumed_run_and_main_ppo(run_sft: RunSFT, run_main_ppo: RunMainPPO, tiny: Tiny, tmp_path: Path) -> None:  # noqa: F811
    """A teacher beside the student and the student's running average: 2 ranks, stopped after step 2, go on bit for bit;
    under Ulysses the same within rounding; main_ppo sees the same tokens as the lean trainer."""
    file = rows_of_two(tmp_path, ("maths", "code"))
    shared = (
        f"data.train_files={file}",
        f"algorithm.hpd.teachers={{maths: {{path: {tiny.teacher}}}, code: {{path: student}}}}",
        "algorithm.hpd.teacher_ema=0.5",
        "data.max_teacher_prompt_length=20",
    )
    lean = ("teacher.model.path=null", f"data.val_files={file}", "trainer.test_freq=2", "trainer.save_freq=2", *shared)
    whole = run_sft(*lean, ranks=2)
    assert whole.returncode == 0, whole.output[-3000:]
    root = tmp_path / "checkpoints"
    shutil.rmtree(root / "global_step_4")
    (root / "latest_checkpointed_iteration.txt").write_text("2")
    resumed = run_sft(*lean, ranks=2)
    assert resumed.returncode == 0, resumed.output[-3000:]
    assert len(list((root / "global_step_2" / "teachers" / "code").iterdir())) == 2
    for again, step in zip(resumed.steps, whole.steps[2:], strict=True):
        for name in ("hpd/loss", "actor/grad_norm", "hpd/teachers/code/reverse_kl_k1"):
            assert again[name] == step[name], name
    assert whole.steps[3]["hpd/teachers/code/reverse_kl_k1"] != 0
    validated = whole.steps[3]
    fractions = [validated[f"val/hpd/teachers/{name}/token_fraction"] for name in ("maths", "code")]
    assert sum(fractions) == pytest.approx(1)

    shared_out = run_sft(*lean, "engine.ulysses_sequence_parallel_size=2", "trainer.resume_mode=disable", ranks=2)
    assert shared_out.returncode == 0, shared_out.output[-3000:]
    for step, reference in zip(shared_out.steps[:2], whole.steps[:2], strict=True):
        for name in ("hpd/loss", "actor/grad_norm", "hpd/teachers/maths/reverse_kl_k1"):
            assert step[name] == pytest.approx(reference[name], rel=2e-4), name

    one_batch = ("data.train_batch_size=64", "trainer.total_training_steps=1", "trainer.resume_mode=disable", *shared)
    first = run_sft("teacher.model.path=null", *one_batch)
    assert first.returncode == 0, first.output[-3000:]
    full = run_main_ppo("actor_rollout_ref.ref.model.path=null", "trainer.save_freq=1", *one_batch)
    assert full.returncode == 0, full.output[-3000:]
    metrics = [f"hpd/teachers/{name}/{each}" for name in ("maths", "code") for each in ("teacher_nll", "student_nll")]
    for name in ("hpd/response_tokens", "hpd/teacher_nll", *metrics):
        assert first.steps[0][name] == pytest.approx(full.steps[0][name], rel=2e-4), name


def test_rollouts(run_main_ppo: RunMainPPO, tiny: Tiny, tmp_path: Path) -> None:
    """The student at its current weights teaches the rows of which both read the same: no gap, on rollouts too."""
    run = run_main_ppo(
        f"data.train_files={rows_of_two(tmp_path, ('code',))}",
        "actor_rollout_ref.ref.model.path=null",
        f"algorithm.hpd.teachers={{maths: {{path: student}}, code: {{path: {tiny.teacher}}}}}",
        "algorithm.hpd.teacher_ema=0",
        "algorithm.hpd.on_policy_fraction=0.5",
        "data.max_teacher_prompt_length=20",
    )
    assert run.returncode == 0, run.output[-3000:]
    for step in run.steps:
        assert step["hpd/on_policy_fraction"] == 0.5
        assert abs(step["hpd/teachers/maths/reverse_kl_k1"]) < 1e-5
        assert abs(step["hpd/teachers/code/reverse_kl_k1"]) > 1e-2
        assert step["hpd/truncated_teacher_prompts"] == 0
