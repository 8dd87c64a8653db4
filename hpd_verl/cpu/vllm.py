"""vLLM plugin (entry point group ``vllm.general_plugins``), loaded in every vLLM process."""

import os
from typing import Any


def register() -> None:
    """Keep linear weights loadable after vLLM's CPU build has packed them.

    The CPU build packs linear weights for oneDNN when it loads a model and drops the originals, so that verl's
    weight sync has no parameter left to load into. verl runs the packing again after each sync, so keeping the
    originals is enough. Does nothing off ``VERL_PLATFORM=cpu``. Idempotent.
    """
    if os.environ.get("VERL_PLATFORM", "").strip().lower() != "cpu":
        return
    from vllm.model_executor.layers import utils

    from hpd_verl.run.replacing import replace

    def keep_weight(original: Any) -> Any:
        def dispatch_cpu_unquantized_gemm(layer: Any, remove_weight: bool) -> Any:
            return original(layer, remove_weight=False)

        return dispatch_cpu_unquantized_gemm

    replace(utils, "dispatch_cpu_unquantized_gemm", keep_weight)
