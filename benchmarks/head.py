"""Time and memory of the output head against its bare matrix products and against plain logits.

    python benchmarks/head.py

Forward and backward of HPD at two shapes in two dtypes, side by side in one process; medians are appended to
benchmarks/results/head.csv with the machine and the versions.

    gemms               the student's three products: logits, gradient of hidden, gradient of weight
    gemms_and_teacher   and the teacher's logits
    head                hpd_verl.head.distillation_head.distillation_head, the teacher's features known
    head_and_teacher    and the features computed
    plain               whole logits and log-probs of both models, autograd (tests/reference.py, naive_hpd_loss)
    NAME_and_teacher    an objective over the vocabulary, hpd_exact, fkl, ...: the teacher's hidden states known
    fused_NAME    head, head_and_teacher or NAME_and_teacher compiled by torch; not on a CPU unless named
    trl_fkl, trl_rkl, trl_jsd    TRL's chunked divergence of the whole vocabulary, where TRL can be imported
    liger_jsd           Liger's fused Jensen-Shannon divergence, where Liger can be imported; on a GPU only

A ratio is to the bare products with the teacher, without it for head and fused_head. Memory is the
growth of the peak resident set over what is resident before, measured once in a process of its own, or with
``--device cuda`` that of what torch allocates there; it holds the gradients of hidden and weight. It needs Linux.
"""

import argparse
import functools
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from reference import naive_hpd_loss  # noqa: E402
from results import append_rows, machine  # noqa: E402

from hpd_verl.head.distillation_head import distillation_head  # noqa: E402
from hpd_verl.head.features import HiddenFeatures, TeacherFeatures, teacher_features  # noqa: E402
from hpd_verl.head.output_head import OutputHead  # noqa: E402
from hpd_verl.objectives import OBJECTIVES, RowObjectives, TokenContext  # noqa: E402

SHAPES = [(1024, 49_152, 576, 576), (512, 151_936, 896, 1536)]
DTYPES = ["float32", "bfloat16"]
BASELINE = {"gemms": "gemms", "head": "gemms", "fused_head": "gemms"}  # others: gemms_and_teacher


