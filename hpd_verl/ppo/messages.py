"""What main_ppo's driver and the trainer tell each other; the trainer runs in a Ray actor, maybe on another machine.

They share a few words in Ray's key-value store, under the number of the job: the driver says that the run is checked,
the trainer that it has begun, the driver that the run shall end, the trainer where it did.
"""

import json
from dataclasses import asdict, dataclass

import ray
from ray.experimental.internal_kv import internal_kv_get_gcs_client

_CHECKED, _BEGUN, _ASKED, _STOPPED = "checked", "begun", "asked", "stopped"


@dataclass(frozen=True)
class Stopped:
    """Where a run ended before its last step."""

    step: int
    total_steps: int
    checkpoint: str | None
    """None where there is none yet."""
    error: str | None = None
    """Why, where nobody asked for it."""


def _key(word: str) -> bytes:
    return f"hpd_verl/{ray.get_runtime_context().get_job_id()}/{word}".encode()


def _put(word: str, value: str = "yes") -> None:
    store = internal_kv_get_gcs_client()
    if store is not None:
        store.internal_kv_put(_key(word), value.encode(), overwrite=True)


def _get(word: str) -> str | None:
    # None without Ray, and in a client of Ray's (ray://): it says nothing, and ends at once.
    store = internal_kv_get_gcs_client() if ray.is_initialized() else None
    value = None if store is None else store.internal_kv_get(_key(word))
    return None if value is None else value.decode()


def say_checked() -> None:
    """The driver's: settings, data and models are checked."""
    _put(_CHECKED)


def is_checked() -> bool:
    """Whether the driver has checked the run; false where another started it."""
    return _get(_CHECKED) is not None


def say_begun() -> None:
    """The trainer's: from now on there is something to lose."""
    _put(_BEGUN)


def ask() -> bool:
    """The driver's: the run shall end after this step. False where nothing has begun."""
    if _get(_BEGUN) is None:
        return False
    _put(_ASKED)
    return True


def is_asked() -> bool:
    """Whether the run shall end after this step."""
    return _get(_ASKED) is not None


def say_stopped(where: Stopped) -> None:
    """The trainer's: it ends before its last step."""
    _put(_STOPPED, json.dumps(asdict(where)))


def stopped() -> Stopped | None:
    """Where the trainer ended before its last step; None if it did not."""
    text = _get(_STOPPED)
    return None if text is None else Stopped(**json.loads(text))
