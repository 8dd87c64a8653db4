"""Errors of the teacher's store: gradient and loss of HPD with stored features, on real text.

    python benchmarks/store.py --student DIR --teacher DIR --data train.parquet

Per batch of rows, the gradient in all of the student's parameters with the teacher's features as computed (exact),
rounded as the store keeps them (hidden in bfloat16), and cut to K log-probs; the draws are the same. For scale, the
exact gradient with other draws. Relative differences are |g - g_exact| / |g_exact|; means over batches are appended to
benchmarks/results/store.csv. A student that knows the task says more than a fresh one: its gaps are small.
"""

import argparse
import os
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]
os.environ.setdefault("VERL_PLATFORM", "cpu")

import torch  # noqa: E402
from results import append_rows, machine  # noqa: E402
from torch import Tensor  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402

from hpd_verl.config import HPDConfig  # noqa: E402
from hpd_verl.engine.causal_lm import offer_head  # noqa: E402
from hpd_verl.head.distillation_head import HeadOutput, distillation_head  # noqa: E402
from hpd_verl.head.features import TeacherFeatures, teacher_features, teacher_top_k  # noqa: E402
from hpd_verl.head.output_head import OutputHead  # noqa: E402
from hpd_verl.head.sampling import counter_uniform  # noqa: E402

CONFIG = HPDConfig()


def sequences(tokenizer: Any, file: Path, rows: int, longest: int) -> list[tuple[Tensor, int]]:
    """``(token ids, prompt length)`` of the first rows of at most ``longest`` tokens."""
    import pandas as pd

    found = []
    for row in pd.read_parquet(file).to_dict("records"):
        prompt = tokenizer.apply_chat_template(list(row["prompt"]), tokenize=False, add_generation_prompt=True)
        prompt_ids = tokenizer.encode(prompt, add_special_tokens=False)
        answer = [*tokenizer.encode(row["demonstration"], add_special_tokens=False), tokenizer.eos_token_id]
        if len(prompt_ids) + len(answer) <= longest:
            found.append((torch.tensor(prompt_ids + answer), len(prompt_ids)))
        if len(found) == rows:
            return found
    raise SystemExit(f"{file}: only {len(found)} rows of at most {longest} tokens")


class Comparison:
    """One student and one teacher, and the gradients of the first."""

    def __init__(self, student: Path, teacher: Path, top_k: int) -> None:
        self.student = AutoModelForCausalLM.from_pretrained(student, dtype=torch.float32)
        self.teacher = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float32).eval()
        self.vocabulary_size = min(self.student.config.vocab_size, self.teacher.config.vocab_size)
        self.top_k = top_k
        for model in (self.student, self.teacher):
            offer_head(model, self.vocabulary_size)

    @torch.no_grad()
    def features(self, ids: Tensor, prompt: int) -> dict[str, TeacherFeatures]:
        labels = ids[prompt:]

        def head(hidden: Tensor, layer: OutputHead) -> dict[str, TeacherFeatures]:
            hidden = hidden[0, prompt - 1 : -1]
            exact = teacher_features(hidden, layer, labels, CONFIG.temperature, CONFIG.token_chunk_size)
            rounded = teacher_features(
                hidden.to(torch.bfloat16).to(hidden.dtype), layer, labels, CONFIG.temperature, CONFIG.token_chunk_size
            )
            top = teacher_top_k(hidden, layer, labels, CONFIG.temperature, CONFIG.token_chunk_size, k=self.top_k)
            return {"exact": exact, "hidden_bf16": rounded, f"topk_{self.top_k}": top}

        return self.teacher(input_ids=ids.unsqueeze(0), head=head)

    def gradient(
        self, batch: list[tuple[Tensor, int]], features: list[TeacherFeatures], seed: int
    ) -> tuple[Tensor, float]:
        """The gradient in all parameters, flat, and the loss, of one batch."""
        self.student.zero_grad()
        tokens = sum(len(ids) - prompt for ids, prompt in batch)
        total = 0.0
        for row, ((ids, prompt), teacher) in enumerate(zip(batch, features, strict=True)):
            count = len(ids) - prompt
            uniforms = counter_uniform(seed, 1, torch.full((count,), row), torch.arange(prompt, len(ids))).unsqueeze(1)

            def head(hidden: Tensor, layer: OutputHead, prompt: int = prompt, ids: Tensor = ids) -> HeadOutput:
                return distillation_head(
                    hidden[0, prompt - 1 : -1],
                    layer,
                    ids[prompt:],
                    uniforms,  # noqa: B023 - called at once
                    torch.full((count,), 1 / tokens),  # noqa: B023
                    torch.zeros(count, dtype=torch.bool),  # noqa: B023
                    teacher,  # noqa: B023
                    CONFIG.objectives,
                )

            loss = self.student(input_ids=ids.unsqueeze(0), head=head).loss
            loss.backward()
            total += loss.item()
        gradients = [parameter.grad.flatten() for parameter in self.student.parameters() if parameter.grad is not None]
        return torch.cat(gradients), total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("student", "teacher", "data"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--batches", type=int, default=4)
    parser.add_argument("--rows", type=int, default=4, help="rows a batch")
    parser.add_argument("--longest", type=int, default=256)
    parser.add_argument("--top_k", type=int, default=CONFIG.teacher_cache_top_k)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--csv", type=Path, default=ROOT / "benchmarks" / "results" / "store.csv")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    comparison = Comparison(arguments.student, arguments.teacher, arguments.top_k)
    rows = sequences(
        AutoTokenizer.from_pretrained(arguments.student),
        arguments.data,
        arguments.batches * arguments.rows,
        arguments.longest,
    )
    differences: dict[str, list[tuple[float, float]]] = {}
    for start in range(0, len(rows), arguments.rows):
        batch = rows[start : start + arguments.rows]
        by_row = [comparison.features(ids, prompt) for ids, prompt in batch]
        exact, exact_loss = comparison.gradient(batch, [each["exact"] for each in by_row], seed=1)
        variants = {name: ([each[name] for each in by_row], 1) for name in by_row[0] if name != "exact"}
        variants["other_draws"] = ([each["exact"] for each in by_row], 2)
        for name, (features, seed) in variants.items():
            gradient, loss = comparison.gradient(batch, features, seed)
            relative = ((gradient - exact).norm() / exact.norm()).item()
            differences.setdefault(name, []).append((relative, abs(loss - exact_loss) / abs(exact_loss)))
    results = []
    for name, values in differences.items():
        gradient_difference, loss_difference = (sum(column) / len(values) for column in zip(*values, strict=True))
        print(f"{name:14} gradient {gradient_difference:8.3%}   loss {loss_difference:8.3%}")
        results.append(
            {
                **machine(),
                "student": arguments.student.name,
                "teacher": arguments.teacher.name,
                "rows": len(rows),
                "variant": name,
                "gradient_difference": round(gradient_difference, 5),
                "loss_difference": round(loss_difference, 5),
            }
        )
    append_rows(arguments.csv, results)


if __name__ == "__main__":
    main()
