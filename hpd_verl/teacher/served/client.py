"""Requests to the servers of one teacher: shared among them, repeated where they fail, and only of the same model.

Rows are cut into requests of some ``PART_TOKENS`` tokens. Each server takes the next request that is left; one that
fails goes back, for any server to take. Before a server is asked for the first time, and after each failure, it must
answer a probe as the model did before.
"""

import asyncio
import concurrent.futures
import json
import logging
import random
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import httpx
import numpy as np
import torch
from torch import Tensor

from hpd_verl.errors import Refused, one_line
from hpd_verl.teacher.served.probe import Probe
from hpd_verl.teacher.teacher import TeacherUnavailable
from hpd_verl.teacher_server import KEY_VARIABLE, URLS, TeacherServer, api_key

logger = logging.getLogger(__name__)

PART_TOKENS = 8192
"""Tokens of a request, or one row where that has more."""
CONCURRENCY = 4
"""Requests of a process to a server at a time."""
GIVEN_UP_AFTER = 0.25
"""A request is repeated after this share of ``timeout_s``."""
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 30.0
"""Seconds before a failed server is asked again; they double in between."""
_SHORT = 1 << 20
"""Bytes of an answer that holds no features, at most."""
_NOT_OFFERED = {400, 404, 405, 422}
"""Statuses of a server that is met for the first time, and does not pool."""
_MAY_PASS = {404, 408, 409, 425, 429}
"""Statuses below 500 that pass by themselves; 404 while a server starts behind a proxy."""

T = TypeVar("T")


class _Failure(Exception):
    """A request that may go well the next time."""


class _NotOffered(Exception):
    """The server knows nothing of the kind; the text says how it answered."""


# ------------------------------ what is asked ------------------------------


class Question(ABC):
    """What a server is asked for rows of tokens."""

    path: str
    sends_last: bool
    """A row's last token is sent, too."""

    @abstractmethod
    def body(self, model: str, rows: Sequence[Sequence[int]]) -> dict[str, Any]:
        """Of the request."""

    @abstractmethod
    def limit(self, rows: Sequence[Sequence[int]]) -> int:
        """Bytes of the answer, at most."""

    @abstractmethod
    def read(self, body: bytes | bytearray, rows: Sequence[Sequence[int]]) -> list[Tensor]:
        """A tensor [tokens, width] a row.

        Raises:
            ValueError: the answer is not one to these rows; in a few words.
        """

    def known_by(self, answer: Tensor) -> Tensor:
        """What of the answer to the probe the model is known by."""
        return answer.float()


@dataclass(frozen=True)
class HiddenStates(Question):
    """vLLM's pooling API: the input of the output layer at every token."""

    hidden_size: int
    dtype: torch.dtype
    path = "/pooling"
    sends_last = False  # it predicts nothing

    def body(self, model: str, rows: Sequence[Sequence[int]]) -> dict[str, Any]:
        return {
            "model": model,
            "input": [list(row) for row in rows],
            "task": "token_embed",
            "encoding_format": "bytes_only",
            "embed_dtype": "float32" if self.dtype == torch.float32 else "bfloat16",
            "endianness": "little",
        }

    def limit(self, rows: Sequence[Sequence[int]]) -> int:
        return sum(map(len, rows)) * self.hidden_size * self.dtype.itemsize

    def read(self, body: bytes | bytearray, rows: Sequence[Sequence[int]]) -> list[Tensor]:
        lengths = [len(row) for row in rows]
        if len(body) != self.limit(rows):
            width = len(body) / (sum(lengths) * self.dtype.itemsize)
            raise ValueError(
                f"{len(body)} bytes for {sum(lengths)} tokens, {width:.4g} values each where the teacher has "
                f"{self.hidden_size}"
            )
        kind: Any = np.int16 if self.dtype.itemsize == 2 else np.float32
        values = torch.from_numpy(np.frombuffer(bytearray(body), dtype=kind))
        hidden = (values.view(self.dtype) if self.dtype.itemsize == 2 else values).view(-1, self.hidden_size)
        return list(hidden.split(lengths))


