"""The teacher and the students, and the trainer that makes both: ``hpd_verl.sft.trainer``, in this process.

Importing verl costs more than a short run of it, so that one process runs many jobs through the same trainer class.
"""

import contextlib
import functools
import hashlib
import os
import random
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from settle_it import task

TEACHER_HIDDEN, STUDENT_HIDDEN = 80, 48
LAYERS, HEADS, HEAD_SIZE = 2, 2, 32
"""vLLM's CPU attention knows no smaller heads."""


def build_model(folder: Path, hidden_size: int, seed: int, initializer_range: float = 0.02) -> Path:
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
        head_dim=HEAD_SIZE,
        initializer_range=initializer_range,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def with_weights(folder: Path, weights: Path) -> Path:
    """A model of this shape with other weights, of a safetensors file."""
    shutil.copyfile(weights, folder / "model.safetensors")
    return folder


def fingerprint(folder: Path) -> str:
    """By which results tell whether they started from the same model."""
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()[:8]


def widen(folder: Path, source: Path, vocabulary: int, seed: int) -> Path:
    """A copy of a model whose vocabulary has further tokens, with random embeddings."""
    model = load(source)
    words, hidden_size = model.get_input_embeddings().weight.shape
    torch.manual_seed(seed)
    model.resize_token_embeddings(vocabulary, mean_resizing=False)
    with torch.no_grad():
        # As long as the others are, so that at the start they are as likely as a word that does not fit.
        deviation = model.get_input_embeddings().weight[:words].std()
        model.get_input_embeddings().weight[words:] = deviation * torch.randn(vocabulary - words, hidden_size)
    model.save_pretrained(folder)
    task.build_tokenizer(vocabulary).save_pretrained(folder)
    return folder


@functools.cache
def _ranks() -> None:
    """One rank, this process."""
    from verl.utils.distributed import initialize_global_process_group

    from hpd_verl.sft.start import ALONE

    os.environ.update(ALONE)
    initialize_global_process_group()


@contextlib.contextmanager
def _said_to(file: Path) -> Iterator[None]:
    """What is printed meanwhile goes into a file."""
    with open(file, "w") as stream, contextlib.redirect_stdout(stream), contextlib.redirect_stderr(stream):
        yield


class RememberedRows(Dataset[dict[str, Tensor]]):
    """The trainer's rows, each made of its text once: here every row is seen dozens of times.

    Args:
        rows: the trainer's.
    """

    def __init__(self, rows: Any) -> None:
        self.rows = rows.rows  # whose counts the trainer logs
        self._made = functools.cache(rows.__getitem__)
        self._length = len(rows)

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return self._made(index)


