"""Measures of a trained student: greedy and sampled accuracy, divergence from the teacher, entropy."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

from settle_it import task

GREEDY = 1e-4
"""A temperature at which the most likely token is the only one."""

LOGITS = 2**22
"""Of one step of a generation, at most: more do not fit a processor's cache."""


class Nucleus(LogitsProcessor):
    """Draws the next token by temperature and top-p, and leaves it as the only one.

    A temperature for each row lets one generation serve all of them. It draws itself because of large vocabularies:
    among the few tokens that are kept that takes a fraction of the time.

    Args:
        temperatures: [rows].
        top_p: mass that is kept.
        ends: tokens after which a row has ended: what is drawn then is not used, and may be of any distribution.
    """

    def __init__(self, temperatures: Tensor, top_p: float, ends: Sequence[int]) -> None:
        self.temperatures = temperatures.unsqueeze(1)
        self.top_p = top_p
        self.ends = torch.tensor(ends)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        probs = (scores / self.temperatures).softmax(-1)
        if self.top_p < 1:
            tokens, kept = self._kept(probs, torch.isin(input_ids[:, -1], self.ends))
            drawn = tokens.gather(1, torch.multinomial(kept, 1))
        else:
            drawn = torch.multinomial(probs, 1)
        return torch.full_like(scores, -torch.inf).scatter_(1, drawn, 0.0)

    def _kept(self, probs: Tensor, has_ended: Tensor) -> tuple[Tensor, Tensor]:
        """The likeliest tokens that together reach the mass, by rising id, among some more at 0: [rows, count]."""
        count, vocabulary = 64, probs.shape[-1]
        while True:  # sorting a large vocabulary would take longer than the model
            ordered, tokens = probs.topk(min(count, vocabulary))
            outside = ordered.cumsum(-1) - ordered >= self.top_p
            if count >= vocabulary or (outside[:, -1] | has_ended).all():
                tokens, places = tokens.sort(-1)
                return tokens, ordered.masked_fill(outside, 0.0).gather(1, places)
            count *= 8


@torch.no_grad()
def answer(
    model: Any,
    problems: Sequence[task.Problem],
    temperatures: Sequence[float],
    top_p: float,
    seed: int,
) -> list[str]:
    """An answer to each problem, sampled at its own temperature."""
    tokenizer = task.build_tokenizer(model.config.vocab_size)
    chats = [[{"role": "user", "content": problem.prompt}] for problem in problems]
    prompts = [tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) for chat in chats]
    torch.manual_seed(seed)
    texts: list[str] = []
    ends = [tokenizer.eos_token_id, tokenizer.pad_token_id]
    batch = min(1024, LOGITS // model.config.vocab_size)
    for start in range(0, len(prompts), batch):
        rows = slice(start, start + batch)
        inputs = tokenizer(
            prompts[rows],
            return_tensors="pt",
            padding=True,
            padding_side="left",
            add_special_tokens=False,
            return_token_type_ids=False,
        )
        out = model.generate(
            **inputs,
            do_sample=False,
            logits_processor=LogitsProcessorList([Nucleus(torch.tensor(temperatures[rows]), top_p, ends)]),
            max_new_tokens=task.MAX_RESPONSE_LENGTH,
            pad_token_id=tokenizer.pad_token_id,
        )
        texts += tokenizer.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return texts


def sample(
    model: Any, problems: Sequence[task.Problem], samples: int, temperature: float, top_p: float, seed: int
) -> list[list[str]]:
    """So many answers to each problem."""
    repeated = [problem for problem in problems for _ in range(samples)]
    texts = answer(model, repeated, [temperature] * len(repeated), top_p, seed)
    return [texts[start : start + samples] for start in range(0, len(texts), samples)]


def right_answers(
    model: Any, problems: Sequence[task.Problem], samples_by_temperature: dict[float, int], seed: int
) -> dict[float, list[int]]:
    """Number of right answers to each problem, of so many samples at each temperature, with top-p 0.95."""
    asked = [
        (temperature, index)
        for temperature, samples in samples_by_temperature.items()
        for index in range(len(problems))
        for _ in range(samples)
    ]
    texts = answer(model, [problems[index] for _, index in asked], [each for each, _ in asked], 0.95, seed)
    counts = {temperature: [0] * len(problems) for temperature in samples_by_temperature}
    for (temperature, index), text in zip(asked, texts, strict=True):
        counts[temperature][index] += int(task.score(problems[index], text))
    return counts


def answer_states(model: Any, problems: Sequence[task.Problem], answers: Sequence[str]) -> Tensor:
    """The last hidden states from which the tokens of the answers are predicted, [response tokens, hidden size]."""
    tokenizer = task.build_tokenizer()
    chats = [[{"role": "user", "content": problem.prompt}] for problem in problems]
    prompts = [tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) for chat in chats]
    texts = [f"{prompt} {text} {task.END}" for prompt, text in zip(prompts, answers, strict=True)]
    batch = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False, return_token_type_ids=False)
    starts = torch.tensor([len(tokenizer.encode(prompt, add_special_tokens=False)) for prompt in prompts])
    # The logits of position t are of token t + 1.
    positions = torch.arange(1, batch["input_ids"].shape[1])
    mask = (positions >= starts.unsqueeze(1)) & batch["attention_mask"][:, 1:].bool()
    return model.model(**batch).last_hidden_state[:, :-1][mask]


@torch.no_grad()
def divergences(student: Any, teacher: Any, problems: Sequence[task.Problem], answers: Sequence[str]) -> dict[str, Any]:
    """KL(p, q), KL(q, p) and the student's entropy on answers, nats a response token, at temperature 1."""
    hidden_q, hidden_p = (answer_states(model, problems, answers) for model in (student, teacher))
    parts = []
    for states_q, states_p in zip(hidden_q.split(1024), hidden_p.split(1024), strict=True):  # for the memory's sake
        log_q, log_p = student.lm_head(states_q).log_softmax(-1), teacher.lm_head(states_p).log_softmax(-1)
        difference = log_p - log_q
        forward, reverse = (log_p.exp() * difference).sum(-1), -(log_q.exp() * difference).sum(-1)
        parts.append(torch.stack([forward, reverse, -(log_q.exp() * log_q).sum(-1)]))
    means = torch.cat(parts, dim=1).mean(1).tolist()
    return {name: round(each, 5) for name, each in zip(("forward_kl", "reverse_kl", "entropy"), means, strict=True)}


def curve(metrics: Path, clip_grad: float, points: int = 10) -> dict[str, Any]:
    """Entropy and one-sample KL on the training rows, and the share of steps whose gradient was clipped."""
    steps = [json.loads(line) for line in metrics.read_text().splitlines()]
    norms = [step["data"]["actor/grad_norm"] for step in steps]
    width = max(1, len(steps) // points)
    named = {"entropy": "actor/entropy", "reverse_kl_k1": "hpd/reverse_kl_k1", "student_nll": "hpd/student_nll"}
    parts = [steps[start : start + width] for start in range(0, len(steps), width)]
    return {
        "step": [part[-1]["step"] for part in parts],
        **{
            name: [round(sum(step["data"][key] for step in part) / len(part), 4) for part in parts]
            for name, key in named.items()
            if key in steps[0]["data"]
        },
        "grad_norm_median": round(sorted(norms)[len(norms) // 2], 4),
        "clipped_share": round(sum(norm > clip_grad for norm in norms) / len(norms), 4),
    }
