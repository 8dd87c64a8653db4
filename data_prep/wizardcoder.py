"""Evol-Instruct code sets, WizardCoder's training data: instructions and answers.

Columns read: instruction, and output or response: as in nickrosh/Evol-Instruct-Code-80k-v1 (default) and
ise-uiuc/Magicoder-Evol-Instruct-110K. HPD's paper replaces the answers by the teacher's. There is no ground truth.

    python -m data_prep.wizardcoder --local_dataset_path ~/data/EvolInstruct-Code-80k.json \\
        --local_save_dir ~/data/wizardcoder --test_fraction 0.01
"""

from typing import Any

from data_prep.rows import Row, build_row, run, text_of
from data_prep.sources import Source

SOURCE = Source("nickrosh/Evol-Instruct-Code-80k-v1", {"train": "train"}, ("instruction",), unnamed=("train",))


def convert(record: dict[str, Any], split: str, index: int) -> Row:
    """One row from one record."""
    return build_row(
        data_source="wizardcoder",
        prompt=[{"role": "user", "content": record["instruction"].strip()}],
        demonstration=text_of(record, "output", "response"),
        ability="code",
        ground_truth="",
        split=split,
        index=index,
    )


if __name__ == "__main__":
    run(__doc__, SOURCE, convert)
