"""A model's output layer, and its products with hidden states, chunk by chunk over tokens."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

_CPU_STEP = 1 << 18  # elements of [rows, vocabulary] worked on at a time: what a CPU's cache holds
_STEP = 1 << 25  # the same on other devices
_CPU_CHUNK = 1024  # tokens of a chunk, where no size is set
_CHUNK = 8192  # the same on other devices: a low-precision weight gradient is added up once a chunk
_CPU_KEPT = 31 << 20  # bytes; half of what the C library keeps of freed memory: several matrices of a step
_INDEXED = (1 << 31) - 1  # elements that a compiled kernel reaches with the indices it is compiled for


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

    @property
    def used_bias(self) -> Tensor | None:
        """[V] or None, detached."""
        return None if self.bias is None else self.bias[: self.vocabulary_size].detach()

    def scaling(self, temperature: float) -> "Scaling":
        """How this layer's products become logits over temperature."""
        return Scaling(self.dtype, self.scale, self.soft_cap, temperature)

    def logits(self, products: Tensor, temperature: float, tokens: Tensor | None = None) -> Tensor:
        """Logits over temperature.

        Args:
            products: hidden states times weight rows, of any dtype: [n, V], or [n, M] of chosen tokens.
            temperature: the distillation temperature.
            tokens: int64 [n, M], the chosen tokens; None for the whole vocabulary.

        Returns:
            Of the products' shape, of this head's ``dtype``: the products themselves where nothing changes them.
        """
        bias = self.used_bias
        return self.scaling(temperature).logits(products, bias if bias is None or tokens is None else bias[tokens])

    def token_logits(self, hidden: Tensor, tokens: Tensor, temperature: float) -> Tensor:
        """Logits over temperature of chosen tokens [n, M], for hidden states [n, d] of the weight's dtype; [n, M]."""
        products = (self.weight[tokens].to(self.dtype) @ hidden.to(self.dtype).unsqueeze(2)).squeeze(2)
        # Rounded as in the product with the whole weight.
        return self.logits(products.to(self.weight.dtype), temperature, tokens)


@dataclass(frozen=True)
class Scaling:
    """From products to logits over temperature; hashable, for a compiled body is made for one."""

    dtype: torch.dtype
    """Of the logits."""
    scale: float = 1.0
    soft_cap: float | None = None
    temperature: float = 1.0

    def logits(self, products: Tensor, bias: Tensor | None) -> Tensor:
        """Logits over temperature of products, and of a bias that broadcasts to them; maybe the products themselves."""
        plain = bias is None and self.soft_cap is None and self.scale == self.temperature == 1.0
        if plain:
            return products.to(self.dtype)
        logits = products.to(self.dtype, copy=True)
        if bias is not None:
            logits.add_(bias)
        if self.scale != 1.0:
            logits.mul_(self.scale)
        if self.soft_cap is not None:
            logits.div_(self.soft_cap).tanh_().mul_(self.soft_cap)
        if self.temperature != 1.0:
            logits.div_(self.temperature)
        return logits

    def slope(self, logits: Tensor) -> Tensor | None:
        """Derivative of the soft cap at logits over temperature, of their shape; None without one."""
        return None if self.soft_cap is None else 1 - (logits * (self.temperature / self.soft_cap)).square()


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


def steps(matrix: Tensor, whole: bool = False) -> Iterator[slice]:
    """Slices of the rows of [n, V] to work on at a time.

    Args:
        matrix: [n, V].
        whole: take all rows at once, as far as 32-bit indices reach: for compiled work, which needs no memory of the
            matrix's size, and whose time on an accelerator would go into starting kernels.
    """
    return chunks(len(matrix), max(1, _INDEXED // matrix.shape[1]) if whole else _step_rows(matrix))


def keep_freed_memory(device: torch.device) -> None:
    """Have the C library keep what a step on a CPU frees for the next one: fetching it anew from the system takes a
    tenth of an objective's time.

    glibc gives back what is above twice the largest block freed so far, of blocks of at most 32 MB.
    """
    if device.type == "cpu":
        torch.empty(_CPU_KEPT, dtype=torch.uint8)  # freed at once, never touched


def take(matrix: Tensor, tokens: Tensor) -> Tensor:
    """One entry of each row: [n] from [n, V] and int64 [n]."""
    return matrix.gather(1, tokens.unsqueeze(1)).squeeze(1)


def label_logits(matrix: Tensor, head: OutputHead, labels: Tensor, temperature: float) -> Tensor:
    """Logits over temperature of the labels, [n], from products [n, V]."""
    tokens = labels.unsqueeze(1)
    return head.logits(matrix.gather(1, tokens), temperature, tokens).squeeze(1)
