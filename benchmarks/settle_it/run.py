"""HPD against its siblings at equal budget: everything from a seed, then the report.

    python benchmarks/settle_it/run.py               all of it; goes on where it was interrupted
    python benchmarks/settle_it/run.py --fast        few objectives, seeds and steps
    python benchmarks/settle_it/report.py            the report again, from the stored results

Stages: the teacher and the data; every objective with every learning rate on the tuning seeds, measured on validation
problems; the best rate of each on fresh seeds, measured on test problems; the report.
"""

import argparse
import multiprocessing
import os
import sys
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
os.environ |= {"VERL_PLATFORM": "cpu", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}

from tqdm import tqdm  # noqa: E402

from settle_it import grid, jobs  # noqa: E402

TEACHER = (1500, 2, 300)
"""Supervised steps, rounds on its own correct answers, steps of a round."""


def run_all(pool: ProcessPoolExecutor, named: str, todo: Sequence[grid.Job], folder: Path) -> list[dict[str, Any]]:
    """The results of these jobs, those that are stored among them."""
    futures = [pool.submit(jobs.run, job, folder) for job in todo]
    results = []
    for future in tqdm(as_completed(futures), total=len(futures), desc=named, unit="job"):
        results.append(future.result())
    return results


def best_rates(results: list[dict[str, Any]]) -> dict[tuple[str, str, float], float]:
    """The learning rate with the best mean on validation, of each regime, objective and temperature."""
    found: dict[tuple[str, str, float], dict[float, list[float]]] = defaultdict(lambda: defaultdict(list))
    for result in results:
        job, sampled = result["job"], result["validation"]["sampled"]
        found[job["regime"], job["objective"], job["temperature"]][job["rate"]].append(sum(sampled) / len(sampled))
    return {key: max(rates, key=lambda rate: sum(rates[rate]) / len(rates[rate])) for key, rates in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "settle_it" / "run")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--regimes", nargs="+", choices=grid.REGIMES, default=list(grid.REGIMES))
    parser.add_argument("--objectives", nargs="+", choices=grid.OBJECTIVES, default=list(grid.OBJECTIVES))
    parser.add_argument("--seeds", type=int, default=len(grid.SEEDS), help="fresh seeds of the test jobs")
    parser.add_argument("--steps", type=int, help="in place of the regime's")
    parser.add_argument("--fast", action="store_true", help="few of everything")
    arguments = parser.parse_args()
    teacher = TEACHER
    if arguments.fast:
        arguments.regimes, arguments.objectives, arguments.seeds, arguments.steps = ["small"], ["sft", "hpd"], 1, 20
        teacher = (60, 1, 20)

    with ProcessPoolExecutor(arguments.processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        pool.submit(prepare, arguments.out, *teacher).result()
        tuning = [
            replace(job, steps=arguments.steps) for job in grid.tuning_jobs(arguments.regimes, arguments.objectives)
        ]
        chosen = best_rates(run_all(pool, "tuning", tuning, arguments.out))
        test = [replace(job, steps=arguments.steps) for job in grid.final_jobs(chosen, grid.SEEDS[: arguments.seeds])]
        run_all(pool, "test", test, arguments.out)

    from settle_it.report import write_report

    write_report(arguments.out / "results", arguments.out / "report")


def prepare(folder: Path, steps: int, rounds: int, round_steps: int) -> None:
    """The teacher and the data, in a process that may import verl."""
    jobs.Data(folder).prepare(steps, rounds, round_steps)


if __name__ == "__main__":
    main()
