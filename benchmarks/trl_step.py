"""Seconds per training step of TRL's GKD trainer, off-policy, on a CPU: a number of another project to compare with.

Runs in an environment of its own, see README.md here. Of every row the chat of prompt and demonstration is trained on;
rows longer than ``--max_tokens`` are left out, so that nothing is cut; their order is the file's.

    python benchmarks/trl_step.py --student STUDENT --teacher TEACHER --data train.parquet --csv trl_step.csv

A step is forward of student and teacher, TRL's divergence of the whole vocabulary (``beta``), backward, clipping to
norm 1 and AdamW, in float32, from ``on_step_begin`` to ``on_step_end`` of the trainer.
"""

import argparse
import csv
import datetime
import os
import platform
import resource
import statistics
import subprocess
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from datasets import Dataset
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


def choose_rows(chats: list[list[dict[str, str]]], tokenizer: Any, max_tokens: int, count: int) -> Dataset:
    """The first ``count`` chats of at most ``max_tokens`` tokens, in TRL's columns.

    Raises:
        ValueError: there are fewer.
    """
    chosen: list[dict[str, Any]] = []
    for chat in chats:
        if len(chosen) == count:
            break
        text = tokenizer.apply_chat_template(chat, tokenize=False)
        if len(tokenizer(text, add_special_tokens=False)["input_ids"]) <= max_tokens:
            chosen.append({"messages": chat})
    if len(chosen) < count:
        raise ValueError(f"--data: {len(chosen)} rows of at most {max_tokens} tokens, {count} are needed")
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


class CountingCollator:
    """The trainer's collator, with a count of what the batches hold."""

    def __init__(self, collate: Any) -> None:
        self.collate = collate
        self.batches: list[tuple[int, int, int]] = []
        """``(tokens, tokens with padding, tokens that have a loss)``."""

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        batch = self.collate(rows)
        mask, labels = batch["attention_mask"], batch["labels"]
        self.batches.append((int(mask.sum()), mask.numel(), int((labels[:, 1:] != -100).sum())))
        return batch


def cpu_model() -> str:
    """The processor's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def commit() -> str:
    """The checkout's commit, "+" with changes; empty without git."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty=+", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def append_row(file: Path, row: dict[str, Any]) -> None:
    """Add a row to a CSV file, with a header if the file is new."""
    file.parent.mkdir(parents=True, exist_ok=True)
    is_new = not file.exists()
    with file.open("a", newline="") as stream:
        writer = csv.DictWriter(stream, list(row), lineterminator="\n")
        if is_new:
            writer.writeheader()
        writer.writerow(row)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--student", type=Path, required=True, help="model folder, with the tokenizer")
    parser.add_argument("--teacher", type=Path, required=True, help="model folder")
    parser.add_argument("--data", type=Path, required=True, help="parquet or jsonl with prompt and demonstration")
    parser.add_argument("--steps", type=int, default=10, help=f"training steps, the first {WARM_UP} not counted")
    parser.add_argument("--batch_size", type=int, default=4, help="rows of a step")
    parser.add_argument("--max_tokens", type=int, default=256, help="longer rows are left out")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of torch")
    parser.add_argument("--beta", type=float, default=0.5, help="TRL's: 0 forward KL, 1 reverse KL")
    parser.add_argument("--gradient_checkpointing", action="store_true", help="TRL's default; slower, less memory")
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
    rows = choose_rows(read_chats(args.data), tokenizer, args.max_tokens, args.steps * args.batch_size)

    with tempfile.TemporaryDirectory() as folder:
        config = GKDConfig(
            output_dir=folder,
            lmbda=0.0,  # demonstrations only
            beta=args.beta,
            max_length=args.max_tokens,
            per_device_train_batch_size=args.batch_size,
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
        collator = CountingCollator(trainer.data_collator)
        trainer.data_collator = collator
        trainer.train()

    seconds, cpu_seconds = timer.seconds[WARM_UP:], timer.cpu_seconds[WARM_UP:]
    tokens, padded, with_loss = (
        statistics.mean(values) for values in zip(*collator.batches[WARM_UP : args.steps], strict=True)
    )
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    row = {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "commit": commit(),
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "threads": args.threads,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "trl": version("trl"),
        "student_parameters": student.num_parameters(),
        "teacher_parameters": teacher.num_parameters(),
        "batch_size": args.batch_size,
        "max_tokens": args.max_tokens,
        "mean_tokens": round(tokens),
        "mean_tokens_padded": round(padded),
        "mean_response_tokens": round(with_loss),
        "beta": args.beta,
        "gradient_checkpointing": student.is_gradient_checkpointing,
        "steps": args.steps,
        "first_loss": f"{losses[0]:.4f}",
        "last_loss": f"{losses[-1]:.4f}",
        "step_seconds_median": f"{statistics.median(seconds):.3f}",
        "step_seconds_min": f"{min(seconds):.3f}",
        "step_seconds_max": f"{max(seconds):.3f}",
        "step_cpu_seconds_median": f"{statistics.median(cpu_seconds):.3f}",
        "peak_rss_gib": f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f}",  # Linux counts KiB
    }
    append_row(args.csv, row)
    print(
        f"{row['step_seconds_median']} s per training step (median of {len(seconds)}, {row['step_seconds_min']} to "
        f"{row['step_seconds_max']}; on the CPU {row['step_cpu_seconds_median']}), {tokens:.0f} tokens of which {with_loss:.0f} have a loss, {padded:.0f} with "
        f"padding; peak RSS {row['peak_rss_gib']} GiB; loss {row['first_loss']} -> {row['last_loss']}"
    )
    print(f"row appended to {args.csv}")


if __name__ == "__main__":
    main()
