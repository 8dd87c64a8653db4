"""The teacher and the students, and the trainer that makes both: ``hpd_verl.sft_trainer``, in this process.

Importing verl costs more than a short run of it, so that one process runs many jobs through the same trainer class.
"""

import contextlib
import functools
import os
import random
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from settle_it import task

TEACHER_HIDDEN, STUDENT_HIDDEN = 80, 48
LAYERS, HEADS = 2, 2


def build_model(folder: Path, hidden_size: int, seed: int) -> Path:
    """A random Llama with the task's tokenizer."""
    tokenizer = task.build_tokenizer()
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=3 * hidden_size,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@functools.cache
def _ranks() -> None:
    """One rank, this process."""
    from verl.utils.distributed import initialize_global_process_group

    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    os.environ.update(alone)
    initialize_global_process_group()


@contextlib.contextmanager
def _said_to(file: Path) -> Iterator[None]:
    """What is printed meanwhile goes into a file."""
    with open(file, "w") as stream, contextlib.redirect_stdout(stream), contextlib.redirect_stderr(stream):
        yield


def train(
    folder: Path,
    student: Path,
    teacher: Path | None,
    rows: Path,
    steps: int,
    batch_size: int,
    rate: float,
    seed: int,
    settings: Mapping[str, Any],
    clip_grad: float = 1.0,
) -> Path:
    """Train by the lean trainer; returns the Hugging Face folder. ``folder/metrics.jsonl`` has every step."""
    from hydra import compose, initialize_config_dir

    from hpd_verl.hydra_config import config_dir
    from hpd_verl.lean import checked
    from hpd_verl.sft_trainer import HPDSFTTrainer
    from hpd_verl.stopping import StopSignals

    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    os.environ["VERL_FILE_LOGGER_PATH"] = str(folder / "metrics.jsonl")
    overrides = {
        "model.path": student,
        "model.enable_gradient_checkpointing": False,
        "teacher.model.path": teacher or "null",
        "data.train_files": rows,
        "data.train_batch_size": batch_size,
        "data.max_prompt_length": task.MAX_PROMPT_LENGTH,
        "data.max_response_length": task.MAX_RESPONSE_LENGTH,
        "data.max_token_len_per_gpu": batch_size * (task.MAX_PROMPT_LENGTH + task.MAX_RESPONSE_LENGTH),
        "data.seed": seed,
        "optim.lr": rate,
        "optim.clip_grad": clip_grad,
        "optim.lr_warmup_steps_ratio": 0.05,
        "checkpoint.save_contents": "[hf_model]",
        "checkpoint.load_contents": "[]",
        "trainer.default_local_dir": folder,
        "trainer.logger": "[file]",
        "trainer.total_training_steps": steps,
        "trainer.total_epochs": 100_000,  # the steps decide
        "trainer.save_freq": -1,
        "trainer.resume_mode": "disable",
        "algorithm.hpd.seed": seed,
        **{f"algorithm.hpd.{name}": value for name, value in settings.items()},
    }
    _ranks()
    with _said_to(folder / "log"), initialize_config_dir(str(config_dir()), version_base=None):
        config = compose("sft_trainer", overrides=[f"{name}={value}" for name, value in overrides.items()])
        checked(config)
        HPDSFTTrainer(config).fit(StopSignals(ask=lambda: False))
    return folder / f"global_step_{steps}" / "huggingface"


def load(folder: Path) -> Any:
    """A model of a folder, for measuring."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def make_teacher(folder: Path, problems: list[task.Problem], steps: int, rounds: int, round_steps: int) -> Path:
    """A teacher that is better than its demonstrations: trained on them, then on its own correct answers."""
    from settle_it.measures import sample

    rng = random.Random(0)
    rows = folder / "demonstrations.parquet"
    task.write(rows, [task.row(problem, task.demonstrate(problem, rng)) for problem in problems])
    model = build_model(folder / "init", TEACHER_HIDDEN, seed=0)
    sft = {"objective": "sft"}
    model = train(folder / "sft", model, None, rows, steps, 64, 3e-3, 0, sft)
    for number in range(rounds):
        answers = sample(load(model), problems, samples=4, temperature=1.0, top_p=1.0, seed=number)
        correct = [
            task.row(problem, text)
            for problem, texts in zip(problems, answers, strict=True)
            for text in dict.fromkeys(text for text in texts if task.score(problem, text))
        ]
        rows = folder / f"correct_{number}.parquet"
        task.write(rows, correct)
        model = train(folder / f"round_{number}", model, None, rows, round_steps, 64, 1e-3, number, sft)
    return model
