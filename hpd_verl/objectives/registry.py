"""The objective as the unit: one declaration carries its function, its parameters and its properties.

    class SkewParameters(ObjectiveParameters):
        skew: float = Field(0.1, ge=0, lt=1)
        \"\"\"Share of the teacher in the mixture.\"\"\"

    @objective("skew_fkl", over="vocabulary", parameters=SkewParameters, source="DistiLLM, arXiv 2402.03898")
    def skew_fkl(log_probs: VocabularyLogProbs, skew: float) -> VocabularyWeights: ...

    @objective("kl", over="vocabulary", returns="loss", source="a loss, differentiated here")
    def kl(log_probs: VocabularyLogProbs) -> Tensor:
        return (log_probs.teacher_probs * (log_probs.teacher - log_probs.student)).sum(-1)

A run takes objectives bound to their parameters' values, mixed with factors, for demonstrations and for rollouts:
``RowObjectives``. Nothing else knows an objective by its name.
"""

import hashlib
import importlib
import importlib.util
import inspect
import math
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from hpd_verl.errors import typed_line
from hpd_verl.objectives.context import ADVANTAGE, REWARD, ROW, TokenContext, check_needs
from hpd_verl.objectives.log_probs import TokenLogProbs, TokenWeights, VocabularyLogProbs, VocabularyWeights
from hpd_verl.objectives.losses import weights_of_loss

Over = Literal["token", "vocabulary"]
Returns = Literal["weights", "loss"]


class ObjectiveParameters(BaseModel):
    """Base of an objective's parameters; as it is, of one that has none. Every field has a default and a docstring."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


@dataclass(frozen=True)
class Objective:
    """An objective and all that the package knows of it. Made by the decorator ``objective``.

    Raises:
        ValueError: the function's arguments are not the log-probs and the parameters' fields, or one has no default.
    """

    name: str
    """The configured name (``algorithm.hpd.objective``), and of its parameters' node (``algorithm.hpd.NAME``)."""
    function: Callable[..., Any]
    """``function(log_probs, **parameters)``: ``TokenLogProbs`` to ``TokenWeights`` over tokens,
    ``VocabularyLogProbs`` to ``VocabularyWeights`` over the vocabulary; with ``returns="loss"`` to the loss of each
    token, [n], differentiable in the student's log-probs."""
    over: Over
    """What it weighs: the label and the sampled token, or every token of the vocabulary."""
    source: str
    """Where it is from."""
    returns: Returns = "weights"
    """Weights, or a loss whose weights follow by autograd, inside a chunk of logits."""
    needs: frozenset[str] = frozenset()
    """What its function gets as ``context``, a ``TokenContext``, beside the log-probs: among "step", "position",
    "behaviour", "prefix" and "row.NAME". Without needs there is no such argument."""
    parameters: type[ObjectiveParameters] = ObjectiveParameters
    """Its parameters, with defaults and bounds."""
    needs_teacher: bool = True
    """False: it does not read the teacher's log-probs."""
    weighs_sample: bool | Callable[[Any], bool] = False
    """Whether it weighs the sampled token, by its parameters."""
    needs_rollouts: bool = False
    """It is for labels that the student drew itself."""
    is_likelihood: bool = False
    """Its weights do not depend on the student: no importance ratio applies to them."""
    row_statistic: Callable[..., Tensor] | None = None
    """``row_statistic(teacher, **parameters)``: [n, 1] of ``TeacherRows``, for what the function, over the vocabulary,
    must know of a row beforehand and no compiled pass can compute, such as a sorted order. It runs uncompiled."""
    has_own_node: bool = True
    """False: its parameters are settings of the algorithm itself, beside the objective's name."""

    def __post_init__(self) -> None:
        for name, kinds in (("over", Over), ("returns", Returns)):
            if getattr(self, name) not in get_args(kinds):
                one_of = " or ".join(get_args(kinds))
                raise ValueError(f"objective {self.name!r}: {name}={getattr(self, name)!r}; choose {one_of}")
        given = list(inspect.signature(self.function).parameters)
        object.__setattr__(self, "needs", frozenset(self.needs))
        try:
            check_needs(self.needs)
        except ValueError as error:
            raise ValueError(f"objective {self.name!r} {error}") from None
        if "context" in self.parameters.model_fields:
            raise ValueError(f"objective {self.name!r}: its parameter context is the name of what it needs; rename it")
        expected = [*(["context"] if self.needs else []), *self.parameters.model_fields]
        if not given or sorted(given[1:]) != sorted(expected):
            what = "the log-probs, the context" if self.needs else "the log-probs"
            raise ValueError(
                f"objective {self.name!r}: its function takes ({', '.join(given)}), expected {what} and its "
                f"parameters ({', '.join(['log_probs', *expected])})"
            )

        required = [name for name, field in self.parameters.model_fields.items() if field.is_required()]
        if required:
            raise ValueError(f"objective {self.name!r}: its parameter {required[0]} has no default; give it one")

    def __call__(self, log_probs: Any, context: TokenContext | None = None, **parameters: Any) -> Any:
        """Weights of the log-probs, computed without autograd; parameters that are not given have their defaults."""
        return self.bind(parameters)(log_probs, context)

    def weigh(self, log_probs: Any, context: TokenContext | None, **parameters: Any) -> Any:
        """``TokenWeights`` or ``VocabularyWeights``, whatever the function returns; of the context what it needs."""
        if self.needs:
            assert context is not None
            parameters["context"] = context.only(self.needs)
        if self.returns == "weights":
            return self.function(log_probs, **parameters)
        return weights_of_loss(self.function, log_probs, **parameters)

    def bind(self, parameters: Mapping[str, Any] | None = None) -> "BoundObjective":
        """The objective with its parameters' values.

        Raises:
            pydantic.ValidationError: an unknown parameter, or a value outside its bounds.
        """
        return BoundObjective(self, self.parameters(**(parameters or {})))