@contextlib.contextmanager
def _whole_batches() -> Iterator[None]:
    """A batch that is one mini-batch and one micro-batch is handed on as it is.

    verl unbinds and joins every nested tensor to split it into one piece, twice a step, which takes a third of a step
    of models as small as these and changes nothing.
    """
    from verl.utils import tensordict_utils

    chunk, select = tensordict_utils.chunk_tensordict, tensordict_utils.index_select_tensor_dict

    def chunked(batch: Any, chunks: int) -> Any:
        return [batch.copy()] if chunks == 1 else chunk(batch, chunks)

    def selected(batch: Any, indices: Any) -> Any:
        whole = [int(index) for index in indices] == list(range(len(batch)))
        return batch.copy() if whole else select(batch, indices)

    with (
        mock.patch.object(tensordict_utils, "chunk_tensordict", chunked),
        mock.patch.object(tensordict_utils, "index_select_tensor_dict", selected),
    ):
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
    save_every: int = -1,
    self_taught: bool = False,
    longest_prompt: int = task.MAX_PROMPT_LENGTH,
) -> list[Path]:
    """Train by the lean trainer.

    Args:
        folder: for the run; ``metrics.jsonl`` there has every step.
        student, teacher: model folders; no teacher where the objective needs none.
        rows: a parquet file.
        steps, batch_size, rate, seed, clip_grad: of the training.
        settings: of ``algorithm.hpd``.
        save_every: steps between checkpoints; -1 for one, at the end.
        self_taught: the teacher is the student, and reads the demonstration behind the problem.
        longest_prompt: of the student, tokens.

    Returns:
        The Hugging Face folders of the checkpoints, the last one at the end.
    """
    from hydra import compose, initialize_config_dir

    from hpd_verl.hydra_config import config_dir
    from hpd_verl.run.stopping import StopSignals
    from hpd_verl.sft.start import checked
    from hpd_verl.sft.trainer import HPDSFTTrainer

    class Trainer(HPDSFTTrainer):
        def _read(self, files: Any, max_samples: int) -> Any:
            return RememberedRows(super()._read(files, max_samples))

    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    os.environ["VERL_FILE_LOGGER_PATH"] = str(folder / "metrics.jsonl")
    overrides = {
        "model.path": student,
        "model.enable_gradient_checkpointing": False,
        "teacher.model.path": teacher or "null",
        "data.train_files": rows,
        "data.train_batch_size": batch_size,
        "data.max_prompt_length": longest_prompt,
        "data.max_response_length": task.MAX_RESPONSE_LENGTH,
        "data.use_dynamic_bsz": False,
        "data.micro_batch_size_per_gpu": batch_size,
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
        "trainer.save_freq": save_every,
        "trainer.resume_mode": "disable",
        "algorithm.hpd.seed": seed,
        # Its features of few rows, once; in float32 they are what the teacher says at each step.
        "algorithm.hpd.teacher_cache": "memory" if teacher else "off",
        "algorithm.hpd.teacher_cache_dtype": "float32",
    }
    if self_taught:
        overrides |= {
            "teacher.model.path": "student",
            "data.teacher_prompt_template": f"'{task.WITH_SOLUTION}'",
            "data.max_teacher_prompt_length": task.MAX_LENGTH_WITH_SOLUTION,
            "algorithm.hpd.teacher_cache": "memory",
        }
    named = [f"{name}={value}" for name, value in overrides.items()]
    named += [f"++algorithm.hpd.{name}={value}" for name, value in settings.items()]
    _ranks()
    with _said_to(folder / "log"), initialize_config_dir(str(config_dir()), version_base=None), _whole_batches():
        config = compose("sft_trainer", overrides=named)
        checked(config)
        Trainer(config).fit(StopSignals(ask=lambda: False))
    checkpoints = sorted(folder.glob("global_step_*"), key=lambda path: int(path.name.rsplit("_", 1)[1]))
    return [path / "huggingface" for path in checkpoints]


def load(folder: Path) -> Any:
    """A model of a folder, for measuring."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def make_teacher(folder: Path, problems: list[task.Problem], steps: int, rounds: int, round_steps: int) -> Path:
    """A teacher that is better than its demonstrations: trained on them, then on its own correct answers."""
    rng = random.Random(0)
    rows = folder / "demonstrations.parquet"
    task.write(rows, [task.row(problem, task.demonstrate(problem, rng)) for problem in problems])
    model = build_model(folder / "init", TEACHER_HIDDEN, seed=0)
    sft = {"objective": "sft"}
    *_, model = train(folder / "sft", model, None, rows, steps, 64, 3e-3, 0, sft)
    for number in range(rounds):
        rows = own_answers(folder / f"correct_{number}.parquet", model, problems, seed=number)
        *_, model = train(folder / f"round_{number}", model, None, rows, round_steps, 64, 1e-3, number, sft)
    return model


def own_answers(file: Path, model: Path, problems: list[task.Problem], seed: int) -> Path:
    """Rows of a model's own correct answers, those of four samples that differ."""
    from settle_it.measures import sample

    answers = sample(load(model), problems, samples=4, temperature=1.0, top_p=1.0, seed=seed)
    correct = [
        task.row(problem, text)
        for problem, texts in zip(problems, answers, strict=True)
        for text in dict.fromkeys(text for text in texts if task.score(problem, text))
    ]
    task.write(file, correct)
    return file
