"""HumanEval (164 functions to complete, MIT licence): validation programs.

Columns read: task_id, prompt, canonical_solution, test, entry_point; also HumanEval.jsonl.gz of the release. The ground
truth is the test program, which calls ``check`` with the function. verl has no reward function for it; use
``reward.custom_reward_function.path=pkg://hpd_verl.tools.rewards.code``. EvalPlus's tests: --dataset
evalplus/humanevalplus or its files. The release HumanEvalPlus.jsonl has inputs instead of tests and is rejected.

    python -m data_prep.humaneval --local_dataset_path ~/data/HumanEval.jsonl.gz --local_save_dir ~/data/humaneval
"""

from typing import Any

from data_prep.rows import Row, build_row, run
from data_prep.sources import Source

SOURCE = Source(
    "openai/openai_humaneval",
    {"test": "test"},
    ("task_id", "prompt", "canonical_solution", "test", "entry_point"),
    unnamed=("test",),
)
INSTRUCTION = "Complete the following Python function. Answer with the whole function in one code block."


def convert(record: dict[str, Any], split: str, index: int) -> Row:
    """One row from one record."""
    start, name = record["prompt"], record["entry_point"].strip()
    if "plus_input" in record:
        raise ValueError("'plus_input': EvalPlus's inputs without its tests; take the files of evalplus/humanevalplus")
    preamble, defined, _ = start.partition(f"def {name}(")
    if not defined:
        raise ValueError(f"'prompt' does not define {name!r}, its 'entry_point'")
    return build_row(
        data_source=SOURCE.dataset,
        prompt=[{"role": "user", "content": f"{INSTRUCTION}\n\n```python\n{start.strip()}\n```"}],
        demonstration=f"```python\n{(start + record['canonical_solution']).strip()}\n```",
        ability="code",
        ground_truth=f"{record['test'].strip()}\n\ncheck({name})\n",
        split=split,
        index=index,
        problem_id=record["task_id"],
        entry_point=name,
        preamble=preamble,  # imports and helpers, which an answer may take for given
    )


if __name__ == "__main__":
    run(__doc__, SOURCE, convert)
