"""The trainer asks the teacher's servers for rows before an update does, and keeps their answers in Ray's object store.

Rollouts as soon as they end, while others run; demonstrations of the next batch while this one trains. Which rank is
going to have a row is not known then, so that ranks read what they need when the update comes.
"""

import concurrent.futures
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray
import torch
from omegaconf import DictConfig
from torch import Tensor
from verl.utils.torch_dtypes import PrecisionType
from verl.workers.config import HFModelConfig

from hpd_verl.checks.models import load_model_config
from hpd_verl.config import HPDConfig
from hpd_verl.errors import Refused
from hpd_verl.run.choices import with_dtype
from hpd_verl.teacher.model_config import shared_vocabulary_size, teacher_model_config, teacher_name, teacher_nodes
from hpd_verl.teacher.served.client import Servers
from hpd_verl.teacher.served.fetched import Fetched, row_key
from hpd_verl.teacher.served.probe import Probe
from hpd_verl.teacher.served.servers import make_servers
from hpd_verl.teacher.served.waiting import wait
from hpd_verl.teacher.teacher import TeacherUnavailable


@dataclass(frozen=True)
class AskedRow:
    """A row that an update is going to need."""

    ids: Tensor
    """Its tokens, as the teacher reads them."""
    teacher: int
    """Which of several has it; 0 for a single one."""
    is_rollout: bool


@dataclass(frozen=True)
class _Teacher:
    servers: Servers
    rollouts_alone: bool
    """Its demonstrations are stored."""

    @property
    def urls(self) -> list[str]:
        return self.servers.settings.urls


class Prefetch:
    """Rows that were asked for, and their answers.

    Args:
        teachers: those that servers run, by their place among all, with whether just rollouts are asked for.
    """

    def __init__(self, teachers: Mapping[int, tuple[Servers, bool]]) -> None:
        self._teachers = {place: _Teacher(*each) for place, each in teachers.items()}
        self._requests: list[tuple[list[bytes], concurrent.futures.Future[list[Any]]]] = []
        self._asked: set[bytes] = set()
        self._waited = 0.0

    @classmethod
    def of(cls, config: DictConfig, hpd: HPDConfig, student: HFModelConfig) -> "Prefetch | None":
        """Of a run whose servers are there; None where nothing is asked for ahead.

        Args:
            config: of the run.
            hpd: the algorithm's settings.
            student: whose vocabulary rows have.
        """
        if not hpd.needs_teacher or not hpd.teacher_server.prefetch:
            return None
        nodes, found = config.actor_rollout_ref, {}
        precision = with_dtype(nodes.ref.fsdp_config).get("mixed_precision") or {}
        dtype = PrecisionType.to_dtype(precision.get("param_dtype", "bf16"))
        for place, ((name, own), node) in enumerate(
            zip(hpd.of_each_teacher.items(), teacher_nodes(nodes.ref, hpd).values(), strict=True)
        ):
            if own.teacher_server.urls:
                setting = f"{teacher_name(name, 'actor_rollout_ref.ref.model')}.path"
                model = load_model_config(teacher_model_config(nodes.model, node), setting)
                servers = make_servers(model, dtype, own, shared_vocabulary_size(student, model))
                found[place] = servers, own.teacher_cache != "off"
        return cls(found) if found else None

    def ask(self, rows: Sequence[AskedRow]) -> None:
        """Ask for rows, but those that were asked for already.

        Raises:
            TeacherUnavailable: servers that are met for the first time do not answer in time, or are no teacher's.
        """
        for place, teacher in self._teachers.items():
            own: dict[bytes, Tensor] = {}
            for row in rows:
                if row.teacher == place and (row.is_rollout or not teacher.rollouts_alone):
                    own[row_key(teacher.urls, row.ids)] = row.ids
            own = {key: ids for key, ids in own.items() if key not in self._asked}
            if not own:
                continue
            if teacher.servers.reference is None:
                _end([teacher.servers.connect()])
            end = None if teacher.servers.question.sends_last else -1
            tokens = [ids[:end].tolist() for ids in own.values()]
            self._requests.append((list(own), teacher.servers.submit(tokens, _keep)))
            self._asked |= own.keys()

    def hand_over(self) -> Fetched:
        """Wait for all that was asked for; it is asked for anew from here on.

        Raises:
            TeacherUnavailable: servers do not answer, or as no server should.
        """
        start = time.perf_counter()
        _end([request for _, request in self._requests])
        places: dict[bytes, Any] = {}
        for keys, request in self._requests:
            places |= zip(keys, request.result(), strict=True)
        self._waited += time.perf_counter() - start
        probes: dict[str, Probe] = {}
        for teacher in self._teachers.values():
            if teacher.servers.reference is not None:
                probes[" ".join(teacher.urls)] = teacher.servers.reference
        self._requests, self._asked = [], set()
        return Fetched(places, probes, _read)

    def add_to(self, metrics: dict[str, float], names: Sequence[str]) -> None:
        """Add what was asked for here to the ranks' metrics.

        Args:
            metrics: of the ranks.
            names: of several teachers, in their order; empty for a single one.
        """
        waited, self._waited = self._waited, 0.0
        for place, teacher in self._teachers.items():
            infix = f"teachers/{names[place]}/" if names else ""
            counts = teacher.servers.counts
            own = {
                f"timing_s/{infix}teacher_wait": waited / len(self._teachers),
                f"hpd/{infix}teacher_server_tokens": counts.tokens,
                f"hpd/{infix}teacher_server_tokens_per_s": counts.tokens / max(counts.seconds, 1e-9),
                f"hpd/{infix}teacher_server_gib": counts.bytes / 2**30,
                f"hpd/{infix}teacher_server_retries": counts.retries,
            }
            for name, value in own.items():
                metrics[name] = metrics.get(name, 0.0) + value


def _end(requests: "Sequence[concurrent.futures.Future[Any]]") -> None:
    """Wait until all have ended well.

    Raises:
        TeacherUnavailable: one has not, for a reason that servers have.
    """
    wait(requests)
    failed = (each.exception() for each in requests if each.done())
    error = next((each for each in failed if each is not None), None)
    if isinstance(error, Refused):  # what repeating does not mend, too: the run has steps to save
        raise TeacherUnavailable(str(error)) from error
    if error is not None:
        raise error


def _keep(answer: Tensor) -> Any:
    """Into Ray's object store, as an array, which it does not pickle; where it is."""
    kind = str(answer.dtype).removeprefix("torch.")
    return ray.put((kind, tuple(answer.shape), answer.contiguous().view(torch.uint8).numpy()))


def _read(place: Any) -> Tensor:
    kind, shape, array = ray.get(place)
    return torch.from_numpy(np.array(array)).view(getattr(torch, kind)).view(shape)
