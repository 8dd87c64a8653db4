"""The one entry point: verl imports this module in every process (entry point group ``verl.plugins``).

verl logs a plugin's errors at DEBUG level and goes on without it, so errors leave here as SystemExit.
"""

import importlib.metadata
import logging
import os
import traceback
from typing import NoReturn

from wrapt import register_post_import_hook

VERL_VERSION = "0.9.1"

BESIDE = {
    "hydra": ("hpd_verl.hydra_config",),
    "transformers.modeling_utils": ("hpd_verl.engine.attention",),
    "verl.trainer.ppo.core_algos": ("hpd_verl.pipelines.advantage", "hpd_verl.pipelines.policy_loss"),
    "verl.experimental.agent_loop": ("hpd_verl.ppo.agent_loop",),
    "verl.trainer.ppo.v1": ("hpd_verl.ppo.trainer",),
}
"""Modules and ours that add to them, imported right after: most processes (reward workers, vLLM's servers) never touch
the trainer, and pay nothing for it."""


def import_beside(module: str, *ours: str) -> None:
    """Import modules of ours once another one has been imported; now, if it already is.

    What they raise ends the process: whoever imports the other module may take an error for its absence.
    """

    def hook(_: object) -> None:
        try:
            for name in ours:
                importlib.import_module(name)
        except Exception as error:
            _end(error)

    register_post_import_hook(hook, module)


def register() -> None:
    """Register everything HPD adds to verl.

    Raises:
        RuntimeError: another verl release is installed than the one this package was written for.
    """
    found = importlib.metadata.version("verl")
    if found != VERL_VERSION:
        raise RuntimeError(
            f"hpd-verl needs verl=={VERL_VERSION}, found verl=={found}: pip install verl=={VERL_VERSION}"
        )
    # verl sets the root logger to WARNING in every process, and its own loggers to this level one by one.
    logging.getLogger("hpd_verl").setLevel(os.environ.get("VERL_LOGGING_LEVEL", "INFO"))
    if os.environ.get("VERL_PLATFORM", "").strip().lower() == "cpu":
        from hpd_verl import cpu

        cpu.register()
    for module, ours in BESIDE.items():
        import_beside(module, *ours)


def _end(error: Exception) -> NoReturn:
    traceback.print_exc()
    raise SystemExit(
        f"hpd-verl could not register with verl: {error}\n"
        "Run verl without it by VERL_USE_EXTERNAL_PLUGINS=none, or uninstall hpd-verl."
    ) from error


try:
    register()
except Exception as error:
    _end(error)
