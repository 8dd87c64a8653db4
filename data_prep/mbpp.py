"""MBPP (974 short Python functions, CC-BY-4.0): train and test programs, in the authors' split.

Columns read: task_id, text (prompt in the sanitized set), code, test_list, test_setup_code or test_imports. A file that
holds all tasks, mbpp.jsonl, is split as the authors do: tasks 601 to 974 to train on, 11 to 510 to test on. The ground
truth is the test program. verl has no reward function for it:
``reward.custom_reward_function.path=pkg://hpd_verl.tools.rewards.code`` runs programs in a sandbox. Files of EvalPlus's
set, evalplus/mbppplus, are read too, with their column test as ground truth.

    python -m data_prep.mbpp --local_dataset_path ~/data/mbpp.jsonl --local_save_dir ~/data/mbpp
"""

from typing import Any

from data_prep.rows import Row, build_row, run, text_of
from data_prep.sources import Source

SOURCE = Source(
    "google-research-datasets/mbpp",
    {"train": "train", "test": "test"},
    ("code",),
    config="full",
    unnamed=("train", "test"),
    other_columns=("task_id", "test_list"),
)
TASKS = {"train": range(601, 975), "test": range(11, 511)}


def convert(record: dict[str, Any], split: str, index: int) -> Row | None:
    """One row from one record; None if the task is not of this split."""
    task, tests = record["task_id"], record["test_list"]
    if not isinstance(task, int) or isinstance(task, bool):
        raise ValueError(f"'task_id' is {task!r}, expected a whole number")
    thorough = record.get("test")  # EvalPlus's, of tasks that are all to test on
    has_thorough = isinstance(thorough, str) and bool(thorough.strip())
    if split == "train" if has_thorough else task not in TASKS[split]:
        return None
    if not isinstance(tests, list) or not tests or not all(isinstance(test, str) and test.strip() for test in tests):
        raise ValueError(f"'test_list' is {repr(tests)[:80]}, expected a list of texts")
    imports = record.get("test_imports")
    setup = "\n".join(imports) if isinstance(imports, list) else str(record.get("test_setup_code") or "")
    shown = "\n".join(tests)
    task_text = text_of(record, "text", "prompt")
    code = record["code"].replace("\r\n", "\n").strip()
    return build_row(
        data_source=SOURCE.dataset,
        prompt=[
            {
                "role": "user",
                "content": f"{task_text} Answer with Python code in one code block that passes:\n\n{shown}",
            }
        ],
        demonstration=f"```python\n{code}\n```",
        ability="code",
        ground_truth=f"{setup}\n{thorough if has_thorough else shown}\n".lstrip(),
        split=split,
        index=index,
        problem_id=str(task),
    )


if __name__ == "__main__":
    run(__doc__, SOURCE, convert)
