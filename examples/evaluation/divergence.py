"""Divergence of a student from its teacher on held-out answers: exact KL and entropies, nats per token.

Both models read each prompt with its demonstration, or with a model's answer from a result of this folder. Their
distributions over the common vocabulary are compared at each response token.

    python -m examples.evaluation.divergence --data test.parquet --student STUDENT --teacher TEACHER --out kl.json
    python -m examples.evaluation.divergence --data test.parquet --student STUDENT --teacher TEACHER --out kl.json \\
        --answers sampled.json
"""

import argparse
import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from examples.evaluation.results import Row, Script, estimate_dict, read_result, read_rows
from hpd_verl.checks.vocabulary import check_vocabularies
from hpd_verl.data.demonstration import DemonstrationTokenizer
from hpd_verl.engine.causal_lm import check_head, offer_head
from hpd_verl.errors import one_line
from hpd_verl.head.distillation_head import distillation_head
from hpd_verl.head.features import teacher_features
from hpd_verl.head.output_head import OutputHead
from hpd_verl.objectives import RowObjectives
from hpd_verl.tools.generation.vllm_engines import load_template
from hpd_verl.tools.intervals import bootstrap

METRICS = ("forward_kl", "reverse_kl", "student_entropy", "teacher_entropy", "student_nll", "teacher_nll")
"""KL(teacher, student), KL(student, teacher), entropies, and minus the log-probs of the answer's tokens."""


class Model:
    """A causal language model, and its output layer seen apart.

    Args:
        name: folder or hub name.
        flag: names it in errors.
        args: the script's flags.

    Raises:
        ValueError: it cannot be loaded, or its output layer is not understood.
    """

    def __init__(self, name: str, flag: str, args: argparse.Namespace) -> None:
        self.tokenizer: PreTrainedTokenizerBase = load_template(name, {}, args.trust_remote_code, flag).tokenizer
        try:
            self.module = AutoModelForCausalLM.from_pretrained(
                name,
                dtype=getattr(torch, args.dtype),
                attn_implementation=args.attn_implementation,
                trust_remote_code=args.trust_remote_code,
            )
        except Exception as error:  # of transformers, safetensors or the model's own code
            raise ValueError(f"{flag}={name}: cannot be loaded: {one_line(error)[:300]}") from error
        self.module.to(args.device).eval()
        offer_head(self.module)
        check_head(self.module)
        self.vocabulary_size = int(self.module.config.get_text_config().vocab_size)

    @torch.no_grad()
    def hidden(self, ids: torch.Tensor, start: int) -> tuple[torch.Tensor, OutputHead]:
        """The input of the output layer where it predicts the tokens from ``start`` on, [tokens, d], and the layer."""
        found = self.module(input_ids=ids.unsqueeze(0), use_cache=False, head=lambda hidden, layer: (hidden, layer))
        return found[0][0, start - 1 : -1], found[1]


def divergence(
    student: Model, teacher: Model, ids: list[int], start: int, chunk_size: int | None = None
) -> dict[str, torch.Tensor]:
    """``METRICS`` at each token from ``start`` on, [tokens], float64 on the CPU.

    Args:
        student, teacher: of one vocabulary, either padded.
        ids: prompt and response.
        start: the response's first position, at least 1.
        chunk_size: tokens whose logits exist at once.
    """
    device = next(student.module.parameters()).device
    tokens = torch.tensor(ids, device=device)
    labels = tokens[start:]
    hidden, head = student.hidden(tokens, start)
    teacher_hidden, layer = teacher.hidden(tokens, start)
    # Rows that only one of them has are padding, which neither can mean: both are normalised over the others.
    shared = min(head.vocabulary_size, layer.vocabulary_size)
    head, layer = replace(head, vocabulary_size=shared), replace(layer, vocabulary_size=shared)
    features = teacher_features(teacher_hidden, layer, labels, 1.0, chunk_size)
    rest: dict[str, Any] = {
        "labels": labels,
        "uniforms": torch.zeros(len(labels), 0, dtype=torch.float64, device=device),
        "token_scale": torch.ones(len(labels), device=device),
        "is_rollout": torch.zeros(len(labels), dtype=torch.bool, device=device),
        "objectives": RowObjectives.of("sft"),
        "chunk_size": chunk_size,
    }
    with torch.no_grad():
        of_student = distillation_head(hidden, head, teacher=features, exact_kl=True, **rest)
        of_teacher = distillation_head(teacher_hidden, layer, teacher=None, **rest)
    found = {
        "forward_kl": of_student.forward_kl,
        "reverse_kl": of_student.reverse_kl,
        "student_entropy": of_student.entropy,
        "teacher_entropy": of_teacher.entropy,
        "student_nll": -of_student.label_log_probs,
        "teacher_nll": None if features.label_log_probs is None else -features.label_log_probs,
    }
    return {name: value.double().cpu() for name, value in found.items() if value is not None}


