"""Answers by vLLM's offline engine, one process per engine.

An engine lives from ``VLLMGenerator``'s first prompt until it is closed. Prompts go to the engine with the fewest; if
an engine or the asking process dies, all end.
"""

import atexit
import contextlib
import multiprocessing
import os
import queue
import signal
import threading
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from hpd_verl.run.with_parent import end_with_parent
from hpd_verl.tools.generation.answers import Answer, GenerationError, Messages, Sampling

QUEUED_ANSWERS = 4096
"""Answers that an engine has before it, at most: more than it can run at once."""

_WITHOUT_EFFECT = {
    "enable_chunked_prefill",
    "enable_prefix_caching",
    "enforce_eager",
    "kv_cache_memory_bytes",
    "max_num_batched_tokens",
    "max_num_seqs",
}
"""Settings of the engine by which answers differ by rounding at most."""

_ENVIRONMENT = {
    # The engine runs in its process, not in one more, so that it ends with it.
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "TOKENIZERS_PARALLELISM": "false",
}
"""Where the user has set nothing else."""


@dataclass
class _Engine:
    process: BaseProcess
    connection: Connection
    waiting: set[int] = field(default_factory=set)
    """Positions of the prompts that it has."""


class VLLMGenerator:
    """A model run here.

    Args:
        model: folder or hub name.
        template_kwargs: for its chat template.
        tensor_parallel_size: devices an engine.
        data_parallel_size: engines.
        dtype, max_model_len, gpu_memory_utilization, trust_remote_code: vLLM's.
        engine_kwargs: further arguments of vLLM's ``LLM``.

    Raises:
        ValueError: a folder without tokenizer, chat template or whole weights, or too few devices.
    """

    def __init__(
        self,
        model: str,
        template_kwargs: Mapping[str, Any] | None = None,
        tensor_parallel_size: int = 1,
        data_parallel_size: int = 1,
        dtype: str = "auto",
        max_model_len: int | None = None,
        gpu_memory_utilization: float = 0.9,
        trust_remote_code: bool = False,
        engine_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        for name, value in (
            ("--tensor_parallel_size", tensor_parallel_size),
            ("--data_parallel_size", data_parallel_size),
        ):
            if value < 1:
                raise ValueError(f"{name}={value}: expected 1 or more")
        self.model = model
        self.template_kwargs = dict(template_kwargs or {})
        self.engine_kwargs = {
            "dtype": dtype,
            "max_model_len": max_model_len,
            "trust_remote_code": trust_remote_code,
            **(engine_kwargs or {}),
        }
        self._load = {
            "tensor_parallel_size": tensor_parallel_size,
            "gpu_memory_utilization": gpu_memory_utilization,
            "disable_log_stats": True,
        }
        load_template(model, self.template_kwargs, trust_remote_code)
        self._devices = _shares_of_devices(data_parallel_size, tensor_parallel_size)
        self._engines: list[_Engine] = []

    @cached_property
    def identity(self) -> Mapping[str, Any]:
        """The model by its path and its files' content, and what of its settings the answers depend on."""
        from transformers import AutoConfig

        from hpd_verl.teacher.store.teacher_files import FileHashes, config_hash, model_files

        config = AutoConfig.from_pretrained(self.model, trust_remote_code=self.engine_kwargs["trust_remote_code"])
        files = model_files(self.model, getattr(config, "transformers_weights", None))
        template = load_template(self.model, self.template_kwargs, self.engine_kwargs["trust_remote_code"])
        weights = FileHashes(None).of(files[name] for name in sorted(files))
        return {
            "model": str(Path(self.model).resolve()) if Path(self.model).is_dir() else self.model,
            "weights": [content[:16] for content in weights],
            "config": config_hash(config)[:16],
            "chat_template": template.tokenizer.chat_template,
            "chat_template_kwargs": self.template_kwargs,
            **{key: value for key, value in self.engine_kwargs.items() if key not in _WITHOUT_EFFECT},
        }

    def answers(
        self, prompts: Sequence[Messages], sampling: Sampling, done: Collection[int] = ()
    ) -> Iterator[tuple[int, list[Answer]]]:
        """As ``Generator.answers``. Stopped before its end, it ends the engines."""
        pending = (position for position in range(len(prompts)) if position not in done)
        first = next(pending, None)
        if first is None:
            return
        finished = False
        try:
            if not self._engines:
                self._start()
            self._give(prompts, sampling, iter([first]))
            while True:
                self._give(prompts, sampling, pending)
                if not any(engine.waiting for engine in self._engines):
                    break
                yield from self._collect()
            finished = True
        finally:
            if not finished:
                self.close()

    def _give(self, prompts: Sequence[Messages], sampling: Sampling, pending: Iterator[int]) -> None:
        """Fill the engines' queues."""
        limit = max(1, QUEUED_ANSWERS // sampling.n)
        while True:
            engine = min(self._engines, key=lambda engine: len(engine.waiting))
            if len(engine.waiting) >= limit:
                return
            position = next(pending, None)
            if position is None:
                return
            try:
                engine.connection.send((position, prompts[position], sampling))
            except OSError:
                raise self._death(engine) from None
            engine.waiting.add(position)

    def _collect(self) -> Iterator[tuple[int, list[Answer]]]:
        """Finished prompts of the engines; waits for at least one."""
        by_connection = {engine.connection: engine for engine in self._engines}
        for connection in wait(list(by_connection)):
            engine = by_connection[connection]  # type: ignore[index]
            try:
                position, answers, error = engine.connection.recv()
            except (EOFError, OSError):
                raise self._death(engine) from None
            if error is not None:
                raise error
            engine.waiting.remove(position)
            yield position, answers

    def _death(self, engine: _Engine) -> GenerationError:
        engine.process.join(10)
        return GenerationError(
            f"--model={self.model}: vLLM's process ended (exit code {engine.process.exitcode}), perhaps killed for "
            "its memory; see the log above, or the kernel's"
        )

    def _start(self) -> None:
        atexit.register(self.close)  # before multiprocessing waits for its processes
        context = multiprocessing.get_context("spawn")
        for devices in self._devices:
            here, there = context.Pipe()
            arguments = (there, self.model, self.template_kwargs, self.engine_kwargs | self._load)
            process = context.Process(target=_serve, args=arguments, name="vllm-engine")
            with _environment({**_ENVIRONMENT, **os.environ, **devices}):
                process.start()
            there.close()
            self._engines.append(_Engine(process, here))

    def close(self) -> None:
        """End the engines."""
        for engine in self._engines:
            engine.connection.close()
            engine.process.terminate()
        for engine in self._engines:
            engine.process.join(10)
            if engine.process.is_alive():
                engine.process.kill()
                engine.process.join()
        self._engines = []
        atexit.unregister(self.close)


@contextlib.contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Environment of processes that are started meanwhile."""
    before = dict(os.environ)
    os.environ.update(variables)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _shares_of_devices(engines: int, each: int) -> list[dict[str, str]]:
    """The environment by which every engine sees its own devices.

    Raises:
        ValueError: there are too few.
    """
    from verl.plugin.platform import get_platform

    platform = get_platform()
    if platform.device_name == "cpu":
        return [{}] * engines
    name = platform.visible_devices_envvar()
    visible = os.environ.get(name)
    devices = visible.split(",") if visible else [str(index) for index in range(platform.device_count())]
    if len(devices) < engines * each:
        raise ValueError(
            f"--data_parallel_size={engines}, --tensor_parallel_size={each}: {engines * each} devices are needed, "
            f"{len(devices)} are visible; lower one of them"
        )
    return [{name: ",".join(devices[index * each : (index + 1) * each])} for index in range(engines)]


def load_template(
    model: str,
    template_kwargs: Mapping[str, Any],
    trust_remote_code: bool = False,
    setting: str = "--model",
    weights: bool = True,
) -> Any:
    """The chat template of a model, with its tokenizer, as ``hpd_verl.data.chat_template.ChatTemplate``.

    Args:
        model: folder or hub name.
        template_kwargs: for the template.
        trust_remote_code: run a tokenizer's own code.
        setting: names the model in errors.
        weights: check that the folder holds whole weights too.

    Raises:
        ValueError: what the model's folder lacks.
    """
    from transformers import AutoTokenizer

    from hpd_verl.checks.models import check_weights
    from hpd_verl.data.chat_template import ChatTemplate
    from hpd_verl.errors import one_line

    folder = Path(model)
    if folder.is_dir():
        if weights:
            check_weights(setting, folder)
    elif model.startswith(("/", "./", "../", "~")):
        raise ValueError(f"{setting}={model}: no such folder; give an existing folder, or a hub name")
    try:
        tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=trust_remote_code)
    except Exception as error:  # of transformers, tokenizers or the model's own code
        raise ValueError(f"{setting}={model}: cannot load its tokenizer: {one_line(error)[:300]}") from error
    if not tokenizer.chat_template:
        raise ValueError(f"{setting}={model}: its tokenizer has no chat template; choose an instruction-tuned model")
    template = ChatTemplate(tokenizer, template_kwargs)
    try:
        template.turn_end([{"role": "user", "content": "question"}])
    except Exception as error:  # templates are programs: any error of Jinja or of what they call
        raise ValueError(
            f"{setting}={model}: its chat template cannot write a chat: {one_line(error)[:300]}"
        ) from error
    return template


# In the engine's process


def _serve(connection: Connection, model: str, template_kwargs: Mapping[str, Any], load: dict[str, Any]) -> None:
    """Answer prompts until the other end closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of a terminal: who asks decides
    end_with_parent()
    requests: queue.SimpleQueue[tuple[int, Messages, Sampling] | None] = queue.SimpleQueue()

    def receive() -> None:
        # Always: were the pipe full at both ends, both would wait for ever.
        with contextlib.suppress(EOFError, OSError):
            while True:
                requests.put(connection.recv())
        requests.put(None)

    threading.Thread(target=receive, daemon=True).start()
    try:
        engine = _VLLM(model, template_kwargs, load)
        while (request := requests.get() if engine.is_idle() else _next(requests)) is not None:
            if request != ():
                engine.add(*request)
                continue
            for position, answers in engine.step():
                connection.send((position, answers, None))
    except BrokenPipeError:
        return
    except GenerationError as error:
        connection.send((-1, [], error))
    except Exception as error:  # whatever vLLM or its libraries raise
        from hpd_verl.errors import one_line

        text = f"--model={model}: vLLM fails: {type(error).__name__}: {one_line(error)[:500]}"
        connection.send((-1, [], GenerationError(text)))


def _next(requests: "queue.SimpleQueue[Any]") -> Any:
    """The next request; () if there is none now."""
    try:
        return requests.get_nowait()
    except queue.Empty:
        return ()


class _VLLM:
    """vLLM's engine, by tokens."""

    def __init__(self, model: str, template_kwargs: Mapping[str, Any], load: dict[str, Any]) -> None:
        import verl  # noqa: F401 - its plugins set what a CPU needs
        from vllm import LLM
        from vllm.platforms import current_platform

        if current_platform.is_cpu():
            # It cannot take back a random number of an answer whose prompt it has read in part: prompts whole, then.
            # The plugin's environment does not compile; the user's own choice wins.
            eager = os.environ.get("TORCHDYNAMO_DISABLE") == "1"
            load = {"enforce_eager": eager, **load, "enable_chunked_prefill": False}
        self._model = model
        self._template = load_template(model, template_kwargs, load["trust_remote_code"])
        self._end = self._template.turn_end([{"role": "user", "content": "question"}]).token
        self._llm = LLM(model, **load)
        self._engine = self._llm.llm_engine
        self._context: int = self._llm.model_config.max_model_len
        self._too_long: list[tuple[int, list[Answer]]] = []

    def is_idle(self) -> bool:
        return not self._too_long and not self._engine.has_unfinished_requests()

    def add(self, position: int, messages: Messages, sampling: Sampling) -> None:
        """Begin a prompt; a prompt that fills the context gets empty, cut answers."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        try:
            chat, _, escaped = self._template.escape(messages)
            tokens = self._template.encode(chat, self._template.prompt(chat), escaped)
        except ValueError as error:
            reason = str(error).replace("the student's", "the model's")
            raise GenerationError(f"--model={self._model}: prompt {position}: {reason}") from error
        if len(tokens) >= self._context:
            self._too_long.append((position, [Answer("", [], "length")] * sampling.n))
            return
        parameters = SamplingParams(
            n=sampling.n,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            max_tokens=min(sampling.max_tokens, self._context - len(tokens)),
            seed=sampling.seed_of(position),
            stop_token_ids=[self._end],
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        self._engine.add_request(str(position), {"prompt_token_ids": tokens}, parameters)

    def step(self) -> list[tuple[int, list[Answer]]]:
        """One step of the engine; returns the finished prompts."""
        finished, self._too_long = self._too_long, []
        if self._engine.has_unfinished_requests():
            for output in self._engine.step():
                if output.finished:
                    finished.append((int(output.request_id), [self._answer(each) for each in output.outputs]))
        return finished

    def _answer(self, output: Any) -> Answer:
        tokens = list(output.token_ids)
        if output.finish_reason not in ("stop", "length"):
            raise GenerationError(f"vLLM ended an answer with {output.finish_reason!r}; see its log")
        text = self._template.tokenizer.decode(
            tokens[:-1] if output.finish_reason == "stop" else tokens,
            skip_special_tokens=False,
            clean_up_tokenization_spaces=False,
        )
        return Answer(text, tokens, output.finish_reason)
