"""Each patch of hpd_verl/cpu does its work once, and the code under it still needs it."""

import importlib.metadata
import inspect

import torch.distributed
from torch.distributed.fsdp import CPUOffloadPolicy

from hpd_verl.checks.start import VLLM_CPU_HEAD_SIZES
from hpd_verl.cpu import patches


def test_applying_twice_changes_nothing() -> None:
    patches.apply()
    before = (torch.distributed.init_process_group, importlib.metadata.version, CPUOffloadPolicy.__init__)
    patches.apply()
    assert before == (torch.distributed.init_process_group, importlib.metadata.version, CPUOffloadPolicy.__init__)


def test_vllm_cpu_counts_as_vllm() -> None:
    patches.apply()
    assert importlib.metadata.version("vllm") == importlib.metadata.version("vllm-cpu") + "+cpu"


def test_verl_still_asks_for_what_the_patches_mend() -> None:
    """These fail when verl changes under a patch: then look whether the patch can go."""
    from verl.utils import distributed
    from verl.workers.engine.fsdp import transformer_impl

    assert 'f"cpu:gloo,{get_device_name()}:{get_nccl_backend()}"' in inspect.getsource(distributed)
    assert "CPUOffloadPolicy(pin_memory=True)" in inspect.getsource(transformer_impl)


def test_vllm_still_drops_packed_weights() -> None:
    from vllm.model_executor.layers import utils

    assert "remove_weight" in inspect.signature(utils.dispatch_cpu_unquantized_gemm).parameters


def test_the_head_sizes_of_vllm() -> None:
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

    assert tuple(CPUAttentionBackend.get_supported_head_sizes()) == VLLM_CPU_HEAD_SIZES
