"""Answers that outlast their process: a file to which every finished prompt is appended at once.

The first line says what the answers depend on, and each line after it is a prompt with its answers. What a killed
process leaves is whole lines and at most a part of one, which is cut off when the file is opened again.

A database would not do. Synced at every answer sqlite takes 17 ms for each, this file 0.06; unsynced it can lose all
answers when the machine goes down, where this file loses the last seconds.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import time
from array import array
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from types import TracebackType
from typing import Any, get_args

from tqdm import tqdm

from hpd_verl.tools.generation.answers import Answer, FinishReason, Generator, Messages, Sampling

FSYNC_SECONDS = 5.0
"""What a power failure can lose; the process's own end loses nothing."""

_ANSWER = {field.name for field in fields(Answer)}
_START = b'{"journal": 1, '


def prompts_digest(prompts: Sequence[Messages]) -> str:
    """sha256 of the prompts, in their order."""
    digest = hashlib.sha256()
    for messages in prompts:
        digest.update(json.dumps(messages, sort_keys=True).encode() + b"\n")
    return digest.hexdigest()


class _Done(Collection[int]):
    """Positions that have an offset."""

    def __init__(self, offsets: "array[int]") -> None:
        self._offsets = offsets

    def __contains__(self, position: object) -> bool:
        return isinstance(position, int) and self._offsets[position] >= 0

    def __iter__(self) -> Iterator[int]:
        return (position for position, offset in enumerate(self._offsets) if offset >= 0)

    def __len__(self) -> int:
        return sum(1 for _ in self)


class Journal:
    """The file, open for one process. A context manager.

    Args:
        path: of the file; made with its folder if it is not there.
        depends_on: what the answers depend on, as JSON values.
        prompts: number of prompts.
        n: answers a prompt.

    Raises:
        ValueError: the file holds answers to something else, which the message names, is no journal, is damaged, or
            another process writes it.
        OSError: it cannot be read or written.
    """

    def __init__(self, path: Path, depends_on: Mapping[str, Any], prompts: int, n: int) -> None:
        self.path, self.depends_on, self.n = path, dict(depends_on), n
        self._offsets = array("q", [-1]) * prompts
        self._fsynced = time.monotonic()
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(path, "a+b", buffering=0)  # noqa: SIM115 - closed by close()
        try:
            try:
                # A lock of the process, which no child inherits: the next one starts as soon as this one is killed.
                fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ValueError(f"{path}: another process writes it; wait for its end, or choose another") from None
            header = _START + json.dumps(depends_on)[1:].encode() + b"\n"
            self._end = self._recover(header)
        except BaseException:
            self._file.close()
            raise
        self.done: Collection[int] = _Done(self._offsets)
        """Positions of the prompts that have their answers."""

    def _recover(self, header: bytes) -> int:
        """The length of the whole lines, to which the file is cut."""
        self._file.seek(0)
        with open(self._file.fileno(), "rb", closefd=False) as lines:
            first = lines.readline()
            if not first.endswith(b"\n"):  # also of a process that was killed while it wrote the first line
                if not header.startswith(first) and not first.startswith(_START):
                    raise ValueError(f"{self.path}: no journal of answers; choose another file")
                self._file.truncate(0)
                self._end = 0
                self._write(header)
                return self._end
            self._check_header(first, header)
            end = len(first)
            for number, line in enumerate(lines, start=2):
                if not line.endswith(b"\n"):
                    self._file.truncate(end)
                    break
                self._offsets[self._position(number, line)] = end
                end += len(line)
        return end

    def _check_header(self, found: bytes, wanted: bytes) -> None:
        if found == wanted:
            return
        try:
            if not found.startswith(_START):
                raise ValueError
            old, new = json.loads(found), json.loads(wanted)
        except (ValueError, RecursionError):
            raise ValueError(f"{self.path}: no journal of answers; choose another file") from None
        differing = [
            f"{key} {old.get(key)} there, {new.get(key)} now" for key in {**old, **new} if old.get(key) != new.get(key)
        ]
        raise ValueError(
            f"{self.path}: holds answers of other settings ({'; '.join(differing)}); set them as there, or remove it"
        )

    def _position(self, number: int, line: bytes) -> int:
        try:
            position, answers = _parse(line)
            if len(answers) != self.n:
                raise ValueError(f"{len(answers)} answers, expected {self.n}")
            if not 0 <= position < len(self._offsets) or self._offsets[position] >= 0:
                raise ValueError(f"prompt {position} is there twice, or not at all in the prompts")
        except ValueError as error:
            raise ValueError(f"{self.path}, line {number}: damaged ({error}); remove the line") from None
        return position

    def append(self, position: int, answers: Sequence[Answer]) -> None:
        """Write a finished prompt; it is in the file when this returns.

        Raises:
            ValueError: the prompt is there already, or has another number of answers.
            OSError: it cannot be written; what was there before stays.
        """
        if self._offsets[position] >= 0 or len(answers) != self.n:
            raise ValueError(f"prompt {position}: {len(answers)} answers, expected {self.n} once")
        offset = self._end
        line = json.dumps({"position": position, "answers": [asdict(answer) for answer in answers]})
        self._write(line.encode() + b"\n")
        self._offsets[position] = offset

    def _write(self, line: bytes) -> None:
        try:
            rest = memoryview(line)
            while rest:
                rest = rest[self._file.write(rest) :]
            if time.monotonic() - self._fsynced > FSYNC_SECONDS:
                os.fsync(self._file.fileno())
                self._fsynced = time.monotonic()
        except OSError as error:
            with contextlib.suppress(OSError):
                self._file.truncate(self._end)
            raise OSError(
                error.errno,
                f"cannot write {self.path} ({error.strerror}); the prompts finished before stay there: "
                "make room and give the same command again",
            ) from error
        self._end += len(line)

    def read(self, position: int) -> list[Answer]:
        """The answers of a finished prompt."""
        offset = self._offsets[position]
        if offset < 0:
            raise KeyError(position)
        self._file.seek(offset)
        with open(self._file.fileno(), "rb", closefd=False) as lines:
            return _parse(lines.readline())[1]

    def close(self) -> None:
        """Bring all to the disk and leave the file to others."""
        if not self._file.closed:
            try:
                os.fsync(self._file.fileno())
            finally:
                self._file.close()

    def __enter__(self) -> "Journal":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _parse(line: bytes) -> tuple[int, list[Answer]]:
    """Position and answers of a line.

    Raises:
        ValueError: it holds something else.
    """
    try:
        entry = json.loads(line)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if not isinstance(entry, dict) or entry.keys() != {"position", "answers"}:
        raise ValueError("no position with its answers")
    position, answers = entry["position"], entry["answers"]
    if type(position) is not int:
        raise ValueError("its position is no number")
    if not isinstance(answers, list):
        raise ValueError("its answers are no list")
    return position, [_answer(answer) for answer in answers]


