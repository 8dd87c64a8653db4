"""Selects a teacher's answers: by their end, their tokens and a reward function."""

import importlib.util
import inspect
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal

from hpd_verl.tools.generation import Answer, Messages

REWARDS = {"maths": "hpd_verl.tools.rewards.maths", "code": "hpd_verl.tools.rewards.code"}

Fate = Literal["kept", "filtered", "cut", "empty", "refused", "rejected"]
"""Results of an answer: refused by the server's content filter, cut at the length, empty, impossible by the chat
template, rejected by its reward."""


@dataclass(frozen=True)
class Verdict:
    """One answer, judged.

    Attributes:
        fate: the first reason against it, or "kept".
        why: the chat template's error.
        reward: None without a reward function.
        length: response tokens of the demonstration, or characters without a tokenizer.
        round_trip: whether the demonstration's tokens are those generated: "exact", "other_end" where only the token
            that ends the turn differs, "differs", or "unknown".
    """

    fate: Fate
    why: str = ""
    reward: float | None = None
    length: int = 0
    round_trip: Literal["exact", "other_end", "differs", "unknown"] = "unknown"


@dataclass(frozen=True)
class Judge:
    """How answers are judged.

    Attributes:
        reward: "maths", "code", "none", or a file with verl's ``compute_score``.
        min_reward: lowest reward to keep.
        keep_cut: keep answers cut by the length.
        tokenizer: whose tokens and chat template demonstrations are written with; None to leave them unchecked.
        template_kwargs: for that chat template.
    """

    reward: str
    min_reward: float
    keep_cut: bool
    tokenizer: str | None
    template_kwargs: Mapping[str, Any]


@dataclass(frozen=True)
class Case:
    """A prompt with its answers, and the reward function's other arguments."""

    where: str
    messages: Messages
    answers: Sequence[Answer]
    data_source: Any
    ground_truth: Any
    extra_info: Any


def reward_function(name: str) -> Callable[..., Any] | None:
    """The function of ``--reward``; None for "none".

    Raises:
        ValueError: no such file, or none with ``compute_score``.
    """
    if name == "none":
        return None
    try:
        if name in REWARDS:
            module = importlib.import_module(REWARDS[name])
        else:
            if not Path(name).is_file():
                raise ValueError(f"--reward={name}: expected maths, code, none or a file of Python")
            spec = importlib.util.spec_from_file_location("reward_of_demonstrations", name)
            if spec is None or spec.loader is None:
                raise ValueError(f"--reward={name}: no file of Python")
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
    except (ImportError, SyntaxError) as error:
        raise ValueError(f"--reward={name}: cannot be imported: {error}") from error
    function = getattr(module, "compute_score", None)
    if not inspect.isroutine(function):
        raise ValueError(f"--reward={name}: it has no function compute_score")
    return function


class Bench:
    """Judges in this process.

    Raises:
        ValueError: no such reward function or tokenizer, or a reward that is no number.
    """

    def __init__(self, judge: Judge) -> None:
        self.judge = judge
        self.reward = reward_function(judge.reward)
        self._tokenizer = None
        if judge.tokenizer is not None:
            from hpd_verl.data.demonstration import DemonstrationTokenizer
            from hpd_verl.tools.generation.vllm_engines import load_template

            tokenizer = load_template(
                judge.tokenizer, judge.template_kwargs, setting="--tokenizer", weights=False
            ).tokenizer
            self._tokenizer = DemonstrationTokenizer(tokenizer, judge.template_kwargs, max_length=2**31)

    def prompt_length(self, messages: Messages) -> int:
        """Tokens with the generation prompt, or characters without a tokenizer."""
        if self._tokenizer is None:
            return sum(len(message["content"]) for message in messages)
        template = self._tokenizer.template
        chat, _, escaped = template.escape(messages)
        return len(template.encode(chat, template.prompt(chat), escaped))

    def verdicts(self, case: Case) -> tuple[int, list[Verdict]]:
        """The prompt's length, and its answers judged in their order."""
        try:
            return self.prompt_length(case.messages), [self._verdict(case, answer) for answer in case.answers]
        except ValueError as error:
            raise ValueError(f"{case.where}: {error}") from error

    def _verdict(self, case: Case, answer: Answer) -> Verdict:
        if answer.finish_reason == "content_filter":
            return Verdict("filtered")
        if answer.finish_reason == "length" and not self.judge.keep_cut:
            return Verdict("cut")
        if not answer.text.strip():
            return Verdict("empty")
        length, round_trip = len(answer.text), "unknown"
        if self._tokenizer is not None:
            try:
                tokens = self._tokenizer.encode(case.messages, answer.text).ids
            except ValueError as error:
                return Verdict("refused", str(error))
            length, round_trip = len(tokens), _round_trip(tokens, answer)
        reward = None if self.reward is None else self._reward(case, answer)
        fate: Fate = "kept" if reward is None or reward >= self.judge.min_reward else "rejected"
        return Verdict(fate, "", reward, length, round_trip)  # type: ignore[arg-type]

    def _reward(self, case: Case, answer: Answer) -> float:
        assert self.reward is not None
        try:
            score = self.reward(case.data_source, answer.text, case.ground_truth, case.extra_info)
            value = float(score["score"] if isinstance(score, Mapping) else score)
        except Exception as error:  # whatever a reward function raises
            text = " ".join(str(error).split())[:300]
            raise ValueError(f"--reward={self.judge.reward} fails: {type(error).__name__}: {text}") from error
        if value != value:
            raise ValueError(f"--reward={self.judge.reward} gives {score!r}, expected a number")
        return value


def _round_trip(tokens: list[int], answer: Answer) -> str:
    if answer.tokens is None:
        return "unknown"
    if answer.finish_reason == "length":  # the demonstration ends its turn where the answer did not
        return "exact" if tokens[:-1] == answer.tokens else "differs"
    if tokens[:-1] != answer.tokens[:-1]:
        return "differs"
    return "exact" if tokens == answer.tokens else "other_end"


# Processes

_bench: Bench | None = None


def _start(judge: Judge) -> None:
    from hpd_verl.run.with_parent import end_with_parent

    global _bench
    end_with_parent()
    _bench = Bench(judge)


def _verdicts(case: Case) -> tuple[int, list[Verdict]]:
    assert _bench is not None
    return _bench.verdicts(case)


class Judges:
    """Judges of several processes; of this one if there is one only. A context manager."""

    def __init__(self, judge: Judge, processes: int | None = None) -> None:
        self.bench = Bench(judge)  # what is wrong with the settings is said before anything is generated
        count = processes or len(os.sched_getaffinity(0))
        self._pool: ProcessPoolExecutor | None = None
        if count > 1:
            self._pool = ProcessPoolExecutor(
                count, mp_context=get_context("spawn"), initializer=_start, initargs=(judge,)
            )

    def judge(self, cases: Sequence[Case]) -> Iterator[tuple[int, list[Verdict]]]:
        """The verdicts, in order."""
        if self._pool is None:
            yield from map(self.bench.verdicts, cases)
            return
        try:
            yield from self._pool.map(_verdicts, cases, chunksize=4)
        except BrokenProcessPool as error:
            raise ValueError(
                f"--reward={self.bench.judge.reward}: a process that judges answers was killed; lower --processes "
                "if the memory was short"
            ) from error

    def __enter__(self) -> "Judges":
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
