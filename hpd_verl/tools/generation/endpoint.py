"""Answers by a server of OpenAI's chat completions, as vLLM, SGLang and hosted models have.

The client is httpx. OpenAI's own, ``openai``, cannot keep what is promised here: it takes headers from the variable
OPENAI_CUSTOM_HEADERS and sends them to any URL, the judge's too; it reads a refusal's body whole, unpacked, before its
caller sees it; it bounds the time of a read, not that of a reply; and it retries no reply that is no completion.
"""

import asyncio
import contextlib
import json
import random
import re
import zlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

import httpx

from hpd_verl.tools.generation.answers import Answer, GenerationError, Messages, Sampling

FIRST_PAUSE = 1.0
LONGEST_PAUSE = 60.0
"""Seconds before the first retry, and before any; it doubles in between."""

LARGEST_REPLY = 4 << 20
TOKEN_BYTES = 64
"""Bytes of a reply, unpacked: at most ``LARGEST_REPLY``, and ``TOKEN_BYTES`` for each token that is asked for."""
MAX_REFUSED = 0.25
"""Share of prompts that a server may refuse by its policy."""
FEW_PROMPTS = 20
"""Prompts before whose end no share is taken."""
SECRET_LENGTH = 8
"""Characters from which on a key is a secret; "EMPTY" or "none" are none, and may be words of an answer."""

_WORTH_A_RETRY = {408, 409, 425, 429}
"""Statuses below 500 that pass by themselves."""


class _Failure(Exception):
    """A request that may go well the next time.

    Attributes:
        pause: seconds that the server asks for.
    """

    def __init__(self, text: str, pause: float = 0.0) -> None:
        super().__init__(text)
        self.pause = pause


