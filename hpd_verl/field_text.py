"""What pydantic finds wrong, and what a declared field may be, in the words of ``errors``."""

from collections.abc import Mapping
from types import NoneType
from typing import Any, Literal, get_args, get_origin

from pydantic import ValidationError
from pydantic.fields import FieldInfo

TAGS = ("number", "schedule")
"""Of members of a union, which are no part of a setting's name."""


def says(remedy: str, **of_parts: str) -> dict[str, Any]:
    """``json_schema_extra`` of a field: what to do where type and bounds do not say it; so of its parts."""
    return {"remedy": remedy, **of_parts}


def first_error(error: ValidationError, fields: Mapping[str, FieldInfo], prefix: str) -> str:
    """The first error as ``setting=found: remedy``.

    Args:
        error: of a model.
        fields: of the model.
        prefix: of its settings' names, as ``algorithm.hpd``.
    """
    first = error.errors()[0]
    # Whole sentences of ``require``, which know more than one field.
    cause = first.get("ctx", {}).get("error")
    if not first["loc"]:
        return str(cause)
    path = [str(part) for part in first["loc"] if part not in TAGS]
    setting, found = ".".join([prefix, *path]), first["input"]
    if path[0] not in fields:
        return f"{setting}={found}: no such parameter; there are {', '.join(fields) or 'none'}"
    field = fields[path[0]]
    takes_text = get_origin(field.annotation) is Literal or str in get_args(field.annotation)
    if isinstance(found, str) and not (takes_text and found.split() == [found]):
        found = repr(found)  # a number in quotes is none, and a space is easily overlooked
    said = field.json_schema_extra if isinstance(field.json_schema_extra, dict) else {}
    return f"{setting}={found}: {cause or said.get(path[-1]) or said.get('remedy') or allowed(field)}"


def allowed(field: FieldInfo) -> str:
    """What a field may be, by its declaration: "give a number above 0", "choose error or rollout"."""
    kinds = [kind for kind in get_args(field.annotation) or [field.annotation] if kind is not NoneType]
    if get_origin(field.annotation) is Literal:
        return f"choose {', '.join(map(str, kinds[:-1]))} or {kinds[-1]}"
    names: dict[Any, str] = {bool: "true or false", int: "an integer", float: "a number", str: "a text"}
    what = names[kinds[0]]
    bounds = {
        name: getattr(part, name) for part in field.metadata for name in ("gt", "ge", "lt", "le") if hasattr(part, name)
    }
    words = {"gt": "above", "ge": "of at least", "lt": "below", "le": "of at most"}
    limits = " and ".join(f"{words[name]} {value:g}" for name, value in bounds.items())
    or_null = ", or null" if NoneType in get_args(field.annotation) else ""
    return f"give {what}{' ' if limits else ''}{limits}{or_null}"
