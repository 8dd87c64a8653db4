"""A small maths task with verifiable answers, and the untrained models that will learn it. Needs no network.

A problem is a start digit and two or three labelled steps; only the last digit counts (arithmetic modulo 10):

    start 4 A - 1 B * 4 ?

A demonstration walks the steps, each in one of four phrasings, and ends with the answer in a box. In train.parquet
a part of the steps, ``--error_rate``, carries a wrong result, as real demonstrations do:

    A : 4 - 1 = 3 . by B we go from 3 to 2 . answer \\boxed{ 2 }

The vocabulary is these words, so that two layers learn the task in minutes on a CPU. Writes to the output folder:

    sft.parquet               correct demonstrations for verl's SFT trainer (column messages)
    train.parquet, val.parquet   verl's columns and the demonstration; no problem of one is in the other or in sft
    teacher_init, student_init   Hugging Face folders: Llama with random weights, and the tokenizer

    python examples/quickstart/task.py --local_save_dir examples/quickstart/run/data
"""

import argparse
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

DATA_SOURCE = "quickstart/last_digit"
MODULUS = 10
LABELS = "ABC"
OPERATIONS = {"+": lambda a, b: a + b, "-": lambda a, b: a - b, "*": lambda a, b: a * b}
OPERANDS = range(2, 7)
MIN_STEPS, MAX_STEPS = 2, 3

PAD, END, USER, ASSISTANT = "<|pad|>", "<|end|>", "<|user|>", "<|assistant|>"
PHRASE_WORDS = "start ? : = . ; at take and get by we go from to answer \\boxed{ }"
WORDS = [str(digit) for digit in range(MODULUS)] + list(OPERATIONS) + list(LABELS) + PHRASE_WORDS.split()
CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|> {{ message['content'] }} <|end|> {% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
HEADS, HEAD_SIZE = 2, 32  # vLLM's CPU attention knows no smaller heads
TEACHER_HIDDEN, STUDENT_HIDDEN = 96, 64


@dataclass(frozen=True)
class Problem:
    """A start digit and steps of (operation, digit)."""

    start: int
    steps: tuple[tuple[str, int], ...]

    @property
    def prompt(self) -> str:
        steps = " ".join(f"{label} {op} {digit}" for label, (op, digit) in zip(LABELS, self.steps, strict=False))
        return f"start {self.start} {steps} ?"

    @property
    def answer(self) -> int:
        value = self.start
        for op, digit in self.steps:
            value = apply(value, op, digit)
        return value


def apply(value: int, op: str, digit: int) -> int:
    """One step."""
    return OPERATIONS[op](value, digit) % MODULUS


def draw_problem(rng: random.Random, excluded: frozenset[Problem] = frozenset()) -> Problem:
    """A random problem that is not one of ``excluded``."""
    while True:
        count = rng.randint(MIN_STEPS, MAX_STEPS)
        steps = tuple((rng.choice(list(OPERATIONS)), rng.choice(OPERANDS)) for _ in range(count))
        problem = Problem(rng.randrange(MODULUS), steps)
        if problem not in excluded:
            return problem


def demonstrate(problem: Problem, rng: random.Random, error_rate: float = 0.0) -> str:
    """A worked answer, each step in a random phrasing; a wrong result is carried on to the boxed answer."""
    value, parts = problem.start, []
    for label, (op, digit) in zip(LABELS, problem.steps, strict=False):
        before, value = value, apply(value, op, digit)
        if rng.random() < error_rate:
            value = (value + rng.randrange(1, MODULUS)) % MODULUS
        phrasings = (
            f"{label} : {before} {op} {digit} = {value} .",
            f"at {label} take {before} {op} {digit} and get {value} .",
            f"by {label} we go from {before} to {value} .",
            f"{label} {value} ;",
        )
        parts.append(rng.choice(phrasings))
    return " ".join([*parts, f"answer \\boxed{{ {value} }}"])


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token a word."""
    specials = [PAD, END, USER, ASSISTANT]
    vocabulary = {word: index for index, word in enumerate(specials + WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=PAD))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, eos_token=END, additional_special_tokens=[USER, ASSISTANT]
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def build_model(hidden_size: int, tokenizer: PreTrainedTokenizerFast, seed: int) -> LlamaForCausalLM:
    """An untrained Llama whose vocabulary is exactly the tokenizer's."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=3 * hidden_size,
        num_hidden_layers=2,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        head_dim=HEAD_SIZE,
        max_position_embeddings=128,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        initializer_range=0.04,
        dtype="float32",
    )
    return LlamaForCausalLM(config)


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write a Hugging Face folder and check that it reads back as the same tokenizer.

    transformers 5 picks the tokenizer's class by the model's type for some types: a Qwen2 folder would come back as a
    byte-level tokenizer without these words, and say nothing.
    """
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    text = " ".join(WORDS)
    found, expected = AutoTokenizer.from_pretrained(folder).encode(text), tokenizer.encode(text)
    if found != expected:
        raise RuntimeError(f"{folder}: the saved tokenizer reads back differently: {found} instead of {expected}")


def hpd_row(problem: Problem, split: str, index: int, demonstration: str) -> dict[str, Any]:
    """A row of verl's prompt format, with the demonstration that HPD learns from."""
    return {
        "data_source": DATA_SOURCE,
        "prompt": [{"role": "user", "content": problem.prompt}],
        "demonstration": demonstration,
        "ability": "math",
        "reward_model": {"style": "rule", "ground_truth": str(problem.answer)},
        "extra_info": {"split": split, "index": index},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--local_save_dir", type=Path, required=True)
    parser.add_argument("--sft_size", type=int, default=8192, help="demonstrations for supervised fine-tuning")
    parser.add_argument("--train_size", type=int, default=8192, help="problems that the student learns from")
    parser.add_argument("--val_size", type=int, default=256, help="held-out problems")
    parser.add_argument("--error_rate", type=float, default=0.06, help="share of wrong steps in demonstrations")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    folder: Path = args.local_save_dir
    folder.mkdir(parents=True, exist_ok=True)
    rng = random.Random(args.seed)
    held_out: dict[Problem, None] = {}  # a set in a reproducible order
    while len(held_out) < args.val_size:
        held_out[draw_problem(rng)] = None
    excluded = frozenset(held_out)

    rows = [hpd_row(problem, "val", index, demonstrate(problem, rng)) for index, problem in enumerate(held_out)]
    pd.DataFrame(rows).to_parquet(folder / "val.parquet")
    problems = [draw_problem(rng, excluded) for _ in range(args.train_size)]
    rows = [hpd_row(p, "train", index, demonstrate(p, rng, args.error_rate)) for index, p in enumerate(problems)]
    pd.DataFrame(rows).to_parquet(folder / "train.parquet")
    problems = [draw_problem(rng, excluded) for _ in range(args.sft_size)]
    conversations = [
        [{"role": "user", "content": p.prompt}, {"role": "assistant", "content": demonstrate(p, rng)}] for p in problems
    ]
    pd.DataFrame({"messages": conversations}).to_parquet(folder / "sft.parquet")

    tokenizer = build_tokenizer()
    for name, hidden_size in (("teacher", TEACHER_HIDDEN), ("student", STUDENT_HIDDEN)):
        model = build_model(hidden_size, tokenizer, args.seed)
        save(model, tokenizer, folder / f"{name}_init")
        print(f"{name}: {model.num_parameters():,} parameters, vocabulary {len(tokenizer)}")
    print(f"example: {conversations[0][0]['content']}  ->  {conversations[0][1]['content']}")


if __name__ == "__main__":
    main()
