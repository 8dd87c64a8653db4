"""The settings of ``algorithm.hpd.teacher_server``: a teacher that a server of its own runs."""

import os
import re
from collections.abc import Mapping
from typing import Any, Literal
from urllib.parse import urlsplit

from pydantic import Field, ValidationError, field_validator, model_validator

from hpd_verl.errors import require
from hpd_verl.field_text import first_error, says
from hpd_verl.objectives import ObjectiveParameters

NODE = "algorithm.hpd.teacher_server"
URLS = f"{NODE}.urls"
KEY_VARIABLE = "HPD_TEACHER_API_KEY"
"""Environment variable with the server's API key; it is no setting, so that no log, dump or checkpoint holds it."""


class TeacherServer(ObjectiveParameters):
    """``algorithm.hpd.teacher_server``."""

    urls: list[str] = Field([], json_schema_extra=says("give a list of addresses, as [http://host:8000]"))
    """Servers of the teacher (vLLM with --runner pooling); several share the rows, and stand in for one another.
    Empty: the teacher's model runs beside the student, or in servers that main_ppo starts."""

    n_gpus_per_node: int = Field(0, ge=0)
    """GPUs a machine of their own, beside trainer.n_gpus_per_node, on which main_ppo starts servers of the teacher, for
    as long as the run lasts; 0: it starts none."""

    nnodes: int = Field(1, ge=1)
    """Machines with as many GPUs for the servers that main_ppo starts."""

    tensor_model_parallel_size: int = Field(1, ge=1)
    """GPUs of each server that main_ppo starts; there are as many servers as fit."""

    features: Literal["auto", "hidden", "topk"] = "auto"
    """hidden (exact: what the output layer takes), topk (the most likely tokens' log-probs, from a server of OpenAI's
    completions with prompt_logprobs, which cannot pool), or auto: hidden where the server offers it."""

    top_k: int = Field(20, ge=1)
    """With topk: tokens a position, at most the server's --max-logprobs."""

    timeout_s: float = Field(600.0, gt=0)
    """Seconds for which every server may fail to answer, at the start or later; then the run ends, with a checkpoint. A
    single request is given up and repeated after a quarter of it."""

    prefetch: int = Field(1, ge=0, le=1)
    """1: features are fetched before the update that needs them: the next batch's demonstrations while this one trains,
    and main_ppo's rollouts as soon as each ends. 0: ranks ask when an update begins, and wait."""

    @classmethod
    def from_node(cls, node: Any) -> "TeacherServer":
        """Build from settings by name.

        Raises:
            ValueError: an unknown key, or a value outside its range; the message names the setting.
        """
        if isinstance(node, cls):
            return node
        require(isinstance(node, Mapping), NODE, node, f"give settings by name: {', '.join(cls.model_fields)}")
        check_no_secrets(URLS, node.get("urls"))
        try:
            return cls(**node)
        except ValidationError as error:
            raise ValueError(first_error(error, cls.model_fields, NODE)) from None

    @field_validator("urls", mode="after")
    @classmethod
    def _addresses(cls, value: list[str]) -> list[str]:
        return addresses(value)

    @model_validator(mode="after")
    def _one_origin(self) -> "TeacherServer":
        own, size = f"{NODE}.n_gpus_per_node", self.tensor_model_parallel_size
        there = f"{URLS}={self.urls} names servers that are there already; leave one of the two out"
        require(not (self.urls and self.n_gpus_per_node), own, self.n_gpus_per_node, there)
        for name in ("nnodes", "tensor_model_parallel_size"):
            value = getattr(self, name)
            unused = f"is of servers that the run starts; set {own}, or leave it out"
            require(value == 1 or self.n_gpus_per_node > 0, f"{NODE}.{name}", value, unused)
        divides = f"must divide {own}={self.n_gpus_per_node}: a server is on one machine"
        require(self.n_gpus_per_node % size == 0, f"{NODE}.tensor_model_parallel_size", size, divides)
        topk = f"the servers that {own}={self.n_gpus_per_node} starts give hidden states; leave it out"
        require(self.features != "topk" or not self.n_gpus_per_node, f"{NODE}.features", self.features, topk)
        return self

    @property
    def is_used(self) -> bool:
        """Servers run the teacher, whoever starts them."""
        return bool(self.urls) or self.n_gpus_per_node > 0

    @property
    def origin(self) -> tuple[str, Any]:
        """The setting by which they are used, and its value."""
        return (f"{NODE}.n_gpus_per_node", self.n_gpus_per_node) if self.n_gpus_per_node else (URLS, self.urls)

    @property
    def source(self) -> str:
        """``origin`` in one word."""
        return "{}={}".format(*self.origin)

    def started(self, urls: list[str]) -> "TeacherServer":
        """The same settings once the run's own servers are there, as those of servers with these addresses."""
        none = {"n_gpus_per_node": 0, "nnodes": 1, "tensor_model_parallel_size": 1}
        return self.model_copy(update={"urls": urls, **none})


def check_no_secrets(setting: str, urls: Any) -> None:
    """Check that a list of addresses holds nothing that no log may have; other values pass.

    Raises:
        ValueError: an address holds a password or a query; the message masks it.
    """
    urls = urls if isinstance(urls, list | tuple) else []
    shown = [re.sub(r"//.*@", "//***@", re.sub(r"[?#].*", "?***", str(url))) for url in urls]
    require(
        shown == [str(url) for url in urls],
        setting,
        shown,
        "a name or password before the host, or what follows ?, would be logged; give the server's key by "
        f"{KEY_VARIABLE} in the environment",
    )


def addresses(value: list[str]) -> list[str]:
    """The same addresses.

    Raises:
        ValueError: one is none, or is there twice; the message does not name the setting.
    """
    for url in value:
        parts = _parts(url)
        if parts is None or parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError("give addresses with http:// or https://, as [http://host:8000]")
    found = [url.rstrip("/").removesuffix("/v1") for url in value]
    if len(set(found)) < len(found):
        raise ValueError("an address twice; give each server once")
    return value


def _parts(url: str) -> Any:
    try:
        parts = urlsplit(url)
        _ = parts.port
    except ValueError:
        return None
    return None if url.split() != [url] else parts


def api_key() -> str | None:
    """The server's API key, from the environment.

    Raises:
        ValueError: no header can hold it.
    """
    key = os.environ.get(KEY_VARIABLE) or None
    if key is not None and not (key.isascii() and key.isprintable() and key.split() == [key]):
        raise ValueError(f"{KEY_VARIABLE}=***: holds characters that no key has, as a space; set it anew")
    return key