@dataclass(frozen=True)
class _Reply:
    """What a server sent, unpacked."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def text(self) -> str:
        """As UTF-8, whatever charset is named: JSON has no other."""
        return self.body.decode(errors="replace")


class EndpointGenerator:
    """A model behind a URL.

    Args:
        url: up to ``/chat/completions``, as ``http://host:8000/v1``.
        model: its name there.
        template_kwargs: ``chat_template_kwargs`` of vLLM's and SGLang's servers; sent if not empty.
        concurrency: requests at a time.
        timeout: seconds a request may take.
        retries: of a request that fails for a reason that may pass.
        token_ids: ask for tokens (``return_token_ids``, vLLM's server).
        api_key: sent as a bearer token.
        first_pause: seconds before the first retry.
        setting: names the URL in errors.
        max_refused: share of prompts that the server may refuse by its policy; above it, asking ends.

    Raises:
        ValueError: no URL or one with a password, a key that no header can hold, or a number out of range.
    """

    def __init__(
        self,
        url: str,
        model: str,
        template_kwargs: Mapping[str, Any] | None = None,
        concurrency: int = 64,
        timeout: float = 600.0,
        retries: int = 5,
        token_ids: bool = False,
        api_key: str | None = None,
        first_pause: float = FIRST_PAUSE,
        setting: str = "--endpoint",
        max_refused: float = MAX_REFUSED,
    ) -> None:
        self.url, self.model = url.rstrip("/"), model
        self._named = f"{setting}={self.url}"
        if (shown := re.sub(r"//.*@", "//***@", re.sub(r"[?#].*", "?***", url, flags=re.S), flags=re.S)) != url:
            raise ValueError(
                f"{setting}={shown}: a name or password before the host, or what follows ? or #, would be logged; give "
                "the URL without it, and the key by its variable"
            )
        if not _is_url(self.url):
            raise ValueError(f"{setting}={url}: expected a URL, as http://host:8000/v1")
        if api_key and not (api_key.isascii() and api_key.isprintable()):
            raise ValueError(f"{setting}={url}: its key holds characters that no key has, as a line's end; set it anew")
        if concurrency < 1 or timeout <= 0 or retries < 0:
            raise ValueError("--concurrency and --request_timeout are above 0, --retries is 0 or more")
        if not 0 <= max_refused <= 1:
            raise ValueError(f"--max_refused={max_refused:g}: expected a share, 0 to 1")
        self.template_kwargs = dict(template_kwargs or {})
        self.concurrency, self.timeout, self.retries = concurrency, timeout, retries
        self.token_ids, self.first_pause = token_ids, first_pause
        self.max_refused, self._key = max_refused, api_key or ""
        self._headers = {"Accept-Encoding": "identity"}
        if api_key:
            self._headers["Authorization"] = f"Bearer {api_key}"

    @property
    def identity(self) -> Mapping[str, Any]:
        """The model's name; which server answers may change from one run to the next."""
        return {"model": self.model, "chat_template_kwargs": self.template_kwargs, "token_ids": self.token_ids}

    def answers(
        self, prompts: Sequence[Messages], sampling: Sampling, done: Collection[int] = ()
    ) -> Iterator[tuple[int, list[Answer]]]:
        """As ``Generator.answers``."""
        finished_prompts = refused = 0
        pending = (position for position in range(len(prompts)) if position not in done)
        with asyncio.Runner() as runner:
            loop = runner.get_loop()
            limits = httpx.Limits(max_connections=self.concurrency, max_keepalive_connections=self.concurrency)
            client = httpx.AsyncClient(headers=self._headers, limits=limits, timeout=None)
            running: set[asyncio.Task[tuple[int, list[Answer]]]] = set()
            try:
                while True:
                    while len(running) < self.concurrency and (position := next(pending, None)) is not None:
                        running.add(loop.create_task(self._ask(client, position, prompts[position], sampling)))
                    if not running:
                        check_refused(self._named, refused, finished_prompts, self.max_refused)
                        return
                    finished, running = runner.run(_first_of(running))
                    failed = [task for task in finished if task.exception() is not None]
                    # What has finished is handed over before the failure of another ends it all.
                    for task in finished:
                        if task not in failed:
                            finished_prompts += 1
                            refused += any(answer.finish_reason == "content_filter" for answer in task.result()[1])
                            yield task.result()
                    if failed:
                        failed[0].result()
                    if finished_prompts >= FEW_PROMPTS:
                        check_refused(self._named, refused, finished_prompts, self.max_refused)
            finally:
                runner.run(_stop(running, client))

    def close(self) -> None:
        """Nothing is held between questions."""

    async def _ask(
        self, client: httpx.AsyncClient, position: int, messages: Messages, sampling: Sampling
    ) -> tuple[int, list[Answer]]:
        """One prompt; asked again for the answers that a server gives less than asked."""
        answers: list[Answer] = []
        attempt = 0
        while True:
            try:
                seed = sampling.seed_of(position) + len(answers)
                answers += await self._request(client, messages, sampling, sampling.n - len(answers), seed)
                if len(answers) >= sampling.n:
                    return position, answers[: sampling.n]
            except _Failure as failure:
                if attempt == self.retries:
                    raise GenerationError(
                        f"{self._named}: {failure}, prompt {position}, {attempt + 1} times; finished prompts "
                        "are kept: give the same command again once it answers"
                    ) from failure
                pause = min(LONGEST_PAUSE, max(failure.pause, self.first_pause * 2**attempt))
                attempt += 1
                await asyncio.sleep(pause * random.uniform(0.75, 1.0))

    async def _request(
        self, client: httpx.AsyncClient, messages: Messages, sampling: Sampling, n: int, seed: int
    ) -> list[Answer]:
        body: dict[str, Any] = {
            "model": self.model,
            "messages": messages,
            "n": n,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "max_tokens": sampling.max_tokens,
            "seed": seed % 2**31,
        }
        # What is no part of OpenAI's interface is sent only where it is needed.
        if messages[-1].get("role") == "assistant":  # vLLM's and SGLang's servers then continue it
            body |= {"continue_final_message": True, "add_generation_prompt": False}
        if sampling.top_k > 0:
            body["top_k"] = sampling.top_k
        if self.template_kwargs:
            body["chat_template_kwargs"] = self.template_kwargs
        if self.token_ids:
            # vLLM's server, which takes what it is not told from the model's generation_config.json.
            body |= {"return_token_ids": True, "skip_special_tokens": False}
            body |= {"top_k": sampling.top_k, "min_p": 0.0, "repetition_penalty": 1.0}
        limit = LARGEST_REPLY + TOKEN_BYTES * n * sampling.max_tokens
        reply = await self._post(client, body, limit)
        if _is_beyond_context(reply):  # prompt and max_tokens together: without a limit it answers to the context's end
            del body["max_tokens"]
            reply = await self._post(client, body, limit)
            if _is_beyond_context(reply):  # the prompt alone fills it
                return [Answer("", [] if self.token_ids else None, "length")] * n
        if _is_refused_by_policy(reply):
            return [Answer("", [] if self.token_ids else None, "content_filter")] * n
        if reply.status != 200:
            raise self._refusal(reply)
        return [self._answer(choice) for choice in self._choices(reply.body, n)]

    async def _post(self, client: httpx.AsyncClient, body: Mapping[str, Any], limit: int) -> _Reply:
        try:
            async with asyncio.timeout(self.timeout):
                async with client.stream("POST", f"{self.url}/chat/completions", json=body) as reply:
                    return _Reply(reply.status_code, reply.headers, await _body_of(reply, limit))
        except TimeoutError:
            raise _Failure(f"no answer within {self.timeout:g} seconds") from None
        except httpx.HTTPError as error:
            raise _Failure(self._masked(f"{type(error).__name__}: {error}".rstrip(": "))) from error

    def _refusal(self, reply: _Reply) -> Exception:
        text = " ".join(self._masked(reply.text).split())[:300]
        found = f"status {reply.status}: {text}".rstrip(": ")
        if reply.status in _WORTH_A_RETRY or reply.status >= 500:
            pause = reply.headers.get("retry-after", "")
            return _Failure(found, float(pause) if re.fullmatch("[0-9]{1,9}", pause) else 0.0)
        return GenerationError(f"{self._named}: {found}")

    def _choices(self, body: bytes, n: int) -> list[Any]:
        shown = f"{self._masked(body[:1000].decode(errors='backslashreplace'))!r:.200}"
        try:
            choices = json.loads(body)["choices"]
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise _Failure(f"a reply that is no chat completion: {shown}") from error
        if not isinstance(choices, list) or not choices:
            raise _Failure(f"a reply without choices: {shown}")
        return choices[:n]

    def _masked(self, text: str) -> str:
        """Without the key, should the server repeat it, also as JSON or a URL writes it."""
        if len(self._key) < SECRET_LENGTH:
            return text
        written = json.dumps(self._key)[1:-1]
        for key in {self._key, written, written.replace("/", "\\/"), quote(self._key), quote(self._key, safe="")}:
            text = text.replace(key, "***")
        return text

    def _shown(self, value: Any) -> str:
        try:
            return self._masked(repr(value))[:200]
        except RecursionError:
            return "nested too deep"

    def _answer(self, choice: Any) -> Answer:
        """One choice of a reply."""
        try:
            message, reason = choice["message"], choice["finish_reason"]
            text, reasoning = message.get("content"), message.get("reasoning_content") or message.get("reasoning")
            tokens = choice.get("token_ids")
        except (TypeError, KeyError, AttributeError) as error:
            raise _Failure(f"a reply without message or finish_reason: {self._shown(choice)}") from error
        if reason == "content_filter":
            return Answer("", [] if self.token_ids else None, "content_filter")
        if reason not in ("stop", "length"):
            raise _Failure(f"finish_reason {self._shown(reason)}, expected stop, length or content_filter")
        text = "" if text is None else text
        if not isinstance(text, str) or not (reasoning is None or isinstance(reasoning, str)):
            raise _Failure(f"content that is no text: {self._shown(text)}")
        if reasoning:  # parted from the answer by the server
            text = f"<think>\n{reasoning.strip()}\n</think>\n\n{text.lstrip()}"
        text = self._masked(text)
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise _Failure(f"a text that is no Unicode: {self._shown(text)}") from error
        if self.token_ids and not (isinstance(tokens, list) and all(type(token) is int for token in tokens)):
            raise GenerationError(f"{self._named}: its replies hold no token_ids; leave --token_ids away")
        return Answer(text, tokens if self.token_ids else None, reason)


def check_refused(named: str, refused: int, prompts: int, limit: float) -> None:
    """A few refusals are kept and counted; many say that the server is the wrong one to ask.

    Raises:
        GenerationError: more than this share of the prompts, at least two of several, was refused.
    """
    if refused > limit * prompts and (refused > 1 or prompts == 1):
        raise GenerationError(
            f"{named}: its content filter refused {refused} of {prompts} prompts, more than --max_refused={limit:g}; "
            "finished prompts are kept: ask another server, or raise it and give the same command again"
        )


def _is_beyond_context(reply: _Reply) -> bool:
    """Whether the server refuses for prompt and ``max_tokens`` being longer than the model's context."""
    says_so = ("context" in reply.text and "length" in reply.text) or "max_model_len" in reply.text
    return reply.status == 400 and says_so


_POLICY = re.compile(
    r"content[_ ]?filter|content[_ ]policy|content management policy|ResponsibleAIPolicy|data_inspection_failed"
    r"|usage polic|content exists risk|considered high risk|prohibited_content|content_moderation|requires moderation"
    r"|\bflagged\b|敏感内容|\\u654f\\u611f\\u5185\\u5bb9",
    re.I,
)


def _is_refused_by_policy(reply: _Reply) -> bool:
    """Whether the server's policy has something against the prompt, as Azure, OpenAI and others say it."""
    return reply.status in (400, 403, 422) and bool(_POLICY.search(reply.text))


async def _body_of(reply: httpx.Response, limit: int) -> bytes:
    """The body, unpacked, of which no more than the limit is ever in memory.

    Raises:
        _Failure: a longer one, or one packed in a way that was not asked for.
    """
    encoding = reply.headers.get("content-encoding", "identity").strip().lower()
    if encoding not in ("identity", "", "gzip", "x-gzip"):
        raise _Failure("a reply packed in a way that was not asked for")
    unpacking = zlib.decompressobj(wbits=31) if encoding.endswith("gzip") else None
    body = bytearray()
    async for piece in reply.aiter_raw():
        try:
            body += piece if unpacking is None else unpacking.decompress(piece, limit + 1 - len(body))
        except zlib.error as error:
            raise _Failure(f"a reply that cannot be unpacked: {error}") from error
        if len(body) > limit:
            raise _Failure(f"a reply of more than {limit >> 20} MiB")
    return bytes(body)


def _is_url(text: str) -> bool:
    try:
        url = httpx.URL(text)
    except httpx.InvalidURL:
        return False
    return url.scheme in ("http", "https") and bool(url.host) and (url.port is None or 0 < url.port < 2**16)


async def _first_of(running: set[Any]) -> tuple[set[Any], set[Any]]:
    return await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)


async def _stop(running: set[Any], client: httpx.AsyncClient) -> None:
    for task in running:
        task.cancel()
    for task in running:
        with contextlib.suppress(asyncio.CancelledError, GenerationError):
            await task
    await client.aclose()