def _answer(found: Any) -> Answer:
    if not isinstance(found, dict) or found.keys() != _ANSWER:
        raise ValueError(f"an answer is not {', '.join(sorted(_ANSWER))}")
    tokens = found["tokens"]
    if type(found["text"]) is not str:
        raise ValueError("an answer's text is no text")
    if tokens is not None and not (isinstance(tokens, list) and all(type(token) is int for token in tokens)):
        raise ValueError("an answer's tokens are no list of numbers")
    if found["finish_reason"] not in (reasons := get_args(FinishReason)):
        raise ValueError(f"an answer's finish_reason is none of {', '.join(reasons)}")
    return Answer(**found)


def open_journal(generator: Generator, prompts: Sequence[Messages], sampling: Sampling, path: Path) -> Journal:
    """The journal of these answers, with those that are there.

    Raises:
        ValueError, OSError: as ``Journal``.
    """
    depends_on = {**generator.identity, **asdict(sampling), "prompts": prompts_digest(prompts)}
    return Journal(path, depends_on, len(prompts), sampling.n)


def generate(generator: Generator, prompts: Sequence[Messages], sampling: Sampling, journal: Journal) -> None:
    """Answer the prompts that have no answers in the journal yet, with a progress bar where somebody looks.

    Raises:
        GenerationError: as ``Generator.answers``; the journal keeps all that had finished.
        OSError: the journal cannot be written.
    """
    bar = tqdm(total=len(prompts), initial=len(journal.done), desc="answers", unit=" prompts", disable=None)
    with bar, contextlib.ExitStack() as stack:
        finished = generator.answers(prompts, sampling, journal.done)
        if hasattr(finished, "close"):
            stack.callback(finished.close)
        for position, answers in finished:
            journal.append(position, answers)
            bar.update()
    missing = len(prompts) - len(journal.done)
    if missing:
        raise RuntimeError(f"{missing} of {len(prompts)} prompts have no answers")


def generate_all(
    generator: Generator, prompts: Sequence[Messages], sampling: Sampling, journal: Path
) -> list[list[Answer]]:
    """All answers, by prompt; those that the journal holds already are not asked for again.

    Raises:
        ValueError: a journal of other settings.
        GenerationError: as ``Generator.answers``; the journal keeps all that had finished.
        OSError: the journal cannot be read or written.
    """
    with open_journal(generator, prompts, sampling, journal) as opened:
        generate(generator, prompts, sampling, opened)
        return [opened.read(position) for position in range(len(prompts))]