@dataclass(frozen=True)
class BoundObjective:
    """An objective with its parameters' values."""

    objective: Objective
    parameters: ObjectiveParameters

    @torch.no_grad()
    def __call__(self, log_probs: Any, context: TokenContext | None = None) -> Any:
        return self.objective.weigh(log_probs, context, **self.arguments)

    @cached_property
    def arguments(self) -> dict[str, Any]:
        """The parameters' values by name."""
        return dict(self.parameters)

    @property
    def weighs_sample(self) -> bool:
        """Whether it weighs the sampled token."""
        weighs = self.objective.weighs_sample
        return weighs(self.parameters) if callable(weighs) else weighs


OBJECTIVES: dict[str, Objective] = {}
"""Objective by its name."""


def objective(
    name: str, *, over: Over, source: str = "your own", **properties: Any
) -> Callable[[Callable[..., Any]], Objective]:
    """Decorator that makes a function an ``Objective``, with its other fields as ``properties``, and registers it.

    Raises:
        ValueError: the name is taken, or the function does not fit.
    """

    def decorate(function: Callable[..., Any]) -> Objective:
        if name in OBJECTIVES:
            raise ValueError(f"objective {name!r} is already registered, by {OBJECTIVES[name].function.__module__}")
        OBJECTIVES[name] = Objective(name=name, function=function, over=over, source=source, **properties)
        return OBJECTIVES[name]

    return decorate


def find_objective(reference: str) -> Objective:
    """An objective by its name, or a user's own by ``package.module:name`` or ``path/file.py:name``.

    Raises:
        ValueError: there is none, or it does not work; the message says what to do.
    """
    if reference in OBJECTIVES:
        return OBJECTIVES[reference]
    place, _, attribute = reference.rpartition(":")
    if not place:
        raise ValueError(
            f"choose one of {', '.join(sorted(OBJECTIVES))}, or give your own as module:name or file.py:name"
        )
    found = getattr(_import(place), attribute, None)
    if not isinstance(found, Objective):
        what = "nothing" if found is None else f"a {type(found).__name__}"
        raise ValueError(f"{place} has {what} of the name {attribute!r}; define it with @hpd_verl.objectives.objective")
    check_objective(found)
    return found


