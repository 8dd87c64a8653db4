"""A device that is no CPU, on any machine: tensors that say they are on it, hold their numbers in CPU memory and obey
a GPU's rules.

Every operation is first run on torch's fake tensors, which refuse operands on two devices and results of another dtype
than asked for, then on the numbers. So ``item``, ``nonzero``, boolean masks and nested tensors work, autograd too, and
results can be compared with those of plain CPU tensors.

    with fake_device():
        total = torch.ones(3, device=NAME).sum()   # total.device.type == NAME
        total + torch.ones(3)                      # refused: two devices

Not seen: an operation or dtype that a GPU has no kernel for, and what kernels compute.
"""

import itertools
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
    UnsupportedOperatorException,
)
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map_only, tree_unflatten

NAME = "meta"
"""``device.type`` of the tensors: of those that a build for CPUs knows, the one whose autograd needs no driver."""
_RULES = "privateuseone"
"""The device whose rules hold."""

_register_guard = getattr(getattr(torch._C, "_acc", None), "register_python_privateuseone_device_guard", None)
is_available = _register_guard is not None
"""Whether this torch lets Python declare a device."""

if _register_guard is not None:
    # The least that fake tensors ask of a device; torch.accelerator does not see it.
    _device_type = torch._C._autograd.DeviceType.PrivateUse1
    _answers = {"is_initialized": True, "is_available": False, "current_device": 0, "device_count": 0}
    _module = SimpleNamespace(**{name: lambda answer=answer: answer for name, answer in _answers.items()})
    torch._register_device_module(_RULES, _module)
    _register_guard(type("_Guard", (torch._C._acc.DeviceGuard,), {"type_": lambda self: _device_type})())


class FakeDeviceTensor(Tensor):
    """A tensor of the device ``NAME``, its numbers in ``numbers``."""

    numbers: Tensor

    @staticmethod
    def __new__(cls, numbers: Tensor) -> "FakeDeviceTensor":
        tensor = Tensor._make_wrapper_subclass(
            cls,
            numbers.size(),
            strides=numbers.stride(),
            storage_offset=numbers.storage_offset(),
            dtype=numbers.dtype,
            device=torch.device(NAME),
        )
        tensor.numbers = numbers
        return tensor

    def tolist(self) -> Any:
        return self.numbers.tolist()

    def __repr__(  # type: ignore[override]  # torch's own class and its stub disagree
        self, *, tensor_contents: Any = None
    ) -> str:
        return f"FakeDeviceTensor({self.numbers!r})"

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in (Tensor.repeat_interleave, torch.repeat_interleave) and isinstance(args[-1], Tensor):
            kwargs.setdefault("output_size", int(args[-1].sum()))  # torch asks for it on the device ``NAME`` alone
        # Lists of indices and single numbers become tensors here: torch makes them on ``NAME`` out of sight.
        if func in (Tensor.__getitem__, Tensor.__setitem__):
            tensor, index, *value = args
            whole = index if isinstance(index, tuple) else (index,)
            index = tuple(torch.tensor(each).long() if isinstance(each, list) else each for each in whole)
            value = [
                torch.tensor(each, dtype=tensor.dtype) if isinstance(each, int | float) else each for each in value
            ]
            args = (tensor, index, *value)
        with torch._C.DisableTorchFunctionSubclass():  # results are what they are, not of this class
            return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch declares a function of C there
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return NotImplemented  # the mode below does it all; of a nested tensor, that tensor's class


class _FakeDevice(TorchDispatchMode):
    """Runs operations on both kinds of tensors by a GPU's rules."""

    rules = FakeTensorMode()
    known: ClassVar[dict[Any, list[bool]]] = {}
    """Of operations that were allowed, by operands' kinds: which resulting tensors are on the device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(not issubclass(each, FakeDeviceTensor | torch.nn.Parameter) for each in types if each is not Tensor):
            return NotImplemented  # nested tensors: their parts come by on their own
        kwargs = kwargs or {}
        if torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd"):
            with self:
                return func.decompose(*args, **kwargs)
        operands, structure = tree_flatten((args, kwargs))
        if any(
            isinstance(each, Tensor) and each.is_meta and not isinstance(each, FakeDeviceTensor) for each in operands
        ):
            raise NotImplementedError(f"{func}: an operand was made out of sight, its numbers are not known")
        on_device = iter(self._by_the_rules(func, operands, structure))
        numbers_args, numbers_kwargs = tree_unflatten([_numbers(each) for each in operands], structure)
        results, structure = tree_flatten(func(*numbers_args, **numbers_kwargs))
        wrapped = [FakeDeviceTensor(each) if isinstance(each, Tensor) and next(on_device) else each for each in results]
        return return_and_correct_aliasing(func, args, kwargs, tree_unflatten(wrapped, structure))

    def _by_the_rules(self, func: Any, operands: list[Any], structure: Any) -> Iterable[bool]:
        """Whether each resulting tensor is on the device.

        Raises:
            RuntimeError: the operation is not allowed.
        """
        kind = (func, structure, *map(_kind, operands))
        if kind in self.known:
            return self.known[kind]
        fakes = [self._fake(each) for each in operands]
        args, kwargs = tree_unflatten(fakes, structure)
        try:
            with self.rules:
                results = tree_leaves(func(*args, **kwargs))
        except (DynamicOutputShapeException, DataDependentOutputException, UnsupportedOperatorException):
            # Its shape depends on numbers. Such an operation has all operands, and its results, in one place.
            devices = {each.device for each in fakes if isinstance(each, Tensor) and each.dim() > 0}
            if len(devices) > 1:
                raise RuntimeError(f"{func}: operands on {', '.join(sorted(map(str, devices)))}") from None
            return itertools.repeat(any(isinstance(each, FakeDeviceTensor) for each in operands))
        self.known[kind] = [each.device.type == _RULES for each in results if isinstance(each, Tensor)]
        return self.known[kind]

    def _fake(self, value: Any) -> Any:
        if isinstance(value, torch.device):
            return torch.device(_RULES) if value.type == NAME else value
        if not isinstance(value, Tensor):
            return value
        device = _RULES if value.device.type == NAME else value.device
        with self.rules:
            return torch.empty_strided(value.size(), value.stride(), dtype=value.dtype, device=device)


def _kind(value: Any) -> Any:
    """What the rules look at."""
    if isinstance(value, Tensor):
        return value.size(), value.stride(), value.dtype, value.device
    return type(value), value


class _Constants(TorchFunctionMode):
    """``torch.tensor(..., device=NAME)`` makes the tensor on the CPU and copies it, which torch does out of sight."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in (torch.tensor, torch.as_tensor) and "device" in kwargs:
            device = kwargs.pop("device")
            return func(*args, **kwargs).to(device)
        if func is torch.tensor and isinstance(args[0], list):
            args = tree_map_only(FakeDeviceTensor, lambda each: each.numbers.item(), args)
        return func(*args, **kwargs)


def _numbers(value: Any) -> Any:
    if isinstance(value, torch.device):
        return torch.device("cpu") if value.type == NAME else value
    return value.numbers if isinstance(value, FakeDeviceTensor) else value


@contextmanager
def fake_device() -> Iterator[None]:
    """Within, ``torch.device(NAME)`` is a device like any other."""
    with _Constants(), _FakeDevice():
        yield
