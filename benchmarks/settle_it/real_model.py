"""A real model and a real vocabulary: SmolLM2-135M-Instruct teaches every second layer of itself, on GSM8K.

    python examples/quickstart/make_smollm2.py --local_save_dir models
    python -m data_prep.gsm8k --local_dataset_path GSM8K --local_save_dir data
    python benchmarks/settle_it/real_model.py --models models --data data

The lean trainer by its command, stored teacher features, the same short rows and steps for every method. Measured on
held-out rows: negative log-likelihood, exact divergences from the teacher and entropy, nats a response token.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
os.environ |= {"VERL_PLATFORM": "cpu", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}

import pandas as pd  # noqa: E402
import torch  # noqa: E402
from torch import Tensor  # noqa: E402
from tqdm import tqdm  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402

from settle_it.results import FOLDER  # noqa: E402

CANDIDATES = Path(__file__).resolve().with_name("candidates.py")
METHODS: dict[str, dict[str, Any]] = {
    "hpd": {"objective": "hpd"},
    "fkl": {"objective": "fkl"},
    "sft": {"objective": "sft"},
    "fkl T2": {"objective": "fkl", "temperature": 2},
    "hpd_no_sampling": {"objective": "hpd", "student_sampling": False},
    "rkl": {"objective": "rkl"},
    "rkl_exact": {"objective": "rkl_exact"},
    "jsd_exact": {"objective": "jsd_exact"},
    "two_temperatures 0.5 T2": {
        "objective": f"{CANDIDATES}:two_temperatures",
        "temperature": 2,
        "two_temperatures.temperature": 2,
        "two_temperatures.share": 0.5,
    },
    "tempered_head T2": {"objective": f"{CANDIDATES}:tempered_head"},
}
BATCH_SIZE, MAX_PROMPT, MAX_RESPONSE = 2, 112, 64


def train(folder: Path, models: Path, rows: Path, method: str, steps: int, rate: float) -> tuple[Path, float]:
    """Train by the lean trainer's command; returns the Hugging Face folder and the CPU time in seconds.

    Raises:
        RuntimeError: the run failed; the message has the end of its output.
    """
    settings = METHODS[method]
    overrides = {
        "model.path": models / "student",
        "teacher.model.path": "null" if settings["objective"] == "sft" else models / "teacher",
        "data.train_files": rows,
        "data.train_batch_size": BATCH_SIZE,
        "data.max_prompt_length": MAX_PROMPT,
        "data.max_response_length": MAX_RESPONSE,
        "data.max_token_len_per_gpu": BATCH_SIZE * (MAX_PROMPT + MAX_RESPONSE),
        "model.enable_gradient_checkpointing": False,
        "optim.lr": rate,
        "checkpoint.save_contents": "[hf_model]",
        "checkpoint.load_contents": "[]",
        "trainer.default_local_dir": folder,
        "trainer.logger": "[file]",
        "trainer.total_training_steps": steps,
        "trainer.total_epochs": 1000,
        "trainer.save_freq": -1,
        "trainer.resume_mode": "disable",
        "algorithm.hpd.teacher_cache": "off" if settings["objective"] == "sft" else "disk",
        "algorithm.hpd.teacher_cache_dir": folder.parent / f"store_{settings.get('temperature', 1)}",
        "algorithm.hpd.teacher_cache_max_gib": 4,
    }
    command = ["torchrun", "--standalone", "--nproc_per_node=1", "-m", "hpd_verl.sft.trainer"]
    command += [f"{name}={value}" for name, value in overrides.items()]
    command += [f"++algorithm.hpd.{name}={value}" for name, value in settings.items()]
    folder.mkdir(parents=True, exist_ok=True)
    environment = os.environ | {"VERL_FILE_LOGGER_PATH": str(folder / "metrics.jsonl"), "PYTHONPATH": str(ROOT)}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    with open(folder / "log", "w") as log:
        done = subprocess.run(command, cwd=folder, env=environment, stdout=log, stderr=subprocess.STDOUT)
    if done.returncode != 0:
        end = (folder / "log").read_text()[-2000:]
        raise RuntimeError(f"{method}: the trainer ended with {done.returncode}: {end}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return folder / f"global_step_{steps}" / "huggingface", seconds


def encode(tokenizer: Any, row: dict[str, Any]) -> tuple[list[int], list[int]]:
    """Token ids of a row's prompt and of its demonstration."""
    prompt = tokenizer.apply_chat_template(list(row["prompt"]), add_generation_prompt=True, return_dict=False)
    return prompt, [*tokenizer.encode(row["demonstration"], add_special_tokens=False), tokenizer.eos_token_id]


