"""Prompts for a model, and its answers."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

Messages = list[dict[str, str]]
"""A chat, ``[{"role": ..., "content": ...}, ...]``, that ends with what is to be answered."""


class GenerationError(RuntimeError):
    """An engine or an endpoint that gives no answers; one line that says what was found and what to do."""


@dataclass(frozen=True)
class Sampling:
    """Sampling parameters of each prompt.

    Attributes:
        n: answers a prompt.
        temperature: 0 is greedy.
        top_p, top_k: 1 and -1 leave all tokens in.
        max_tokens: of one answer, its end of turn included.
        seed: with the prompt's position and the answer's number, of each answer's random numbers.

    Raises:
        ValueError: a value out of range, by its name.
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1
    max_tokens: int = 1024
    seed: int = 0

    def __post_init__(self) -> None:
        for name, holds, wanted in (
            ("n", self.n >= 1, "1 or more"),
            ("temperature", 0 <= self.temperature < float("inf"), "0 or more"),
            ("top_p", 0 < self.top_p <= 1, "above 0, at most 1"),
            ("top_k", self.top_k == -1 or self.top_k >= 1, "-1 for all tokens, or 1 or more"),
            ("max_tokens", self.max_tokens >= 1, "1 or more"),
            ("seed", 0 <= self.seed < 2**31, "0 to 2^31 - 1"),
        ):
            if not holds:
                raise ValueError(f"{name}={getattr(self, name)}: expected {wanted}")
        if self.temperature == 0 and self.n > 1:
            raise ValueError(f"n={self.n}: greedy answers (temperature=0) are all the same; raise it, or set n=1")

    def seed_of(self, position: int) -> int:
        """The seed of a prompt's first answer; the next answers have the next seeds."""
        return (self.seed * 1_000_003 + position * self.n) % 2**62


FinishReason = Literal["stop", "length", "content_filter"]


@dataclass(frozen=True)
class Answer:
    """One answer of a model.

    Attributes:
        text: without the token that ends the turn; reasoning that the model wrote is part of it.
        tokens: as generated, the end of turn last where ``finish_reason`` is "stop"; None where they are not known.
        finish_reason: "stop" where the model ended its turn, "length" where it was cut, "content_filter" where the
            server refused to answer by its policy; the text is empty then.
    """

    text: str
    tokens: list[int] | None
    finish_reason: FinishReason


class Generator(Protocol):
    """Answers prompts."""

    @property
    def identity(self) -> Mapping[str, Any]:
        """Everything but prompts and sampling that answers depend on, as JSON values: the model and its execution."""

    def answers(
        self, prompts: Sequence[Messages], sampling: Sampling, done: Collection[int] = ()
    ) -> Iterator[tuple[int, list[Answer]]]:
        """Answer prompts.

        Args:
            prompts: all of them.
            sampling: how.
            done: positions of those that need no answers any more.

        Yields:
            ``(position, n answers)`` in the order in which prompts finish.

        Raises:
            GenerationError: the engine or endpoint fails, or the model cannot take a prompt.
        """

    def close(self) -> None:
        """Release its resources, such as devices; the next prompt starts it again."""