class Case:
    """Inputs of one shape and dtype, and the implementations as methods without arguments."""

    def __init__(
        self, shape: tuple[int, int, int, int], dtype: torch.dtype, chunk_size: int | None, device: str = "cpu"
    ) -> None:
        with torch.device(device):
            self._make(shape, dtype, chunk_size)

    def _make(self, shape: tuple[int, int, int, int], dtype: torch.dtype, chunk_size: int | None) -> None:
        tokens, self.vocabulary, hidden, teacher_hidden = shape
        torch.manual_seed(0)
        self.chunk_size = chunk_size
        self.hidden = torch.randn(tokens, hidden, dtype=dtype).requires_grad_()
        self.weight = torch.randn(self.vocabulary, hidden, dtype=dtype).mul_(0.05).requires_grad_()
        self.teacher_hidden = torch.randn(tokens, teacher_hidden, dtype=dtype)
        self.teacher_weight = torch.randn(self.vocabulary, teacher_hidden, dtype=dtype).mul_(0.05)
        self.labels = torch.randint(self.vocabulary, (tokens,))
        self.uniforms = torch.rand(tokens, 1, dtype=torch.float64)
        self.token_scale = torch.full((tokens,), 1 / tokens)
        self.is_rollout = torch.zeros(tokens, dtype=torch.bool)
        self.teacher_head = OutputHead(self.teacher_weight, self.vocabulary)
        self.features = self._features()

    def _features(self, compiled: bool = False) -> TeacherFeatures:
        arguments = (self.teacher_hidden, self.teacher_head, self.labels, 1.0, self.chunk_size)
        return teacher_features(*arguments, compiled=compiled)

    @torch.no_grad()
    def gemms(self) -> None:
        matrix = self.hidden @ self.weight.T
        matrix @ self.weight
        matrix.T @ self.hidden

    def gemms_and_teacher(self) -> None:
        self.gemms()
        self.teacher_hidden @ self.teacher_weight.T

    def head(self, compiled: bool = False) -> None:
        self._head("hpd", self.features, compiled)

    def _head(self, objective: str, features: TeacherFeatures, compiled: bool = False) -> None:
        objectives = RowObjectives.of(objective)
        self._backward(
            distillation_head(
                self.hidden,
                OutputHead(self.weight, self.vocabulary),
                self.labels,
                self.uniforms,
                self.token_scale,
                self.is_rollout,
                features,
                objectives,
                chunk_size=self.chunk_size,
                compiled=compiled,
                context=TokenContext.example(objectives.needs, self.is_rollout, torch.float32),
            ).loss
        )

    def head_and_teacher(self, compiled: bool = False) -> None:
        self.features = self._features(compiled)
        self.head(compiled)

    def over_vocabulary(self, objective: str, compiled: bool = False) -> None:
        self._head(objective, HiddenFeatures(self.teacher_hidden, self.teacher_head, 1.0), compiled)

    def trl(self, beta: float) -> None:
        from trl.trainer.distillation_trainer import _chunked_divergence_loss

        mask = torch.ones_like(self.labels).unsqueeze(0)
        hidden, teacher_hidden = self.hidden.unsqueeze(0), self.teacher_hidden.unsqueeze(0)
        loss, *_ = _chunked_divergence_loss(hidden, teacher_hidden, self.weight, self.teacher_weight, mask, beta=beta)
        self._backward(loss)

    def liger_jsd(self) -> None:
        from liger_kernel.transformers import LigerFusedLinearJSD

        loss = LigerFusedLinearJSD(jsd_beta=0.5)
        self._backward(loss(self.hidden, self.weight, self.teacher_hidden, self.teacher_weight, None))

    def plain(self) -> None:
        mask = torch.ones_like(self.token_scale)
        self._backward(
            naive_hpd_loss(
                self.hidden @ self.weight.T,
                self.teacher_hidden @ self.teacher_weight.T,
                self.labels,
                mask,
                len(self.labels),
            )
        )

    def implementation(self, name: str) -> Callable[[], None]:
        """One of ``IMPLEMENTATIONS`` or ``OPTIONAL``."""
        if name in TRL:
            return functools.partial(self.trl, TRL[name])
        plain = name.removeprefix(FUSED)
        compiled = {"compiled": True} if name.startswith(FUSED) else {}
        if plain in EXACT:
            return functools.partial(self.over_vocabulary, plain.removesuffix("_and_teacher"), **compiled)
        return functools.partial(getattr(self, plain), **compiled)

    def _backward(self, loss: Tensor) -> None:
        self.hidden.grad = self.weight.grad = None
        loss.backward()


FUSED = "fused_"
EXACT = [f"{name}_and_teacher" for name, each in OBJECTIVES.items() if each.over == "vocabulary"]
TRL = {"trl_fkl": 0.0, "trl_rkl": 1.0, "trl_jsd": 0.5}
"""TRL's beta."""
IMPLEMENTATIONS = ["gemms", "gemms_and_teacher", "head", "head_and_teacher", *EXACT, "plain"]
OPTIONAL = [
    *(FUSED + name for name in IMPLEMENTATIONS if name in ("head", "head_and_teacher", *EXACT)),
    *TRL,
    "liger_jsd",
]


def _synchronise(device: str) -> None:
    """Wait until the device has done what it was given."""
    if device != "cpu":
        torch.get_device_module(device).synchronize()


