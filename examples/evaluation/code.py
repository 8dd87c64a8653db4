"""Programs: HumanEval and MBPP, run with their tests in a sandbox, avg@k and pass@k.

    python -m examples.evaluation.code --data humaneval/test.parquet --model MODEL --out humaneval.json
    python -m examples.evaluation.code --data mbpp/test.parquet --model MODEL --out mbpp.json \\
        --n 10 --temperature 0.8 --pass_at 1 10

The sandbox needs Debian's package bubblewrap; --unsandboxed runs programs without it.
"""

import argparse
import os
from typing import Any

from examples.evaluation import scored
from examples.evaluation.results import Row, Script
from hpd_verl.tools.generation import Answer
from hpd_verl.tools.rewards.code import SECONDS, outcome_of
from hpd_verl.tools.rewards.sandbox import UNSANDBOXED, check


def score(row: Row, answer: Answer) -> tuple[float, str]:
    """1.0 if it passes all tests, and what became of it."""
    outcome = outcome_of(answer.text, row.ground_truth, row.extra_info)
    return float(outcome.passed), f"{outcome.status} {outcome.message}".strip()[:300]


def evaluate(args: argparse.Namespace) -> dict[str, Any]:
    """As ``scored.evaluate``; whether the sandbox works is known before anything is generated."""
    if args.unsandboxed:
        os.environ[UNSANDBOXED] = "1"
    os.environ[SECONDS] = str(args.program_seconds)
    check("def f():\n    return 1\n", "assert f() == 1")
    return scored.evaluate(args, score)


def main() -> None:
    script = Script(__doc__ or "", "code")
    script.add_generation_arguments(temperature=0.0, max_tokens=2048)
    scored.add_arguments(script.parser)
    script.parser.add_argument("--program_seconds", type=float, default=10, help="seconds per answer (%(default)s)")
    script.parser.add_argument(
        "--unsandboxed", action="store_true", help="run programs without bubblewrap, with limits only"
    )
    script.run(evaluate)


if __name__ == "__main__":
    main()
