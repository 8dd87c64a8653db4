"""The student's own rollouts: the same students and measures, trained by ``main_ppo`` with vLLM.

    python benchmarks/settle_it/on_policy.py [METHOD ...]    goes on where it was interrupted

A run starts Ray and a server, so that there are few: the regime "warm", 100 steps of 32 sequences, learning rates of
``RATES`` on one tuning seed, then the best of each on ``SEEDS``. Fraction 0 is what the lean trainer does too.
"""

import argparse
import json
import os
import re
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
os.environ |= {"VERL_PLATFORM": "cpu", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}

from tqdm import tqdm  # noqa: E402

from settle_it import measures, models, task  # noqa: E402
from settle_it.grid import BATCH_SIZE, REGIMES, Job  # noqa: E402
from settle_it.jobs import Data, accuracy, right_demonstrations, rollouts  # noqa: E402
from settle_it.results import FOLDER, Results  # noqa: E402

STEPS = 100
SUITE = "on_policy"
SEEDS = (1, 2, 3)
TUNING_SEED = 101
RATES = (1e-3, 3e-3)
RISING = f"{{start: 0, end: 1, steps: {STEPS}}}"
METHODS: dict[str, dict[str, Any]] = {
    **{
        f"{name}, rollouts": {"on_policy_objective": name, "on_policy_fraction": 1}
        for name in ("opd", "rkl_exact", "fkl", "jsd_exact", "hpd")
    },
    **{
        f"{name}, {fraction} rollouts": {"objective": name, "on_policy_fraction": fraction}
        for fraction in (0, 0.25)
        for name in ("hpd", "fkl")
    },
    **{
        f"{name}, then {then}": {"objective": name, "on_policy_objective": then, "on_policy_fraction": RISING}
        for name, then in (("hpd", "opd"), ("fkl", "opd"), ("fkl", "rkl_exact"))
    },
}
"""Name to settings of ``algorithm.hpd``; with "then", rollouts grow from none to all."""


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
    rows = data.rows(REGIMES["warm"].demonstrations, "test", from_teacher=False)
    named = {
        "actor_rollout_ref.model.path": student,
        "actor_rollout_ref.ref.model.path": data.teacher_model,
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
        **{f"algorithm.hpd.{name}": value for name, value in METHODS[method].items()},
    }
    return [f"{name}={value}" for name, value in named.items()]


def run(job: Job, folder: Path) -> dict[str, Any]:
    """Train and measure, as ``jobs.run``."""
    data = Data(folder)
    working = folder / "working" / re.sub(r"\W+", "_", job.key)
    student = data.initial_student(job)
    trained = models.load(train(working, student, data, job.method, job.rate, job.seed))
    result: dict[str, Any] = {"job": asdict(job)}
    if job.split == "validation":
        counts = measures.right_answers(trained, data.problems["validation"], {0.7: 8}, job.seed)
        return result | {"validation": round(sum(counts[0.7]) / len(counts[0.7]) / 8, 5)}
    teacher, test = models.load(data.teacher_model), data.problems["test"]
    steps = [json.loads(line)["data"] for line in (working / "metrics.jsonl").read_text().splitlines()]
    return {
        **result,
        **accuracy(trained, data.problems["validation"], test, job.seed),
        "held_out": measures.divergences(trained, teacher, test, right_demonstrations(test)),
        "rollouts": rollouts(trained, teacher, test, job.seed),
        "training": {
            "entropy": [round(step["actor/entropy"], 4) for step in steps[9::10]],
            "clipped_share": sum(step["actor/grad_norm"] > 1 for step in steps) / len(steps),
            "seconds_a_step": round(sorted(step["timing_s/step"] for step in steps)[len(steps) // 2], 3),
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("methods", nargs="*", metavar="METHOD", help=f"of {'; '.join(METHODS)}")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "settle_it" / "run", help="as of run.py")
    parser.add_argument("--results", type=Path, default=FOLDER)
    parser.add_argument("--seeds", type=int, default=len(SEEDS))
    arguments = parser.parse_args()
    methods = arguments.methods or list(METHODS)
    if unknown := set(methods) - set(METHODS):
        parser.error(f"{', '.join(sorted(unknown))}: choose from {'; '.join(METHODS)}")
    results = Results(arguments.results)

    def run_all(jobs: list[Job], stage: str) -> None:
        for job in tqdm([job for job in jobs if job not in results], desc=f"{SUITE}, {stage}", unit="job"):
            results.add(SUITE, run(job, arguments.out.resolve()))

    run_all([Job("warm", name, rate, TUNING_SEED, "validation") for name in methods for rate in RATES], "tuning")
    chosen = results.chosen_rates()
    seeds = SEEDS[: arguments.seeds]
    run_all([Job("warm", name, chosen["warm", name], seed) for seed in seeds for name in methods], "test")


if __name__ == "__main__":
    main()
