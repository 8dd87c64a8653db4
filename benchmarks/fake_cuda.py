"""The Triton source that torch's compiler generates for an H100, on a machine without a GPU, and what its kernels move.

Nothing is run, and Triton compiles nothing: tensors are fake, and what torch asks of CUDA is answered here. The names
below are private to torch and were tried with torch 2.13; ``TorchChanged`` says which one is gone:

- ``torch.cuda`` and ``torch._dynamo.device_interface.CudaInterface``: which device there is;
- ``torch._inductor.graph.GraphLowering.compile_to_module``: where the generated code is taken;
- ``torch._inductor.fx_passes.joint_graph.lazy_init``: patterns that it would try out on the device;
- the guard of the device that copies of fake tensors ask for, five lines of C++ (``_GUARD``);
- the form of the generated code, read by regular expressions (``kernels``).
"""

import contextlib
import ctypes
import functools
import math
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch

_H100 = SimpleNamespace(
    name="NVIDIA H100",
    major=9,
    minor=0,
    multi_processor_count=132,
    total_memory=80 << 30,
    warp_size=32,
    max_threads_per_block=1024,
    max_threads_per_multi_processor=2048,
    regs_per_multiprocessor=65536,
    shared_memory_per_block=49152,
    shared_memory_per_block_optin=232448,
    shared_memory_per_multiprocessor=233472,
    L2_cache_size=50 << 20,
    gcnArchName="",
)

_GUARD = """
#include <c10/core/impl/DeviceGuardImplInterface.h>
namespace c10::impl {
struct Fake : NoOpDeviceGuardImpl<DeviceType::CUDA> { DeviceIndex deviceCount() const noexcept override { return 1; } };
static ::c10::impl::DeviceGuardImplRegistrar fake_cuda(DeviceType::CUDA, new Fake());
}
"""

_ITEM_SIZES = {"fp64": 8, "i64": 8, "fp32": 4, "i32": 4, "bf16": 2, "fp16": 2, "i1": 1, "i8": 1, "u8": 1}


class TorchChanged(Exception):
    """This torch has another form of what is used of it privately; the message says what."""


@dataclass(frozen=True)
class Kernel:
    """A generated kernel as it is launched."""

    name: str
    bytes: int
    """Loaded and stored, instruction by instruction: a loop that loads again counts again."""


@functools.cache
def _load_guard() -> None:
    from torch.utils.cpp_extension import include_paths, library_paths

    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder, "guard.cpp"), Path(folder, "guard.so")
        source.write_text(_GUARD)
        command = ["g++", "-shared", "-fPIC", "-std=c++20", *(f"-I{path}" for path in include_paths()), str(source)]
        command += ["-o", str(library), *(f"-L{path}" for path in library_paths()), "-lc10"]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise TorchChanged(f"torch {torch.__version__}: a device guard does not compile: {done.stderr[-300:]}")
        ctypes.CDLL(str(library))


@contextlib.contextmanager
def _cuda() -> Iterator[None]:
    """Within, torch believes in a CUDA device."""
    import triton
    from torch._dynamo.device_interface import CudaInterface
    from torch._inductor.fx_passes import joint_graph
    from triton.backends.compiler import GPUTarget

    cuda = {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "_lazy_init": lambda: None,
        "current_device": lambda: 0,
        "device_count": lambda: 1,
        "get_device_properties": lambda *arguments: _H100,
        "get_device_capability": lambda *arguments: (9, 0),
        "is_bf16_supported": lambda *arguments, **keywords: True,
        "current_stream": lambda *arguments: SimpleNamespace(cuda_stream=0),
        "synchronize": lambda *arguments: None,
        "set_device": lambda *arguments: None,
        "_exchange_device": lambda index: 0,
        "_maybe_exchange_device": lambda index: 0,
        "get_rng_state": lambda *arguments: torch.get_rng_state(),
        "set_rng_state": lambda *arguments: None,
    }
    interface: dict[str, Callable[..., Any]] = {
        "is_available": lambda: True,
        "current_device": lambda: 0,
        "device_count": lambda: 1,
        "get_device_properties": lambda *arguments: _H100,
        "get_compute_capability": lambda *arguments: 90,
        "is_triton_capable": lambda *arguments: True,
        "raise_if_triton_unavailable": lambda *arguments: None,
        "get_raw_stream": lambda *arguments: 0,
        "exchange_device": lambda index: 0,
        "maybe_exchange_device": lambda index: 0,
        "set_device": lambda *arguments: None,
        "synchronize": lambda *arguments: None,
    }
    target = GPUTarget("cuda", 90, 32)
    driver = SimpleNamespace(
        get_current_target=lambda: target, get_current_device=lambda: 0, get_current_stream=lambda *arguments: 0
    )
    with contextlib.ExitStack() as stack:
        for name, value in cuda.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, value))
        for name, value in interface.items():
            stack.enter_context(mock.patch.object(CudaInterface, name, staticmethod(value)))
        for name in ("current_device", "get_device_properties", "set_device"):
            stack.enter_context(mock.patch.object(CudaInterface.Worker, name, staticmethod(interface[name])))
        stack.enter_context(mock.patch.object(triton.runtime.driver, "_active", driver))
        stack.enter_context(mock.patch.object(joint_graph, "lazy_init", return_value=None))
        yield


