"""Result of the quickstart: a table of teacher and student before and after, and the training curves.

    python examples/quickstart/report.py --teacher DIR --before DIR --after DIR --val_file val.parquet \
        --metrics metrics.jsonl --plot training_curves.png
"""

import argparse
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import transformers
from reward import compute_score
from transformers import AutoModelForCausalLM, AutoTokenizer

from hpd_verl.tools.report import draw_picture, logged, read_run

CURVES = ("val-core/.*mean@1", "hpd/loss", "hpd/reverse_kl_k1", "hpd/student_nll", "actor/grad_norm")


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


def main() -> None:
    transformers.utils.logging.disable_progress_bar()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("teacher", "before", "after", "val_file", "metrics", "plot"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    args = parser.parse_args()
    rows = pd.read_parquet(args.val_file).to_dict("records")
    tokenizer = AutoTokenizer.from_pretrained(args.before)
    teacher = load(args.teacher)
    run = read_run(args.metrics, "student")
    validated = logged([run], CURVES[:1])

    print(f"\n{'model':<16}{'parameters':>12}{'accuracy':>10}{'KL to teacher':>15}")
    scores = {}
    for name, folder in (("teacher", args.teacher), ("student before", args.before), ("student after", args.after)):
        model = load(folder)
        kl = 0.0 if name == "teacher" else kl_to_teacher(model, teacher, tokenizer, rows)
        scores[name] = accuracy(model, tokenizer, rows)
        print(f"{name:<16}{model.num_parameters():>12,}{scores[name]:>10.3f}{kl:>15.4f}")
    by_step = sorted((step, value) for name in validated for step, value in run.metrics[name].items())
    by_vllm = ", ".join(f"{value:.3f} at step {step}" for step, value in by_step)
    print(f"\n{len(rows)} held-out problems, greedy. The student's accuracy by verl's validation with vLLM: {by_vllm}.")
    draw_picture([run], args.plot, CURVES, {name: {"teacher": scores["teacher"]} for name in validated})
    print(f"Training curves: {args.plot}")


if __name__ == "__main__":
    main()
