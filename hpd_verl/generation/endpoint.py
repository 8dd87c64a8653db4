"""Answers by a server of OpenAI's chat completions, as vLLM, SGLang and hosted models have."""

import asyncio
import contextlib
import json
import random
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import httpx

from hpd_verl.generation.answers import Answer, GenerationError, Messages, Sampling

FIRST_PAUSE = 1.0
LONGEST_PAUSE = 60.0
"""Seconds before the first retry, and before any; it doubles in between."""

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

    Raises:
        ValueError: no URL, a key that no header can hold, or a number out of range.
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
    ) -> None:
        self.url, self.model = url.rstrip("/"), model
        self._named = f"{setting}={self.url}"
        if not _is_url(self.url):
            raise ValueError(f"{setting}={url}: expected a URL, as http://host:8000/v1")
        if api_key and not (api_key.isascii() and api_key.isprintable()):
            raise ValueError(f"{setting}={url}: its key holds characters that no key has, as a line's end; set it anew")
        if concurrency < 1 or timeout <= 0 or retries < 0:
            raise ValueError("--concurrency and --request_timeout are above 0, --retries is 0 or more")
        self.template_kwargs = dict(template_kwargs or {})
        self.concurrency, self.timeout, self.retries = concurrency, timeout, retries
        self.token_ids, self.first_pause = token_ids, first_pause
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}

    @property
    def identity(self) -> Mapping[str, Any]:
        """The model's name; which server answers may change from one run to the next."""
        return {"model": self.model, "chat_template_kwargs": self.template_kwargs, "token_ids": self.token_ids}

    def answers(
        self, prompts: Sequence[Messages], sampling: Sampling, done: Collection[int] = ()
    ) -> Iterator[tuple[int, list[Answer]]]:
        """As ``Generator.answers``."""
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
                        return
                    finished, running = runner.run(_first_of(running))
                    failed = [task for task in finished if task.exception() is not None]
                    # What has finished is handed over before the failure of another ends it all.
                    yield from (task.result() for task in finished if task not in failed)
                    if failed:
                        failed[0].result()
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
        reply = await self._post(client, body)
        if _is_beyond_context(reply):  # prompt and max_tokens together: without a limit it answers to the context's end
            del body["max_tokens"]
            reply = await self._post(client, body)
            if _is_beyond_context(reply):  # the prompt alone fills it
                return [Answer("", [] if self.token_ids else None, "length")] * n
        if reply.status_code != 200:
            raise self._refusal(reply)
        return [self._answer(choice) for choice in _choices(reply.content, n)]

    async def _post(self, client: httpx.AsyncClient, body: Mapping[str, Any]) -> httpx.Response:
        try:
            async with asyncio.timeout(self.timeout):
                return await client.post(f"{self.url}/chat/completions", json=body)
        except TimeoutError:
            raise _Failure(f"no answer within {self.timeout:g} seconds") from None
        except httpx.HTTPError as error:
            raise _Failure(f"{type(error).__name__}: {error}".rstrip(": ")) from error

    def _refusal(self, reply: httpx.Response) -> Exception:
        text = " ".join(reply.text.split())[:300]
        found = f"status {reply.status_code}: {text}".rstrip(": ")
        if reply.status_code in _WORTH_A_RETRY or reply.status_code >= 500:
            pause = reply.headers.get("retry-after", "")
            return _Failure(found, float(pause) if pause.isdigit() else 0.0)
        return GenerationError(f"{self._named}: {found}")

    def _answer(self, choice: Any) -> Answer:
        """One choice of a reply."""
        try:
            message, reason = choice["message"], choice["finish_reason"]
            text, reasoning = message.get("content"), message.get("reasoning_content") or message.get("reasoning")
            tokens = choice.get("token_ids")
        except (TypeError, KeyError, AttributeError) as error:
            raise _Failure(f"a reply without message or finish_reason: {repr(choice)[:200]}") from error
        if reason not in ("stop", "length"):
            raise _Failure(f"finish_reason {reason!r}, expected stop or length")
        text = "" if text is None else text
        if not isinstance(text, str) or not (reasoning is None or isinstance(reasoning, str)):
            raise _Failure(f"content that is no text: {repr(text)[:200]}")
        if reasoning:  # parted from the answer by the server
            text = f"<think>\n{reasoning.strip()}\n</think>\n\n{text.lstrip()}"
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise _Failure(f"a text that is no Unicode: {text[:200]!r}") from error
        if self.token_ids and not (isinstance(tokens, list) and all(type(token) is int for token in tokens)):
            raise GenerationError(f"{self._named}: its replies hold no token_ids; leave --token_ids away")
        return Answer(text, tokens if self.token_ids else None, reason)


def _is_beyond_context(reply: httpx.Response) -> bool:
    """Whether the server refuses for prompt and ``max_tokens`` being longer than the model's context."""
    says_so = ("context" in reply.text and "length" in reply.text) or "max_model_len" in reply.text
    return reply.status_code == 400 and says_so


def _is_url(text: str) -> bool:
    try:
        url = httpx.URL(text)
    except httpx.InvalidURL:
        return False
    return url.scheme in ("http", "https") and bool(url.host) and (url.port is None or 0 < url.port < 2**16)


def _choices(content: bytes, n: int) -> list[Any]:
    try:
        choices = json.loads(content)["choices"]
    except (ValueError, TypeError, KeyError) as error:
        raise _Failure(f"a reply that is no chat completion: {content[:200]!r}") from error
    if not isinstance(choices, list) or not choices:
        raise _Failure(f"a reply without choices: {content[:200]!r}")
    return choices[:n]


async def _first_of(running: set[Any]) -> tuple[set[Any], set[Any]]:
    return await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)


async def _stop(running: set[Any], client: httpx.AsyncClient) -> None:
    for task in running:
        task.cancel()
    for task in running:
        with contextlib.suppress(asyncio.CancelledError, GenerationError):
            await task
    await client.aclose()
