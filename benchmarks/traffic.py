"""Bytes that the output layer's elementwise work reads and writes per logit: what it costs beside the matrix products
on a device whose memory is the limit.

    python benchmarks/traffic.py

Counted, not timed, on any machine: operation by operation as they run one after the other (``eager``), and by the
compiler's own account where they are fused (``compiled``), which is what a GPU runs. Matrix products are left out, and
so is what touches single entries. The compiler counts once what one loop reads, also where it passes over it twice.
HPD in bfloat16 with the teacher's features computed, at a vocabulary of 151,936, hidden size 1,536 and chunks of 8,192
tokens.
"""

import argparse
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch._inductor.config
import torch._inductor.metrics
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from hpd_verl.head import compiling, output_head  # noqa: E402
from hpd_verl.head.distillation_head import distillation_head  # noqa: E402
from hpd_verl.head.features import teacher_features  # noqa: E402
from hpd_verl.head.output_head import OutputHead  # noqa: E402
from hpd_verl.objectives import RowObjectives  # noqa: E402

VOCABULARY, HIDDEN, CHUNK = 151_936, 1536, 8192
_PRODUCTS = ("mm", "addmm", "bmm", "matmul")
_WRITTEN_WHOLE = ("copy_", "fill_", "zero_")  # do not read what they overwrite
_OF_ENTRIES = ("gather", "index", "index_select", "embedding", "scatter_", "scatter_add_", "index_add_", "index_put_")


class Traffic(TorchDispatchMode):
    """Counts the bytes of large tensors that operations read and write, by operation.

    Args:
        least: elements from which on a tensor counts.
        columns: count only tensors whose last dimension has this size; None for all.
    """

    def __init__(self, least: int, columns: int | None = None) -> None:
        super().__init__()
        self.least = least
        self.columns = columns
        self.paused = False
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        name = func.overloadpacket.__name__
        if (
            self.paused
            or func.is_view
            or name in (*_PRODUCTS, *_OF_ENTRIES, "empty", "empty_like", "new_empty", "expand")
        ):
            return result
        out = kwargs.get("out")
        read = {
            self._place(each): each for each in self._large(args) if not (name in _WRITTEN_WHOLE and each is args[0])
        }
        written = self._large(result if out is None else out)
        self.bytes[name] += sum(each.numel() * each.element_size() for each in [*read.values(), *written])
        return result

    def _large(self, values: Any) -> list[Tensor]:
        tensors = [each for each in tree_leaves(values) if isinstance(each, Tensor) and each.numel() >= self.least]
        return [each for each in tensors if self.columns in (None, each.shape[-1])]

    @staticmethod
    def _place(tensor: Tensor) -> tuple[int, torch.Size]:
        return tensor.data_ptr(), tensor.shape


def run(tokens: int, hidden_size: int, chunk_size: int, compiled: bool) -> None:
    """HPD's loss and gradients of random inputs, with the teacher's features."""
    torch.manual_seed(0)
    hidden = torch.randn(tokens, hidden_size, dtype=torch.bfloat16).requires_grad_()
    weight = torch.randn(VOCABULARY, hidden_size, dtype=torch.bfloat16).requires_grad_()
    head = OutputHead(weight, VOCABULARY)
    labels = torch.randint(VOCABULARY, (tokens,))
    teacher_head = OutputHead(weight.detach().flip(0), VOCABULARY)
    features = teacher_features(hidden.detach(), teacher_head, labels, 1.0, chunk_size, compiled)
    distillation_head(
        hidden,
        head,
        labels,
        torch.rand(tokens, 1, dtype=torch.float64),
        torch.full((tokens,), 1 / tokens),
        torch.zeros(tokens, dtype=torch.bool),
        features,
        RowObjectives.of("hpd"),
        chunk_size=chunk_size,
        compiled=compiled,
    )


def elementwise(compiled: bool, tokens: int = 16) -> Counter[str]:
    """Bytes per logit by operation, all tokens in one chunk and one step."""
    output_head._CPU_STEP = output_head._STEP  # steps of a device without a CPU's cache
    traffic = Traffic(tokens * VOCABULARY // 2)
    if compiled:
        torch._inductor.metrics.reset()
        run(tokens, 2, tokens, compiled=True)
        traffic.bytes["fused"] = torch._inductor.metrics.num_bytes_accessed
    uncounted = mock.patch.object(compiling, "_fused", lambda function: _uncounted(function, traffic))
    with uncounted, traffic:  # under it nothing is compiled
        run(tokens, 2, tokens, compiled)
    return Counter({name: count / (tokens * VOCABULARY) for name, count in traffic.bytes.items() if count})


def _uncounted(function: Callable[..., Any], traffic: Traffic) -> Callable[..., Any]:
    def call(*args: Any) -> Any:
        traffic.paused = True
        result = function(*args)
        traffic.paused = False
        return result

    return call


def accumulation(chunk_size: int, hidden_size: int = 16) -> float:
    """Bytes per logit of adding up the weight's gradient over chunks."""

    def total(chunks: int) -> int:
        with Traffic(VOCABULARY * hidden_size // 64, columns=hidden_size) as traffic:
            run(chunks * 4, hidden_size, 4, compiled=False)
        return sum(traffic.bytes.values())

    per_chunk = (total(6) - total(3)) / 3
    return per_chunk / (VOCABULARY * hidden_size) * HIDDEN / chunk_size


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    torch._inductor.config.force_disable_caches = True
    torch._logging.set_logs(inductor_metrics=True)  # without which the compiler does not count
    for compiled in (False, True):
        counted = elementwise(compiled=compiled)
        parts = ", ".join(f"{name} {count:.1f}" for name, count in counted.most_common() if count >= 0.05)
        print(f"{'compiled' if compiled else 'eager':10} {sum(counted.values()):6.1f} bytes a logit ({parts})")
    for chunk_size in (1024, CHUNK):
        print(f"weight's gradient over chunks of {chunk_size:5} tokens: {accumulation(chunk_size):5.1f} bytes a logit")


if __name__ == "__main__":
    main()
