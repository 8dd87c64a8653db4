"""A served teacher beside a colocated one and a stored one: tokens per second and losses, in one run.

    python benchmarks/served.py

Makes a small random student and a teacher of four times its layers and twice its width, starts vLLM with the teacher,
and trains by the lean trainer, the runs of one repetition next to each other: the teacher beside the student, the
server's features with teacher_server.prefetch=0 and 1. Then ``hpd-verl fill-store`` fills a store through the server,
the server is killed, and one more run has nothing but the store. Prints the losses side by side and appends rows to
benchmarks/results/served.csv. Needs vLLM; a core for the server beside the trainer's.
"""

import argparse
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
os.environ.setdefault("VERL_PLATFORM", "cpu")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import verl  # noqa: E402, F401 - loads the plugin, whose environment the runs get
from conftest import WORDS, make_model, make_rows, start_module, write_parquet  # noqa: E402
from results import append_rows, machine  # noqa: E402
from vllm_server import VLLM  # noqa: E402

LONGEST = 256
"""Response tokens, of which each row has nearly as many."""
FIRST = 3
"""Steps that are left out of the times."""
STORED = (
    "algorithm.hpd.teacher_cache=disk",
    "algorithm.hpd.teacher_cache_dtype=float32",
    "algorithm.hpd.teacher_cache_max_gib=1",
)


class Runs:
    """Runs of commands on the models and rows of a folder.

    Args:
        folder: for everything.
        steps: of a training.
    """

    def __init__(self, folder: Path, steps: int) -> None:
        self.folder = folder
        self.context: ForkServerContext = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(["hpd_verl.sft.fill_store", "hpd_verl.sft.trainer"])
        shape: dict[str, Any] = {"vocab_size": len(WORDS) + 7, "max_position_embeddings": 2 * LONGEST, "head_dim": 64}
        self.student = make_model(folder / "student", seed=1, **shape)
        own: dict[str, Any] = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 8}
        self.teacher = make_model(folder / "teacher", seed=2, **{**shape, **own})
        answer = " ".join(["1 plus 2 is 3 ."] * 40)
        rows = [{**row, "demonstration": f"{row['demonstration']} {answer}"} for row in make_rows(64)]
        self.arguments = [
            f"model.path={self.student}",
            f"teacher.model.path={self.teacher}",
            f"data.train_files={write_parquet(rows, folder / 'train.parquet')}",
            "data.train_batch_size=8",
            "data.max_prompt_length=16",
            f"data.max_response_length={LONGEST}",
            "optim.lr=1e-4",
            "trainer.logger=[file]",
            f"trainer.total_training_steps={steps}",
            "trainer.total_epochs=100",
            "trainer.save_freq=-1",
            "trainer.resume_mode=disable",
            f"trainer.default_local_dir={folder / 'checkpoints'}",
        ]

    def run(self, module: str, *overrides: str) -> list[dict[str, Any]]:
        """The metrics of each step.

        Raises:
            SystemExit: the command has failed.
        """
        log, output = self.folder / "metrics.jsonl", self.folder / "output.txt"
        log.unlink(missing_ok=True)
        alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
        variables = {**alone, "VERL_FILE_LOGGER_PATH": str(log)}
        process = start_module(self.context, module, [*self.arguments, *overrides], self.folder, output, **variables)
        process.join()
        if process.exitcode:
            raise SystemExit(f"{module}: exit code {process.exitcode}\n{output.read_text()[-3000:]}")
        return [json.loads(line)["data"] for line in log.read_text().splitlines()] if log.exists() else []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--csv", type=Path, default=ROOT / "benchmarks" / "results" / "served.csv")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        runs = Runs(Path(folder), arguments.steps)
        server = VLLM(runs.teacher, Path(folder) / "vllm.txt", max_model_len=2 * LONGEST)
        try:
            server.wait()
            found = measure(runs, server, arguments.repeats)
        finally:
            server.kill()
        stored = (*STORED, f"algorithm.hpd.teacher_cache_dir={folder}/store")  # which the dead server's teacher is in
        url = f"algorithm.hpd.teacher_server.urls=[{server.url}]"
        found["stored"] = [runs.run("hpd_verl.sft.trainer", url, *stored)]
    report(found, arguments.csv)


def measure(runs: Runs, server: VLLM, repeats: int) -> dict[str, list[list[dict[str, Any]]]]:
    """Each way's runs, and a store that the server has filled."""
    url, ahead = f"algorithm.hpd.teacher_server.urls=[{server.url}]", "algorithm.hpd.teacher_server.prefetch"
    ways = {"colocated": (), "served, prefetch=0": (url, f"{ahead}=0"), "served, prefetch=1": (url, f"{ahead}=1")}
    found: dict[str, list[list[dict[str, Any]]]] = {name: [] for name in ways}
    for _ in range(repeats):
        for name, overrides in ways.items():
            found[name].append(runs.run("hpd_verl.sft.trainer", *overrides))
    start = time.perf_counter()
    runs.run("hpd_verl.sft.fill_store", url, *STORED, f"algorithm.hpd.teacher_cache_dir={runs.folder}/store")
    print(f"fill-store through the server: {time.perf_counter() - start:.1f} s, start included")
    return found


def report(found: dict[str, list[list[dict[str, Any]]]], file: Path) -> None:
    """Print speeds and losses, and append them to a CSV."""
    waits = found["served, prefetch=0"][0]
    tokens = waits[-1]["hpd/teacher_server_tokens"] / len(waits)
    seconds = {
        name: [statistics.median(step["timing_s/step"] for step in run[FIRST:]) for run in of_name]
        for name, of_name in found.items()
    }
    rows = []
    print(f"\n{tokens:.0f} tokens a step; median step, tokens/s, against colocated in the same repetition")
    for name, times in seconds.items():
        ratios = [first / own for first, own in zip(seconds["colocated"], times, strict=False)]
        waited = statistics.median(step.get("timing_s/teacher_wait", 0.0) for step in found[name][0][FIRST:])
        said = ", ".join(f"{ratio:.2f}" for ratio in ratios)
        print(f"{name:20} {times[0]:7.3f} s {tokens / times[0]:9,.0f} tokens/s   x {said}   waits {waited:.3f} s")
        losses = [step["hpd/loss"] for step in found[name][0]]
        rows += [
            {
                **machine(),
                "way": name,
                "repetition": repetition,
                "tokens": round(tokens),
                "seconds": round(own, 4),
                "tokens_per_s": round(tokens / own),
                "speed_against_colocated": round(ratio, 3),
                "teacher_wait": round(waited, 4),
                "first_loss": losses[0],
                "last_loss": losses[-1],
            }
            for repetition, (own, ratio) in enumerate(zip(times, ratios, strict=True))
        ]
    print("\nlosses\nstep " + " ".join(f"{name:>20}" for name in found))
    first = {name: [step["hpd/loss"] for step in of_name[0]] for name, of_name in found.items()}
    for step, of_step in enumerate(zip(*first.values(), strict=True), start=1):
        print(f"{step:4} " + " ".join(f"{loss:20.6f}" for loss in of_step))
    for name, own in first.items():
        worst = max(abs(a - b) for a, b in zip(own, first["colocated"], strict=True))
        print(f"{name}: at most {worst:.1e} from colocated")
    append_rows(file, rows)


if __name__ == "__main__":
    main()
