"""One job: a student is made, trained and measured; the result is a small JSON file."""

import json
import random
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from settle_it import measures, models, task
from settle_it.grid import BATCH_SIZE, DECODE_TEMPERATURES, OBJECTIVES, REGIMES, SAMPLES, TEACHER_ANSWERS, Job

COUNTS = {"teacher": 4096, "student": 1024, "validation": 128, "test": 128}
"""Problems, disjoint: no problem of one is in another."""
WARM_RATE = 3e-3


class Data:
    """What all jobs share, in a folder.

    Args:
        folder: of the benchmark's run.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        drawn: list[task.Problem] = []
        for number, (name, count) in enumerate(COUNTS.items()):
            problems = task.draw_problems(count, seed=number, excluded=drawn)
            drawn += problems
            setattr(self, name, problems)

    teacher: list[task.Problem]
    student: list[task.Problem]
    validation: list[task.Problem]
    test: list[task.Problem]

    @property
    def teacher_model(self) -> Path:
        return self.folder / "teacher"

    def rows(self, regime: str, from_teacher: bool) -> Path:
        """Training rows of a regime."""
        return self.folder / "data" / f"{regime}{'_from_teacher' if from_teacher else ''}.parquet"

    def prepare(self, steps: int, rounds: int, round_steps: int) -> None:
        """The teacher and the training rows; what is there already stays."""
        if not self.teacher_model.exists():
            made = models.make_teacher(self.folder / "making_teacher", self.teacher, steps, rounds, round_steps)
            shutil.copytree(made, self.teacher_model)
            shutil.rmtree(self.folder / "making_teacher")
        if all(self.rows(name, own).exists() for name in REGIMES for own in (False, True)):
            return
        teacher = models.load(self.teacher_model)
        answers = measures.sample(teacher, self.student, samples=4, temperature=1.0, top_p=1.0, seed=7)
        rng = random.Random(1)
        demonstrations = [task.demonstrate(problem, rng) for problem in self.student]
        for name, regime in REGIMES.items():
            count = regime.demonstrations
            rows = [task.row(*each) for each in zip(self.student[:count], demonstrations, strict=False)]
            task.write(self.rows(name, from_teacher=False), rows)
            correct = [
                task.row(problem, next((text for text in texts if task.score(problem, text)), texts[0]))
                for problem, texts in zip(self.student[:count], answers, strict=False)
            ]
            task.write(self.rows(name, from_teacher=True), correct)

    def initial_student(self, job: Job) -> Path:
        """The student that the job starts from: the same for all jobs of a regime and seed."""
        regime = REGIMES[job.regime]
        folder = self.folder / "students" / f"{'warm' if regime.warm_steps else 'scratch'}_{job.seed}"
        if folder.exists():
            return folder
        making = folder.with_name(f"{folder.name}_{job.key}")
        made = models.build_model(making / "init", models.STUDENT_HIDDEN, seed=job.seed)
        if regime.warm_steps:
            rng = random.Random(job.seed)
            rows = making / "rows.parquet"  # other problems than the distillation's
            problems = rng.sample(self.teacher, 512)
            task.write(rows, [task.row(problem, task.demonstrate(problem, rng)) for problem in problems])
            steps = job.steps or regime.warm_steps
            sft = {"objective": "sft"}
            made = models.train(making / "warm", made, None, rows, steps, BATCH_SIZE, WARM_RATE, job.seed, sft)
        if not folder.exists():  # another process may have been faster
            shutil.move(made, folder)
        shutil.rmtree(making)
        return folder


def run(job: Job, folder: Path) -> dict[str, Any]:
    """Train and measure; the result is also written to ``folder/results``."""
    torch.set_num_threads(1)
    out = folder / "results" / f"{job.key}.json"
    if out.exists():
        return json.loads(out.read_text())
    data, regime = Data(folder), REGIMES[job.regime]
    # A temperature is that of both models: teacher_temperature follows it.
    chosen = OBJECTIVES[job.objective] | {"temperature": job.temperature} | dict(job.settings)
    needs_teacher = chosen["objective"] != "sft"
    working = folder / "working" / job.key
    trained = models.train(
        working,
        data.initial_student(job),
        data.teacher_model if needs_teacher else None,
        data.rows(job.regime, job.objective in TEACHER_ANSWERS),
        job.steps or regime.steps,
        BATCH_SIZE,
        job.rate,
        job.seed,
        chosen,
        job.clip_grad,
    )
    result = {
        "job": asdict(job),
        **measure(models.load(trained), models.load(data.teacher_model), data, job),
        "training": measures.curve(working / "metrics.jsonl", job.clip_grad),
    }
    shutil.rmtree(working)
    out.parent.mkdir(exist_ok=True)
    partial = out.with_suffix(".partial")
    partial.write_text(json.dumps(result))
    partial.rename(out)
    return result


def measure(student: Any, teacher: Any, data: Data, job: Job) -> dict[str, Any]:
    """All measures of a student: of a tuning job on the validation problems only."""

    def sampled(problems: list[task.Problem], temperature: float, samples: int = SAMPLES) -> list[float]:
        answers = measures.sample(student, problems, samples, temperature, top_p=0.95, seed=job.seed)
        return [round(score, 4) for score in measures.scores(problems, answers)]

    def mean(values: list[float]) -> float:
        return sum(values) / len(values)

    if job.tuning:
        return {"validation": {"sampled": sampled(data.validation, 0.7)}}
    by_temperature = {each: mean(sampled(data.validation, each, SAMPLES // 2)) for each in DECODE_TEMPERATURES}
    tuned = max(by_temperature, key=lambda each: by_temperature[each])
    rng = random.Random(3)
    held_out = [task.row(problem, task.demonstrate(problem, rng, error_rate=0.0)) for problem in data.test]
    at = {each: sampled(data.test, each) for each in {0.7, tuned}}
    return {
        "test": {"greedy": sampled(data.test, 0.0, 1), "sampled": at[0.7], "tuned": at[tuned]},
        "decode_temperature": tuned,
        **measures.divergences(student, teacher, held_out),
    }
