"""An objective that needs everything, and writes down what it gets: a line of JSON for each token."""

import json
from pathlib import Path
from typing import Any

from torch import Tensor

from hpd_verl.objectives import TokenContext, TokenLogProbs, objective

NUMBERS = ("is_rollout", "index", "reward", "advantage")
FIELDS = ("step", "steps", "position", "length", "behaviour", "prefix_teacher", "prefix_behaviour")


def write(log_probs: TokenLogProbs, context: TokenContext, numbers: tuple[str, ...]) -> None:
    seen: dict[str, Any] = {name: context.row[name].tolist() for name in numbers}
    seen |= {name: getattr(context, name).tolist() for name in FIELDS if getattr(context, name) is not None}
    seen |= {name: getattr(log_probs, name).tolist() for name in ("student_label", "teacher_label")}
    lines = [json.dumps(dict(zip(seen, token, strict=True))) for token in zip(*seen.values(), strict=True)]
    with open(Path(__file__).with_name("seen.jsonl"), "a") as stream:
        stream.write("\n".join(lines) + "\n")


@objective(
    "of_rollouts",
    over="token",
    returns="loss",
    needs={"step", "position", "behaviour", "prefix", *(f"row.{name}" for name in NUMBERS)},
    needs_rollouts=True,
)
def of_rollouts(log_probs: TokenLogProbs, context: TokenContext) -> Tensor:
    write(log_probs, context, NUMBERS)
    return -log_probs.student_label * (log_probs.teacher_label.exp() + context.row["reward"])


@objective("of_all", over="token", returns="loss", needs={"step", "position", "prefix", "row.index"})
def of_all(log_probs: TokenLogProbs, context: TokenContext) -> Tensor:
    write(log_probs, context, NUMBERS[1:2])
    return -log_probs.student_label * log_probs.teacher_label.exp()
