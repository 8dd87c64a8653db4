"""Gradients of the loss in hidden states, weight and bias, added up while each chunk's probabilities exist."""

from typing import Any

import torch
from torch import Tensor

from hpd_verl.head.output_head import OutputHead, chunks, steps

_WEIGHT_ROWS = 4096  # rows of a low-precision weight gradient that are added to the float32 one at a time


class Gradients:
    """Gradients of the loss in hidden, weight and bias, each where it is needed, from one chunk after the other."""

    def __init__(self, hidden: Tensor, head: OutputHead) -> None:
        recording = torch.is_grad_enabled()
        self.head = head
        self.count = len(hidden)
        self.hidden = torch.empty_like(hidden) if recording and hidden.requires_grad else None
        self.weight = torch.empty_like(head.weight) if recording and head.weight.requires_grad else None
        self.bias = None
        if head.bias is not None and recording and head.bias.requires_grad:
            self.bias = torch.zeros_like(head.bias, dtype=head.dtype)
        if self.weight is not None:
            # Rows in use are written by the first or the last chunk.
            self.weight[head.vocabulary_size if self.count else 0 :] = 0
        self._sum: Tensor | None = None  # of a low-precision weight's gradient over the chunks so far
        self._one_hots: list[tuple[Tensor, Tensor, Tensor]] = []  # what the sum does not hold yet

    @property
    def needed(self) -> bool:
        return not (self.hidden is None and self.weight is None and self.bias is None)

    def add(
        self, chunk: slice, hidden: Tensor, matrix: Tensor, factors: Tensor, tokens: Tensor, token_factors: Tensor
    ) -> None:
        """Take in the gradient ``factors * matrix - sum_k token_factors_k onehot(tokens_k)`` of the products.

        Args:
            chunk: the place of the n tokens in hidden; the last chunk ends where hidden does.
            hidden: [n, d], of the weight's dtype.
            matrix: [n, V], of the weight's dtype.
            factors: [n].
            tokens, token_factors: [n, M].
        """
        dtype, weight = self.head.dtype, self.head.used_weight.detach()
        if self.hidden is not None:
            gradient = (matrix @ weight).to(dtype).mul_(factors.unsqueeze(1))
            for token, factor in zip(tokens.unbind(1), token_factors.unbind(1), strict=True):
                gradient.addcmul_(weight[token].to(dtype), factor.unsqueeze(1), value=-1)
            self.hidden[chunk] = gradient
        if self.weight is not None:
            scaled = (hidden.to(dtype) * factors.unsqueeze(1)).to(weight.dtype)
            if weight.dtype == dtype:
                used = self.weight[: len(weight)]
                torch.addmm(used, matrix.T, scaled, beta=int(chunk.start > 0), out=used)
                for token, factor in zip(tokens.unbind(1), token_factors.unbind(1), strict=True):
                    self.weight.index_add_(0, token, hidden * -factor.unsqueeze(1))
            else:
                self._one_hots.append((tokens, token_factors, hidden))
                self._add_low_precision(matrix, scaled, first=chunk.start == 0, last=chunk.stop == self.count)
        if self.bias is not None:
            for rows in steps(matrix):
                self.bias[: matrix.shape[1]].add_(factors[rows] @ matrix[rows].to(dtype))
            self.bias.index_add_(0, tokens.flatten(), -token_factors.flatten())

    def _add_low_precision(self, matrix: Tensor, scaled: Tensor, first: bool, last: bool) -> None:
        """Add ``matrix.T @ scaled`` of one chunk; after the last, the one-hots, in float32, and round once.

        A single chunk needs no float32 copy of the gradient: its product is in the weight's dtype already, and only the
        rows with one-hots change.
        """
        assert self.weight is not None
        used = self.weight[: matrix.shape[1]]
        if first and last:
            torch.mm(matrix.T, scaled, out=used)
        elif first:
            self._sum = torch.mm(matrix.T, scaled).to(self.head.dtype)
        else:
            assert self._sum is not None
            product = scaled.new_empty(min(len(used), _WEIGHT_ROWS), scaled.shape[1])
            for rows in chunks(len(used), _WEIGHT_ROWS):
                self._sum[rows].add_(torch.mm(matrix[:, rows].T, scaled, out=product[: rows.stop - rows.start]))
        if last:
            total = used if self._sum is None else self._sum
            tokens = torch.cat([each.flatten() for each, _, _ in self._one_hots])
            values = torch.cat([each.flatten() for _, each, _ in self._one_hots])
            hidden = torch.cat([each for _, _, each in self._one_hots]).to(self.head.dtype)
            hidden = hidden.repeat_interleave(len(tokens) // len(hidden), dim=0)
            rows_in_use, place = tokens.unique(return_inverse=True)
            changed = total[rows_in_use].to(self.head.dtype)
            changed.index_add_(0, place, hidden * -values.unsqueeze(1))
            if self._sum is not None:
                used.copy_(self._sum)
            used[rows_in_use] = changed.to(used.dtype)

    def attach(self, loss: Tensor, hidden: Tensor) -> Tensor:
        """The loss, with these gradients as its backward pass."""
        if not self.needed:
            return loss
        bias = None if self.bias is None or self.head.bias is None else self.bias.to(self.head.bias.dtype)
        return _LossWithGradients.apply(loss, hidden, self.head.weight, self.head.bias, self.hidden, self.weight, bias)


class _LossWithGradients(torch.autograd.Function):
    """A loss whose gradients in three tensors are known."""

    @staticmethod
    def forward(
        ctx: Any,
        loss: Tensor,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        hidden_gradient: Tensor | None,
        weight_gradient: Tensor | None,
        bias_gradient: Tensor | None,
    ) -> Tensor:
        ctx.save_for_backward(hidden_gradient, weight_gradient, bias_gradient)
        return loss.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (factor,) = grad_outputs
        gradients = ctx.saved_tensors
        if factor.item() != 1.0:  # a pass over the weight's gradient is worth a look
            gradients = [None if each is None else each * factor.to(each.dtype) for each in gradients]
        return None, *gradients, None, None, None
