"""The one entry point: verl imports this module in every process (entry point group ``verl.plugins``).

verl logs a plugin's errors at DEBUG level and goes on without it, so errors leave here as SystemExit.
"""

import importlib.metadata
import logging
import os
import traceback

from hpd_verl.run.import_hooks import when_imported

VERL_VERSION = "0.9.1"


def _register_hydra() -> None:
    import hpd_verl.hydra_config  # noqa: F401


def _register_core_algorithms() -> None:
    import hpd_verl.pipelines.advantage
    import hpd_verl.pipelines.policy_loss  # noqa: F401


def _register_attention() -> None:
    import hpd_verl.engine.attention  # noqa: F401


def _register_agent_loop() -> None:
    import hpd_verl.ppo.agent_loop  # noqa: F401


def _register_trainer() -> None:
    import hpd_verl.ppo.trainer  # noqa: F401


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
    when_imported("hydra", _register_hydra)
    when_imported("transformers.modeling_utils", _register_attention)
    when_imported("verl.trainer.ppo.core_algos", _register_core_algorithms)
    when_imported("verl.experimental.agent_loop", _register_agent_loop)
    when_imported("verl.trainer.ppo.v1", _register_trainer)


try:
    register()
except Exception as error:
    traceback.print_exc()
    raise SystemExit(
        f"hpd-verl could not register with verl: {error}\n"
        "Run verl without it by VERL_USE_EXTERNAL_PLUGINS=none, or uninstall hpd-verl."
    ) from error
