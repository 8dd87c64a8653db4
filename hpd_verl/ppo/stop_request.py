"""Passes a signal from main_ppo's driver to the trainer, a Ray actor, perhaps on another machine.

Both share entries in Ray's key-value store, under the job's number: the trainer has begun, the driver asks it to stop,
the trainer has stopped after a step.
"""

import json
from dataclasses import asdict, dataclass
from typing import Any

import ray
from ray.experimental.internal_kv import internal_kv_get_gcs_client

from hpd_verl.run.stopping import StopSignals

_BEGUN, _ASKED, _STOPPED = "begun", "asked", "stopped"


@dataclass(frozen=True)
class Stopped:
    """Where a run ended that was asked to."""

    step: int
    total_steps: int
    checkpoint: str


def _key(word: str) -> bytes:
    return f"hpd_verl/{ray.get_runtime_context().get_job_id()}/{word}".encode()


def _put(word: str, value: str = "yes") -> None:
    internal_kv_get_gcs_client().internal_kv_put(_key(word), value.encode(), overwrite=True)


def _get(word: str) -> str | None:
    store = internal_kv_get_gcs_client()  # None in a client of Ray's (ray://), which ends at once
    value = None if store is None else store.internal_kv_get(_key(word))
    return None if value is None else value.decode()


def say_begun() -> None:
    """The trainer's: from now on there is something to lose."""
    _put(_BEGUN)


def is_asked() -> bool:
    """Whether the run shall end after this step."""
    return _get(_ASKED) is not None


def say_stopped(stopped: Stopped) -> None:
    """The trainer's: it ends before its last step."""
    _put(_STOPPED, json.dumps(asdict(stopped)))


class Driver:
    """The driver's side, from before Ray starts until the trainer has ended."""

    def __init__(self) -> None:
        self.signals = StopSignals(self._ask)
        self.signals.install()
        self.init = ray.init

        def init(*args: Any, **kwargs: Any) -> Any:
            context = self.init(*args, **kwargs)
            self.signals.install()  # ray.init has put a handler of SIGTERM in place that ends the driver
            return context

        ray.init = init

    @staticmethod
    def _ask() -> bool:
        if not ray.is_initialized() or _get(_BEGUN) is None:
            return False
        _put(_ASKED)
        return True

    def end(self) -> None:
        """After the trainer has ended without an error: end the process if it did so because it was asked to."""
        self.signals.ignore()
        ray.init = self.init
        text = _get(_STOPPED) if ray.is_initialized() else None
        if text is not None:
            stopped = Stopped(**json.loads(text))
            self.signals.end(stopped.step, stopped.total_steps, stopped.checkpoint)
