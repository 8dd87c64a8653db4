"""Plain data as JSON and back, which candidate and tests exchange by value.

Runs inside the sandbox. Plain data are of exactly the types listed here; ``exchange.py`` hands over everything else.
Modules are imported when one of their values arrives, because sandboxes start often.
"""

import base64
import collections
import importlib
import re
import sys
import types
from collections.abc import Callable
from typing import Any

Convert = Callable[[Any], Any]

_ARRAY_TYPE = re.compile(r"[<>|=]?[biufcSUmM]\d*(\[\d*\w+\])?")


def _clock(value: Any) -> tuple[Any, ...]:
    return value.hour, value.minute, value.second, value.microsecond, value.tzinfo, value.fold


def _clocked(make: Any, *parts: Any) -> Any:
    *given, zone, fold = parts
    return make(*given, tzinfo=zone, fold=fold)


# Type: its parts, which are plain, and how it is built from them where that is not by a call.
_BY_PARTS: dict[str, tuple[Callable[[Any], tuple[Any, ...]], Callable[..., Any] | None]] = {
    "builtins.complex": (lambda x: (x.real, x.imag), None),
    "builtins.range": (lambda x: (x.start, x.stop, x.step), None),
    "builtins.slice": (lambda x: (x.start, x.stop, x.step), None),
    "builtins.ellipsis": (lambda x: (), lambda _: ...),
    "decimal.Decimal": (lambda x: (str(x),), None),
    "fractions.Fraction": (lambda x: (x.numerator, x.denominator), None),
    "datetime.date": (lambda x: (x.year, x.month, x.day), None),
    "datetime.time": (_clock, _clocked),
    "datetime.datetime": (lambda x: (x.year, x.month, x.day, *_clock(x)), _clocked),
    "datetime.timedelta": (lambda x: (x.days, x.seconds, x.microseconds), None),
    "datetime.timezone": (lambda x: x.__getinitargs__(), None),
    "zoneinfo.ZoneInfo": (lambda x: (x.key,), None),
    "uuid.UUID": (lambda x: (x.int,), lambda make, number: make(int=number)),
    "pathlib.PosixPath": (lambda x: (str(x),), None),
    "pathlib.PurePosixPath": (lambda x: (str(x),), None),
    "re.Pattern": (lambda x: (x.pattern, x.flags), lambda _, *parts: re.compile(*parts)),
    "array.array": (lambda x: (x.typecode, x.tobytes()), None),
    "collections.deque": (lambda x: ([*x], x.maxlen), None),
    "collections.defaultdict": (
        lambda x: (_factory(x.default_factory), dict(x)),
        lambda make, name, content: make(_FACTORIES.get(name), content),
    ),
}


def _items(value: Any, encode: Convert) -> list[Any]:
    return [encode(each) for each in value]


def _pairs(value: Any, encode: Convert) -> list[Any]:
    return [[encode(key), encode(each)] for key, each in value.items()]


def _dict(content: Any, decode: Convert) -> dict[Any, Any]:
    return {decode(key): decode(each) for key, each in content}


# Type: its content, and how it is built from that.
_BY_CONTENT: dict[str, tuple[Callable[[Any, Convert], Any], Callable[[Any, Convert], Any]]] = {
    "builtins.int": (lambda x, _: hex(x), lambda x, _: int(x, 16)),  # large ones
    "builtins.bytes": (lambda x, _: x.hex(), lambda x, _: bytes.fromhex(x)),
    "builtins.bytearray": (lambda x, _: x.hex(), lambda x, _: bytearray.fromhex(x)),
    "builtins.list": (_items, lambda x, decode: [decode(each) for each in x]),
    "builtins.tuple": (_items, lambda x, decode: tuple(decode(each) for each in x)),
    "builtins.set": (_items, lambda x, decode: {decode(each) for each in x}),
    "builtins.frozenset": (_items, lambda x, decode: frozenset(decode(each) for each in x)),
    "builtins.dict": (_pairs, _dict),
    "builtins.mappingproxy": (_pairs, lambda x, decode: types.MappingProxyType(_dict(x, decode))),
    "builtins.dict_keys": (_items, lambda x, decode: dict.fromkeys(decode(each) for each in x).keys()),
    "builtins.dict_values": (_items, lambda x, decode: dict(enumerate(decode(each) for each in x)).values()),
    "builtins.dict_items": (lambda x, encode: _pairs(dict(x), encode), lambda x, decode: _dict(x, decode).items()),
    "collections.OrderedDict": (_pairs, lambda x, decode: collections.OrderedDict(_dict(x, decode))),
    "collections.Counter": (_pairs, lambda x, decode: collections.Counter(_dict(x, decode))),
}
_FACTORIES: dict[str, Any] = {each.__name__: each for each in (int, float, str, list, dict, set, tuple, bool)}
_SIMPLE: tuple[Any, ...] = (types.NoneType, bool, int, float, str)
CHANGING: tuple[Any, ...] = (list, dict, set, bytearray, collections.deque)
"""Types with a content that changes."""

