"""One job: a student is made, trained and measured."""

import os
import random
import shutil
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from settle_it import measures, models, task
from settle_it.grid import BATCH_SIZE, DECODE_TEMPERATURES, FRESH_SPLITS, METHODS, REGIMES, SAMPLES, Job, Regime

COUNTS = {"teacher": 4096, "student": 512, "validation": 128, "test": 128, "fresh_student": 512, "fresh_test": 128}
"""Problems, disjoint: no problem of one is in another."""
FEW = {"teacher": 128, "student": 64, "validation": 16, "test": 16, "fresh_student": 64, "fresh_test": 16}
"""The same for a trial of the whole."""
WARM_RATE = 8e-3
WARM_PROBLEMS = 2048
STARTING_MODELS = Path(__file__).resolve().with_name("starting_models")
"""Weights of the teacher and of the students of "warm", as ``Data`` makes them where there are none. Made again on
another processor they come out different, by rounding that training amplifies: by a third in a student's accuracy."""
WIDENING_STEPS, WIDENING_RATE = {"teacher": 300, "student": 100}, 1e-3
"""Supervised steps, on what the model learned before, in which it learns that the further tokens never occur."""


class Data:
    """What all jobs share, in a folder.

    Args:
        folder: of the benchmark's run.
        few: few problems, for a trial.
    """

    def __init__(self, folder: Path, few: bool = False) -> None:
        self.folder = folder
        self.starting_models = None if few else STARTING_MODELS
        drawn: list[task.Problem] = []
        self.problems: dict[str, list[task.Problem]] = {}
        for number, (name, count) in enumerate((FEW if few else COUNTS).items()):
            self.problems[name] = task.draw_problems(count, seed=number, excluded=drawn)
            drawn += self.problems[name]

    def teacher(self, regime: Regime) -> Path:
        """The teacher's folder."""
        return self.folder / ("teacher" if regime.vocabulary is None else f"teacher_{regime.vocabulary}")

    def _weights(self, name: str) -> Path | None:
        """The stored weights of a starting model, if there are any."""
        file = self.starting_models / f"{name}.safetensors" if self.starting_models is not None else None
        return file if file is not None and file.exists() else None

    def rows(self, demonstrations: int, split: str, from_teacher: bool) -> Path:
        """Training rows: those of fresh splits are of other problems."""
        pool = "fresh_student" if split in FRESH_SPLITS else "student"
        return self.folder / "data" / f"{pool}_{demonstrations}{'_from_teacher' if from_teacher else ''}.parquet"

    def prepare(self, steps: int, rounds: int, round_steps: int) -> None:
        """The teacher and the training rows; what is there already stays."""
        teacher = self.folder / "teacher"
        if not teacher.exists():
            making = self.folder / "making_teacher"
            if weights := self._weights("teacher"):
                made = models.with_weights(models.build_model(making / "init", models.TEACHER_HIDDEN, seed=0), weights)
            else:
                made = models.make_teacher(making, self.problems["teacher"], steps, rounds, round_steps)
            _moved(made, teacher)
            shutil.rmtree(making)
        sizes = {regime.demonstrations for regime in REGIMES.values()}
        for number, split in enumerate(("test", "fresh"), 1):
            files = [self.rows(size, split, own) for size in sizes for own in (False, True)]
            if all(file.exists() for file in files):
                continue
            problems = self.problems["fresh_student" if split == "fresh" else "student"]
            rng = random.Random(number)
            demonstrations = [task.demonstrate(problem, rng) for problem in problems]
            answers = measures.sample(models.load(teacher), problems, 4, 1.0, top_p=1.0, seed=6 + number)
            correct = [
                next((text for text in texts if task.score(problem, text)), texts[0])
                for problem, texts in zip(problems, answers, strict=True)
            ]
            for size in sizes:
                for texts, own in ((demonstrations, False), (correct, True)):
                    rows = [task.row(*each) for each in zip(problems[:size], texts, strict=False)]
                    task.write(self.rows(size, split, own), rows)

    def prepare_teacher(self, regime: Regime) -> None:
        """The teacher of a regime with a larger vocabulary."""
        folder = self.teacher(regime)
        if regime.vocabulary is None or folder.exists():
            return
        making = self.folder / "making_teacher"
        teacher = self.folder / "teacher"
        rows = models.own_answers(making / "rows.parquet", teacher, self.problems["teacher"], seed=9)
        made = models.widen(making / "init", teacher, regime.vocabulary, seed=0)
        steps, sft = WIDENING_STEPS["teacher"], {"objective": "sft"}
        *_, made = models.train(making / "widened", made, None, rows, steps, BATCH_SIZE, WIDENING_RATE, 0, sft)
        _moved(made, folder)
        shutil.rmtree(making)

    def initial_student(self, job: Job) -> Path:
        """The student that the job starts from: the same for all jobs of a regime and seed."""
        regime = REGIMES[job.regime]
        if regime.vocabulary is not None:
            return self._widened_student(job, regime.vocabulary)
        kind = "reader" if regime.reads_solutions else "warm" if regime.warm_steps else "scratch"
        folder = self.folder / "students" / f"{kind}_{job.seed}"
        if folder.exists():
            return folder
        making = folder.with_name(f"{folder.name}_{os.getpid()}")
        made = models.build_model(making / "init", models.STUDENT_HIDDEN, job.seed, initializer_range=0.05)
        weights = self._weights(folder.name) if regime.warm_steps else None
        if weights is not None:
            models.with_weights(made, weights)
        elif regime.warm_steps:
            rows = self._warm_rows(making / "rows.parquet", job.seed, regime.reads_solutions)
            steps = job.steps or regime.warm_steps
            sft, longest = {"objective": "sft"}, task.MAX_LENGTH_WITH_SOLUTION
            *_, made = models.train(
                making / "warm", made, None, rows, steps, BATCH_SIZE, WARM_RATE, job.seed, sft, longest_prompt=longest
            )
        return _kept(made, folder, making)

    def _warm_rows(self, file: Path, seed: int, with_solutions: bool = False) -> Path:
        """Demonstrations of other problems than the distillation's; with solutions, every second prompt carries a
        worked answer with the demonstration's results in other phrasings."""
        rng = random.Random(seed)
        teachers = self.problems["teacher"]
        problems = rng.sample(teachers, min(WARM_PROBLEMS, len(teachers)))
        rows = [task.row(problem, task.demonstrate(problem, rng)) for problem in problems]
        for index in range(0, len(rows) if with_solutions else 0, 2):
            results = task.draw_results(problems[index], rng)
            answer, solution = (task.demonstrate(problems[index], rng, results=results) for _ in range(2))
            rows[index] = task.row(problems[index], answer, solution)
        task.write(file, rows)
        return file

    def _widened_student(self, job: Job, vocabulary: int) -> Path:
        """The warm student with a larger vocabulary."""
        folder = self.folder / "students" / f"{job.regime}_{job.seed}"
        if folder.exists():
            return folder
        making = folder.with_name(f"{folder.name}_{os.getpid()}")
        rows = self._warm_rows(making / "rows.parquet", job.seed)
        warm = self.initial_student(replace(job, regime="warm"))
        made = models.widen(making / "init", warm, vocabulary, job.seed)
        steps, sft = job.steps or WIDENING_STEPS["student"], {"objective": "sft"}
        *_, made = models.train(making / "widened", made, None, rows, steps, BATCH_SIZE, WIDENING_RATE, job.seed, sft)
        return _kept(made, folder, making)