def answers_to(args: argparse.Namespace, rows: Sequence[Row]) -> list[list[tuple[str, bool]]]:
    """The answers of each row that both models read, and whether each was cut before its end.

    Raises:
        ValueError: a result that lacks a row's prompt.
    """
    if args.answers is None:
        return [[(row.demonstration or "", False)] for row in rows]
    items = {item["key"]: item for item in read_result(args.answers)["items"]}
    found = []
    for number, row in enumerate(rows):
        texts = items.get(row.key, {}).get("answers")
        if not texts:
            raise ValueError(f"--answers={args.answers}: no answer to row {number}; evaluate it on the same --data")
        reasons = items[row.key].get("finish_reasons") or ["stop"] * len(texts)
        found.append([(text, reason == "length") for text, reason in zip(texts, reasons, strict=True)])
    return found


def evaluate(args: argparse.Namespace) -> dict[str, Any]:
    """The metrics of every row, and their means over response tokens.

    Raises:
        ValueError: rows or models that do not fit.
    """
    needs = ["demonstration"] if args.answers is None else []
    rows = read_rows(args.data, args.max_rows, needs)
    answers = answers_to(args, rows)
    student, teacher = Model(args.student, "--student", args), Model(args.teacher, "--teacher", args)
    sizes = student.vocabulary_size, teacher.vocabulary_size
    check_vocabularies(student.tokenizer, teacher.tokenizer, *sizes, "--student, --teacher")
    demonstrations = DemonstrationTokenizer(student.tokenizer, {}, args.max_response_length)
    items, truncated, empty = [], 0, 0
    for number, (row, texts) in enumerate(zip(tqdm(rows, desc="rows", disable=None), answers, strict=True)):
        parts = []
        for text, cut in texts:
            if not text.strip():
                empty += 1
                continue
            try:
                response = demonstrations.encode(row.prompt, text)
                chat, _, escaped = demonstrations.template.escape(row.prompt)
                prompt = demonstrations.template.encode(chat, demonstrations.template.prompt(chat), escaped=escaped)
            except ValueError as error:
                raise ValueError(f"--data, row {number}: {error}") from error
            truncated += response.truncated or cut
            # An answer that was cut has not ended its turn.
            tokens = response.ids[:-1] if cut and not response.truncated else response.ids
            parts.append(divergence(student, teacher, prompt + tokens, len(prompt), args.token_chunk_size))
        if not parts:
            continue
        values = {name: torch.cat([part[name] for part in parts]) for name in METRICS}
        if not all(value.isfinite().all() for value in values.values()):
            raise ValueError(f"--data, row {number}: a model gives NaN or infinity; check its weights and --dtype")
        means = {name: value.mean().item() for name, value in values.items()}
        count = len(values["forward_kl"])
        items.append({"key": row.key, "scores": [means["reverse_kl"]], "tokens": count, **means})
    if not items:
        raise ValueError(f"--answers={args.answers}: all of them are empty")
    weights = [item["tokens"] for item in items]
    summary: dict[str, Any] = {
        name: estimate_dict(bootstrap([item[name] for item in items], args.bootstrap_seed, weights)) for name in METRICS
    }
    summary |= {"tokens": sum(weights), "truncated answers": truncated, "empty answers": empty}
    model = {"student": args.student, "teacher": args.teacher, "dtype": args.dtype}
    return {"model": model, "summary": summary, "items": items}


def main() -> None:
    logging.basicConfig(format="%(message)s")
    script = Script(__doc__ or "", "divergence")
    add = script.parser.add_argument
    add("--student", required=True, help="folder or hub name")
    add("--teacher", required=True, help="folder or hub name; same vocabulary")
    add("--answers", type=Path, help="use the answers of this result instead of demonstrations")
    add("--max_response_length", type=int, default=16384, help="read at most these tokens of an answer (%(default)s)")
    add(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        default="float32",
        help="dtype of both models (%(default)s)",
    )
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="%(default)s")
    add("--attn_implementation", default="eager", help="transformers' attention (%(default)s, right for every family)")
    add("--token_chunk_size", type=int, help="tokens per chunk of logits")
    add("--trust_remote_code", action="store_true", help="run code that a model brings")
    script.run(evaluate)


if __name__ == "__main__":
    main()
