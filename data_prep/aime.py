"""AIME (30 problems a year, answers are whole numbers from 0 to 999): validation problems.

Columns read: problem or Problem, answer or Answer, and solution or Solution, if present, as demonstration: as in
HuggingFaceH4/aime_2024 (default), Maxwell-Jia/AIME_2024, math-ai/aime25 (--hub_split test) and others.

    python -m data_prep.aime --local_dataset_path ~/data/aime_2024 --local_save_dir ~/data/aime24
"""

import re
from typing import Any

from data_prep.problems import problem_row, run_problems
from data_prep.rows import Row, text_of
from data_prep.sources import Source

SOURCE = Source("HuggingFaceH4/aime_2024", {"test": "train"}, unnamed=("test",))


def whole_number(record: dict[str, Any]) -> str:
    r"""The answer without leading zeros; in ``\boxed{}`` and dollar signs or bare.

    Raises:
        ValueError: it is no whole number from 0 to 999.
    """
    text = text_of(record, "answer", "Answer")
    match = re.fullmatch(r"\$?(?:\\boxed\{)?0*(\d{1,3})\}?\$?", text)
    if match is None:
        raise ValueError(f"the answer is {text[:80]!r}, expected a whole number from 0 to 999")
    return match[1]


def convert(record: dict[str, Any], split: str, index: int) -> Row:
    """One row from one record."""
    return problem_row(record, split, index, whole_number(record))


if __name__ == "__main__":
    run_problems(__doc__, SOURCE, convert)