def _import(place: str) -> Any:
    """A module by its name or its file, imported once."""
    if not place.endswith(".py"):
        try:
            return importlib.import_module(place)
        except (Exception, SystemExit) as error:  # of the user's code
            found = f"cannot import {place} ({typed_line(error)})"
            raise ValueError(f"{found}; give a module that Python finds, or file.py:name") from error
    try:
        file = Path(place).expanduser().resolve()
    except RuntimeError as error:  # of ~ and no such user
        raise ValueError(f"{place}: {typed_line(error)}; give the whole path") from error
    if not file.is_file():
        raise ValueError(f"there is no file {file}; give a file that every machine has")
    name = f"hpd_verl_objective_{hashlib.sha256(str(file).encode()).hexdigest()[:16]}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except BaseException as error:
        del sys.modules[name]
        for registered in [each for each in OBJECTIVES.values() if each.function.__module__ == name]:
            del OBJECTIVES[registered.name]
        if isinstance(error, Exception | SystemExit):
            raise ValueError(f"{file} fails when it is imported ({typed_line(error)})") from error
        raise
    return module


def check_objective(checked: Objective) -> None:
    """Try an objective on a few random log-probs.

    Raises:
        ValueError: it fails, returns something else than finite weights, or a differentiable loss, of the right type
            and shape, or does what its declared properties exclude.
    """
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, _TRIED, 7, generator=generator).log_softmax(-1)
    if not checked.needs_teacher:
        teacher = torch.full_like(teacher, math.nan)  # what it gets in a run without one
    labels = torch.arange(_TRIED)
    log_probs: Any
    kind: type[VocabularyWeights] | type[TokenWeights]
    if checked.over == "vocabulary":
        log_probs, kind = VocabularyLogProbs(student, teacher, labels), VocabularyWeights
        likes = {"weights": student, "value": student[:, 0]}
    else:
        log_probs = TokenLogProbs(student[:, 0], teacher[:, 0], student[:, 1], teacher[:, 1], labels > 2)
        kind, likes = TokenWeights, {"label": student[:, 0], "sampled": student[:, 0]}
    given = {name: value.clone() for name, value in vars(log_probs).items() if value is not None}
    is_rollout = torch.ones_like(labels, dtype=torch.bool) if checked.needs_rollouts else labels % 2 == 0
    context = TokenContext.example(checked.needs, is_rollout, student.dtype)
    if not checked.needs_teacher and context.prefix_teacher is not None:
        context = context._replace(prefix_teacher=torch.full_like(context.prefix_teacher, math.nan))
    known = context.fields()
    kept = {name: value.clone() for name, value in known.items()}

    def rows(places: slice) -> Any:
        return type(log_probs)(**{name: value[places].clone() for name, value in given.items()})

    try:
        if checked.returns == "loss":
            _check_loss(checked, rows(slice(None)), context, student[:, 0])
        result = checked(log_probs, context)
        alone = [checked(rows(one), context.at(one)) for one in (slice(row, row + 1) for row in range(_TRIED))]
    except _Refused as refused:
        raise ValueError(f"objective {checked.name!r} {refused}") from None
    except (Exception, SystemExit) as error:  # of the user's code
        failed = f"objective {checked.name!r} fails on {_TRIED} random tokens ({typed_line(error)})"
        if checked.needs:
            failed += f"; its context holds {', '.join(sorted(checked.needs))}: declare what else it reads in needs"
        raise ValueError(failed) from error
    for name, value in known.items():
        if not torch.equal(value.nan_to_num(), kept[name].nan_to_num()) or not torch.equal(
            value.isnan(), kept[name].isnan()
        ):
            raise ValueError(f"objective {checked.name!r}: writes into {name} of the context; let it work on a copy")
    if not isinstance(result, kind):
        hint = '; declare returns="loss"' if isinstance(result, Tensor) else ""
        raise ValueError(f"objective {checked.name!r} returns {type(result).__name__}, not {kind.__name__}{hint}")
    for name, value in given.items():
        if not torch.equal(getattr(log_probs, name).nan_to_num(), value.nan_to_num()):
            raise ValueError(f"objective {checked.name!r}: writes into {name} of the log-probs; let it work on a copy")
    for name in ("label", "value"):
        if name not in likes and getattr(result, name) is not None:
            likes[name] = student[:, 0]
    for name, like in likes.items():
        value = getattr(result, name)
        what = name
        if checked.returns == "loss":
            what = "its loss" if name == "value" else "the gradient of its loss"
        if not isinstance(value, Tensor) or value.shape != like.shape or value.dtype != like.dtype:
            raise ValueError(f"objective {checked.name!r}: {what} is {_form(value)}, expected {_form(like)}")
        if not value.isfinite().all():
            cause = "for ordinary log-probs" if checked.needs_teacher else "without a teacher: declare needs_teacher"
            if not checked.needs_rollouts and checked.needs & _OF_ROLLOUTS and value[is_rollout].isfinite().all():
                cause = "for demonstrations, whose behaviour and rewards are NaN: replace these (nan_to_num) and weigh "
                cause += "demonstrations by row.is_rollout, or declare needs_rollouts=True"
            raise ValueError(f"objective {checked.name!r}: {what} is not finite {cause}")
        one_by_one = [getattr(each, name) for each in alone]
        if any(each.shape != value[:1].shape for each in one_by_one) or not torch.allclose(
            torch.cat(one_by_one), value, rtol=1e-4, atol=1e-6
        ):
            raise ValueError(
                f"objective {checked.name!r}: {what} of a token is another one where it is alone; the tokens beside it "
                "are those of a chunk, so let it weigh each by itself, without chance"
            )
    if isinstance(result, TokenWeights) and not checked.bind().weighs_sample and result.sampled.any():
        raise ValueError(f"objective {checked.name!r}: weighs the sampled token; declare weighs_sample=True")


