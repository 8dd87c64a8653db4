"""The mass that the models of "49k" give to the tokens that never occur, by temperature.

    python benchmarks/settle_it/tail_mass.py --out DIR     DIR as of run.py, which makes the models

On right answers to test problems, as each model stands before the distillation.
"""

import argparse
import sys
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from settle_it import measures, models, task  # noqa: E402
from settle_it.grid import REGIMES, SEEDS  # noqa: E402
from settle_it.jobs import Data, right_demonstrations  # noqa: E402

REGIME, PROBLEMS = "49k", 32


def tail_mass(logits: Tensor, words: int, temperature: float) -> float:
    """The mean mass of the tokens from ``words`` on; logits are [positions, vocabulary]."""
    return float((logits / temperature).softmax(-1)[:, words:].sum(-1).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "settle_it" / "run", help="as of run.py")
    data = Data(parser.parse_args().out)
    problems = data.problems["test"][:PROBLEMS]
    answers = right_demonstrations(problems)
    students = [data.folder / "students" / f"{REGIME}_{seed}" for seed in SEEDS[:3]]
    folders = [data.teacher(REGIMES[REGIME]), *students]
    if missing := [folder for folder in folders if not folder.exists()]:
        parser.error(f"--out: there is no {missing[0]}; `run.py {REGIME}` with the same --out makes it")
    for folder in folders:
        model = models.load(folder)
        with torch.no_grad():
            logits = model.lm_head(measures.answer_states(model, problems, answers))
        masses = (f"{tail_mass(logits, len(task.WORDS), temperature):.3f} at {temperature:g}" for temperature in (1, 2))
        print(f"{folder.name}: {', '.join(masses)}")


if __name__ == "__main__":
    main()
