"""Results as lines of JSON, one file per suite, kept beside the code; a run resumes from them."""

import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hpd_verl.tools.intervals import pass_at_k
from settle_it.grid import TUNING_SEEDS, Job

FOLDER = Path(__file__).resolve().with_name("results")


def right_shares(results: Sequence[dict[str, Any]], measure: str, samples: int) -> np.ndarray:
    """Share of right answers, [seeds, problems], from the counts that results keep as digits."""
    return np.array([[int(count) for count in result[measure]] for result in results]) / samples


def pass_at(results: Sequence[dict[str, Any]], measure: str, samples: int, k: int) -> np.ndarray:
    """pass@k, [seeds, problems]."""
    by_count = [pass_at_k(samples, right, k) for right in range(samples + 1)]
    return np.array([[by_count[int(count)] for count in result[measure]] for result in results])


def _check_models(results: Iterable[dict[str, Any]]) -> None:
    first: dict[int, dict[str, Any]] = {}
    for result in results:
        job = Job(**result["job"])
        earlier = first.setdefault(job.seed, result)
        if result.get("models") != earlier.get("models"):
            raise ValueError(
                f"{job.key}: starts from {result.get('models')}, {Job(**earlier['job']).key} from "
                f"{earlier.get('models')}; run both again from the same models"
            )


class Results:
    """The results of a folder.

    Args:
        folder: of ``SUITE.jsonl`` files. A last line that a killed run left half is dropped; its job is run again.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.by_key: dict[str, dict[str, Any]] = {}
        for file in sorted(folder.glob("*.jsonl")):
            text = file.read_text()
            whole = text[: text.rfind("\n") + 1]
            if whole != text:
                file.write_text(whole)
            for line in whole.splitlines():
                result = json.loads(line)
                self.by_key[Job(**result["job"]).key] = result

    def __contains__(self, job: Job) -> bool:
        return job.key in self.by_key

    def add(self, suite: str, result: dict[str, Any]) -> None:
        """Keep a result, in its suite's file too."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with open(self.folder / f"{suite}.jsonl", "a") as file:
            file.write(json.dumps(result, separators=(",", ":")) + "\n")
        self.by_key[Job(**result["job"]).key] = result

    def of(self, split: str, regime: str, methods: Iterable[str] | None = None) -> dict[str, list[dict[str, Any]]]:
        """Results by method, in the order of their seeds.

        Raises:
            ValueError: jobs of one seed started from different models: their comparison would be of those.
        """
        wanted = None if methods is None else set(methods)
        found: dict[str, list[dict[str, Any]]] = defaultdict(list)
        for result in self.by_key.values():
            job = result["job"]
            if job["split"] == split and job["regime"] == regime and (wanted is None or job["method"] in wanted):
                found[job["method"]].append(result)
        _check_models(result for each in found.values() for result in each)
        return {name: sorted(each, key=lambda result: result["job"]["seed"]) for name, each in found.items()}

    def validation_means(self) -> dict[tuple[str, str], dict[float, float]]:
        """Mean accuracy on validation problems, by regime and method, then by learning rate; of whole sets of seeds."""
        found: dict[tuple[str, str], dict[float, list[float]]] = defaultdict(lambda: defaultdict(list))
        for result in self.by_key.values():
            job = result["job"]
            if job["split"] == "validation":
                found[job["regime"], job["method"]][job["rate"]].append(result["validation"])
        whole = len(TUNING_SEEDS)
        means = {
            key: {rate: sum(each) / whole for rate, each in rates.items() if len(each) == whole}
            for key, rates in found.items()
        }
        return {key: rates for key, rates in means.items() if rates}

    def chosen_rates(self) -> dict[tuple[str, str], float]:
        """The learning rate with the best mean on validation, by regime and method."""
        return {key: max(means, key=lambda rate: means[rate]) for key, means in self.validation_means().items()}
