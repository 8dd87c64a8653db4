"""The teacher's features in the form of ``hybrid_code``: bytes, decoded a chunk of tokens at a time."""

from dataclasses import dataclass

import torch
from torch import Tensor

from hpd_verl.head.features import TeacherFeatures, WholeDistribution
from hpd_verl.head.hybrid_code import HybridCode
from hpd_verl.head.output_head import Products, Scaling
from hpd_verl.objectives import LOG_ZERO


@dataclass(frozen=True)
class HybridFeatures(TeacherFeatures):
    """The whole distribution, in shape exact for the likeliest tokens and near for the others."""

    TENSORS = ("label_log_probs", "shift", "packed")

    label_log_probs: Tensor
    """log p(y), [n], float32 or float64, at least ``LOG_ZERO``, which a label beyond the teacher's vocabulary has."""
    shift: Tensor
    """[n], float32 or float64: of the coarse state's logits, to log-probs."""
    packed: Tensor
    """uint8 [n, bytes]."""
    code: HybridCode
    """Of the bytes; it has the teacher's output layer and temperature."""

    @property
    def vocabulary_size(self) -> int:
        return self.code.head.vocabulary_size

    def log_probs(self, tokens: Tensor) -> Tensor:
        decoded = self.code.decode(self.packed)
        within = tokens.clamp_max(self.vocabulary_size - 1)
        logits = self.code.head.token_logits(decoded.hidden, within, self.code.temperature)
        matches = decoded.top_tokens.unsqueeze(1) == tokens.unsqueeze(2)
        residuals = decoded.residuals.gather(1, matches.int().argmax(-1))
        residuals = torch.where(matches.any(-1), residuals, 0.0)
        log_probs = (logits - self.shift.unsqueeze(1) + residuals).clamp_(LOG_ZERO, 0.0)
        return torch.where(tokens < self.vocabulary_size, log_probs, LOG_ZERO)

    def whole_distribution(self, chunk_size: int) -> WholeDistribution:
        return _WholeOfHybrid(self)


class _WholeOfHybrid(WholeDistribution):
    """Log-probs in place of products: their log-sum-exp is 0."""

    fills_memory = True

    def __init__(self, features: HybridFeatures) -> None:
        self.features = features
        self.scaling = Scaling(features.code.head.dtype)

    def start(self, chunk: slice) -> None:
        self.first = chunk.start
        self.decoded = self.features.code.decode(self.features.packed[chunk])
        products = Products(self.decoded.hidden, self.features.code.head, len(self.decoded.hidden))
        self.matrix = products[slice(0, len(self.decoded.hidden))]

    def rows(self, tokens: slice) -> Tensor:
        code, here = self.features.code, slice(tokens.start - self.first, tokens.stop - self.first)
        logits = code.head.logits(self.matrix[here], code.temperature)
        log_probs = logits - self.features.shift[tokens].to(logits.dtype).unsqueeze(1)
        return log_probs.scatter_add_(1, self.decoded.top_tokens[here], self.decoded.residuals[here])

    def log_sum_exp(self, tokens: slice) -> Tensor:
        return torch.zeros_like(self.features.shift[tokens], dtype=self.scaling.dtype)


@torch.no_grad()
def teacher_hybrid(hidden: Tensor, code: HybridCode, labels: Tensor, chunk_size: int | None = None) -> HybridFeatures:
    """Features of the hybrid form.

    Args:
        hidden: floating [n, d_t], the input of the teacher's output layer.
        code: how they become bytes.
        labels: int64 [n].
        chunk_size: tokens whose logits exist at once; memory only. None chooses by the device.
    """
    last = code.head.vocabulary_size - 1
    encoded = code.encode(hidden, labels.clamp_max(last), chunk_size)
    label_log_probs = encoded.label_log_probs.clamp_min(LOG_ZERO)
    return HybridFeatures(
        torch.where((labels <= last) | label_log_probs.isnan(), label_log_probs, LOG_ZERO),
        encoded.shift,
        encoded.packed,
        code,
    )
