"""Bytes that the output layer's elementwise work reads and writes per logit: what it costs beside the matrix products
on a device whose memory is the limit.

    python benchmarks/traffic.py [--objective NAME ...]
    python benchmarks/traffic.py --kernels

Counted, not timed, on any machine, at a vocabulary of 151,936. The first counts operation by operation, as they run
uncompiled in bfloat16, with what adding up the weight's gradient takes at a hidden size of 1,536. The second counts the
loads and stores of the kernels that torch generates for an H100, where a loop that loads again counts again, as CSV
``objective,bytes_a_logit,kernels``, and fails where an objective takes more than ``LIMITS``. Matrix products are left
out, and so is what touches single entries. Where an objective needs the teacher's products it is counted with its
reads of them; one over tokens with the pass that makes the teacher's features.
"""

import argparse
import functools
import sys
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import fake_cuda  # noqa: E402

from hpd_verl.head import output_head  # noqa: E402
from hpd_verl.head.bodies import Biases, Form, Rows, log_sum_exp, parts_of, read, write  # noqa: E402
from hpd_verl.head.distillation_head import distillation_head  # noqa: E402
from hpd_verl.head.features import HiddenFeatures, TeacherProducts, teacher_features  # noqa: E402
from hpd_verl.head.output_head import OutputHead, Scaling  # noqa: E402
from hpd_verl.objectives import OBJECTIVES, RowObjectives, TokenContext  # noqa: E402

VOCABULARY, HIDDEN, CHUNK, ROWS = 151_936, 1536, 8192, 4096
LIMITS = {"token": 12.5, "vocabulary": 16.5, "entropy_aware": 22.0, "akl": 32.0, "top_k_tail": 32.0, "taid": 36.0}
"""Bytes per logit in bfloat16; float32 may take twice as many. Objectives with a limit of their own sum a row up before
they weigh it, in both passes; akl looks for its head, too."""
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


def run(objective: str, tokens: int, hidden_size: int, chunk_size: int) -> None:
    """An objective's loss and gradients of random inputs, with the teacher's features."""
    torch.manual_seed(0)
    hidden = torch.randn(tokens, hidden_size, dtype=torch.bfloat16).requires_grad_()
    weight = torch.randn(VOCABULARY, hidden_size, dtype=torch.bfloat16).requires_grad_()
    labels = torch.randint(VOCABULARY, (tokens,))
    teacher_head = OutputHead(weight.detach().flip(0), VOCABULARY)
    objectives = RowObjectives.of(objective)
    features = HiddenFeatures(hidden.detach(), teacher_head, 1.0)
    if not objectives.over_vocabulary:
        features = teacher_features(hidden.detach(), teacher_head, labels, 1.0, chunk_size)
    distillation_head(
        hidden,
        OutputHead(weight, VOCABULARY),
        labels,
        torch.rand(tokens, 1, dtype=torch.float64),
        torch.full((tokens,), 1 / tokens),
        torch.zeros(tokens, dtype=torch.bool),
        features,
        objectives,
        chunk_size=chunk_size,
        context=TokenContext.example(objectives.needs, torch.zeros(tokens, dtype=torch.bool), torch.float32),
    )