@dataclass(frozen=True)
class TopLogProbs(Question):
    """OpenAI's completions with ``prompt_logprobs``, as vLLM's server gives them.

    A row of the answer is the next token's log-prob, then k tokens, then their log-probs, [tokens - 1, 1 + 2 k].
    """

    k: int
    path = "/v1/completions"
    sends_last = True

    def body(self, model: str, rows: Sequence[Sequence[int]]) -> dict[str, Any]:
        return {"model": model, "prompt": [list(row) for row in rows], "max_tokens": 1, "prompt_logprobs": self.k}

    def limit(self, rows: Sequence[Sequence[int]]) -> int:
        return _SHORT + 400 * (self.k + 1) * sum(map(len, rows))

    def read(self, body: bytes | bytearray, rows: Sequence[Sequence[int]]) -> list[Tensor]:
        try:
            choices = {int(choice["index"]): choice["prompt_logprobs"] for choice in json.loads(body)["choices"]}
            if sorted(choices) != list(range(len(rows))):
                raise ValueError(f"{len(choices)} answers to {len(rows)} rows")
            return [self._row(choices[index], row) for index, row in enumerate(rows)]
        except (KeyError, TypeError, AttributeError, RecursionError, json.JSONDecodeError) as error:
            raise ValueError("no prompt_logprobs of these rows") from error

    def _row(self, found: Any, row: Sequence[int]) -> Tensor:
        if len(found) != len(row):
            raise ValueError(f"prompt_logprobs of {len(found)} tokens for {len(row)}")
        lines = []
        for token, entries in zip(row[1:], found[1:], strict=True):
            known = {int(name): float(each["logprob"]) for name, each in entries.items()}
            top = sorted(known, key=lambda name: -known[name])[: self.k]
            if len(top) < self.k:
                raise ValueError(f"{len(top)} log-probs a token for {self.k}")
            lines.append([known[token], *top, *(known[name] for name in top)])
        return torch.tensor(lines, dtype=torch.float64).view(len(row) - 1, 1 + 2 * self.k)

    def known_by(self, answer: Tensor) -> Tensor:
        return answer[:, 0].float().unsqueeze(0)


# ------------------------------ servers ------------------------------


@dataclass
class _Server:
    url: str
    served: "Served | None" = None
    """What it last said of its model."""
    is_ready: bool = False
    """It answers, and is the same model as before."""
    failures: int = 0
    """Since its last answer."""
    down_since: float | None = None
    last: str = ""
    """What failed last."""
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)

    def fail(self, failure: str) -> None:
        """Note a failure of a request; those that were on their way together count once."""
        if self.is_ready:
            self.failures += 1
        if self.down_since is None:
            logger.warning("%s: %s; it is asked again", self.url, failure)
            self.down_since = time.monotonic()
        self.is_ready, self.last = False, failure

    @property
    def down_for(self) -> float:
        return 0.0 if self.down_since is None else time.monotonic() - self.down_since


@dataclass
class Counts:
    """Since the start."""

    tokens: int = 0
    bytes: int = 0
    seconds: float = 0.0
    """In which anything was asked for."""
    retries: int = 0


@dataclass(frozen=True)
class Served:
    """What a server says of its model."""

    url: str
    name: str
    root: str | None
    max_model_len: int | None


