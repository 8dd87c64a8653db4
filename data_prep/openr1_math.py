"""OpenR1-Math-220k (competition maths, Apache-2.0): a verified answer of DeepSeek-R1 becomes the demonstration.

Columns read: problem, answer, generations, correctness_math_verify, is_reasoning_complete; the demonstration is the
first generation that ended and that Math-Verify found right. Problems without one are left out and counted.

    python -m data_prep.openr1_math --local_dataset_path ~/data/OpenR1-Math-220k/data \\
        --local_save_dir ~/data/openr1_math

Also reads sets in verl's columns, such as the HPD authors' ``wh-zhu/train_openr1_8k``: prompt (chat list),
reward_model, and the answer in demonstration, target or response (a text or a list of one assistant message).
"""

from typing import Any

from data_prep.rows import MATH_REWARD, Row, build_row, math_prompt, run, text_of
from data_prep.sources import Source

SOURCE = Source("open-r1/OpenR1-Math-220k", {"train": "train"}, config="default", unnamed=("train",))
ANSWER_COLUMNS = ("demonstration", "target", "response")


def verified_generation(record: dict[str, Any]) -> str | None:
    """The first generation that ended and is right; None if there is none.

    Raises:
        ValueError: a column that is no list, or lists of different lengths.
    """
    columns = ("generations", "correctness_math_verify", "is_reasoning_complete")
    lists = [record.get(column) for column in columns]
    # Where Math-Verify could not run, the set has no verdicts.
    if lists[1] is None:
        return None
    lengths = [len(values) if isinstance(values, list) else None for values in lists]
    if None in lengths or len(set(lengths)) > 1:
        raise ValueError(f"{', '.join(columns)} have the lengths {lengths}, expected lists of one length")
    for text, right, complete in zip(*(values or () for values in lists), strict=True):
        if right and complete and isinstance(text, str) and text.strip():
            return text.strip()
    return None


def _of_verl(record: dict[str, Any], split: str, index: int) -> Row:
    prompt, reward_model = record["prompt"], record.get("reward_model")
    if not isinstance(prompt, list) or not all(
        isinstance(turn, dict) and isinstance(turn.get("role"), str) and isinstance(turn.get("content"), str)
        for turn in prompt
    ):
        raise ValueError(f"'prompt' is {repr(prompt)[:80]}, expected a chat list")
    if not prompt or prompt[-1]["role"] != "user":
        raise ValueError("'prompt' does not end with the user's turn")
    if not isinstance(reward_model, dict) or not isinstance(reward_model.get("ground_truth"), str):
        raise ValueError(f"'reward_model' is {repr(reward_model)[:80]}, expected an object with ground_truth, a text")
    answer = next((record[column] for column in ANSWER_COLUMNS if record.get(column) is not None), None)
    if isinstance(answer, list) and len(answer) == 1 and isinstance(answer[0], dict):
        answer = answer[0].get("content")
    if not isinstance(answer, str) or not answer.strip():
        raise ValueError(f"no answer as a text in {', '.join(ANSWER_COLUMNS)}, there are {', '.join(record)}")
    return build_row(
        data_source=MATH_REWARD,
        prompt=[{"role": turn["role"], "content": turn["content"]} for turn in prompt],
        demonstration=answer.strip(),
        ability="math",
        ground_truth=reward_model["ground_truth"],
        split=split,
        index=index,
        problem_id="",
    )


def convert(record: dict[str, Any], split: str, index: int) -> Row | None:
    """One row from one record; None without a verified generation."""
    if "problem" not in record and "prompt" in record:
        return _of_verl(record, split, index)
    problem, answer = text_of(record, "problem"), text_of(record, "answer")
    demonstration = verified_generation(record)
    if demonstration is None:
        return None
    return build_row(
        data_source=MATH_REWARD,
        prompt=math_prompt(problem),
        demonstration=demonstration,
        ability="math",
        ground_truth=answer,
        split=split,
        index=index,
        problem_id=str(record.get("uuid") or ""),
    )


if __name__ == "__main__":
    run(__doc__, SOURCE, convert)