_names: dict[Any, str] = {}


def _factory(value: Any) -> str | None:
    return next((name for name, each in _FACTORIES.items() if each is value), None)


def _name(kind: Any) -> str:
    if kind not in _names:
        _names[kind] = f"{kind.__module__}.{kind.__qualname__}"
    return _names[kind]


def is_plain(kind: Any) -> bool:
    """Whether values of exactly this type are handed over by value."""
    return kind in _SIMPLE or _name(kind) in _BY_CONTENT or _name(kind) in _BY_PARTS


def encode(value: Any, refer: Convert) -> Any:
    """Plain data as JSON; ``refer`` says what stands for anything else, or raises TypeError."""
    kind = type(value)
    if kind in _SIMPLE and (kind is not int or -(1 << 62) < value < 1 << 62):
        return value
    name = _name(kind)
    if name in _BY_CONTENT:
        return {name: _BY_CONTENT[name][0](value, lambda each: encode(each, refer))}
    if name in _BY_PARTS:
        return {name: [encode(each, refer) for each in _BY_PARTS[name][0](value)]}
    numpy = sys.modules.get("numpy")
    if numpy is not None and issubclass(kind, numpy.ndarray | numpy.generic):
        whole, alone = numpy.asarray(value), issubclass(kind, numpy.generic)
        if _ARRAY_TYPE.fullmatch(whole.dtype.str):
            data = base64.b64encode(whole.tobytes()).decode()
            return {"array": [whole.dtype.str, None if alone else list(whole.shape), data]}
        if whole.dtype == object:
            return {"objects": [list(whole.shape), [encode(each, refer) for each in whole.flat]]}
    return refer(value)


def decode(value: Any, meet: Callable[[str, Any], Any]) -> Any:
    """The reverse of ``encode``; ``meet`` is given tag and content of what is no plain data.

    Raises:
        ValueError, TypeError, LookupError, ...: it is no encoding.
    """
    if isinstance(value, list):
        raise ValueError("a list without a tag")
    if not isinstance(value, dict):
        return value
    ((tag, content),) = value.items()

    def part(each: Any) -> Any:
        return decode(each, meet)

    if tag in _BY_CONTENT:
        return _BY_CONTENT[tag][1](content, part)
    if tag in _BY_PARTS:
        module, _, name = tag.partition(".")
        kind: Any = getattr(importlib.import_module(module), name, None)
        make = _BY_PARTS[tag][1]
        parts = [part(each) for each in content]
        return kind(*parts) if make is None else make(kind, *parts)
    if tag == "array":
        return _array(*content)
    if tag == "objects":
        return _object_array(content[0], [part(each) for each in content[1]])
    return meet(tag, content)


def plain_base(kind: Any) -> Any:
    """The plain type that a type is derived from; None if there is none, as for bool, range, ..."""
    return next(
        (each for each in kind.__mro__ if each is not bool and each is not types.NoneType and is_plain(each)), None
    )


def base_of(value: Any) -> Any:
    """A value of a type derived from a plain one, as the plain one."""
    kind = plain_base(type(value))
    if kind is int:
        return int.__index__(value)
    if kind is float:
        return float.__float__(value)
    if kind is str:
        return str.__str__(value)
    if issubclass(kind, bytes | bytearray):
        return kind(memoryview(value))
    if issubclass(kind, collections.defaultdict):
        return kind(value.default_factory, dict.items(value))
    if issubclass(kind, dict):
        return kind(dict.items(value))
    if kind is collections.deque:
        return kind(kind.__iter__(value), value.maxlen)
    if kind in (list, tuple, set, frozenset):
        return kind(kind.__iter__(value))
    parts, make = _BY_PARTS[_name(kind)]
    return kind(*parts(value)) if make is None else make(kind, *parts(value))


def _array(kind: str, shape: list[int] | None, data: str) -> Any:
    if not _ARRAY_TYPE.fullmatch(kind):
        raise ValueError("an array of an unknown type")
    import numpy

    found = numpy.frombuffer(base64.b64decode(data), numpy.dtype(kind))
    return found[0] if shape is None else found.reshape(shape).copy()


def _object_array(shape: list[int], items: list[Any]) -> Any:
    import numpy

    found = numpy.empty(len(items), object)
    found[:] = items
    return found.reshape(shape)
