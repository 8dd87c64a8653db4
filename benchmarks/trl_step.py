"""A training step of TRL's GKD trainer on demonstrations: the same models, rows and settings as step.py, elsewhere.

    python benchmarks/trl_step.py --student DIR --teacher DIR --data train.parquet

TRL is in an environment of its own, see README.md here. A step is the forward passes of student and teacher, the
generalised Jensen-Shannon divergence of the whole vocabulary, backward, clipping and AdamW, in float32, all of it
TRL's; the same batch every time. The median and the peak resident set are appended to benchmarks/results/trl_step.csv
with the machine and the versions. It needs Linux.
"""

import argparse
import resource
import statistics
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from datasets import Dataset
from results import append_rows, machine
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback, set_seed
from trl.experimental.gkd import GKDConfig, GKDTrainer

WARM_UP = 2
"""Steps at the start that do not count."""


def read_chats(file: Path) -> list[list[dict[str, str]]]:
    """Prompt and demonstration of each row of a parquet or jsonl file, as one chat."""
    frame = pd.read_parquet(file) if file.suffix == ".parquet" else pd.read_json(file, lines=True)
    chats = []
    for prompt, demonstration in zip(frame["prompt"], frame["demonstration"], strict=True):
        if isinstance(demonstration, str):
            demonstration = [{"role": "assistant", "content": demonstration}]
        chats.append([{"role": turn["role"], "content": turn["content"]} for turn in [*prompt, *demonstration]])
    return chats


def rows_of_length(chats: list[list[dict[str, str]]], tokenizer: Any, count: int, longest: int) -> Dataset:
    """The first chats of at most ``longest`` tokens, in TRL's columns.

    Raises:
        ValueError: there are fewer.
    """
    chosen: list[dict[str, Any]] = []
    for chat in chats:
        if len(chosen) == count:
            break
        text = tokenizer.apply_chat_template(chat, tokenize=False)
        if len(tokenizer(text, add_special_tokens=False)["input_ids"]) <= longest:
            chosen.append({"messages": chat})
    if len(chosen) < count:
        raise ValueError(f"--data: {len(chosen)} rows of at most {longest} tokens, {count} are needed")
    return Dataset.from_list(chosen)


class Timer(TrainerCallback):
    """Seconds of each step, by the clock and of this process on the CPU."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.cpu_seconds: list[float] = []

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.start, self.cpu_start = time.perf_counter(), time.process_time()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.seconds.append(time.perf_counter() - self.start)
        self.cpu_seconds.append(time.process_time() - self.cpu_start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("student", "teacher", "data"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--longest", type=int, default=256, help="tokens of prompt and response")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--steps", type=int, default=10, help=f"training steps, the first {WARM_UP} not counted")
    parser.add_argument("--beta", type=float, default=0.5, help="TRL's: 0 forward KL, 1 reverse KL")
    parser.add_argument("--gradient_checkpointing", action="store_true", help="TRL's default; step.py has none")
    parser.add_argument("--csv", type=Path, default=Path(__file__).parent / "results" / "trl_step.csv")
    args = parser.parse_args()
    if args.steps <= WARM_UP:
        parser.error(f"--steps={args.steps}: give more than {WARM_UP}")

    torch.set_num_threads(args.threads)
    set_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(args.student)
    student, teacher = (
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32) for folder in (args.student, args.teacher)
    )
    rows = rows_of_length(read_chats(args.data), tokenizer, args.rows, args.longest)

    with tempfile.TemporaryDirectory() as folder:
        config = GKDConfig(
            output_dir=folder,
            lmbda=0.0,  # demonstrations only
            beta=args.beta,
            max_length=args.longest,
            per_device_train_batch_size=args.rows,
            gradient_accumulation_steps=1,
            gradient_checkpointing=args.gradient_checkpointing,
            max_steps=args.steps,
            optim="adamw_torch",
            learning_rate=1e-5,
            lr_scheduler_type="constant",
            max_grad_norm=1.0,
            bf16=False,
            use_cpu=True,
            train_sampling_strategy="sequential",
            dataloader_pin_memory=False,
            save_strategy="no",
            report_to="none",
            logging_steps=1,
            disable_tqdm=True,
        )
        timer = Timer()
        trainer = GKDTrainer(
            model=student,
            teacher_model=teacher,
            args=config,
            train_dataset=rows,
            processing_class=tokenizer,
            callbacks=[timer],
        )
        trainer.train()

    batch = trainer.data_collator(list(rows))
    seconds, cpu_seconds = timer.seconds[WARM_UP:], timer.cpu_seconds[WARM_UP:]
    row = {
        **machine(),
        "transformers": version("transformers"),
        "trl": version("trl"),
        "threads": args.threads,
        "student": args.student.name,
        "teacher": args.teacher.name,
        "rows": args.rows,
        "tokens": int(batch["attention_mask"].sum()),
        "padded_tokens": batch["attention_mask"].numel(),
        "response_tokens": int((batch["labels"] != -100).sum()),
        "beta": args.beta,
        "gradient_checkpointing": student.is_gradient_checkpointing,
        "steps": len(seconds),
        "seconds": round(statistics.median(seconds), 4),
        "cpu_seconds": round(statistics.median(cpu_seconds), 4),
        "peak_rss_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),  # Linux counts KiB
    }
    append_rows(args.csv, [row])
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    print(
        f"{row['seconds']:.3f} s per training step, median of {len(seconds)} "
        f"({min(seconds):.3f} to {max(seconds):.3f}; {row['cpu_seconds']:.3f} s on the CPU)"
    )
    print(f"{row['tokens']} tokens, {row['padded_tokens']} with padding, {row['response_tokens']} of responses")
    print(f"peak resident set {row['peak_rss_gib']} GiB, loss {losses[0]} -> {losses[-1]}")


if __name__ == "__main__":
    main()