def generate(function: Callable[..., Any], make_arguments: Callable[[], tuple[Any, ...]]) -> str:
    """The code that ``torch.compile`` generates for a function.

    Args:
        function: of fake tensors on CUDA.
        make_arguments: makes them; what it says of dynamic dimensions holds.

    Raises:
        TorchChanged: see there.
    """
    from torch._inductor import config
    from torch._inductor.graph import GraphLowering
    from torch._subclasses import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    _load_guard()
    found: list[str] = []

    class _Taken(Exception):
        pass

    def take(graph: Any) -> None:
        code, *_ = graph.codegen()
        found.append(getattr(code, "value", code))
        raise _Taken

    torch._dynamo.reset()
    settings = {"fx_graph_cache": False, "compile_threads": 1, "joint_graph_constant_folding": False}
    try:
        with (
            _cuda(),
            mock.patch.object(GraphLowering, "compile_to_module", take),
            config.patch(settings),
            FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True),
            torch.no_grad(),
        ):
            torch.compile(function, fullgraph=True)(*make_arguments())
    except Exception as error:
        if not found:
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            raise TorchChanged(f"torch {torch.__version__} generates no code for a fake device: {reason}") from error
    if len(found) != 1:
        raise TorchChanged(f"torch {torch.__version__} compiles {len(found)} graphs in place of one")
    return found[0]


def kernels(code: str, rows: int) -> list[Kernel]:
    """The kernels of generated code in the order of their launches.

    Args:
        code: of ``generate``.
        rows: the value of the dynamic dimension.

    Raises:
        TorchChanged: the code has another form than the one that is known.
    """
    try:
        return _kernels(code, rows)
    except (KeyError, IndexError, NameError, SyntaxError, ValueError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise TorchChanged(f"torch {torch.__version__}: its generated code has another form ({reason})") from error


def _kernels(code: str, rows: int) -> list[Kernel]:
    definitions = {}
    for match in re.finditer(r"'signature': ({.*?}).*?^def (triton_\w+)\((.*?)\):\n(.*?)^'''", code, re.S | re.M):
        signature, name, parameters, body = match.groups()
        accesses = re.findall(r"tl\.(?:load|store|atomic_add)\((\w+) \+ ", body)
        names = [each.split(":")[0].strip() for each in parameters.split(",")]
        definitions[name] = (names, eval(signature), accesses)
    call = code[code.index("def call(") :]
    if "extern_kernels." in call or "torch.ops." in call:
        raise ValueError("it calls kernels that are not generated")
    numbers = dict.fromkeys(re.findall(r"\bs\d+\b", call), rows)
    sizes: dict[str, int] = {}

    def value(expression: str) -> int:
        return int(eval(expression, {}, numbers))

    launched = []
    for line in map(str.strip, call.splitlines()):
        if found := re.match(r"(?:assert_size_stride\()?(\w+)(?:,| = empty_strided_cuda\() ?\((.*?)\), ", line):
            sizes[found[1]] = math.prod(value(each) for each in found[2].split(",") if each.strip())
        elif found := re.match(r"(\w+) = (?:reinterpret_tensor\()?(buf\w+|arg\w+)[;,]", line):
            sizes[found[1]] = sizes[found[2]]
        elif found := re.match(r"(\w+numel) = (.*)", line):
            numbers[found[1]] = value(found[2])
        elif found := re.match(r"(triton_\w+)\.run\((.*), stream=", line):
            names, signature, accesses = definitions[found[1]]
            given = dict(zip(names, re.split(r", (?![^()]*\))", found[2]), strict=False))
            elements = math.prod(value(given[name]) for name in names if name.endswith("numel"))
            moved = 0
            for name in accesses:
                buffer = re.sub(r"reinterpret_tensor\((\w+).*", r"\1", given[name])
                moved += min(sizes[buffer], elements) * _ITEM_SIZES[signature[name].removeprefix("*")]
            launched.append(Kernel(found[1], moved))
    if not launched:
        raise ValueError("it launches no kernel")
    return launched
