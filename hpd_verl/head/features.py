"""What the objectives need to know of the teacher at a number of tokens: two forms of one interface.

``HiddenFeatures`` holds the input of the teacher's output layer, from which the whole distribution follows;
``TopKFeatures`` the most likely tokens' log-probs. Tokens of the student beyond the teacher's vocabulary have
probability 0 (``LOG_ZERO``) in both.
"""

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, TypeVar

import torch
from torch import Tensor

from hpd_verl.head.bodies import log_sum_exp
from hpd_verl.head.compiling import NotCompilable, give_up, given_up, run_compiled
from hpd_verl.head.output_head import (
    OutputHead,
    Products,
    Scaling,
    chunks,
    default_chunk_size,
    label_logits,
    steps,
    take,
)
from hpd_verl.objectives import LOG_ZERO, TeacherRows

Features = TypeVar("Features", bound="TeacherFeatures")


class WholeDistribution(ABC):
    """The teacher's distributions over its whole vocabulary as products, one chunk of tokens after the other."""

    scaling: Scaling
    """How the products become logits over temperature."""
    bias: Tensor | None = None
    """[V], the output layer's."""
    fills_memory: bool = False
    """Whether ``rows`` takes memory of its own: ask for few rows at a time."""

    @abstractmethod
    def start(self, chunk: slice) -> None:
        """Go to a chunk of tokens; slices are of the features' tokens."""

    @abstractmethod
    def rows(self, tokens: slice) -> Tensor:
        """Products of tokens in the chunk, [tokens, V], valid until the next chunk."""

    @abstractmethod
    def log_sum_exp(self, tokens: slice) -> Tensor | None:
        """Of the logits over temperature, [tokens], where it is known."""


@dataclass(frozen=True)
class TeacherFeatures(ABC):
    """The teacher at n tokens, at the temperature of its distribution."""

    TENSORS: ClassVar[tuple[str, ...]]
    """Names of the fields with an entry a token."""

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The fields with an entry a token, [n] or [n, width], by name; without those that are not known."""
        named = {name: getattr(self, name) for name in self.TENSORS}
        return {name: value for name, value in named.items() if value is not None}

    def with_tensors(self: Features, tensors: dict[str, Tensor]) -> Features:
        """The same of other tokens."""
        return dataclasses.replace(self, **{name: tensors.get(name) for name in self.TENSORS})

    def __len__(self) -> int:
        return len(next(iter(self.tensors.values())))

    def __getitem__(self: Features, tokens: slice | Tensor) -> Features:
        """The features of some tokens: a slice, an index or a mask."""
        return self.with_tensors({name: value[tokens] for name, value in self.tensors.items()})

    @classmethod
    def cat(cls, parts: Sequence["TeacherFeatures"]) -> "TeacherFeatures":
        """The features of all parts' tokens, in order; the parts are of one form and one teacher."""
        first = parts[0]
        return first.with_tensors({name: torch.cat([part.tensors[name] for part in parts]) for name in first.tensors})

    @property
    @abstractmethod
    def vocabulary_size(self) -> int:
        """The teacher's tokens that the student has too."""

    @abstractmethod
    def log_probs(self, tokens: Tensor) -> Tensor:
        """log p, at least ``LOG_ZERO``, of chosen tokens: floating [n, M] of int64 [n, M], the student's numbers."""

    @abstractmethod
    def whole_distribution(self, chunk_size: int) -> WholeDistribution:
        """The teacher's whole distribution, in chunks of so many tokens."""


@dataclass(frozen=True)
class HiddenFeatures(TeacherFeatures):
    """The input of the teacher's output layer.

    ``label_log_probs`` and ``log_sum_exp`` take one product with the output layer's weight. Where an objective makes
    that product anyway, for the whole distribution, they need not be known.
    """

    TENSORS = ("label_log_probs", "log_sum_exp", "hidden")

    hidden: Tensor
    """[n, d_t], floating."""
    head: OutputHead
    """The teacher's output layer."""
    temperature: float
    """Of the teacher's distribution."""
    label_log_probs: Tensor | None = None
    """log p(y), [n], float32 or float64, at least ``LOG_ZERO``, which a label beyond the teacher's vocabulary has."""
    log_sum_exp: Tensor | None = None
    """[n], float32 or float64: of the teacher's logits over temperature, over its head's vocabulary."""

    @property
    def vocabulary_size(self) -> int:
        return self.head.vocabulary_size

    def log_probs(self, tokens: Tensor) -> Tensor:
        if self.log_sum_exp is None:
            raise ValueError("the log-sum-exp of the teacher's logits is not known: make features by teacher_features")
        within = tokens.clamp_max(self.vocabulary_size - 1)
        logits = self.head.token_logits(self.hidden.to(self.head.weight.dtype), within, self.temperature)
        log_probs = (logits - self.log_sum_exp.unsqueeze(1)).clamp_min_(LOG_ZERO)
        return torch.where(tokens < self.vocabulary_size, log_probs, LOG_ZERO)

    def whole_distribution(self, chunk_size: int) -> WholeDistribution:
        return _WholeOfHidden(self, chunk_size)