def _moved(made: Path, folder: Path) -> None:
    """A copy of a folder that is there as a whole or not at all."""
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.copytree(made, partial, dirs_exist_ok=True)
    partial.rename(folder)


def _kept(made: Path, folder: Path, making: Path) -> Path:
    """A student that was made, in its place; what it was made in goes."""
    try:
        made.rename(folder)
    except OSError:  # another process was faster
        assert folder.exists()
    shutil.rmtree(making)
    return folder


def run(job: Job, folder: Path) -> dict[str, Any]:
    """Train and measure."""
    torch.set_num_threads(1)
    data, regime, method = Data(folder, few=job.steps is not None), REGIMES[job.regime], METHODS[job.method]
    student = data.initial_student(job)
    steps = job.steps or regime.steps
    # Entropy in rollouts over the training: of one seed, for it costs generations.
    follows = job.split == "test" and job.seed == 1
    working = folder / "working" / str(os.getpid())
    start = time.process_time()
    checkpoints = (
        [student]
        if not method.trains
        else models.train(
            working,
            student,
            data.teacher(regime) if method.needs_teacher else None,
            data.rows(regime.demonstrations, job.split, method.from_teacher),
            steps,
            BATCH_SIZE,
            job.rate,
            job.seed,
            method.all_settings,
            method.clip_grad,
            save_every=steps // 4 if follows else -1,
            self_taught=method.self_taught,
        )
    )
    seconds = time.process_time() - start
    trained = models.load(checkpoints[-1])
    result: dict[str, Any] = {"job": asdict(job), "cpu_seconds": round(seconds, 2)}
    result["models"] = fingerprints(student, data.teacher(regime))
    if job.split == "validation":
        counts = measures.right_answers(trained, data.problems["validation"], {0.7: SAMPLES // 2}, job.seed)
        result["validation"] = round(sum(counts[0.7]) / len(counts[0.7]) / (SAMPLES // 2), 5)
        return result
    teacher = models.load(data.teacher(regime))
    test = data.problems["fresh_test" if job.split in FRESH_SPLITS else "test"]
    result |= accuracy(trained, data.problems["validation"], test, job.seed)
    result["held_out"] = measures.divergences(trained, teacher, test, right_demonstrations(test))
    result["rollouts"] = rollouts(trained, teacher, test, job.seed)
    if not method.trains:
        return result
    result["training"] = measures.curve(working / "metrics.jsonl", method.clip_grad)
    if follows:
        earlier = [rollouts(models.load(each), teacher, test, job.seed) for each in checkpoints[:-1]]
        result["rollout_entropy"] = [each["entropy"] for each in [*earlier, result["rollouts"]]]
    return result


def fingerprints(student: Path, teacher: Path) -> dict[str, str]:
    """Of the models that a job starts from."""
    return {"student": models.fingerprint(student), "teacher": models.fingerprint(teacher)}


def right_demonstrations(problems: list[task.Problem]) -> list[str]:
    """Demonstrations without a wrong step, the same for every student."""
    rng = random.Random(3)
    return [task.demonstrate(problem, rng, error_rate=0.0) for problem in problems]


def accuracy(student: Any, validation: list[task.Problem], test: list[task.Problem], seed: int) -> dict[str, Any]:
    """Right answers to each test problem, a digit each: greedy, of 8 at 0.7, of 8 at the temperature that is best on
    validation problems."""
    tried = measures.right_answers(student, validation[::2], dict.fromkeys(DECODE_TEMPERATURES, SAMPLES // 2), seed)
    tuned = max(tried, key=lambda temperature: sum(tried[temperature]))
    samples = {measures.GREEDY: 1, 0.7: SAMPLES, tuned: SAMPLES}
    counts = measures.right_answers(student, test, samples, seed)
    named = {"greedy": counts[measures.GREEDY], "sampled": counts[0.7], "tuned": counts[tuned]}
    return {
        **{name: "".join(map(str, each)) for name, each in named.items()},
        "decode_temperature": tuned,
    }


def rollouts(student: Any, teacher: Any, problems: list[task.Problem], seed: int) -> dict[str, Any]:
    """Divergences and entropy on the student's own answers, sampled at temperature 1."""
    answers = measures.answer(student, problems, [1.0] * len(problems), 1.0, seed)
    return measures.divergences(student, teacher, problems, answers)