_TRIED = 5
"""Tokens that an objective is tried on."""
_OF_ROLLOUTS = {"behaviour", f"{ROW}{REWARD}", f"{ROW}{ADVANTAGE}"}


class _Refused(Exception):
    """What is wrong with a loss."""


def _check_loss(checked: Objective, log_probs: Any, context: TokenContext, like: Tensor) -> None:
    """Its form, and that it can be differentiated."""
    for name, value in vars(log_probs).items():
        if name.startswith("student"):
            object.__setattr__(log_probs, name, value.requires_grad_())
    with torch.enable_grad():
        given = {"context": context} if checked.needs else {}
        loss = checked.function(log_probs, **given, **checked.bind().arguments)
    if not isinstance(loss, Tensor) or loss.shape != like.shape or loss.dtype != like.dtype:
        raise _Refused(f"returns {_form(loss)}, expected the loss of each token, {_form(like)}")
    of_student = [value for name, value in vars(log_probs).items() if name.startswith("student")]
    leaves = _leaves(loss)
    if not any(leaf is value for leaf in leaves for value in of_student):
        raise _Refused("returns a loss without gradient in the student's log-probs; compute it from them, undetached")
    if not all(any(leaf is value for value in of_student) for leaf in leaves):
        raise _Refused(
            "returns a loss that depends on a tensor with requires_grad, which nothing would train; detach it, or "
            "declare a parameter"
        )


