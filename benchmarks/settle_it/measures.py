"""What is measured of a trained student: accuracy greedy and sampled, divergence from the teacher, entropy."""

import json
from pathlib import Path
from typing import Any

import torch

from settle_it import task


@torch.no_grad()
def sample(
    model: Any,
    problems: list[task.Problem],
    samples: int,
    temperature: float,
    top_p: float,
    seed: int,
    batch: int = 512,
) -> list[list[str]]:
    """Answers to each problem; greedy at temperature 0."""
    tokenizer = task.build_tokenizer()
    chats = [[{"role": "user", "content": problem.prompt}] for problem in problems]
    prompts = [tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) for chat in chats]
    repeated = [prompt for prompt in prompts for _ in range(samples)]
    torch.manual_seed(seed)
    how: dict[str, Any] = {"do_sample": False}
    if temperature > 0:
        how = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}
    texts: list[str] = []
    for start in range(0, len(repeated), batch):
        part = tokenizer(
            repeated[start : start + batch],
            return_tensors="pt",
            padding=True,
            padding_side="left",
            add_special_tokens=False,
            return_token_type_ids=False,
        )
        out = model.generate(
            **part, **how, max_new_tokens=task.MAX_RESPONSE_LENGTH, pad_token_id=tokenizer.pad_token_id
        )
        texts += tokenizer.batch_decode(out[:, part["input_ids"].shape[1] :], skip_special_tokens=True)
    return [texts[start : start + samples] for start in range(0, len(texts), samples)]


def scores(problems: list[task.Problem], answers: list[list[str]]) -> list[float]:
    """Share of right answers, a problem each."""
    return [
        sum(task.score(problem, text) for text in texts) / len(texts)
        for problem, texts in zip(problems, answers, strict=True)
    ]


@torch.no_grad()
def divergences(student: Any, teacher: Any, rows: list[dict[str, Any]]) -> dict[str, float]:
    """KL(p || q), KL(q || p) and the student's entropy on held-out answers, nats a response token, at temperature 1."""
    tokenizer = task.build_tokenizer()
    prompts = [tokenizer.apply_chat_template(row["prompt"], tokenize=False, add_generation_prompt=True) for row in rows]
    texts = [f"{prompt} {row['demonstration']} {task.END}" for prompt, row in zip(prompts, rows, strict=True)]
    batch = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False, return_token_type_ids=False)
    starts = torch.tensor([len(tokenizer.encode(prompt, add_special_tokens=False)) for prompt in prompts])
    log_q, log_p = (model(**batch).logits[:, :-1].log_softmax(-1) for model in (student, teacher))
    # The logits of position t are of token t + 1.
    positions = torch.arange(1, batch["input_ids"].shape[1])
    mask = (positions >= starts.unsqueeze(1)) & batch["attention_mask"][:, 1:].bool()
    difference = log_p - log_q
    sums = {
        "forward_kl": (log_p.exp() * difference).sum(-1),
        "reverse_kl": -(log_q.exp() * difference).sum(-1),
        "entropy": -(log_q.exp() * log_q).sum(-1),
    }
    return {name: float(value[mask].mean()) for name, value in sums.items()}


def curve(metrics: Path, clip_grad: float, points: int = 20) -> dict[str, Any]:
    """Entropy and one-sample KL over training, and the share of steps whose gradient was clipped."""
    steps = [json.loads(line) for line in metrics.read_text().splitlines()]
    norms = [step["data"]["actor/grad_norm"] for step in steps]
    every = max(1, len(steps) // points)
    named = {"entropy": "actor/entropy", "reverse_kl_k1": "hpd/reverse_kl_k1", "student_nll": "hpd/student_nll"}
    return {
        "step": [step["step"] for step in steps[::every]],
        **{
            name: [round(step["data"][key], 5) for step in steps[::every]]
            for name, key in named.items()
            if key in steps[0]["data"]
        },
        "grad_norm_median": sorted(norms)[len(norms) // 2],
        "clipped_share": sum(norm > clip_grad for norm in norms) / len(norms),
        "seconds_a_step": sum(step["data"]["timing_s/step"] for step in steps) / len(steps),
    }
