"""Maths problems: answers compared with the ground truth, avg@k and pass@k.

Greedy, and 8 answers a problem:

    python -m examples.evaluation.maths --data math500/test.parquet --model MODEL --out greedy.json
    python -m examples.evaluation.maths --data math500/test.parquet --model MODEL --out sampled.json \\
        --n 8 --temperature 0.6 --top_p 0.95
"""

from examples.evaluation import scored
from examples.evaluation.results import Row, Script
from hpd_verl.tools.generation import Answer
from hpd_verl.tools.rewards.maths import compute_score, final_answer


def score(row: Row, answer: Answer) -> tuple[float, str]:
    """1.0 if it is right, and what was compared."""
    value = compute_score(row.data_source, answer.text, row.ground_truth, row.extra_info)
    given, _ = final_answer(answer.text)
    return value, given[-200:]


def main() -> None:
    script = Script(__doc__ or "", "maths")
    script.add_generation_arguments(temperature=0.0, max_tokens=4096)
    scored.add_arguments(script.parser)
    script.run(lambda args: scored.evaluate(args, score))


if __name__ == "__main__":
    main()