def _leaves(loss: Tensor) -> list[Tensor]:
    """The tensors that a loss could be differentiated in."""
    if loss.grad_fn is None:
        return [loss] if loss.requires_grad else []
    found, seen, waiting = [], {loss.grad_fn}, [loss.grad_fn]
    while waiting:
        node = waiting.pop()
        if hasattr(node, "variable"):
            found.append(node.variable)
        for following, _ in node.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                waiting.append(following)
    return found


def _form(value: Any) -> str:
    return f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__


@dataclass(frozen=True)
class Mixture:
    """Objectives on the same tokens, each with a factor: its gradient is the weighted sum of theirs."""

    parts: tuple[tuple[BoundObjective, float], ...]

    def over(self, kind: Over) -> "Mixture":
        """The parts of one kind."""
        return Mixture(tuple(part for part in self.parts if part[0].objective.over == kind))

    def __bool__(self) -> bool:
        return bool(self.parts)

    def __iter__(self) -> Iterator[tuple[BoundObjective, float]]:
        return iter(self.parts)

    def token_weights(self, log_probs: TokenLogProbs, context: TokenContext | None = None) -> TokenWeights:
        """Weights of the label and of the sampled token by the parts over tokens, of the log-probs' shape."""
        label = sampled = value = torch.zeros_like(log_probs.student_label)
        has_value = False
        for bound, factor in self.over("token"):
            weights = bound(log_probs, context)
            label, sampled = label + factor * weights.label, sampled + factor * weights.sampled
            value = value + factor * weights.loss(log_probs)
            has_value |= weights.value is not None
        return TokenWeights(label, sampled, value if has_value else None)


@dataclass(frozen=True)
class RowObjectives:
    """What a run optimises: a mixture for rows whose label is a demonstration, one for the student's own rollouts."""

    demonstration: Mixture
    rollout: Mixture = field(default=None)  # type: ignore[assignment]
    """The same as ``demonstration`` if it is not given."""

    def __post_init__(self) -> None:
        if self.rollout is None:
            object.__setattr__(self, "rollout", self.demonstration)

    @classmethod
    def of(cls, name: str, **parameters: Any) -> "RowObjectives":
        """One objective for all rows."""
        return cls(Mixture(((OBJECTIVES[name].bind(parameters), 1.0),)))

    def by_row(self, is_rollout: Tensor) -> list[tuple[Mixture, Tensor]]:
        """Mixtures with their rows, bool of ``is_rollout``'s shape; every row has exactly one."""
        if self.rollout == self.demonstration:
            return [(self.demonstration, torch.ones_like(is_rollout))]
        return [(self.demonstration, ~is_rollout), (self.rollout, is_rollout)]

    @cached_property
    def bound(self) -> tuple[BoundObjective, ...]:
        """All objectives in use."""
        return tuple(dict.fromkeys(bound for mixture in (self.demonstration, self.rollout) for bound, _ in mixture))

    def names(self, of: Callable[[BoundObjective], bool] = lambda bound: True) -> str:
        """The names of the objectives in use that have a property, for messages; empty if there is none."""
        return ", ".join(sorted({bound.objective.name for bound in self.bound if of(bound)}))

    @property
    def needs_teacher(self) -> bool:
        return any(bound.objective.needs_teacher for bound in self.bound)

    @property
    def weighs_sample(self) -> bool:
        """Whether any weighs the sampled token."""
        return any(bound.weighs_sample for bound in self.bound)

    @property
    def needs(self) -> frozenset[str]:
        """What any needs of a ``TokenContext``."""
        return frozenset[str]().union(*(bound.objective.needs for bound in self.bound))

    @property
    def over_vocabulary(self) -> bool:
        """Whether any weighs the whole vocabulary."""
        return any(bound.objective.over == "vocabulary" for bound in self.bound)

    @property
    def is_likelihood(self) -> bool:
        """Whether any has weights that do not depend on the student."""
        return any(bound.objective.is_likelihood for bound in self.bound)