class Servers:
    """The servers of one teacher, asked in a thread of their own.

    Args:
        settings: addresses and time.
        questions: what they are asked for rows; of several, the first that they understand.
        probe_tokens: of the sequence by which the model is known.
        dtype: of the teacher's products, for what counts as the same model.

    Raises:
        ValueError: an API key that no header can hold.
    """

    def __init__(
        self, settings: TeacherServer, questions: list[Question], probe_tokens: list[int], dtype: torch.dtype
    ) -> None:
        self.settings = settings
        self.questions = questions
        self.probe_tokens = probe_tokens
        self.dtype = dtype
        self.reference: Probe | None = None
        """The model's answer to the probe; set by its first, unless known before."""
        self.counts = Counts()
        self.timeout = settings.timeout_s
        self._key = api_key()
        self._servers = [_Server(url.rstrip("/").removesuffix("/v1")) for url in settings.urls]
        self._loop: asyncio.AbstractEventLoop | None = None
        self._client: httpx.AsyncClient | None = None
        self._running = 0
        self._since = 0.0

    @property
    def question(self) -> Question:
        """The one that the servers understand, once they have been met."""
        return self.questions[0]

    # ------------------------------ from other threads ------------------------------

    def submit(
        self, rows: Sequence[Sequence[int]], keep: Callable[[Tensor], T]
    ) -> "concurrent.futures.Future[list[T]]":
        """Ask for rows of at least one token each; what ``keep`` makes of their answers is in the order of the rows.

        The future raises ``TeacherUnavailable`` or, for what repeating does not mend, ``Refused``.
        """

        async def ask() -> list[T]:
            return [keep(answer) for answer in await self._ask_all([list(row) for row in rows])]

        return self._start(ask())

    def connect(self) -> "concurrent.futures.Future[list[Served]]":
        """Ask until every server answers the probe, as the others do; what they say of their models.

        The future raises ``TeacherUnavailable`` where one does not in time, and ``Refused`` where another model
        answers, or no model at all.
        """

        async def every_one() -> list[Served]:
            return list(await asyncio.gather(*(self._until_ready(server) for server in self._servers)))

        return self._start(every_one())

    def tokenise(self, text: str) -> list[int] | None:
        """The tokens that the first server's tokenizer makes of a text; None where it does not say."""

        async def ask() -> list[int] | None:
            server = self._servers[0]
            body = {"model": (await self._until_ready(server)).name, "prompt": text, "add_special_tokens": False}
            try:
                answer = json.loads(await self._request(server, "POST", "/tokenize", body, _SHORT, 30.0))
            except (_Failure, _NotOffered, ValueError):
                return None
            found = answer.get("tokens") if isinstance(answer, dict) else None
            return found if isinstance(found, list) else None

        return self._start(ask()).result()

    def close(self) -> None:
        """End the thread and its connections."""
        if self._loop is None:
            return

        async def end() -> None:
            if self._client is not None:
                await self._client.aclose()

        self._start(end()).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._loop, self._client = None, None

    def _start(self, work: Coroutine[Any, Any, T]) -> "concurrent.futures.Future[T]":
        if self._loop is None:
            self._loop = asyncio.new_event_loop()
            threading.Thread(target=self._loop.run_forever, name="teacher_servers", daemon=True).start()
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    # ------------------------------ in the loop's thread ------------------------------

    async def _ask_all(self, rows: list[list[int]]) -> list[Tensor]:
        parts = _parts(rows)
        left: asyncio.Queue[list[int]] = asyncio.Queue()
        for part in parts:
            left.put_nowait(part)
        answers: dict[int, Tensor] = {}
        self._begin()

        async def work(server: _Server) -> None:
            while True:
                if not server.is_ready:
                    await self._until_ready(server)
                part = await left.get()
                try:
                    found = await self._ask(server, [rows[index] for index in part])
                except _Failure as failure:
                    server.fail(str(failure))
                    self.counts.retries += 1
                    left.put_nowait(part)
                    if server.down_for >= self.timeout:
                        raise self._unavailable() from None
                else:
                    answers.update(zip(part, found, strict=True))
                    server.failures, server.down_since = 0, None
                    if len(answers) == len(rows):
                        all_there.set()

        all_there = asyncio.Event()
        if not rows:
            all_there.set()
        end = asyncio.ensure_future(all_there.wait())
        workers = {asyncio.ensure_future(work(server)) for server in self._servers for _ in range(CONCURRENCY)}
        try:
            while not all_there.is_set():
                done, _ = await asyncio.wait({end, *workers}, return_when=asyncio.FIRST_COMPLETED)
                for each in done - {end}:
                    workers.discard(each)
                    error = each.exception()
                    if not isinstance(error, TeacherUnavailable) and error is not None:
                        raise error
                if not workers and not all_there.is_set():
                    raise self._unavailable()
        finally:
            self._end()
            for each in (end, *workers):
                each.cancel()
            await asyncio.gather(end, *workers, return_exceptions=True)
        return [answers[index] for index in range(len(rows))]

    def _begin(self) -> None:
        self._since = time.monotonic() if self._running == 0 else self._since
        self._running += 1

    def _end(self) -> None:
        self._running -= 1
        if self._running == 0:
            self.counts.seconds += time.monotonic() - self._since

    def _unavailable(self) -> TeacherUnavailable:
        last = "; ".join(f"{server.url}: {server.last}" for server in self._servers)
        urls = ",".join(server.url for server in self._servers)
        return TeacherUnavailable(
            f"{URLS}=[{urls}]: no answer for {self.timeout:g} s ({last}); start the teacher's server, then give the "
            "same command again"
        )

    async def _until_ready(self, server: _Server) -> Served:
        """Ask a server for its model and the probe, again and again.

        Raises:
            TeacherUnavailable: it has not answered for too long.
            Refused: another model answers.
        """
        async with server.lock:
            while True:
                if server.is_ready and server.served is not None:
                    return server.served
                if server.failures and server.down_for < self.timeout:
                    pause = min(LONGEST_PAUSE, FIRST_PAUSE * 2 ** min(server.failures - 1, 20)) * random.uniform(
                        0.75, 1.0
                    )
                    await asyncio.sleep(min(pause, max(0.0, self.timeout - server.down_for)))
                try:
                    await self._meet(server)
                except _Failure as failure:
                    server.failures += 1
                    server.fail(str(failure))
                    if server.down_for >= self.timeout:
                        raise self._unavailable() from None

    async def _meet(self, server: _Server) -> None:
        """One try of it."""
        limit = min(60.0, self.timeout * GIVEN_UP_AFTER)
        try:
            listed = json.loads(await self._request(server, "GET", "/v1/models", None, _SHORT, limit))
            model = listed["data"][0]
            found = Served(server.url, str(model["id"]), model.get("root"), model.get("max_model_len"))
        except Refused:
            raise
        except (_NotOffered, ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError) as error:
            raise Refused(f"{URLS}={server.url}: /v1/models names no model; give the address of the teacher's server, "
                          "as http://host:8000") from error  # fmt: skip
        answer = await self._first_answer(server, found.name, limit)
        named = f"{URLS}={server.url}"
        if self.reference is None:
            if not answer.isfinite().all():
                raise Refused(f"{named}: NaN or infinity in what {found.name} answers; check the server's dtype")
            if isinstance(self.question, HiddenStates) and (answer.norm(dim=-1) - 1).abs().max() < 1e-2:
                raise Refused(
                    f"{named}: its vectors have length 1, they are normalised; start the server with "
                    '"use_activation": false in --pooler-config'
                )
            self.reference = Probe(self.probe_tokens, answer)
        difference = self.reference.difference(answer, self.dtype)
        if difference is not None:
            raise Refused(
                f"{named}: not the model that answered before ({difference}); serve the same model, revision and "
                "quantisation, or begin a new run and store"
            )
        server.served, server.is_ready = found, True

    async def _first_answer(self, server: _Server, name: str, seconds: float) -> Tensor:
        """The answer to the probe, by which the model is known; settles which question is asked from here on."""
        rows, refusals = [self.probe_tokens], []
        for question in self.questions:
            most = question.limit(rows) + _SHORT
            try:
                body = await self._request(server, "POST", question.path, question.body(name, rows), most, seconds)
                (answer,) = question.read(body, rows)
            except _NotOffered as error:
                refusals.append(str(error))
                continue
            except ValueError as error:
                if isinstance(error, Refused):
                    raise
                raise Refused(f"{URLS}={server.url}: {name} answers {error}; give the teacher's server") from error
            self.questions = [question]
            return question.known_by(answer)
        raise Refused(f"{URLS}={server.url}: {'; '.join(refusals)}; see docs/served.md for how the server is started")

    async def _ask(self, server: _Server, rows: list[list[int]]) -> list[Tensor]:
        assert server.served is not None
        body = self.question.body(server.served.name, rows)
        answer = await self._request(
            server, "POST", self.question.path, body, self.question.limit(rows), self.timeout * GIVEN_UP_AFTER
        )
        try:
            found = self.question.read(answer, rows)
        except ValueError as error:
            raise _Failure(f"{self.question.path} gave {error}") from error
        self.counts.tokens += sum(map(len, rows))
        self.counts.bytes += len(answer)
        return found

    async def _request(
        self, server: _Server, method: str, path: str, body: Any, limit: int, seconds: float
    ) -> bytearray:
        """The body of an answer of status 200.

        Raises:
            _Failure: of a kind that may pass.
            Refused: of another.
        """
        if self._client is None:
            headers = {"Accept-Encoding": "identity"}
            if self._key is not None:
                headers["Authorization"] = f"Bearer {self._key}"
            count = CONCURRENCY * len(self._servers) * 2
            limits = httpx.Limits(max_connections=count, max_keepalive_connections=count)
            self._client = httpx.AsyncClient(headers=headers, limits=limits, timeout=None)
        found = bytearray()
        try:
            async with asyncio.timeout(seconds):
                async with self._client.stream(method, server.url + path, json=body) as answer:
                    is_good = answer.status_code == 200
                    async for piece in answer.aiter_raw():
                        found += piece
                        if len(found) > (limit if is_good else _SHORT):
                            break
        except TimeoutError:
            raise _Failure(f"{path}: no answer within {seconds:g} s") from None
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise _Failure(self._masked(f"{path}: {type(error).__name__} {one_line(error)}")) from error
        if is_good:
            if len(found) > limit:
                raise _Failure(f"{path} gave more than the {limit} bytes that were asked for")
            return found
        text = " ".join(self._masked(found[:400].decode(errors="replace")).split())
        said = f"{path}: status {answer.status_code} {text}"
        if answer.status_code in _NOT_OFFERED and server.served is None:
            raise _NotOffered(said)
        if answer.status_code >= 500 or answer.status_code in _MAY_PASS:
            raise _Failure(said)
        remedy = {
            401: f"set {KEY_VARIABLE} in the environment of every process",
            403: f"set {KEY_VARIABLE} in the environment of every process",
        }.get(answer.status_code, "see docs/served.md for how the server is started")
        raise Refused(f"{URLS}={server.url}: {said}; {remedy}")

    def _masked(self, text: str) -> str:
        """Without the key, should the server repeat it."""
        return text if self._key is None else text.replace(self._key, "***")


def _parts(rows: Sequence[Sequence[int]]) -> list[list[int]]:
    """Indices of the rows of each request, long rows first."""
    parts: list[list[int]] = []
    room = 0
    for index in sorted(range(len(rows)), key=lambda index: -len(rows[index])):
        if len(rows[index]) > room:
            parts.append([])
            room = PART_TOKENS
        parts[-1].append(index)
        room -= len(rows[index])
    return parts
