"""Errors in one line: ``SETTING=VALUE: what was found; what to do``."""

from typing import Any


class Refused(ValueError):
    """A rejected setting, in one line ``SETTING=VALUE: what was found; what to do``, without a traceback."""


def require(condition: bool, setting: str, found: Any, remedy: str) -> None:
    """Refuse a setting's value.

    Raises:
        Refused: the condition does not hold.
    """
    if not condition:
        raise Refused(f"{setting}={found}: {remedy}")


def one_line(error: BaseException) -> str:
    """An exception's text without line breaks; its type where it has no text."""
    return " ".join(str(error).split()) or type(error).__name__


def typed_line(error: BaseException) -> str:
    """An exception's type and text, without line breaks."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
