"""AMC 12 of 2022 and 2023 (83 problems, answers are numbers): validation problems.

Columns read: problem or question, answer (a number; 142.0 becomes 142), and solution, if present, as demonstration: as
in AI-MO/aimo-validation-amc (default), math-ai/amc23 (--hub_split test) and others.

    python -m data_prep.amc --local_dataset_path ~/data/aimo-validation-amc --local_save_dir ~/data/amc
"""

from typing import Any

from data_prep.problems import problem_row, run_problems
from data_prep.rows import Row, text_of
from data_prep.sources import Source

SOURCE = Source("AI-MO/aimo-validation-amc", {"test": "train"}, unnamed=("test",))


def number(record: dict[str, Any]) -> str:
    """The answer, without ``.0``.

    Raises:
        ValueError: it is no finite number.
    """
    text = text_of(record, "answer", "Answer")
    try:
        value = float(text)
    except ValueError:
        raise ValueError(f"the answer is {text[:80]!r}, expected a number") from None
    if value - value != 0:
        raise ValueError(f"the answer is {text[:80]!r}, expected a finite number")
    return str(int(value)) if value.is_integer() else text


def convert(record: dict[str, Any], split: str, index: int) -> Row:
    """One row from one record."""
    return problem_row(record, split, index, number(record))


if __name__ == "__main__":
    run_problems(__doc__, SOURCE, convert)
