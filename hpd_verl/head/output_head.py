"""A model's output layer, and its products with hidden states, chunk by chunk over tokens."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

_CPU_STEP = 1 << 18  # elements of [rows, vocabulary] worked on at a time: what a CPU's cache holds
_STEP = 1 << 25  # the same on other devices
_CPU_CHUNK = 1024  # tokens of a chunk, where no size is set
_CHUNK = 8192  # the same on other devices: a low-precision weight gradient is added up once a chunk


@dataclass(frozen=True)
class OutputHead:
    """An output layer: ``logits = scale * (hidden @ weight.T + bias)``, then ``soft_cap * tanh(logits / soft_cap)``.

    Raises:
        ValueError: ``vocabulary_size`` is not a number of the weight's rows.
    """

    weight: Tensor
    """[V_full, d], floating; the matrix products are made in its dtype."""
    vocabulary_size: int
    """V: the first V rows are used: all of the student's; of the teacher's those that the student has too."""
    bias: Tensor | None = None
    """[V_full] or None."""
    scale: float = 1.0
    """Factor of the logits."""
    soft_cap: float | None = None
    """Bound of the logits' absolute value."""

    def __post_init__(self) -> None:
        if not 1 <= self.vocabulary_size <= len(self.weight):
            raise ValueError(f"vocabulary_size={self.vocabulary_size}: the weight has {len(self.weight)} rows")

    @property
    def dtype(self) -> torch.dtype:
        """dtype of everything but the matrix products."""
        return torch.float64 if self.weight.dtype == torch.float64 else torch.float32

    @property
    def used_weight(self) -> Tensor:
        """[V, d]"""
        return self.weight[: self.vocabulary_size]

    def logits(
        self, products: Tensor, temperature: float, tokens: Tensor | None = None, out: Tensor | None = None
    ) -> Tensor:
        """Logits over temperature.

        Args:
            products: hidden states times weight rows, of any dtype: [n, V], or [n, M] of chosen tokens.
            temperature: the distillation temperature.
            tokens: int64 [n, M], the chosen tokens; None for the whole vocabulary.
            out: of the products' shape and this head's ``dtype``, memory to use.

        Returns:
            Of the products' shape, of this head's ``dtype``: the products themselves where nothing changes them.
        """
        bias = self.bias
        if bias is not None:
            bias = bias[: self.vocabulary_size] if tokens is None else bias[tokens]
        plain = bias is None and self.soft_cap is None and self.scale == temperature == 1.0
        if plain and products.dtype == self.dtype:
            return products
        logits = products.to(self.dtype, copy=True) if out is None else out.copy_(products)
        if bias is not None:
            logits.add_(bias)
        if self.scale != 1.0:
            logits.mul_(self.scale)
        if self.soft_cap is not None:
            logits.div_(self.soft_cap).tanh_().mul_(self.soft_cap)
        if temperature != 1.0:
            logits.div_(temperature)
        return logits

    def token_logits(self, hidden: Tensor, tokens: Tensor, temperature: float) -> Tensor:
        """Logits over temperature of chosen tokens [n, M], for hidden states [n, d] of the weight's dtype; [n, M]."""
        products = (self.weight[tokens].to(self.dtype) @ hidden.to(self.dtype).unsqueeze(2)).squeeze(2)
        # Rounded as in the product with the whole weight.
        return self.logits(products.to(self.weight.dtype), temperature, tokens)

    def slope(self, logits: Tensor, temperature: float) -> Tensor | None:
        """Derivative of the soft cap at logits over temperature, of their shape; None without one."""
        return None if self.soft_cap is None else 1 - (logits * (temperature / self.soft_cap)).square()


class Products:
    """``hidden @ weight.T`` of one chunk after the other, in one buffer.

    Args:
        hidden: floating [n, d].
        head: the output layer.
        chunk_size: tokens of a chunk.
    """

    def __init__(self, hidden: Tensor, head: OutputHead, chunk_size: int) -> None:
        self.hidden = hidden.detach().to(head.weight.dtype)
        self.weight = head.used_weight.detach()
        self.buffer = self.weight.new_empty(min(chunk_size, len(hidden)), head.vocabulary_size)

    def __getitem__(self, tokens: slice) -> Tensor:
        """[tokens, V], valid until the next chunk's."""
        return torch.mm(self.hidden[tokens], self.weight.T, out=self.buffer[: tokens.stop - tokens.start])


class Scratch:
    """Memory of a step's rows, used again and again: a CPU pays fresh memory with page faults.

    Args:
        matrix: [n, V], whose steps it is for.
        dtype: of the memory.
        count: how many matrices of a step.
    """

    def __init__(self, matrix: Tensor, dtype: torch.dtype, count: int) -> None:
        self.buffers = [matrix.new_empty(_step_rows(matrix), matrix.shape[1], dtype=dtype) for _ in range(count)]

    def rows(self, count: int) -> list[Tensor]:
        """[count, V] of each."""
        return [buffer[:count] for buffer in self.buffers]


def chunks(count: int, chunk_size: int) -> Iterator[slice]:
    """Slices of ``range(count)``."""
    for start in range(0, count, chunk_size):
        yield slice(start, min(start + chunk_size, count))


def default_chunk_size(size: int | None, device: torch.device) -> int:
    """Tokens of a chunk: the setting, or what suits the device."""
    return size or (_CPU_CHUNK if device.type == "cpu" else _CHUNK)


def _step_rows(matrix: Tensor) -> int:
    elements = _CPU_STEP if matrix.device.type == "cpu" else _STEP
    return max(1, min(len(matrix), elements // matrix.shape[1]))


def steps(matrix: Tensor, compiled: bool = False) -> Iterator[slice]:
    """Slices of the rows of [n, V] to work on at a time.

    A compiled function needs no memory of the matrix's size between its operations: an accelerator then takes all rows
    at once, for its time would go into starting kernels.
    """
    return chunks(len(matrix), max(1, len(matrix)) if compiled and matrix.device.type != "cpu" else _step_rows(matrix))


def take(matrix: Tensor, tokens: Tensor) -> Tensor:
    """One entry of each row: [n] from [n, V] and int64 [n]."""
    return matrix.gather(1, tokens.unsqueeze(1)).squeeze(1)


def label_logits(matrix: Tensor, head: OutputHead, labels: Tensor, temperature: float) -> Tensor:
    """Logits over temperature of the labels, [n], from products [n, V]."""
    tokens = labels.unsqueeze(1)
    return head.logits(matrix.gather(1, tokens), temperature, tokens).squeeze(1)