def medians(case: Case, repeats: int, implementations: list[str], device: str) -> dict[str, float]:
    """Seconds of each implementation; they take turns, so that a busy moment of the machine hits all."""
    functions: dict[str, Callable[[], None]] = {name: case.implementation(name) for name in implementations}
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for repeat in range(repeats + 1):
        for name, function in functions.items():
            _synchronise(device)
            start = time.perf_counter()
            function()
            _synchronise(device)
            if repeat:  # the first is a warm-up
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def _resident(field: str) -> int:
    """VmRSS or VmHWM of this process, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def peak_memory(case: Case, implementation: str, device: str) -> int:
    """Bytes by which the peak of one run, of the resident set or on the device, exceeds what there was before."""
    if device != "cpu":
        memory = torch.get_device_module(device)
        case.implementation(implementation)()  # what compiling and the libraries take once does not count
        memory.reset_peak_memory_stats()
        before = memory.memory_allocated()
        case.implementation(implementation)()
        return int(memory.max_memory_allocated() - before)
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = _resident("VmRSS")
    case.implementation(implementation)()
    return _resident("VmHWM") - before


def _peak_memory_in_own_process(arguments: argparse.Namespace, shape: int, dtype: str, implementation: str) -> int:
    command = [sys.executable, __file__, "--memory", implementation, "--shape", str(shape), "--dtype", dtype]
    command += ["--threads", str(arguments.threads), "--device", arguments.device]
    command += ["--chunk_size", str(arguments.chunk_size)] if arguments.chunk_size else []
    command += ["--tokens", str(arguments.tokens)] if arguments.tokens else []
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cpu", help="cpu, or cuda")
    parser.add_argument("--chunk_size", type=int, help="tokens; 1024 on a CPU, else what the head takes")
    parser.add_argument("--tokens", type=int, help="in place of the shape's")
    parser.add_argument("--only", nargs="+", choices=[*IMPLEMENTATIONS, *OPTIONAL], default=IMPLEMENTATIONS)
    parser.add_argument("--shape", type=int, choices=range(len(SHAPES)), help="one of the shapes only")
    parser.add_argument("--dtype", choices=DTYPES, help="one of the dtypes only")
    parser.add_argument("--csv", type=Path, default=ROOT / "benchmarks" / "results" / "head.csv")
    parser.add_argument("--memory", choices=[*IMPLEMENTATIONS, *OPTIONAL], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.chunk_size is None and arguments.device == "cpu":
        arguments.chunk_size = 1024

    def shape_of(index: int) -> tuple[int, int, int, int]:
        tokens, vocabulary, hidden, teacher_hidden = SHAPES[index]
        return arguments.tokens or tokens, vocabulary, hidden, teacher_hidden

    def case_of(index: int, dtype: str) -> Case:
        return Case(shape_of(index), getattr(torch, dtype), arguments.chunk_size, arguments.device)

    if arguments.memory:
        print(peak_memory(case_of(arguments.shape, arguments.dtype), arguments.memory, arguments.device))
        return

    needed = {BASELINE.get(name, "gemms_and_teacher") for name in arguments.only} | set(arguments.only)
    implementations = [name for name in [*IMPLEMENTATIONS, *OPTIONAL] if name in needed]
    rows = []
    for index in range(len(SHAPES)) if arguments.shape is None else [arguments.shape]:
        for dtype in DTYPES if arguments.dtype is None else [arguments.dtype]:
            tokens, vocabulary, hidden, teacher_hidden = shape_of(index)
            seconds = medians(case_of(index, dtype), arguments.repeats, implementations, arguments.device)
            for name in implementations:
                memory = _peak_memory_in_own_process(arguments, index, dtype, name)
                row = {
                    **machine(),
                    "threads": arguments.threads,
                    "tokens": tokens,
                    "vocabulary": vocabulary,
                    "hidden": hidden,
                    "teacher_hidden": teacher_hidden,
                    "dtype": dtype,
                    "chunk_size": arguments.chunk_size,
                    "implementation": name,
                    "seconds": round(seconds[name], 4 if arguments.device == "cpu" else 6),
                    "ratio": round(seconds[name] / seconds[BASELINE.get(name, "gemms_and_teacher")], 3),
                    "extra_mb": round(memory / 1e6),
                }
                rows.append(row)
                shape = f"{tokens} x {vocabulary} {dtype}"
                time_taken = f"{seconds[name] * 1000:10.2f} ms {row['ratio']:6.2f} x"
                print(f"{shape:26} {name:22} {time_taken} {row['extra_mb']:6} MB", flush=True)

    append_rows(arguments.csv, rows)


if __name__ == "__main__":
    main()
