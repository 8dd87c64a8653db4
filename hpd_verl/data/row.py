"""A row as its author wrote it: without the nulls of columnar formats, and with its tools as a list."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

DEMONSTRATION = "demonstration"

TOOLS = "tools"
"""Column of the tools that a row offers: JSON schemas, as a list or as its JSON text."""


def without_fillers(value: Any, feature: Any) -> Any:
    """A value without the keys that a columnar format gave it.

    Where one row's object has a key, Arrow gives it to the objects of all rows, as null. Nulls that a row wrote itself
    cannot be told from these and go too, except where ``datasets`` keeps JSON as it is (``Json``).

    Args:
        value: decoded by ``datasets``.
        feature: its ``datasets`` feature.
    """
    if isinstance(feature, Mapping) and isinstance(value, Mapping):
        return {key: without_fillers(item, feature.get(key)) for key, item in value.items() if item is not None}
    inner = feature[0] if isinstance(feature, list) and feature else getattr(feature, "feature", None)
    if inner is not None and isinstance(value, list):
        return [without_fillers(item, inner) for item in value]
    return value


def _without_null_keys(messages: Any) -> Any:
    """Messages without null keys (a template may read the presence of a key), with tool calls given as JSON text parsed
    into a list."""
    if not isinstance(messages, list):
        return messages
    found = []
    for message in messages:
        if isinstance(message, Mapping):
            message = {key: item for key, item in message.items() if item is not None or key in ("role", "content")}
            if isinstance(message.get("tool_calls"), str):
                message["tool_calls"] = parsed(message["tool_calls"])
        found.append(message)
    return found


def parsed(text: str) -> Any:
    """The value of JSON text; other text unchanged."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def as_written(row: Mapping[str, Any], features: Mapping[str, Any], *chat_keys: str) -> dict[str, Any]:
    """A row whose chat columns are as they were before a columnar format held them.

    Args:
        row: decoded by ``datasets``.
        features: of its data set.
        chat_keys: columns of chats, beside the demonstration's.
    """
    found = dict(row)
    for key in (*chat_keys, DEMONSTRATION, TOOLS):
        if key in row:
            found[key] = without_fillers(row[key], features.get(key))
            if key != TOOLS:
                found[key] = _without_null_keys(found[key])
    return found


def tools_of(value: Any) -> list[dict[str, Any]] | None:
    """The tools of a row, or None.

    Args:
        value: the row's ``tools``: null, a list of objects, or one as JSON text.

    Raises:
        ValueError: of another form; the message does not name the row.
    """
    if isinstance(value, str):
        try:
            value = json.loads(value) if value.strip() else None
        except json.JSONDecodeError as error:
            raise ValueError(f"{TOOLS} is text that is not JSON ({error.msg}); write a list of JSON schemas") from None
    if value is None:
        return None
    is_list = isinstance(value, Sequence) and not isinstance(value, str)
    if not is_list or not all(isinstance(tool, Mapping) for tool in value):
        raise ValueError(f"{TOOLS} is {type(value).__name__}, expected a list of JSON schemas, each an object")
    return [dict(tool) for tool in value] or None
