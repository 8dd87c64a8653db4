"""Answers of the teacher's servers that another process has asked for."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from hpd_verl.teacher.served.probe import Probe


def row_key(urls: Sequence[str], ids: Tensor) -> bytes:
    """What identifies a row to the servers of a teacher."""
    digest = hashlib.blake2b(" ".join(urls).encode(), digest_size=16)
    digest.update(ids.to("cpu").numpy().tobytes())
    return digest.digest()


@dataclass(frozen=True)
class Fetched:
    """Answers to rows, wherever they are kept."""

    places: Mapping[bytes, Any] = field(default_factory=dict)
    """Where each is, by ``row_key``."""
    probes: Mapping[str, Probe] = field(default_factory=dict)
    """Which models gave them, by their servers' addresses with a space between."""
    read: Callable[[Any], Tensor] = lambda place: place
    """Gets an answer from its place."""
