"""The task: chains of operations modulo 10, answered step by step, with a final answer that can be checked.

    Q 4 A - 1 B * 4 ?    ->    A : 4 - 1 = 3 . so B turns 3 into 2 . answer \\boxed{ 2 }

A problem is a start digit and two to four labelled steps. A demonstration walks them, each in one of five phrasings
(one terse, one that does two steps at once), carries results on, and ends with the boxed digit. A share of its steps
carries a wrong result, as in real demonstrations.
"""

import functools
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

DATA_SOURCE = "settle_it/chains"
MODULUS = 10
LABELS = "ABCD"
OPERATIONS = {"+": lambda a, b: a + b, "-": lambda a, b: a - b, "*": lambda a, b: a * b}
OPERANDS = range(1, 7)
STEPS = (2, 4)
ERROR_RATE = 0.06
MAX_PROMPT_LENGTH, MAX_RESPONSE_LENGTH = 24, 64
WITH_SOLUTION = "{prompt} {demonstration}"
"""Prompt of who reads a worked answer: ``data.teacher_prompt_template``."""
MAX_LENGTH_WITH_SOLUTION = 64

PAD, END, USER, ASSISTANT = "<|pad|>", "<|end|>", "<|user|>", "<|assistant|>"
PHRASES = "Q ? : = . ; at take and get so turns into then answer \\boxed{ }"
WORDS = [PAD, END, USER, ASSISTANT, *map(str, range(MODULUS)), *OPERATIONS, *LABELS, *PHRASES.split()]
CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|> {{ message['content'] }} <|end|> {% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@dataclass(frozen=True)
class Problem:
    """A start digit and steps of (operation, digit)."""

    start: int
    steps: tuple[tuple[str, int], ...]

    @property
    def prompt(self) -> str:
        steps = " ".join(f"{label} {op} {digit}" for label, (op, digit) in zip(LABELS, self.steps, strict=False))
        return f"Q {self.start} {steps} ?"

    @property
    def answer(self) -> int:
        value = self.start
        for op, digit in self.steps:
            value = apply(value, op, digit)
        return value

    @classmethod
    def parse(cls, prompt: str) -> "Problem":
        """The problem of a prompt."""
        words = prompt.split()
        return cls(
            int(words[1]), tuple((op, int(digit)) for op, digit in zip(words[3:-1:3], words[4:-1:3], strict=True))
        )


def apply(value: int, op: str, digit: int) -> int:
    """One step."""
    return OPERATIONS[op](value, digit) % MODULUS


def draw_result(value: int, op: str, digit: int, rng: random.Random, error_rate: float = ERROR_RATE) -> int:
    """One step, sometimes wrong."""
    right = apply(value, op, digit)
    return (right + rng.randrange(1, MODULUS)) % MODULUS if rng.random() < error_rate else right


def draw_results(problem: Problem, rng: random.Random) -> list[int]:
    """The results of all steps, each sometimes wrong."""
    values = [problem.start]
    for op, digit in problem.steps:
        values.append(draw_result(values[-1], op, digit, rng))
    return values[1:]


def draw_problems(count: int, seed: int, excluded: Iterable[Problem] = ()) -> list[Problem]:
    """Distinct random problems, none of them excluded."""
    rng, found = random.Random(seed), set(excluded)
    out: list[Problem] = []
    while len(out) < count:
        steps = tuple((rng.choice(list(OPERATIONS)), rng.choice(OPERANDS)) for _ in range(rng.randint(*STEPS)))
        problem = Problem(rng.randrange(MODULUS), steps)
        if problem not in found:
            found.add(problem)
            out.append(problem)
    return out


def demonstrate(
    problem: Problem, rng: random.Random, error_rate: float = ERROR_RATE, results: Sequence[int] | None = None
) -> str:
    """A worked answer; a wrong result is carried on to the boxed one.

    Args:
        problem: to answer.
        rng: draws phrasings and wrong results.
        error_rate: of wrong results.
        results: of the steps, in place of those that it draws.
    """
    value, parts, index = problem.start, [], 0

    def step() -> tuple[str, int, str, int, int]:
        nonlocal value, index
        op, digit = problem.steps[index]
        before = value
        value = draw_result(value, op, digit, rng, error_rate) if results is None else results[index]
        index += 1
        return LABELS[index - 1], before, op, digit, value

    while index < len(problem.steps):
        phrasing = rng.randrange(5 if index + 1 < len(problem.steps) else 4)
        label, before, op, digit, after = step()
        if phrasing == 0:
            parts.append(f"{label} : {before} {op} {digit} = {after} .")
        elif phrasing == 1:
            parts.append(f"at {label} take {before} {op} {digit} and get {after} .")
        elif phrasing == 2:
            parts.append(f"so {label} turns {before} into {after} .")
        elif phrasing == 3:
            parts.append(f"{label} {after} ;")
        else:
            second, _, op_2, digit_2, last = step()
            parts.append(f"{label} then {second} : {before} {op} {digit} {op_2} {digit_2} = {last} .")
    return " ".join([*parts, f"answer \\boxed{{ {value} }}"])


def score(problem: Problem, text: str) -> float:
    """1 where the last box of an answer holds the right digit, else 0."""
    words = text.split()
    boxes = [index for index, word in enumerate(words) if word == "\\boxed{"]
    return float(bool(boxes) and words[boxes[-1] + 1 : boxes[-1] + 3] == [str(problem.answer), "}"])


@functools.cache
def build_tokenizer(size: int = len(WORDS)) -> PreTrainedTokenizerFast:
    """One token a word; a larger vocabulary has words after these that never occur."""
    words = [*WORDS, *(f"<|unused_{index}|>" for index in range(len(WORDS), size))]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token=PAD))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, eos_token=END, additional_special_tokens=[USER, ASSISTANT]
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def row(problem: Problem, demonstration: str, solution: str | None = None) -> dict[str, Any]:
    """A row of the columns that the trainers read; a solution stands behind the problem."""
    values = {"prompt": problem.prompt, "demonstration": solution}
    return {
        "data_source": DATA_SOURCE,
        "prompt": [{"role": "user", "content": problem.prompt if solution is None else WITH_SOLUTION.format(**values)}],
        "demonstration": demonstration,
        "reward_model": {"style": "rule", "ground_truth": str(problem.answer)},
    }


def write(file: Path, rows: list[dict[str, Any]]) -> None:
    """A parquet file of rows."""
    file.parent.mkdir(parents=True, exist_ok=True)
    pd.DataFrame(rows).to_parquet(file)