def elementwise(objective: str, tokens: int = 16) -> Counter[str]:
    """Bytes per logit by operation, uncompiled, all tokens in one chunk and one step."""
    output_head._CPU_STEP = output_head._STEP  # steps of a device without a CPU's cache
    with Traffic(tokens * VOCABULARY // 2) as traffic:
        run(objective, tokens, 2, tokens)
    return Counter({name: count / (tokens * VOCABULARY) for name, count in traffic.bytes.items() if count})


def accumulation(chunk_size: int, hidden_size: int = 16) -> float:
    """Bytes per logit of adding up the weight's gradient over chunks."""

    def total(chunks: int) -> int:
        with Traffic(VOCABULARY * hidden_size // 64, columns=hidden_size) as traffic:
            run("hpd", chunks * 4, hidden_size, 4)
        return sum(traffic.bytes.values())

    per_chunk = (total(6) - total(3)) / 3
    return per_chunk / (VOCABULARY * hidden_size) * HIDDEN / chunk_size


def generated(objective: str, dtype: torch.dtype) -> tuple[float, int]:
    """Bytes per logit and kernels of both passes as an H100 runs them.

    Raises:
        fake_cuda.TorchChanged: see there.
    """
    objectives, scaling = RowObjectives.of(objective), Scaling(torch.float32)
    if objectives.over_vocabulary:
        return _generated(Form(scaling, scaling, (parts_of(objectives.demonstration),)), False, dtype)
    return _generated(Form(scaling), objectives.needs_teacher, dtype)


@functools.cache
def _generated(form: Form, makes_features: bool, dtype: torch.dtype) -> tuple[float, int]:
    over_vocabulary = bool(form.parts)

    def rows(*written: str) -> Rows:
        """Fake tensors, of the fields that a pass has beside the products."""
        fields: dict[str, Any] = {name: _fake(dtype=torch.float32) for name in ("student_label", *written)}
        fields |= {"student": _fake(VOCABULARY, dtype=dtype), "labels": _fake(dtype=torch.int64)}
        if form.teacher is not None:
            fields |= {"teacher": _fake(VOCABULARY, dtype=dtype), "teacher_label": _fake(dtype=torch.float32)}
        statistics = tuple(
            tuple(None if part.objective.row_statistic is None else _fake(1, dtype=torch.float32) for part in parts)
            for parts in form.parts
        )
        is_rollout = _fake(dtype=torch.bool)
        needs = frozenset[str]().union(*(part.objective.needs for parts in form.parts for part in parts))
        if needs:
            fields["context"] = TokenContext.example(needs, is_rollout, torch.float32)
        return Rows(is_rollout=is_rollout, row_statistics=statistics, **fields)

    sums = ["student_log_sum_exp", *(["teacher_log_sum_exp", "total"] if over_vocabulary else [])]
    passes: list[tuple[Callable[..., Any], Callable[[], tuple[Any, ...]]]] = [
        (lambda rows: read(form, rows, Biases())[0], lambda: (rows(),)),
        (lambda rows: write(form, rows, Biases()), lambda: (rows(*sums),)),
    ]
    if makes_features:
        passes.append(
            (lambda products: log_sum_exp(form.student, products, None), lambda: (_fake(VOCABULARY, dtype=dtype),))
        )
    launched = [each for one in passes for each in fake_cuda.kernels(fake_cuda.generate(*one), ROWS)]
    moved = sum(kernel.bytes for kernel in launched) / (ROWS * VOCABULARY)
    return moved + _beforehand(form, dtype), len(launched)


def _fake(*shape: int, dtype: torch.dtype) -> Tensor:
    tensor = torch.empty(ROWS, *shape, dtype=dtype, device="cuda")
    torch._dynamo.maybe_mark_dynamic(tensor, 0)
    return tensor


def _beforehand(form: Form, dtype: torch.dtype, tokens: int = 4) -> float:
    """Bytes per logit of row statistics, which run operation by operation."""
    products, known = torch.randn(tokens, VOCABULARY).to(dtype).mul_(5), torch.zeros(tokens)
    with Traffic(tokens * VOCABULARY // 2) as traffic:
        for part in (part for parts in form.parts for part in parts):
            part.row_statistic(TeacherProducts(products, form.student, None, known))
    return sum(traffic.bytes.values()) / (tokens * VOCABULARY)


def count_kernels(objectives: Iterable[str], dtype: torch.dtype) -> int:
    """Print the CSV; the number of objectives beyond their limit."""
    beyond = 0
    print("objective,bytes_a_logit,kernels")
    for name in objectives:
        moved, kernels = generated(name, dtype)
        limit = LIMITS.get(name, LIMITS[OBJECTIVES[name].over]) * (2 if dtype == torch.float32 else 1)
        print(f"{name},{moved:.1f},{kernels}", flush=True)
        if moved > limit:
            print(f"Error: {name}: {moved:.1f} bytes a logit, the limit is {limit}", file=sys.stderr)
            beyond += 1
    return beyond


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kernels", action="store_true", help="count generated kernels; needs g++ and triton")
    parser.add_argument("--objective", nargs="+", choices=sorted(OBJECTIVES), help="these only")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16", help="with --kernels")
    arguments = parser.parse_args()
    if arguments.kernels:
        try:
            beyond = count_kernels(arguments.objective or OBJECTIVES, getattr(torch, arguments.dtype))
        except fake_cuda.TorchChanged as error:
            parser.exit(2, f"Error: {error}\n")
        parser.exit(1 if beyond else 0)
    for name in arguments.objective or ["hpd", "fkl"]:
        counted = elementwise(name)
        parts = ", ".join(f"{operation} {count:.1f}" for operation, count in counted.most_common() if count >= 0.05)
        print(f"{name:10} {sum(counted.values()):6.1f} bytes a logit ({parts})")
    for chunk_size in (1024, CHUNK):
        print(f"weight's gradient over chunks of {chunk_size:5} tokens: {accumulation(chunk_size):5.1f} bytes a logit")


if __name__ == "__main__":
    main()
