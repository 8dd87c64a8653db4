"""The planner's memory estimate against measured runs.

    python benchmarks/memory.py

Random Llama models, trained for two steps by the lean trainer on a CPU; the largest resident memory of a rank beyond
that of a run of the smallest models, against ``hpd-verl plan --platform cpu`` for the same settings. Rows go
to benchmarks/results/memory.csv. One thing at a time differs from the first point.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd
import psutil
import torch
from results import append_rows, machine
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from hpd_verl.sft.start import ALONE
from hpd_verl.tools.plan.memory import plan_memory
from hpd_verl.tools.plan.model_size import model_size, read_config
from hpd_verl.tools.plan.run import PlannedRun

ROOT = Path(__file__).resolve().parents[1]
WORDS = ["<pad>", "<end>", "<turn>", "user", "assistant", *map(str, range(100))]
TEMPLATE = (
    "{% for m in messages %}<turn> {{ m['role'] }} {{ m['content'] }} <end> {% endfor %}"
    "{% if add_generation_prompt %}<turn> assistant {% endif %}"
)
PROMPT, RESPONSE = 16, 240
"""Tokens of each row, the template's included."""


@dataclass(frozen=True)
class Point:
    """One run."""

    name: str = "base"
    student: tuple[int, int, int] = (512, 8, 32_768)
    """Hidden size, layers, vocabulary."""
    teacher: tuple[int, int, int] | None = (512, 16, 32_768)
    gpus: int = 1
    rows: int = 8
    tokens: int = 8 * (PROMPT + RESPONSE)
    gradient_checkpointing: bool = True
    lora_rank: int = 0

    def run(self) -> PlannedRun:
        """The planner's settings."""
        return PlannedRun(
            platform="cpu",
            trainer="lean",
            gpus=self.gpus,
            batch_size=self.rows,
            tokens=self.tokens,
            prompt_tokens=PROMPT,
            response_tokens=RESPONSE,
            gradient_checkpointing=self.gradient_checkpointing,
            lora_rank=self.lora_rank,
            teacher_dtype="fp32",
        )


BASE = Point()
POINTS = [
    BASE,
    replace(BASE, name="no gradient checkpointing", gradient_checkpointing=False),
    replace(BASE, name="micro-batches of a quarter", tokens=BASE.tokens // 4),
    replace(BASE, name="twice the rows", rows=16, tokens=2 * BASE.tokens),
    replace(BASE, name="no teacher", teacher=None),
    replace(BASE, name="teacher twice as wide", teacher=(1024, 16, 32_768)),
    replace(BASE, name="vocabulary 131,072", student=(512, 8, 131_072), teacher=(512, 16, 131_072)),
    replace(BASE, name="LoRA of rank 16", lora_rank=16),
    replace(BASE, name="2 ranks", gpus=2, rows=16),
]
SMALLEST = replace(BASE, student=(64, 1, 128), teacher=(64, 1, 128), tokens=PROMPT + RESPONSE, rows=2)
"""Its resident memory is that of the libraries."""


def make_model(folder: Path, hidden: int, layers: int, vocabulary: int) -> Path:
    """A random model with its tokenizer, once."""
    path = folder / f"h{hidden}_l{layers}_v{vocabulary}"
    if path.exists():
        return path
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=max(1, hidden // 64),
        num_key_value_heads=max(1, hidden // 128),
        tie_word_embeddings=False,
        eos_token_id=1,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(path)
    words = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>", pad_token="<pad>")
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(path)
    return path


def make_data(folder: Path) -> Path:
    """Rows of one length."""
    file = folder / "train.parquet"
    question = " ".join("1" for _ in range(PROMPT - 5))
    answer = " ".join(str(index % 100) for index in range(RESPONSE - 1))
    row: dict[str, Any] = {"prompt": [{"role": "user", "content": question}], "demonstration": answer}
    pd.DataFrame([row] * 64).to_parquet(file)
    return file


def peak_of_ranks(command: list[str], folder: Path) -> int:
    """Run a command; the largest resident memory that one of its processes reached, bytes.

    The C library gives back at once what is freed: hundreds of MiB of its heap would count otherwise.
    """
    environment = {**ALONE, **os.environ, "VERL_PLATFORM": "cpu", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    environment |= dict.fromkeys(("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_"), "65536")
    peak = 0
    log = folder / "run.log"
    with open(log, "w") as stream:
        process = psutil.Popen(command, cwd=folder, env=environment, stdout=stream, stderr=subprocess.STDOUT)
        while process.poll() is None:
            for each in [process, *process.children(recursive=True)]:
                try:
                    lines = Path(f"/proc/{each.pid}/status").read_text().splitlines()
                except (FileNotFoundError, ProcessLookupError):
                    continue  # it has ended
                peak = max([peak, *(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))])
            time.sleep(0.1)
    if process.returncode != 0:
        sys.exit(f"{' '.join(command)}\n{log.read_text()[-3000:]}")
    return peak


def measure(point: Point, folder: Path, data: Path) -> tuple[int, Path, Path | None]:
    """Peak of a rank, bytes, and the folders of student and teacher."""
    student = make_model(folder, *point.student)
    teacher = None if point.teacher is None else make_model(folder, *point.teacher)
    ranks = ("torch.distributed.run", "--standalone", f"--nproc_per_node={point.gpus}", "-m") if point.gpus > 1 else ()
    command = [
        *(sys.executable, "-m", *ranks, "hpd_verl.sft.trainer", f"model.path={student}", f"data.train_files={data}"),
        "algorithm.hpd.objective=sft" if teacher is None else f"teacher.model.path={teacher}",
        f"data.train_batch_size={point.rows}",
        f"data.max_token_len_per_gpu={point.tokens}",
        f"data.max_prompt_length={PROMPT}",
        f"data.max_response_length={RESPONSE}",
        f"model.enable_gradient_checkpointing={point.gradient_checkpointing}",
        f"model.lora_rank={point.lora_rank}",
        *("trainer.total_training_steps=2", "trainer.save_freq=-1", "trainer.resume_mode=disable"),
        f"trainer.default_local_dir={folder / 'checkpoints'}",
        "checkpoint.save_contents=[]",
    ]
    return peak_of_ranks(command, folder), student, teacher


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", help="names of some points")
    parser.add_argument("--csv", type=Path, default=ROOT / "benchmarks" / "results" / "memory.csv")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = make_data(folder)
        baseline = measure(SMALLEST, folder, data)[0]
        print(f"libraries alone: {baseline / 2**20:,.0f} MiB", flush=True)
        for point in POINTS:
            if arguments.only and point.name not in arguments.only:
                continue
            peak, student, teacher = measure(point, folder, data)
            sizes = [
                None if each is None else model_size(each.name, read_config(str(each))) for each in (student, teacher)
            ]
            assert sizes[0] is not None
            plan = plan_memory(sizes[0], sizes[1], point.run())
            measured = peak - baseline
            row = {
                **machine(),
                **{name: str(value) for name, value in asdict(point).items()},
                "measured_mib": round(measured / 2**20),
                "planned_mib": round(plan.peak / 2**20),
                "phase": plan.peak_phase,
                "ratio": round(plan.peak / measured, 3),
            }
            print(
                f"{point.name:28} {row['measured_mib']:>7,} MiB, planned {row['planned_mib']:>7,} MiB, "
                f"{row['ratio']:.2f}, {row['phase']}",
                flush=True,
            )
            append_rows(arguments.csv, [row])


if __name__ == "__main__":
    main()
