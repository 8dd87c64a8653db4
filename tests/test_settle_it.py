"""benchmarks/settle_it: the task, the grid and the statistics of its report. The whole is run by hand."""

import json
import random
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

from settle_it import grid, task
from settle_it.report import compare, holm, interval, resampled_means, write_report


def test_problems_are_disjoint_and_the_same_from_a_seed() -> None:
    first = task.draw_problems(300, seed=1)
    second = task.draw_problems(300, seed=2, excluded=first)
    assert len(set(first)) == 300
    assert not set(first) & set(second)
    assert first == task.draw_problems(300, seed=1)
    assert {len(problem.steps) for problem in first} == {2, 3, 4}


def test_a_right_demonstration_is_scored_as_right_and_fits() -> None:
    rng, tokenizer = random.Random(0), task.build_tokenizer()
    for problem in task.draw_problems(300, seed=3):
        text = task.demonstrate(problem, rng, error_rate=0.0)
        assert task.score(problem, text) == 1
        assert set(f"{problem.prompt} {text}".split()) <= set(task.WORDS)
        assert len(tokenizer.encode(text)) < task.MAX_RESPONSE_LENGTH
        assert task.Problem.parse(problem.prompt) == problem


def test_errors_reach_the_box() -> None:
    rng = random.Random(0)
    problems = task.draw_problems(500, seed=4)
    wrong = sum(1 - task.score(problem, task.demonstrate(problem, rng, error_rate=0.5)) for problem in problems)
    assert 0.5 < wrong / 500 < 0.95


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("answer \\boxed{ 2 }", 1),
        ("answer \\boxed{ 3 }", 0),
        ("\\boxed{ 2 } \\boxed{ 3 }", 0),
        ("\\boxed{ 2", 0),
        ("", 0),
    ],
)
def test_scores(text: str, score: float) -> None:
    problem = task.Problem(4, (("-", 1), ("*", 4)))
    assert problem.answer == 2
    assert task.score(problem, text) == score


def test_jobs_are_told_apart() -> None:
    jobs = grid.tuning_jobs(list(grid.REGIMES), list(grid.OBJECTIVES))
    jobs += grid.final_jobs({(job.regime, job.objective, job.temperature): job.rate for job in jobs}, grid.SEEDS)
    assert len({job.key for job in jobs}) == len(jobs)
    assert not set(grid.SEEDS) & set(grid.TUNING_SEEDS)


def test_holm() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9]) == pytest.approx([1.0, 1.0])


def test_a_comparison_is_paired() -> None:
    """Problems that differ much between one another do not hide a difference that all of them have."""
    rng = np.random.default_rng(0)
    scores = rng.uniform(0, 0.9, size=(5, 60))
    found = compare(scores + 0.05, scores)
    assert found["difference"] == pytest.approx(0.05)
    assert (found["low"], found["high"]) == pytest.approx((0.05, 0.05))
    low, high = interval(resampled_means(scores))
    assert low < scores.mean() < high
    assert compare(scores, scores)["p"] == 1


def result(objective: str, seed: int, shift: float) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    scores = list(np.clip(rng.uniform(0, 0.8, 20) + shift, 0, 1))
    job = {"regime": "small", "objective": objective, "temperature": 1.0, "rate": 0.003, "seed": seed}
    training = {"step": [1, 2], "entropy": [1.0, 0.5], "clipped_share": 0.1, "seconds_a_step": 0.1}
    return {
        "job": job | {"clip_grad": 1.0, "settings": []},
        "test": {"greedy": scores, "sampled": scores, "tuned": scores},
        "forward_kl": 0.1,
        "reverse_kl": 0.2,
        "entropy": 0.3,
        "training": training,
    }


def test_a_report_is_written(tmp_path: Path) -> None:
    results = tmp_path / "results"
    results.mkdir()
    for objective, shift in (("hpd", 0.2), ("sft", 0.0)):
        for seed in (1, 2):
            (results / f"test_{objective}_{seed}.json").write_text(json.dumps(result(objective, seed, shift)))
    write_report(results, tmp_path / "report")
    text = (tmp_path / "report" / "evidence.md").read_text()
    assert text.index("| hpd | 1 |") < text.index("| sft | 1 |")
    assert "| hpd - sft | +0.2" in text
    assert "- worse: sft" in text
    assert (tmp_path / "report" / "small.png").stat().st_size > 1000
