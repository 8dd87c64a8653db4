"""Writes the table of docs/cost.md: what long rows take by the planner, shared out by Ulysses or not.

    python docs/long_contexts.py

tests/tools/test_plan.py fails where the page is not what is planned.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]

from transformers import Qwen2Config  # noqa: E402

from hpd_verl.engine.families import divides_heads  # noqa: E402
from hpd_verl.tools.plan.memory import plan_memory  # noqa: E402
from hpd_verl.tools.plan.model_size import ModelSize, model_size  # noqa: E402
from hpd_verl.tools.plan.run import GIB, PlannedRun  # noqa: E402

STUDENT = Qwen2Config(
    hidden_size=1536,
    intermediate_size=8960,
    num_hidden_layers=28,
    num_attention_heads=12,
    num_key_value_heads=2,
    vocab_size=151_936,
    tie_word_embeddings=True,
)
TEACHER = Qwen2Config(
    hidden_size=3584,
    intermediate_size=18_944,
    num_hidden_layers=28,
    num_attention_heads=28,
    num_key_value_heads=4,
    vocab_size=152_064,
    tie_word_embeddings=False,
)
PROMPT, ROWS, GPUS = 1024, 32, 8


def _cell(student: ModelSize, teacher: ModelSize, row: int, shared: int) -> str:
    if not all(divides_heads(shared, model.heads, model.key_heads) for model in (student, teacher)):
        return "does not divide the heads"
    run = PlannedRun(
        gpus=GPUS,
        tokens=row // shared,
        ulysses=shared,
        prompt_tokens=PROMPT,
        response_tokens=row - PROMPT,
        batch_size=ROWS,
    )
    memory = plan_memory(student, teacher, run)
    return f"{memory.peak / GIB:.1f}, {memory.peak_phase}"


def table() -> str:
    """GiB of the largest phase on each GPU, by tokens of a row and GPUs that share one."""
    models = model_size("Qwen2.5-1.5B", STUDENT), model_size("Qwen2.5-7B", TEACHER)
    sizes = (1, 2, 4, 8)
    lines = ["| tokens of a row | " + " | ".join(f"Ulysses {shared}" for shared in sizes) + " |", "|---" * 5 + "|"]
    for row in (32_768, 131_072):
        lines.append(f"| {row:,} | " + " | ".join(_cell(*models, row, shared) for shared in sizes) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
