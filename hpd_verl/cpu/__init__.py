"""Everything verl 0.9.1 and vLLM need to run on a CPU. Chosen only by verl's own ``VERL_PLATFORM=cpu``.

verl has a registry for platforms; the rest of what a CPU needs has no hook, so `patches.py` changes it in place.
Nothing outside this folder imports it except `plugin.py`.
"""

import os

# Set before torch and vLLM read them. A user's own value wins.
ENVIRONMENT = {
    # verl registers its FSDP engine for "cuda" and "npu" only; the engine itself is device-agnostic.
    "VERL_ENGINE_DEVICE": "cuda",
    # Ranks and vLLM share the cores: vLLM's default binds its threads to its own cores.
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    # Compiling costs a small model more than it saves.
    "TORCHDYNAMO_DISABLE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "RAY_USAGE_STATS_ENABLED": "0",
    # Ray starts workers ahead, one per core, that nothing ever uses: verl's have environment variables of their own.
    "RAY_prestart_worker_first_driver": "0",
}


def register() -> None:
    """Register the CPU platform with verl, and apply the patches. Idempotent."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)

    from hpd_verl.cpu import patches, platform

    platform.register()
    patches.apply()
