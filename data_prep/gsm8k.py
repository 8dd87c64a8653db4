"""GSM8K (grade-school maths, MIT licence): its worked answers become the demonstrations.

Reads train.jsonl and test.jsonl of the original release, or the parquet files of the hub, with the columns question and
answer (a worked answer that ends with a line "#### number"); writes train.parquet and test.parquet. From the root of
the checkout:

    python -m data_prep.gsm8k --local_dataset_path ~/data/gsm8k --local_save_dir ~/data/gsm8k_hpd

The calculator annotations of the original, ``<<48/2=24>>``, are removed. The last line ``#### <number>`` stays, and
the prompt asks for it: verl's reward function for ``openai/gsm8k`` looks there.
"""

import re
from typing import Any

from data_prep.rows import build_row, run
from data_prep.sources import Source

DATA_SOURCE = "openai/gsm8k"
SOURCE = Source(DATA_SOURCE, {"train": "train", "test": "test"}, ("question", "answer"), config="main")
INSTRUCTION = 'Reason step by step and write the final answer after "####".'

_ANNOTATION = re.compile(r"<<[^<>]*>>")
_FINAL_ANSWER = re.compile(r"#### (-?\d[\d,]*(?:\.\d+)?)")


def final_answer(answer: str) -> str:
    """The number of the last line ``#### number``, without thousands separators.

    Raises:
        ValueError: there is no such line at the end.
    """
    last_line = answer.strip().rsplit("\n", 1)[-1].rstrip()
    match = _FINAL_ANSWER.fullmatch(last_line)
    if match is None:
        raise ValueError(f"no final answer: the last line is {last_line[-80:]!r}, expected '#### <number>'")
    return match[1].replace(",", "")


def convert(record: dict[str, Any], split: str, index: int) -> dict[str, Any]:
    """One row from one record of GSM8K."""
    question, answer = record["question"].strip(), record["answer"].strip()
    return build_row(
        data_source=DATA_SOURCE,
        prompt=[{"role": "user", "content": f"{question} {INSTRUCTION}"}],
        demonstration=_ANNOTATION.sub("", answer),
        ability="math",
        ground_truth=final_answer(answer),
        split=split,
        index=index,
        question=question,
        answer=answer,
    )


if __name__ == "__main__":
    run(__doc__, SOURCE, convert)