class _WholeOfHidden(WholeDistribution):
    def __init__(self, features: HiddenFeatures, chunk_size: int) -> None:
        self.features = features
        self.products = Products(features.hidden, features.head, chunk_size)
        self.scaling = features.head.scaling(features.temperature)
        self.bias = features.head.used_bias

    def start(self, chunk: slice) -> None:
        self.first = chunk.start
        self.matrix = self.products[chunk]

    def rows(self, tokens: slice) -> Tensor:
        return self.matrix[tokens.start - self.first : tokens.stop - self.first]

    def log_sum_exp(self, tokens: slice) -> Tensor | None:
        known = self.features.log_sum_exp
        return None if known is None else known[tokens].to(self.scaling.dtype)


@dataclass(frozen=True)
class TopKFeatures(TeacherFeatures):
    """The teacher's K most likely tokens; the rest of its mass is taken as spread evenly over the other tokens."""

    TENSORS = ("label_log_probs", "rest_log_prob", "top_tokens", "top_log_probs")

    label_log_probs: Tensor
    """log p(y), [n], float32 or float64, at least ``LOG_ZERO``, which a label beyond the teacher's vocabulary has."""
    rest_log_prob: Tensor
    """[n], float32 or float64: log-prob of all other tokens together."""
    top_tokens: Tensor
    """[n, K], integer."""
    top_log_probs: Tensor
    """[n, K], floating."""
    teacher_vocabulary_size: int
    """Tokens of the teacher's vocabulary that the student has too."""
    dtype: torch.dtype = torch.float32
    """Of what is computed from them."""

    @property
    def vocabulary_size(self) -> int:
        return self.teacher_vocabulary_size

    def log_probs(self, tokens: Tensor) -> Tensor:
        matches = self.top_tokens.unsqueeze(1) == tokens.unsqueeze(2)
        found = self.top_log_probs.to(self.dtype).gather(1, matches.int().argmax(-1))
        others = self.other_log_prob.expand_as(found)
        log_probs = torch.where(matches.any(-1), found, others).clamp_min_(LOG_ZERO)
        return torch.where(tokens < self.vocabulary_size, log_probs, LOG_ZERO)

    @property
    def other_log_prob(self) -> Tensor:
        """log p of each token outside the top K, [n, 1]."""
        others = max(1, self.vocabulary_size - self.top_tokens.shape[1])
        return (self.rest_log_prob.to(self.dtype) - math.log(others)).unsqueeze(1)

    def whole_distribution(self, chunk_size: int) -> WholeDistribution:
        return _WholeOfTopK(self)


class _WholeOfTopK(WholeDistribution):
    """Log-probs in place of products: their log-sum-exp is 0."""

    fills_memory = True

    def __init__(self, features: TopKFeatures) -> None:
        self.features = features
        self.scaling = Scaling(features.dtype)

    def start(self, chunk: slice) -> None:
        pass  # nothing is made for a whole chunk

    def rows(self, tokens: slice) -> Tensor:
        features = self.features[tokens]
        log_probs = features.other_log_prob.repeat(1, features.vocabulary_size)
        return log_probs.scatter_(1, features.top_tokens.long(), features.top_log_probs.to(features.dtype))

    def log_sum_exp(self, tokens: slice) -> Tensor:
        return torch.zeros_like(self.features.rest_log_prob[tokens], dtype=self.scaling.dtype)


@dataclass(frozen=True)
class TeacherProducts(TeacherRows):
    """The teacher's rows by its products."""

    products: Tensor
    """[n, V of the teacher]"""
    scaling: Scaling
    bias: Tensor | None
    known_log_sum_exp: Tensor | None = None
    """[n], floating; computed where it is needed."""
    compiled: bool = False

    def logits(self, tokens: Tensor) -> Tensor:
        """Logits over temperature of chosen tokens, int64 [n, M]; -inf beyond the teacher's vocabulary."""
        within = tokens.clamp_max(self.products.shape[1] - 1)
        logits = self.scaling.logits(self.products.gather(1, within), None if self.bias is None else self.bias[within])
        return torch.where(tokens < self.products.shape[1], logits, -math.inf)

    def log_sum_exp(self) -> Tensor:
        """[n]; kept."""
        if self.known_log_sum_exp is None:
            found = log_sums_exp(self.products, self.scaling, self.bias, self.compiled)
            object.__setattr__(self, "known_log_sum_exp", found)
        assert self.known_log_sum_exp is not None
        return self.known_log_sum_exp

    def top(self, count: int) -> Tensor:
        count = min(count, self.products.shape[1])
        if self.bias is None:  # the products have the logits' order
            logits = self.scaling.logits(self.products.topk(count, -1).values, None)
        else:
            each = [self.scaling.logits(self.products[rows], self.bias) for rows in steps(self.products)]
            logits = torch.cat([part.topk(count, -1).values for part in each])
        return (logits - self.log_sum_exp().unsqueeze(1)).clamp_min_(LOG_ZERO)

    def log_probs(self, rows: Tensor) -> Tensor:
        logits = self.scaling.logits(self.products[rows], self.bias)
        return (logits - self.log_sum_exp()[rows].unsqueeze(1)).clamp_min_(LOG_ZERO)


