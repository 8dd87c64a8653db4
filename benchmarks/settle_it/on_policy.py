"""The student's own rollouts: the same students and measures, trained by ``main_ppo`` with vLLM.

    python benchmarks/settle_it/on_policy.py [METHOD ...]    resumes after a stop

Each run starts Ray and a server, so there are few: the students of "warm", 100 steps of 32 sequences, one learning rate
for all. Fraction 0 also runs on the lean trainer, to show that both agree.
"""

import argparse
import json
import multiprocessing
import os
import re
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
os.environ |= {"VERL_PLATFORM": "cpu", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}

from tqdm import tqdm  # noqa: E402

from settle_it import jobs, measures, models, task  # noqa: E402
from settle_it.grid import BATCH_SIZE, LEAN, REGIMES, ROLLOUT_METHODS, ROLLOUTS, Job  # noqa: E402
from settle_it.jobs import Data, accuracy, right_demonstrations, rollouts  # noqa: E402
from settle_it.results import FOLDER, Results  # noqa: E402

STEPS = REGIMES[ROLLOUTS].steps
SUITE = "on_policy"
SEEDS = (1, 2, 3)
RATE = 3e-3


def train(folder: Path, student: Path, data: Data, method: str, rate: float, seed: int) -> Path:
    """Train by ``main_ppo``; returns the Hugging Face folder.

    Raises:
        RuntimeError: the run failed; the message has the end of its output.
    """
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "verl.trainer.main_ppo", "algorithm=hpd"]
    command += overrides(folder, student, data, method, rate, seed)
    environment = os.environ | {"VERL_FILE_LOGGER_PATH": str(folder / "metrics.jsonl"), "PYTHONPATH": str(ROOT)}
    with open(folder / "log", "w") as log:
        done = subprocess.run(command, cwd=folder, env=environment, stdout=log, stderr=subprocess.STDOUT)
    if done.returncode != 0:
        raise RuntimeError(f"{method}: main_ppo ended with {done.returncode}: {(folder / 'log').read_text()[-3000:]}")
    return folder / f"global_step_{STEPS}" / "actor" / "huggingface"


def overrides(folder: Path, student: Path, data: Data, method: str, rate: float, seed: int) -> list[str]:
    """Of ``main_ppo``, beside ``algorithm=hpd``."""
    rows = data.rows(REGIMES[ROLLOUTS].demonstrations, "test", from_teacher=False)
    named = {
        "actor_rollout_ref.model.path": student,
        "actor_rollout_ref.ref.model.path": data.teacher(REGIMES[ROLLOUTS]),
        "actor_rollout_ref.model.enable_gradient_checkpointing": False,
        "actor_rollout_ref.actor.optim.lr": rate,
        "actor_rollout_ref.actor.optim.lr_warmup_steps_ratio": 0.05,
        "actor_rollout_ref.actor.checkpoint.save_contents": "[model,hf_model]",
        "actor_rollout_ref.actor.checkpoint.load_contents": "[model]",
        "actor_rollout_ref.rollout.max_num_seqs": BATCH_SIZE,
        "actor_rollout_ref.rollout.engine_kwargs.vllm.kv_cache_memory_bytes": 67108864,
        "data.train_files": rows,
        "data.train_batch_size": BATCH_SIZE,
        "data.max_prompt_length": task.MAX_PROMPT_LENGTH,
        "data.max_response_length": task.MAX_RESPONSE_LENGTH,
        "data.seed": seed,
        "trainer.default_local_dir": folder,
        "trainer.logger": "[file]",
        "trainer.total_training_steps": STEPS,
        "trainer.total_epochs": 1000,
        "trainer.save_freq": STEPS,
        "trainer.resume_mode": "disable",
        "algorithm.hpd.seed": seed,
        **{f"algorithm.hpd.{name}": value for name, value in ROLLOUT_METHODS[method].items()},
    }
    return [f"{name}={value}" for name, value in named.items()]


def run(job: Job, folder: Path) -> dict[str, Any]:
    """Train and measure, as ``jobs.run``."""
    data = Data(folder)
    working = folder / "working" / re.sub(r"\W+", "_", job.key)
    student = data.initial_student(job)
    trained = models.load(train(working, student, data, job.method, job.rate, job.seed))
    teacher, test = models.load(data.teacher(REGIMES[ROLLOUTS])), data.problems["test"]
    steps = [json.loads(line)["data"] for line in (working / "metrics.jsonl").read_text().splitlines()]
    return {
        "job": asdict(job),
        "models": jobs.fingerprints(student, data.teacher(REGIMES[ROLLOUTS])),
        **accuracy(trained, data.problems["validation"], test, job.seed),
        "held_out": measures.divergences(trained, teacher, test, right_demonstrations(test)),
        "rollouts": rollouts(trained, teacher, test, job.seed),
        "training": {
            "step": list(range(10, STEPS + 1, 10)),
            "entropy": [round(step["actor/entropy"], 4) for step in steps[9::10]],
            "clipped_share": sum(step["actor/grad_norm"] > 1 for step in steps) / len(steps),
            "seconds_a_step": round(sorted(step["timing_s/step"] for step in steps)[len(steps) // 2], 3),
        },
    }


def main() -> None:
    names = [*LEAN, *ROLLOUT_METHODS]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("methods", nargs="*", metavar="METHOD", help=f"of {'; '.join(names)}")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "settle_it" / "run", help="as of run.py")
    parser.add_argument("--results", type=Path, default=FOLDER)
    parser.add_argument("--seeds", type=int, default=len(SEEDS))
    parser.add_argument("--rate", type=float, default=RATE)
    arguments = parser.parse_args()
    methods = arguments.methods or names
    if unknown := set(methods) - set(names):
        parser.error(f"{', '.join(sorted(unknown))}: choose from {'; '.join(names)}")
    results = Results(arguments.results)

    wanted = [Job(ROLLOUTS, name, arguments.rate, seed) for seed in SEEDS[: arguments.seeds] for name in methods]
    folder = arguments.out.resolve()
    for job in tqdm([job for job in wanted if job not in results], SUITE, unit="job"):
        results.add(SUITE, run_lean(job, folder) if job.method in LEAN else run(job, folder))


def run_lean(job: Job, folder: Path) -> dict[str, Any]:
    """By the lean trainer, in a process of its own: it sets the environment of a rank."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(jobs.run, job, folder).result()


if __name__ == "__main__":
    main()
