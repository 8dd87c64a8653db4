"""What an objective needs comes to it in whole runs, each number to its token."""

import json
import math
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from conftest import RunMainPPO, Tiny, make_rows, write_parquet
from test_sft_trainer import RunSFT, run_sft

__all__ = ["run_sft"]  # the fixture

SEEING = Path(__file__).with_name("seeing.py")


def seen_by(folder: Path) -> list[list[dict[str, float]]]:
    """The tokens of each row that the objective was given in the run, and not where it was tried."""
    tokens = [json.loads(line) for line in (folder / "seen.jsonl").read_text().splitlines()]
    rows: list[list[dict[str, float]]] = []
    for token in (each for each in tokens if each["steps"] == 2):
        if token["position"] == 0:
            rows.append([])
        rows[-1].append(token)
    return rows


def check_rows(rows: list[list[dict[str, float]]]) -> None:
    """Places and sums follow from the row's own tokens."""
    for row in rows:
        assert [token["position"] for token in row] == list(range(len(row)))
        assert {token["length"] for token in row} == {len(row)}
        assert row[0]["prefix_teacher"] == 0
        for one, following in pairwise(row):
            step = one["teacher_label"] - one["student_label"]
            assert following["prefix_teacher"] - one["prefix_teacher"] == pytest.approx(step, abs=1e-4)
            if "prefix_behaviour" in one:
                step = one["student_label"] - one["behaviour"]
                assert following["prefix_behaviour"] - one["prefix_behaviour"] == pytest.approx(step, abs=1e-4)


def numbered_rows(file: Path, count: int = 64) -> Path:
    """Rows with a column of numbers, of a name that verl gives another content."""
    rows: list[dict[str, Any]] = [{**row, "index": number / 64} for number, row in enumerate(make_rows(count))]
    return write_parquet(rows, file)


def test_main_ppo(run_main_ppo: RunMainPPO, tiny: Tiny, tmp_path: Path) -> None:
    """Rollouts by vLLM, two of a prompt, with their log-probs, rewards and advantages; demonstrations beside them."""
    own = shutil.copy(SEEING, tmp_path)
    run = run_main_ppo(
        f"data.train_files={numbered_rows(tmp_path / 'numbered.parquet')}",
        "trainer.resume_mode=disable",
        "algorithm.hpd.on_policy_fraction=0.5",
        "algorithm.hpd.rollouts_per_prompt=2",
        f"algorithm.hpd.objective={own}:of_all",
        f"algorithm.hpd.on_policy_objective={own}:of_rollouts",
        "algorithm.hpd.score_rollouts=true",
        f"reward.custom_reward_function.path={tiny.reward}",
    )
    assert run.returncode == 0, run.output[-3000:]
    seen = seen_by(tmp_path)
    rollouts = [row for row in seen if "reward" in row[0] and row[0]["is_rollout"]]
    # Each objective is given all rows, of which its own count.
    assert len(rollouts) == 8
    check_rows([row for row in seen if "reward" not in row[0]] + rollouts)
    assert {token["step"] for row in seen for token in row} == {1, 2}
    for row in rollouts:
        assert all(abs(token["student_label"] - token["behaviour"]) < 1e-3 for token in row)
        assert row[0]["reward"] in (0, 1)
        twins = [each for each in rollouts if each[0]["index"] == row[0]["index"]]
        mean = sum(each[0]["reward"] for each in twins) / len(twins)
        assert len(twins) == 2
        assert row[0]["advantage"] == row[0]["reward"] - mean
    for row in seen:
        if "reward" in row[0] and not row[0]["is_rollout"]:
            assert all(math.isnan(row[0][name]) for name in ("reward", "advantage", "behaviour", "prefix_behaviour"))


def test_lean_trainer(run_sft: RunSFT, tmp_path: Path) -> None:
    """The step of how many, and a column of the data, of each row on two ranks."""
    own, file = shutil.copy(SEEING, tmp_path), numbered_rows(tmp_path / "numbered.parquet")
    run = run_sft(
        f"data.train_files={file}",
        "trainer.resume_mode=disable",
        "trainer.total_training_steps=2",
        f"algorithm.hpd.objective={own}:of_all",
        ranks=2,
    )
    assert run.returncode == 0, run.output[-3000:]
    seen = seen_by(tmp_path)
    check_rows(seen)
    assert len(seen) == 16
    assert len({row[0]["index"] for row in seen}) == 16
    assert {token["step"] for row in seen for token in row} == {1, 2}