def short_rows(file: Path, tokenizer: Any, count: int) -> pd.DataFrame:
    """The first rows that a CPU trains on in seconds."""
    short = []
    for row in pd.read_parquet(file).to_dict("records"):
        prompt, answer = encode(tokenizer, row)
        if len(prompt) <= MAX_PROMPT and len(answer) <= MAX_RESPONSE:
            short.append(row)
        if len(short) == count:
            break
    return pd.DataFrame(short)


class HeldOut:
    """Held-out demonstrations and what the teacher says of them.

    Args:
        teacher: its folder.
        rows: a parquet file.
    """

    def __init__(self, teacher: Path, rows: Path) -> None:
        tokenizer = AutoTokenizer.from_pretrained(teacher)
        self.rows: list[tuple[Tensor, Tensor]] = []
        """Token ids of prompt and answer, [1, tokens]; the answer's, [labels, 1]."""
        for row in pd.read_parquet(rows).to_dict("records"):
            prompt, answer = encode(tokenizer, row)
            labels = torch.tensor(answer)
            self.rows.append((torch.cat([torch.tensor(prompt), labels]).unsqueeze(0), labels.unsqueeze(1)))
        self.tokens = sum(len(labels) for _, labels in self.rows)
        self.teacher_logits = list(self._logits(teacher))

    @torch.no_grad()
    def _logits(self, folder: Path) -> Iterator[Tensor]:
        """Of the positions before the labels, [labels, vocabulary], row by row."""
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        for ids, labels in self.rows:
            yield model(ids, logits_to_keep=len(labels) + 1).logits[0, :-1]

    def measure(self, student: Path) -> dict[str, float]:
        """NLL, KL(p, q), KL(q, p) and entropy, nats a token."""
        sums = torch.zeros(4, dtype=torch.float64)
        for (_, labels), teacher, logits in zip(self.rows, self.teacher_logits, self._logits(student), strict=True):
            log_q, log_p = logits.log_softmax(-1), teacher.log_softmax(-1)
            difference = log_p - log_q
            parts = [
                -log_q.gather(1, labels),
                (log_p.exp() * difference).sum(-1),
                -(log_q.exp() * difference).sum(-1),
                -(log_q.exp() * log_q).sum(-1),
            ]
            sums += torch.stack([part.double().sum() for part in parts])
        return dict(zip(("nll", "forward_kl", "reverse_kl", "entropy"), (sums / self.tokens).tolist(), strict=True))

    def tail_mass(self, temperature: float) -> float:
        """The teacher's mass beyond its 100 likeliest tokens, a mean over tokens."""
        likely = [(each / temperature).softmax(-1).topk(100).values.double().sum() for each in self.teacher_logits]
        return 1 - float(torch.stack(likely).sum()) / self.tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, required=True, help="folders teacher and student")
    parser.add_argument("--data", type=Path, required=True, help="train.parquet and test.parquet")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "settle_it" / "run" / "real_model")
    parser.add_argument("--results", type=Path, default=FOLDER / "real_model.json")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--rate", type=float, default=3e-4)
    parser.add_argument("--rows", type=int, default=400, help="demonstrations")
    parser.add_argument("--held_out", type=int, default=32, help="rows to measure on")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    arguments = parser.parse_args()
    out: Path = arguments.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    models = arguments.models.resolve()
    train_rows, held_out_rows = out / "train.parquet", out / "held_out.parquet"
    tokenizer = AutoTokenizer.from_pretrained(models / "teacher")
    for rows, source, count in (
        (train_rows, "train.parquet", arguments.rows),
        (held_out_rows, "test.parquet", arguments.held_out),
    ):
        short_rows(arguments.data / source, tokenizer, count).to_parquet(rows)
    results = json.loads(arguments.results.read_text()) if arguments.results.exists() else {}
    setting = {name: getattr(arguments, name) for name in ("steps", "rate", "rows", "held_out")}
    if results.setdefault("setting", setting) != setting:
        parser.error(f"{arguments.results} is of {results['setting']}, not {setting}: choose another file")
    held_out = HeldOut(models / "teacher", held_out_rows)
    for name in ("teacher", "student"):
        if name not in results:
            results[name] = held_out.measure(models / name)
    for temperature in (1.0, 2.0):
        results["teacher"][f"tail_mass_T{temperature:g}"] = held_out.tail_mass(temperature)
    for method in tqdm([name for name in arguments.methods if name not in results], unit="method"):
        trained, seconds = train(
            out / method.replace(" ", "_"), models, train_rows, method, arguments.steps, arguments.rate
        )
        results[method] = held_out.measure(trained) | {"cpu_seconds": round(seconds)}
        arguments.results.parent.mkdir(parents=True, exist_ok=True)
        arguments.results.write_text(json.dumps(results, indent=1) + "\n")
    print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