def log_sums_exp(products: Tensor, scaling: Scaling, bias: Tensor | None, compiled: bool) -> Tensor:
    """Log-sum-exp of the logits over temperature, [n], of products [n, V]."""
    if compiled and not given_up(scaling):
        try:
            parts = [run_compiled(log_sum_exp, scaling, products[rows], bias) for rows in steps(products, whole=True)]
            return torch.cat(parts)
        except NotCompilable as error:
            give_up(scaling, "the teacher's log-sum-exp", error)
    return torch.cat([log_sum_exp(scaling, products[rows], bias) for rows in steps(products)])


@torch.no_grad()
def teacher_features(
    hidden: Tensor,
    head: OutputHead,
    labels: Tensor,
    temperature: float,
    chunk_size: int | None = None,
    compiled: bool = False,
) -> HiddenFeatures:
    """Features of the hidden form with all that follows from them: one product with the teacher's weight.

    Args:
        hidden: floating [n, d_t], the input of the teacher's output layer; kept as it is.
        head: the teacher's output layer.
        labels: int64 [n].
        temperature: of the teacher's distribution.
        chunk_size: tokens whose logits exist at once; memory only. None chooses by the device.
        compiled: fuse the elementwise work by ``torch.compile``.
    """
    label_log_probs = torch.empty(len(hidden), dtype=head.dtype, device=hidden.device)
    normaliser = torch.empty_like(label_log_probs)
    known = labels < head.vocabulary_size
    within = labels.clamp_max(head.vocabulary_size - 1)
    chunk_size = default_chunk_size(chunk_size, hidden.device)
    products = Products(hidden, head, chunk_size)
    scaling, bias = head.scaling(temperature), head.used_bias
    for chunk in chunks(len(hidden), chunk_size):
        matrix = products[chunk]
        logits = label_logits(matrix, head, within[chunk], temperature)
        normaliser[chunk] = log_sums_exp(matrix, scaling, bias, compiled)
        label_log_probs[chunk] = logits - normaliser[chunk]
    label_log_probs = torch.where(known, label_log_probs.clamp_min_(LOG_ZERO), LOG_ZERO)
    return HiddenFeatures(hidden.detach(), head, temperature, label_log_probs, normaliser)


@torch.no_grad()
def teacher_top_k(
    hidden: Tensor, head: OutputHead, labels: Tensor, temperature: float, chunk_size: int | None = None, *, k: int
) -> TopKFeatures:
    """Features of the top-k form; arguments as of ``teacher_features``, and k, the number of tokens kept.

    Raises:
        ValueError: k is not from 1 to the vocabulary's size.
    """
    if not 1 <= k <= head.vocabulary_size:
        raise ValueError(f"k={k}: the vocabulary has {head.vocabulary_size} tokens")
    label_log_probs = torch.empty(len(hidden), dtype=head.dtype, device=hidden.device)
    rest_log_prob = torch.empty_like(label_log_probs)
    top_log_probs = torch.empty(len(hidden), k, dtype=head.dtype, device=hidden.device)
    top_tokens = torch.empty(len(hidden), k, dtype=torch.int64, device=hidden.device)
    known = labels < head.vocabulary_size
    within = labels.clamp_max(head.vocabulary_size - 1)
    chunk_size = default_chunk_size(chunk_size, hidden.device)
    products = Products(hidden, head, chunk_size)
    for chunk in chunks(len(hidden), chunk_size):
        matrix = products[chunk]
        for rows in steps(matrix):
            tokens = slice(chunk.start + rows.start, chunk.start + rows.stop)
            log_probs = torch.log_softmax(head.logits(matrix[rows], temperature), -1)
            label_log_probs[tokens] = take(log_probs, within[tokens])
            top_log_probs[tokens], top_tokens[tokens] = log_probs.topk(k, -1)
            # In the logarithm: what remains of 1 would cancel where the top tokens hold nearly everything.
            rest_log_prob[tokens] = log_probs.scatter_(1, top_tokens[tokens], -math.inf).logsumexp(-1)
    return TopKFeatures(
        label_log_probs=torch.where(known, label_log_probs.clamp_min_(LOG_ZERO), LOG_ZERO),
        rest_log_prob=rest_log_prob.clamp_min_(LOG_ZERO),
        top_tokens=top_tokens,
        top_log_probs=top_log_probs,
        teacher_vocabulary_size=head.vocabulary_size,
        dtype=head.dtype,
    )
