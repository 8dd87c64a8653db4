"""Compiled passes are the uncompiled ones, without a compilation too many.

A process of its own: a CPU run of the package switches the compiler off.
"""

import logging
from typing import Any

import torch
from test_head import VOCABULARY_OBJECTIVE_NAMES, Case, close, configured

from hpd_verl.config import HPDConfig
from hpd_verl.head import compiling
from hpd_verl.head.features import HiddenFeatures, teacher_features
from hpd_verl.head.output_head import OutputHead
from hpd_verl.head.warm_up import warm_up
from hpd_verl.objectives import Mixture, RowObjectives, TokenContext, VocabularyLogProbs, VocabularyWeights, objective

V = 300  # more than a block of draws, and no multiple of what a kernel holds


def compare(case: Case, tolerance: float, **changes: Any) -> None:
    """Outputs and gradients, compiled and not."""
    plain, gradients = case.run_with_gradients(**changes)
    fused, others = case.run_with_gradients(**changes, compiled=True)
    assert torch.equal(plain.sampled, fused.sampled)
    for name, value in vars(plain).items():
        if value is not None:
            close(getattr(fused, name), value, 3e-5)
    for gradient, other in zip(gradients, others, strict=True):
        assert (gradient - other).double().norm() <= tolerance * gradient.double().norm()


def hpd(tokens: int = 37, chunk_size: int | None = 9) -> Case:
    config = configured("hpd", token_chunk_size=chunk_size)
    return Case(dtype=torch.bfloat16, tokens=tokens, vocabulary=V, config=config)


def nothing_is_compiled_after_the_start() -> None:
    """A hundred micro-batches of other lengths, of one row too, in other chunks, with gradients and without."""
    case = hpd()
    warm_up(case.head(), case.teacher(), case.config.objectives, 1.0, draws=1, exact_kl=False)
    count = compiling.compilations()
    assert count == 3, count
    arguments = (case.teacher_hidden, case.teacher_head(), case.labels, 1.0, 6)
    teacher = teacher_features(*arguments, compiled=True)
    close(teacher.tensors["log_sum_exp"], case.teacher().tensors["log_sum_exp"], 1e-5)
    compare(case, 2e-2, teacher=teacher)
    for step in range(100):
        case = hpd(tokens=1 + step * 7 % 41, chunk_size=None if step % 2 else 9)
        if step % 5:
            case.run_with_gradients(compiled=True)
        else:
            case.run(compiled=True)
    assert compiling.compilations() == count, compiling.compilations()


def all_objectives_are_the_same() -> None:
    """In one mixture, by row, with all that a layer can have, a teacher of fewer tokens, its sums not known.

    Not akl: torch 2.13 fails to write its second pass in C++, and runs it uncompiled.
    """

    @objective("tempered", over="vocabulary", returns="loss")
    def tempered(log_probs: VocabularyLogProbs) -> torch.Tensor:
        square = ((log_probs.teacher_probs - log_probs.student_probs) ** 2).sum(-1)
        return square - (log_probs.teacher_probs.sqrt() * log_probs.student).sum(-1) - log_probs.student_label[:, 0]

    @objective("following", over="vocabulary", returns="loss", needs={"prefix", "position", "row.difficulty"})
    def following(log_probs: VocabularyLogProbs, context: TokenContext) -> torch.Tensor:
        weight = torch.sigmoid(context.prefix_teacher / 9) + context.row["difficulty"] + context.position / 40
        return -weight * (log_probs.teacher_probs * log_probs.student).sum(-1)

    names = [name for name in VOCABULARY_OBJECTIVE_NAMES if name not in ("akl", "vopd")] + ["tempered", "following"]
    mixture = {name: 0.3 + 0.1 * index for index, name in enumerate(names)}
    config = HPDConfig(
        token_chunk_size=None,
        objective={"hpd": 1.0, **mixture},
        on_policy_objective={"jsd_exact": 1.0, "vopd": 0.5},
        temperature=1.3,
    )
    layer = {"soft_cap": 8.0, "scale": 0.7}
    case = Case(dtype=torch.float32, vocabulary=V, layer=layer, bias=True, config=config)
    case.labels %= V - 9
    shorter = OutputHead(case.teacher_head().weight, V - 9, case.teacher_head().bias, **layer)
    count = compiling.compilations()
    teacher, row = HiddenFeatures(case.teacher_hidden, shorter, 1.3), torch.arange(case.tokens) // 9
    compare(case, 3e-5, teacher=teacher, exact_kl=True, row=row)
    assert compiling.compilations() == count + 4  # with both models' sums, which the prefix needs beforehand
    assert not compiling._given_up


class Messages(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def one_that_cannot_be_compiled_is_named() -> None:
    """A decision on numbers: it runs uncompiled, the same, and the log says so once."""

    @objective("deciding", over="vocabulary", source="this test")
    def deciding(log_probs: VocabularyLogProbs) -> VocabularyWeights:
        weights = log_probs.teacher_probs * 2 if bool((log_probs.teacher_probs > 2).any()) else log_probs.teacher_probs
        return VocabularyWeights(weights, -(weights * log_probs.student).sum(-1))

    @objective("deciding_loss", over="vocabulary", returns="loss")
    def deciding_loss(log_probs: VocabularyLogProbs) -> torch.Tensor:
        sign = 1 if bool((log_probs.teacher_probs > 2).any()) else -1
        return sign * (log_probs.teacher_probs * log_probs.student).sum(-1)

    heard = Messages()
    compiling.logger.addHandler(heard)
    case = Case(dtype=torch.float32, vocabulary=V, config=configured("fkl", token_chunk_size=9))
    objectives = RowObjectives(Mixture(((deciding.bind(), 1.0), (deciding.bind(), 0.5))))
    for _ in range(2):
        compare(case, 1e-6, objectives=objectives)
    compare(case, 1e-6, objectives=RowObjectives(Mixture(((deciding_loss.bind(), 1.0),))))
    for line, name in zip(heard.lines, ("deciding", "deciding_loss"), strict=True):
        assert line.startswith(f"objective {name}: cannot be compiled ("), line
        assert line.endswith("runs operation by operation, at about 10 times the memory traffic"), line


if __name__ == "__main__":
    nothing_is_compiled_after_the_start()
    all_objectives_are_the_same()
    one_that_cannot_be_compiled_is_named()
