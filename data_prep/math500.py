"""MATH-500 (500 problems of MATH's test set): validation problems with worked solutions.

Columns read: problem, solution, answer, unique_id. verl rewards the last ``\\boxed{}`` for this set.

    python -m data_prep.math500 --local_dataset_path ~/data/MATH-500/test.jsonl --local_save_dir ~/data/math500
"""

from typing import Any

from data_prep.rows import Row, build_row, math_prompt, run
from data_prep.sources import Source

SOURCE = Source("HuggingFaceH4/MATH-500", {"test": "test"}, ("problem", "solution", "answer"))


def convert(record: dict[str, Any], split: str, index: int) -> Row:
    """One row from one record."""
    return build_row(
        data_source=SOURCE.dataset,
        prompt=math_prompt(record["problem"]),
        demonstration=record["solution"].strip(),
        ability="math",
        ground_truth=record["answer"].strip(),
        split=split,
        index=index,
        problem_id=str(record.get("unique_id") or ""),
    )


if __name__ == "__main__":
    run(__doc__, SOURCE, convert)
