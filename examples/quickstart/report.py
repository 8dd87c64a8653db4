"""What the quickstart came to: a table of teacher, student before and after, and a picture of the training curves.

    python examples/quickstart/report.py --teacher DIR --before DIR --after DIR --val_file val.parquet \
        --metrics metrics.jsonl --plot training_curves.png
"""

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib
import pandas as pd
import torch
import transformers
from reward import compute_score
from transformers import AutoModelForCausalLM, AutoTokenizer

matplotlib.use("Agg")
import matplotlib.pyplot as plt

CURVES = (
    ("hpd/loss", "loss"),
    ("hpd/reverse_kl_k1", "KL(student || teacher), one-sample estimate"),
    ("hpd/student_nll", "NLL of demonstrations"),
    ("actor/grad_norm", "gradient norm"),
)


def load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@torch.no_grad()
def accuracy(model: Any, tokenizer: Any, rows: list[dict[str, Any]]) -> float:
    """Share of problems whose greedy answer is right."""
    prompts = [
        tokenizer.apply_chat_template(list(row["prompt"]), tokenize=False, add_generation_prompt=True) for row in rows
    ]
    batch = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False)
    batch.pop("token_type_ids", None)
    generated = model.generate(**batch, max_new_tokens=64, do_sample=False, pad_token_id=tokenizer.pad_token_id)
    answers = tokenizer.batch_decode(generated[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    scores = [
        compute_score(row["data_source"], answer, row["reward_model"]["ground_truth"])
        for row, answer in zip(rows, answers, strict=True)
    ]
    return sum(scores) / len(scores)


@torch.no_grad()
def kl_to_teacher(student: Any, teacher: Any, tokenizer: Any, rows: list[dict[str, Any]]) -> float:
    """Mean exact KL(student || teacher) per response token of held-out demonstrations, nats."""
    total, tokens = 0.0, 0
    for row in rows:
        prompt = tokenizer.apply_chat_template(list(row["prompt"]), tokenize=False, add_generation_prompt=True)
        start = len(tokenizer.encode(prompt, add_special_tokens=False))
        ids = tokenizer(f"{prompt} {row['demonstration']}", return_tensors="pt", add_special_tokens=False)["input_ids"]
        log_q = student(input_ids=ids).logits[0, start - 1 :].log_softmax(-1)
        log_p = teacher(input_ids=ids).logits[0, start - 1 :].log_softmax(-1)
        total += (log_q.exp() * (log_q - log_p)).sum().item()
        tokens += len(log_q)
    return total / tokens


def validation_accuracy(lines: list[dict[str, Any]]) -> dict[int, float]:
    """The student's accuracy by verl's validation with vLLM, by training step."""
    return {
        line["step"]: value
        for line in lines
        for name, value in line["data"].items()
        if name.startswith("val-core/") and name.endswith("mean@1")
    }


def plot(lines: list[dict[str, Any]], teacher_accuracy: float, file: Path) -> None:
    """Draw accuracy and training curves.

    Args:
        lines: what verl's file logger wrote, ``{"step": ..., "data": {...}}`` each.
        teacher_accuracy: drawn as a line beside the student's.
        file: the picture.
    """
    steps = [line for line in lines if "hpd/loss" in line["data"]]
    figure, axes = plt.subplots(1, len(CURVES) + 1, figsize=(3.6 * (len(CURVES) + 1), 3.2), constrained_layout=True)
    accuracy_by_step = validation_accuracy(lines)
    axes[0].plot(list(accuracy_by_step), list(accuracy_by_step.values()), marker="o", label="student")
    axes[0].axhline(teacher_accuracy, linestyle="--", color="grey", label="teacher")
    axes[0].set_ylim(0, 1)
    axes[0].set_title("accuracy on held-out problems", fontsize=10)
    axes[0].legend()
    for axis, (name, title) in zip(axes[1:], CURVES, strict=True):
        axis.plot([step["step"] for step in steps], [step["data"][name] for step in steps])
        axis.set_title(title, fontsize=10)
    for axis in axes:
        axis.set_xlabel("training step")
        axis.grid(alpha=0.3)
    figure.savefig(file, dpi=120)


def main() -> None:
    transformers.utils.logging.disable_progress_bar()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("teacher", "before", "after", "val_file", "metrics", "plot"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    args = parser.parse_args()
    rows = pd.read_parquet(args.val_file).to_dict("records")
    tokenizer = AutoTokenizer.from_pretrained(args.before)
    teacher = load(args.teacher)
    lines = [json.loads(line) for line in args.metrics.read_text().splitlines()]

    print(f"\n{'model':<16}{'parameters':>12}{'accuracy':>10}{'KL to teacher':>15}")
    scores = {}
    for name, folder in (("teacher", args.teacher), ("student before", args.before), ("student after", args.after)):
        model = load(folder)
        kl = 0.0 if name == "teacher" else kl_to_teacher(model, teacher, tokenizer, rows)
        scores[name] = accuracy(model, tokenizer, rows)
        print(f"{name:<16}{model.num_parameters():>12,}{scores[name]:>10.3f}{kl:>15.4f}")
    by_vllm = ", ".join(f"{value:.3f} at step {step}" for step, value in sorted(validation_accuracy(lines).items()))
    print(f"\n{len(rows)} held-out problems, greedy. The student's accuracy by verl's validation with vLLM: {by_vllm}.")
    plot(lines, scores["teacher"], args.plot)
    print(f"Training curves: {args.plot}")


if __name__ == "__main__":
    main()
