"""HPD against other objectives at equal budget: all runs from their seeds, then the report.

    python benchmarks/settle_it/run.py               all suites; resumes after a stop
    python benchmarks/settle_it/run.py core long     some of them
    python benchmarks/settle_it/run.py --fast        few methods, seeds, steps and problems
    python benchmarks/settle_it/report.py            the report again, from the stored results

First come teacher and data, then for each suite (``grid.SUITES``): every method with every learning rate on the tuning
seeds and validation problems; the best rate of each method on fresh seeds and test problems.
"""

import argparse
import multiprocessing
import os
import sys
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
os.environ |= {"VERL_PLATFORM": "cpu", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}

from tqdm import tqdm  # noqa: E402

from settle_it import grid, jobs  # noqa: E402
from settle_it.confirmation import confirmation  # noqa: E402
from settle_it.results import FOLDER, Results  # noqa: E402

TEACHER = (1500, 2, 300)
"""Supervised steps, rounds on its own correct answers, steps of a round."""


class Runner:
    """Runs jobs in processes and keeps their results.

    Args:
        pool: of processes.
        results: what is there already is not run again.
        folder: for models and data.
        steps: in place of the regimes'.
        rates: learning rates to try.
    """

    def __init__(
        self,
        pool: ProcessPoolExecutor,
        results: Results,
        folder: Path,
        steps: int | None = None,
        rates: tuple[float, ...] = grid.RATES,
    ) -> None:
        self.pool = pool
        self.results = results
        self.folder = folder
        self.steps = steps
        self.rates = rates

    def run(self, suite: grid.Suite) -> None:
        """A suite: tuning, the next rate where the best is at an edge, and the test."""
        for regime in suite.regimes:
            self.pool.submit(prepare_teacher, self.folder, regime).result()
        self._run(suite, "tuning", grid.tuning_jobs(suite, self.rates))
        while any(job not in self.results for job in self._wider(suite)):
            self._run(suite, "more rates", self._wider(suite))
        self._run(suite, "test", grid.test_jobs(suite, self.results.chosen_rates()))

    def _wider(self, suite: grid.Suite) -> list[grid.Job]:
        jobs = grid.wider_jobs(suite, self.results.chosen_rates())
        return [replace(job, steps=self.steps) for job in jobs]

    def _run(self, suite: grid.Suite, stage: str, todo: Iterable[grid.Job]) -> None:
        wanted = [replace(job, steps=self.steps) for job in todo]
        wanted = [job for job in wanted if job not in self.results]
        futures = [self.pool.submit(jobs.run, job, self.folder) for job in wanted]
        try:
            done = as_completed(futures)
            for future in tqdm(done, f"{suite.name}, {stage}", len(futures), unit="job", disable=not futures):
                self.results.add(suite.name, future.result())
        finally:
            for future in futures:
                future.cancel()


def main() -> None:
    names = [suite.name for suite in grid.SUITES] + ["confirmation"]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("suites", nargs="*", help=f"of {', '.join(names)}; all if none is given")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "settle_it" / "run", help="models and data")
    parser.add_argument("--results", type=Path, default=FOLDER)
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--methods", nargs="+", metavar="METHOD", help="only these of the suites")
    parser.add_argument("--fast", action="store_true", help="few methods, seeds, steps and problems, into OUT/fast")
    arguments = parser.parse_args()
    if unknown := set(arguments.suites) - set(names):
        parser.error(f"suites {', '.join(sorted(unknown))}: choose from {', '.join(names)}")
    suites, teacher, steps = list(grid.SUITES), TEACHER, None
    rates: tuple[float, ...] = grid.RATES
    if arguments.fast:
        fast = grid.Suite(
            "fast", {name: grid.METHODS[name] for name in ("sft", "hpd", "fkl, self")}, ("small",), seeds=(1,)
        )
        suites, teacher, steps, rates = [fast], (60, 0, 0), 20, grid.RATES[1:2]
        arguments.out = arguments.out / "fast"
        arguments.results = arguments.out / "results"
    elif arguments.suites:
        suites = [suite for suite in grid.SUITES if suite.name in arguments.suites]
    if arguments.methods:
        if unknown := set(arguments.methods) - {name for suite in suites for name in suite.methods}:
            parser.error(f"--methods {', '.join(sorted(unknown))}: not among the suites' methods")
        suites = [replace(suite, methods=suite.only(arguments.methods)) for suite in suites]

    results = Results(arguments.results)
    with ProcessPoolExecutor(arguments.processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        pool.submit(prepare, arguments.out, arguments.fast, *teacher).result()
        runner = Runner(pool, results, arguments.out, steps, rates)
        for suite in suites:
            runner.run(suite)
        if not arguments.fast and "confirmation" in (arguments.suites or names):
            runner.run(confirmation())

    from settle_it.report import write_report

    write_report(results, arguments.results.parent / "report" if arguments.fast else None)


def prepare(folder: Path, few: bool, steps: int, rounds: int, round_steps: int) -> None:
    """The teacher and the data, in a process that may import verl."""
    jobs.Data(folder, few).prepare(steps, rounds, round_steps)


def prepare_teacher(folder: Path, regime: str) -> None:
    """The teacher of a regime with a larger vocabulary."""
    jobs.Data(folder).prepare_teacher(grid.REGIMES[regime])


if __name__ == "__main__":
    main()
