"""What objectives need beside log-probs: right wherever a row stands and however chunks cut it."""

from typing import Any

import pytest
import torch
from test_head import Case, close, configured
from torch import Tensor

from hpd_verl.head.prefix import PrefixSums
from hpd_verl.objectives import (
    OBJECTIVES,
    Mixture,
    Objective,
    RowObjectives,
    TokenContext,
    TokenLogProbs,
    TokenWeights,
    VocabularyLogProbs,
    VocabularyWeights,
)

LENGTHS = (6, 1, 11, 2, 5)
ALL = frozenset({"step", "position", "behaviour", "prefix", "row.is_rollout", "row.difficulty"})


class Rows(Case):
    """Rows of response tokens, all of which count."""

    def __post_init__(self) -> None:
        self.tokens = sum(LENGTHS)
        super().__post_init__()
        self.token_scale = torch.linspace(0.1, 1.1, self.tokens, dtype=torch.float64)
        self.row = torch.arange(len(LENGTHS)).repeat_interleave(torch.tensor(LENGTHS))
        self.is_rollout = self.row % 2 == 0
        position = torch.cat([torch.arange(length) for length in LENGTHS])
        numbers = torch.rand(self.tokens, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        self.context = TokenContext(
            step=torch.full((self.tokens,), 3.0),
            steps=torch.full((self.tokens,), 10.0),
            position=position,
            length=torch.tensor(LENGTHS)[self.row],
            row={"is_rollout": self.is_rollout.double(), "difficulty": self.row.double() / 7},
            behaviour=torch.where(self.is_rollout, -3 * numbers, torch.nan),
        )

    def of(self, rows: list[int], objectives: RowObjectives, **changes: Any) -> tuple[Tensor, Tensor]:
        """Token losses and gradients of hidden states, of some rows in this order."""
        places = torch.cat([(self.row == row).nonzero().squeeze(1) for row in rows])
        hidden = self.hidden[places].requires_grad_()
        output = self.run(
            hidden=hidden,
            labels=self.labels[places],
            uniforms=self.uniforms[places],
            token_scale=self.token_scale[places],
            is_rollout=self.is_rollout[places],
            teacher=self.teacher()[places],
            objectives=objectives,
            context=self.context.at(places),
            row=torch.arange(len(rows)).repeat_interleave(torch.tensor(LENGTHS)[rows]) + 5,
            **changes,
        )
        (gradient,) = torch.autograd.grad(output.loss, hidden)
        return output.token_losses, gradient

    def prefixes(self) -> tuple[Tensor, Tensor]:
        """The sums by their definition, on whole logits, token by token."""
        log_q = self.logits().detach().log_softmax(-1).gather(1, self.labels[:, None])[:, 0]
        log_p = self.teacher_logits().log_softmax(-1).gather(1, self.labels[:, None])[:, 0]
        teacher, behaviour = torch.zeros_like(log_q), torch.zeros_like(log_q)
        for token in range(self.tokens):
            for earlier in range(token):
                if self.row[earlier] == self.row[token]:
                    teacher[token] += log_p[earlier] - log_q[earlier]
                    behaviour[token] += log_q[earlier] - self.context.behaviour[earlier]
        return teacher, torch.where(self.is_rollout, behaviour, torch.nan)


def read_by(name: str, over: str) -> Objective:
    """An objective whose value is a field of the context, with the weights of another."""

    def field(context: TokenContext) -> Tensor:
        return context.row["difficulty"] if name == "row" else getattr(context, name).double()

    def over_tokens(log_probs: TokenLogProbs, context: TokenContext) -> TokenWeights:
        weights = OBJECTIVES["rkl"].function(log_probs)
        return TokenWeights(weights.label, weights.sampled, field(context))

    def over_vocabulary(log_probs: VocabularyLogProbs, context: TokenContext) -> VocabularyWeights:
        return VocabularyWeights(OBJECTIVES["fkl"].function(log_probs).weights, field(context))

    function = over_tokens if over == "token" else over_vocabulary
    return Objective(name, function, over, "", needs=ALL)  # type: ignore[arg-type]


def alone(*objectives: Objective) -> RowObjectives:
    return RowObjectives(Mixture(tuple((each.bind(), 1.0) for each in objectives)))


@pytest.mark.parametrize("over", ["token", "vocabulary"])
@pytest.mark.parametrize("chunk_size", [1, 4, 100])
def test_every_field_comes_to_its_token(over: str, chunk_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hpd_verl.head.output_head._CPU_STEP", 3 * Case.vocabulary)  # steps cut chunks, too
    case = Rows(config=configured("fkl", token_chunk_size=chunk_size))
    teacher, behaviour = case.prefixes()
    context = case.context
    wanted = {name: getattr(context, name).double() for name in ("step", "steps", "position", "length", "behaviour")}
    wanted |= {"row": context.row["difficulty"], "prefix_teacher": teacher, "prefix_behaviour": behaviour}
    for name, value in wanted.items():
        for exact_kl in (False, True):
            objectives = alone(read_by(name, over))
            output = case.run(objectives=objectives, context=context, row=case.row, exact_kl=exact_kl)
            torch.testing.assert_close(output.token_losses, value, rtol=1e-10, atol=1e-10, equal_nan=True)


def weighed_loss(over: str) -> Objective:
    """A loss that uses everything, finite for demonstrations too."""

    def loss(log_probs: Any, context: TokenContext) -> Tensor:
        rollout = context.row["is_rollout"] == 1
        ratio = torch.where(rollout, context.prefix_behaviour, 0.3) + torch.where(rollout, context.behaviour, 0.7)
        weight = torch.sigmoid(context.prefix_teacher / 5 + ratio) + context.position / context.length
        weight = weight * (1 + context.step / context.steps) * (1 + context.row["difficulty"])
        if over == "token":
            return -weight * log_probs.student_label * (log_probs.teacher_label.exp())
        return weight * (log_probs.teacher_probs * (log_probs.teacher - log_probs.student)).sum(-1)

    return Objective("everything", loss, over, "", returns="loss", needs=ALL)  # type: ignore[arg-type]


@pytest.mark.parametrize("objectives", ["token", "vocabulary", "both", "beside another"])
def test_a_row_is_the_same_alone_and_anywhere(objectives: str) -> None:
    """In value and gradient, in any order of the rows and with any chunks."""
    used = {
        "token": (weighed_loss("token"),),
        "vocabulary": (weighed_loss("vocabulary"),),
        "both": (weighed_loss("token"), weighed_loss("vocabulary")),
        "beside another": (weighed_loss("token"), OBJECTIVES["todi"]),
    }[objectives]
    case = Rows(config=configured("fkl", token_chunk_size=4))
    everything = alone(*used)
    found = [case.of([row], everything) for row in range(len(LENGTHS))]
    for order in ([0, 1, 2, 3, 4], [4, 2, 0, 3, 1], [1, 2]):
        for chunk_size in (1, 3, 7, 64):
            losses, gradient = case.of(order, everything, chunk_size=chunk_size)
            close(losses, torch.cat([found[row][0] for row in order]), 1e-11)
            close(gradient, torch.cat([found[row][1] for row in order]), 1e-11)


def test_needs_are_met_or_named() -> None:
    case = Rows()
    one = alone(weighed_loss("vocabulary"))
    with pytest.raises(
        ValueError, match=r"^everything: needs behaviour, position, prefix, row.difficulty, row.is_roll"
    ):
        case.run(objectives=one, context=None)
    with pytest.raises(ValueError, match=r"^everything: needs row.difficulty, which the context does not hold"):
        case.run(objectives=one, row=case.row, context=case.context._replace(row={"is_rollout": case.context.step}))
    with pytest.raises(ValueError, match=r"^everything: needs prefix, which the context does not hold"):
        case.run(objectives=one, context=case.context)


def test_only_what_is_declared_is_handed_over() -> None:
    """An objective sees no more in a mixture than alone."""
    case = Rows()
    seen = []

    def spy(log_probs: TokenLogProbs, context: TokenContext) -> TokenWeights:
        seen.append(context)
        return TokenWeights(torch.ones_like(log_probs.student_label), torch.zeros_like(log_probs.student_label))

    spying = Objective("spy", spy, "token", "", needs=frozenset({"position", "row.difficulty"}))
    case.run(objectives=alone(spying, weighed_loss("token")), context=case.context, row=case.row)
    for context in seen:
        assert context.position is not None
        assert set(context.row) == {"difficulty"}
        assert context.step is context.behaviour is context.prefix_teacher is context.prefix_behaviour is None


def test_an_unknown_value_stays_in_its_row() -> None:
    sums = PrefixSums()
    row = torch.tensor([0, 0, 1, 1, 1, 2])
    values = torch.tensor([1.0, torch.nan, 1.0, 2.0, 3.0, 4.0]).unsqueeze(1)
    parts = [sums.take(row[part], values[part]) for part in (slice(0, 4), slice(4, 5), slice(5, 6))]
    wanted = torch.tensor([0.0, torch.nan, 0.0, 1.0, 3.0, 0.0], dtype=torch.float64).unsqueeze(1)
    torch.testing.assert_close(torch.cat(parts), wanted, equal_nan=True)
