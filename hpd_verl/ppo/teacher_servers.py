"""Servers of the teacher that the trainer starts, each by a Ray actor on GPUs of its own, and that end with the run."""

import contextlib
import logging
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import ray
from omegaconf import DictConfig
from ray.util.placement_group import placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy
from verl.plugin.platform import get_platform
from verl.utils.torch_dtypes import PrecisionType

from hpd_verl.checks.settings import on_cpu
from hpd_verl.data.teacher_prompt import max_teacher_prompt_length
from hpd_verl.errors import Refused, require
from hpd_verl.run.choices import with_dtype
from hpd_verl.teacher.model_config import teacher_model_config
from hpd_verl.teacher_server import NODE, TeacherServer, api_key

logger = logging.getLogger(__name__)

PAUSE = 1.0
"""Seconds before a server that has ended is started again."""

POOLER = '{"task": "token_embed", "tok_pooling_type": "ALL", "use_activation": false}'

_SETTING = f"{NODE}.n_gpus_per_node"


def server_options(config: DictConfig, size: int) -> list[str]:
    """The teacher's, of vLLM's server, without its address.

    Args:
        config: of the run.
        size: GPUs of the server.
    """
    nodes, data = config.actor_rollout_ref, config.data
    model = teacher_model_config(nodes.model, nodes.ref.model)
    path = str(Path(model.path).absolute()) if Path(model.path).exists() else str(model.path)
    precision = with_dtype(nodes.ref.fsdp_config).get("mixed_precision") or {}
    dtype = str(PrecisionType.to_dtype(precision.get("param_dtype", "bf16"))).removeprefix("torch.")
    length = max_teacher_prompt_length(data) + data.max_response_length
    options = ["--model", path, "--runner", "pooling", "--convert", "embed", "--pooler-config", POOLER]
    options += ["--dtype", dtype, "--max-model-len", str(length), "--disable-uvicorn-access-log"]
    options += ["--trust-remote-code"] if model.get("trust_remote_code") else []
    options += ["--enforce-eager"] if on_cpu() else []
    # Of its own processes: it is in a placement group of the run's, but not known to Ray.
    options += ["--tensor-parallel-size", str(size), "--distributed-executor-backend", "mp"] if size > 1 else []
    return options


