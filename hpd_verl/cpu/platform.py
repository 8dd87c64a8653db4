"""verl's platform interface on a CPU."""

import os
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from verl.plugin.platform.platform_base import PlatformBase
from verl.plugin.platform.platform_manager import PlatformRegistry


class _CPUDeviceModule(types.ModuleType):
    """``torch.cpu`` completed by the calls verl makes on ``torch.<device>``: memory is zero, streams do nothing."""

    _calls: dict[str, Callable[..., Any]] = {  # noqa: RUF012 - a constant table
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "init": lambda: None,
        "memory_allocated": lambda *args, **kwargs: 0,
        "memory_reserved": lambda *args, **kwargs: 0,
        "max_memory_allocated": lambda *args, **kwargs: 0,
        "max_memory_reserved": lambda *args, **kwargs: 0,
        "reset_peak_memory_stats": lambda *args, **kwargs: None,
        "reset_accumulated_memory_stats": lambda *args, **kwargs: None,
        "mem_get_info": lambda *args, **kwargs: (0, 0),
        "empty_cache": lambda: None,
        "ipc_collect": lambda: None,
        "synchronize": lambda *args, **kwargs: None,
        "set_device": lambda *args, **kwargs: None,
        "current_device": lambda: "cpu",
        "device_count": lambda: 1,
        "manual_seed": torch.manual_seed,
        "manual_seed_all": torch.manual_seed,
        "get_rng_state": lambda *args, **kwargs: torch.get_rng_state(),
        "set_rng_state": lambda state, *args, **kwargs: torch.set_rng_state(state),
        "get_device_name": lambda *args, **kwargs: "cpu",
        "get_device_capability": lambda *args, **kwargs: (None, None),
    }

    def __getattr__(self, name: str) -> Any:
        return self._calls[name] if name in self._calls else getattr(torch.cpu, name)


_device_module = _CPUDeviceModule("hpd_verl.cpu.device")


class PlatformCPU(PlatformBase):
    """The CPU as one verl device per rank, with gloo between ranks."""

    @property
    def device_name(self) -> str:
        return "cpu"

    @property
    def vendor_name(self) -> str:
        return "cpu"

    @property
    def device_module(self) -> types.ModuleType:
        return _device_module

    def is_available(self) -> bool:
        return True

    def is_platform_available(self, use_smi_check: bool = False) -> bool:
        return False  # never chosen by detection: a GPU cluster's head node may have no GPU

    def current_device(self) -> torch.device:
        return torch.device("cpu")

    def device_count(self) -> int:
        return 1

    def set_device(self, device_index: int) -> None:
        pass

    def synchronize(self, device_index: int | None = None) -> None:
        pass

    def manual_seed(self, seed: int) -> None:
        torch.manual_seed(seed)

    def manual_seed_all(self, seed: int) -> None:
        torch.manual_seed(seed)

    def set_allocator_settings(self, settings: str) -> None:
        pass

    def empty_cache(self) -> None:
        pass

    def get_device_capability(self, device_index: int = 0) -> tuple[int | None, int | None]:
        return None, None

    def communication_backend_name(self) -> str:
        return "gloo"

    def visible_devices_envvar(self) -> str:
        return "CUDA_VISIBLE_DEVICES"

    @contextmanager
    def nvtx_range(self, msg: str) -> Iterator[None]:
        yield

    def profiler_start(self) -> None:
        pass

    def profiler_stop(self) -> None:
        pass

    def ray_resource_name(self) -> str:
        return "GPU"  # the only resource verl counts ranks by; configs/platform/cpu.yaml declares that many

    def ray_noset_envvars(self) -> list[str]:
        return ["RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES"]

    def rollout_env_vars(self) -> dict[str, str]:
        return {name: value for name, value in os.environ.items() if name.startswith("VLLM_CPU_")}

    def is_ipc_supported(self) -> bool:
        return False  # verl then moves weights through shared memory

    def cudart(self) -> None:
        return None


def register() -> None:
    """Make ``VERL_PLATFORM=cpu`` a platform of verl."""
    PlatformRegistry.register(platform="cpu")(PlatformCPU)
