"""Weights of an objective that returns a loss: its gradients in the student's log-probs, with the sign turned.

``sum_v (dL / d log q(v)) d log q(v)`` is what ``-sum_v w(v) d log q(v)`` is for detached weights, so that nothing else
of the output layer needs to know of the loss.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from hpd_verl.objectives.log_probs import TokenLogProbs, TokenWeights, VocabularyLogProbs, VocabularyWeights


def weights_of_loss(loss: Callable[..., Tensor], log_probs: Any, **arguments: Any) -> TokenWeights | VocabularyWeights:
    """Weights and value of a loss.

    Args:
        loss: ``loss(log_probs, **arguments)`` to the loss of each token, [n]; it may use any of the student's tensors.
        log_probs: ``TokenLogProbs`` or ``VocabularyLogProbs``.
    """
    if isinstance(log_probs, VocabularyLogProbs):
        return _over_vocabulary(loss, log_probs, arguments)
    return _over_tokens(loss, log_probs, arguments)


def _over_vocabulary(
    loss: Callable[..., Tensor], log_probs: VocabularyLogProbs, arguments: dict[str, Any]
) -> VocabularyWeights:
    def of(student: Tensor, probs: Tensor, label: Tensor) -> Tensor:
        return loss(replace(log_probs, student=student, student_probs=probs, student_label=label), **arguments)

    # Of q and log q(y) apart from log q: they are known, and the label's gradient stays one number a row.
    value, (weights, of_probs, label) = _gradients(
        of, log_probs.student, log_probs.student_probs, log_probs.student_label
    )
    weights = torch.addcmul(weights, of_probs, log_probs.student_probs)
    return VocabularyWeights(-weights, value, -label.squeeze(1))


def _over_tokens(loss: Callable[..., Tensor], log_probs: TokenLogProbs, arguments: dict[str, Any]) -> TokenWeights:
    def of(label: Tensor, sampled: Tensor) -> Tensor:
        return loss(replace(log_probs, student_label=label, student_sampled=sampled), **arguments)

    value, (label, sampled) = _gradients(of, log_probs.student_label, log_probs.student_sampled)
    return TokenWeights(-label, -sampled, value)


def _gradients(loss: Callable[..., Tensor], *inputs: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Values of a loss and the gradients of their sum in the inputs, without autograd around it."""
    if torch.compiler.is_compiling():  # which traces this form of autograd only
        value, pull = torch.func.vjp(loss, *inputs)[:2]
        return value, pull(torch.ones_like(value))
    with torch.enable_grad():
        leaves = [each.detach().requires_grad_() for each in inputs]
        value = loss(*leaves)
        gradients = torch.autograd.grad(value.sum(), leaves, allow_unused=True, materialize_grads=True)
    return value.detach(), gradients