class ServerActor:
    """A server in processes of its own, started again at the same address whenever it ends.

    Args:
        options: of vLLM's server.
        host: address of this machine.
        port: of the server.
        log: file that its output is appended to.
    """

    def __init__(self, options: list[str], host: str, port: int, log: str) -> None:
        server = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *options]
        server += ["--host", host, "--port", str(port)]
        self._command = [sys.executable, "-m", "hpd_verl.run.with_parent", *server]
        self._health = f"{_url(host, port)}/health"
        self._log = Path(log)
        self._status: int | None = None
        self._log.parent.mkdir(parents=True, exist_ok=True)
        threading.Thread(target=self._keep, name="teacher_server", daemon=True).start()

    def _keep(self) -> None:
        environment = dict(os.environ)
        environment.pop("VLLM_ALLOW_RUNTIME_LORA_UPDATING", None)  # verl sets it for its rollout servers
        gpus, key = ray.get_gpu_ids(), api_key()
        if gpus:  # Ray leaves it to its actors where RAY_EXPERIMENTAL_NOSET_... is set
            environment[get_platform().visible_devices_envvar()] = ",".join(map(str, gpus))
        if key is not None:
            environment["VLLM_API_KEY"] = key
        while True:
            with open(self._log, "ab") as log:
                # It ends when its standard input is closed: with this process, however that ends.
                process = subprocess.Popen(
                    self._command,
                    stdin=subprocess.PIPE,
                    stdout=log,
                    stderr=log,
                    env=environment,
                    start_new_session=True,
                )
            self._status = process.wait()
            logger.warning("%s: the server has ended with status %d; it is started again", self._health, self._status)
            time.sleep(PAUSE)

    def wait(self, seconds: float) -> str | None:
        """Wait until the server answers; what has happened instead, if it ends or has not answered in that time."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if self._status is not None:
                lines = self._log.read_text(errors="replace").split("\n")
                last = next((line.strip() for line in reversed(lines) if line.strip()), "")
                return f"has ended with status {self._status} ({last[:300]})"
            with contextlib.suppress(httpx.HTTPError):
                if httpx.get(self._health, timeout=5.0, trust_env=False).status_code == httpx.codes.OK:
                    return None
            time.sleep(0.5)
        return f"does not answer after {seconds:g} s ({NODE}.timeout_s)"


class TeacherServers:
    """The servers of a run; they live as long as this object.

    Args:
        settings: with ``n_gpus_per_node``.
        options: of each server.
        logs: folder of their logs.

    Raises:
        Refused: Ray lacks the GPUs, or a server does not start.
    """

    def __init__(self, settings: TeacherServer, options: list[str], logs: Path) -> None:
        size, kind = settings.tensor_model_parallel_size, get_platform().ray_resource_name()
        bundles = [{"CPU": 1.0, kind: float(size)}] * (settings.n_gpus_per_node // size)
        # Of all servers of a machine together, so that none takes a part of a machine that the students' ranks need.
        groups = [placement_group(bundles, strategy="STRICT_PACK") for _ in range(settings.nnodes)]
        deadline = time.monotonic() + settings.timeout_s
        for group in groups:
            require(
                group.wait(max(1, int(deadline - time.monotonic()))),
                _SETTING,
                settings.n_gpus_per_node,
                f"Ray has no {settings.nnodes} machines with as many GPUs free; lower it, or add machines",
            )
        takes = {"num_gpus": size} if kind == "GPU" else {"resources": {kind: size}}
        self.urls: list[str] = []
        self._actors: list[Any] = []
        places = []
        for group in groups:
            strategy = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=0)
            find = ray.remote(num_cpus=0)(free_ports).options(scheduling_strategy=strategy)
            host, ports = ray.get(find.remote(len(bundles)))
            places += [(group, index, host, port) for index, port in enumerate(ports)]
        for number, (group, index, host, port) in enumerate(places):
            strategy = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=index)
            actor = ray.remote(ServerActor).options(num_cpus=1, scheduling_strategy=strategy, max_restarts=-1, **takes)
            log = logs / f"teacher_server_{number}.log"
            self.urls.append(_url(host, port))
            self._actors.append(actor.remote(options, host, port, str(log)))
            logger.info("the teacher's server %s: its log is %s on %s", self.urls[-1], log, host)
        for number, failure in enumerate(ray.get([actor.wait.remote(settings.timeout_s) for actor in self._actors])):
            if failure is not None:
                log = logs / f"teacher_server_{number}.log"
                raise Refused(
                    f"{_SETTING}={settings.n_gpus_per_node}: the teacher's server {self.urls[number]} {failure}; "
                    f"see its log, {log}"
                )


def check_gpus(settings: TeacherServer, ranks: int) -> None:
    """Check that Ray has GPUs for the student's ranks and for the servers.

    Raises:
        Refused: it has not.
    """
    kind = get_platform().ray_resource_name()
    there, own = int(ray.cluster_resources().get(kind, 0)), settings.n_gpus_per_node * settings.nnodes
    require(
        ranks + own <= there,
        _SETTING,
        settings.n_gpus_per_node,
        f"the servers take {own} GPUs beside the trainer's {ranks}, and Ray has {there}; lower it, lower "
        "trainer.n_gpus_per_node, or add machines",
    )


def free_ports(count: int) -> tuple[str, list[int]]:
    """Address and free ports of this machine."""
    host = ray.util.get_node_ip_address()
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with contextlib.ExitStack() as stack:
        free = [stack.enter_context(socket.socket(family)) for _ in range(count)]
        for each in free:
            each.bind((host, 0))
        return host, [each.getsockname()[1] for each in free]


def _url(host: str, port: int) -> str:
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
