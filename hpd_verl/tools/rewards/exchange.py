"""Exchanges objects between a candidate and its tests over two pipes.

Runs inside the sandbox. Each side is a ``Port``. Plain data go by value (``plain.py``), everything else as a ``Proxy``,
whose operations run on the side of the object. An exception class becomes a class of the same name and bases, which
``except`` catches; a coroutine becomes a coroutine.

The tests do not trust the candidate: its proxies never take part in a comparison by the tests, and a proxy of a tests'
object shows the candidate that object, not its module.
"""

import builtins
import collections
import copy
import functools
import importlib
import io
import json
import math
import operator
import os
import sys
import threading
import types
import weakref
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

from hpd_verl.tools.rewards.plain import CHANGING, base_of, decode, encode, is_plain, plain_base

MESSAGE_BYTES = 1 << 24
"""Of one call or one result."""
PRINTED = 1 << 20
"""Characters that are handed over of what a call prints."""


class Lost(BaseException):
    """The candidate's process has ended, or what it sends is no result. No test can catch it by ``Exception``."""


class CandidateError(Exception):
    """An exception of the candidate that has no class on this side, or would change the course of its tests."""


_ARITHMETIC = {
    f"__{name}__": getattr(operator, f"__{name}__")
    for name in (
        *("add", "sub", "mul", "matmul", "truediv", "floordiv", "mod", "pow", "lshift", "rshift", "and", "or", "xor"),
        *("iadd", "isub", "imul", "imatmul", "itruediv", "ifloordiv", "imod", "ipow", "ilshift", "irshift"),
        *("iand", "ior", "ixor"),
    )
} | {"__divmod__": divmod}
_REFLECTED = {
    name.replace("__", "__r", 1): (lambda target, other, do=do: do(other, target))
    for name, do in _ARITHMETIC.items()
    if not name.startswith("__i")
}
_ORDER = {name: getattr(operator, name) for name in ("__lt__", "__le__", "__gt__", "__ge__")}
_NUMBERS: dict[str, Any] = {
    **{"__int__": int, "__float__": float, "__complex__": complex, "__index__": operator.index, "__abs__": abs},
    **{"__round__": round, "__trunc__": math.trunc, "__floor__": math.floor, "__ceil__": math.ceil},
}
_OTHERS: dict[str, Any] = {
    **{"__len__": len, "__iter__": iter, "__reversed__": reversed, "__contains__": operator.contains},
    **{"__getitem__": operator.getitem, "__setitem__": operator.setitem, "__delitem__": operator.delitem},
    **{"__neg__": operator.neg, "__pos__": operator.pos, "__invert__": operator.invert},
    **{
        name: (lambda target, *args, name=name: getattr(type(target), name)(target, *args))
        for name in ("__enter__", "__exit__", "__aenter__", "__aexit__", "__aiter__")
    },
}
_ALWAYS: dict[str, Any] = {
    **{"__str__": str, "__repr__": repr, "__format__": format, "__hash__": hash, "__eq__": operator.eq},
    **{"__copy__": copy.copy, "__deepcopy__": copy.deepcopy, "__dir__": dir},
    **{"__type__": type, "__bool__": bool, "__signature__": lambda target: _parameters(target)},
    "__instancecheck__": lambda target, value: isinstance(value, target),
    "__subclasscheck__": lambda target, value: issubclass(value, target),
}
_SOMETIMES: dict[str, Any] = {**_ARITHMETIC, **_REFLECTED, **_ORDER, **_NUMBERS, **_OTHERS}
"""Special methods that a proxy has where its object has them."""
SPECIAL: dict[str, Any] = {**_SOMETIMES, **_ALWAYS}

_SHOWN = {
    "__name__",
    "__qualname__",
    "__doc__",
    "__dict__",
    "__annotations__",
    "__wrapped__",
    "__members__",
    "__bases__",
}
_SHOWN |= {"__mro__", "__notes__", "__cause__", "__context__"}
"""Special attributes of a candidate's object that its tests may ask for."""

_LIBRARY = {"collections", "collections.abc", "datetime", "decimal", "fractions", "numbers", "typing", "enum", "uuid"}
_LIBRARY |= {"pathlib", "array", "numpy", "abc", "zoneinfo"}
"""Modules whose classes are those of each side's own copy."""


class Proxy:
    # An object of the other side. (No docstring: its own is asked for.)
    __slots__ = ("__weakref__", "_hpd_kind", "_hpd_made", "_hpd_number", "_hpd_port")

    def __init__(self, port: "Port", number: int, kind: dict[str, Any]) -> None:
        for name, value in (("port", port), ("number", number), ("kind", kind), ("made", "")):
            object.__setattr__(self, f"_hpd_{name}", value)

    def __getattr__(self, name: str) -> Any:
        return self._hpd_port.attribute(self, name)

    def __setattr__(self, name: str, value: Any) -> None:
        self._hpd_port.ask("set", self, (name, value))

    def __delattr__(self, name: str) -> None:
        self._hpd_port.ask("delete", self, (name,))

    __class__ = property(lambda self: self._hpd_port.class_of(self))
    __doc__ = property(lambda self: self._hpd_port.attribute(self, "__doc__"))

    def __eq__(self, other: object) -> Any:
        return self._hpd_port.equal(self, other)

    def __hash__(self) -> int:
        return int(self._hpd_port.hash_of(self))

    def __bool__(self) -> bool:
        return bool(self._hpd_port.truth_of(self))

    def __instancecheck__(self, value: Any) -> bool:
        return bool(self._hpd_port.is_instance(self, value))

    def __subclasscheck__(self, value: Any) -> bool:
        return bool(self._hpd_port.ask("special", self, ("__subclasscheck__", value)))

    def __deepcopy__(self, memo: Any) -> Any:
        return self._hpd_port.ask("special", self, ("__deepcopy__",))

    def __mro_entries__(self, bases: Any) -> Any:
        raise TypeError("a class of the tests cannot be derived from one of the candidate")


def _special_method(name: str) -> Callable[..., Any]:
    def method(self: Any, *args: Any) -> Any:
        return self._hpd_port.special(self, name, args)

    method.__name__ = name
    return method


for _name in ("__str__", "__repr__", "__format__", "__copy__", "__dir__"):
    setattr(Proxy, _name, _special_method(_name))


def _call(self: Any, /, *args: Any, **kwargs: Any) -> Any:
    return self._hpd_port.call(self, args, kwargs)


def _next(self: Any) -> Any:
    # As a list: StopIteration is no error of the other side's.
    batch = self._hpd_port.ask("next", self, ())
    if not batch:
        raise StopIteration
    return batch[0]


def _await(self: Any) -> Any:
    return self._hpd_port.coroutine(self._hpd_number, "awaited").__await__()


async def _anext(self: Any) -> Any:
    batch = await self._hpd_port.coroutine(self._hpd_number, "anext")
    if not batch:
        raise StopAsyncIteration
    return batch[0]


_METHODS: dict[str, Any] = {
    **{name: _special_method(name) for name in _SOMETIMES},
    **{"__call__": _call, "__next__": _next, "__await__": _await, "__anext__": _anext},
}
_NAMES = (*_METHODS, "__bool__")


@functools.cache
def _proxy_class(names: frozenset[str], fields: tuple[str, ...]) -> Any:
    """A proxy with these special methods, so that ``callable``, ``for``, ``with`` and the like see what there is; of a
    data class with these fields."""
    methods = {name: _METHODS[name] for name in names if name in _METHODS}
    if fields:
        import dataclasses

        made: Any = dataclasses.make_dataclass("fields", fields)
        methods["__dataclass_fields__"] = made.__dataclass_fields__
    return type("Proxy", (Proxy,), {"__slots__": (), "__doc__": vars(Proxy)["__doc__"], **methods})


_BASES: dict[Any, Any] = {each.__name__: each for each in CHANGING}


class Container(Proxy):
    # A list, set, ... of a class of the candidate's own: what it holds is plain data and can be compared.
    __slots__ = ()
    __class__ = property(lambda self: _BASES.get(self._hpd_kind.get("base"), Container))


def _of_content(name: str) -> Callable[..., Any]:
    def method(self: Any, *args: Any) -> Any:
        others = [each._hpd_port.content_of(each) if isinstance(each, Container) else each for each in args]
        return getattr(operator, name)(self._hpd_port.content_of(self), *others)

    return method


for _name in ("__eq__", "__ne__", "__lt__", "__le__", "__gt__", "__ge__", "__contains__", "__add__", "__mul__"):
    setattr(Container, _name, _of_content(_name))
for _name in ("__or__", "__and__", "__sub__", "__xor__"):
    setattr(Container, _name, _of_content(_name))
Container.__radd__ = lambda self, other: other + self._hpd_port.content_of(self)  # type: ignore[attr-defined]
Container.__hash__ = None  # type: ignore[assignment]
Container.__bool__ = lambda self: bool(self._hpd_port.content_of(self))  # type: ignore[method-assign]


_ADDED = {"__annotations__", "__orig_bases__", "__annotate__", "__annotate_func__", "__annotations_cache__"}
"""What typing.NamedTuple gives a class beside the fields."""


class Port:
    """One side. ``scope`` is the module whose classes are this side's own."""

    def __init__(self, source: int, sink: int, scope: dict[str, Any]) -> None:
        self.source, self.sink, self.scope = os.fdopen(source, "rb"), os.fdopen(sink, "wb"), scope
        self.kept: list[Any] = []
        self.numbers: dict[int, int] = {}
        self.met: dict[Any, Any] = {}
        """What stands here for the other side's objects, by number."""
        self.coroutines: Any = weakref.WeakKeyDictionary()
        """The other side's numbers of coroutines that stand for its own."""
        self.lock = threading.RLock()

    # Requests to the other side.

    def ask(self, op: str, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> Any:
        """The result of an operation on the other side's object.

        Arguments are copies: a change of them is seen here only where the operation has no result (None), as of a
        function that works in place.
        """
        number = target if type(target) is int else target._hpd_number
        given = (*args, *(kwargs or {}).values())
        message: dict[str, Any] = {"op": op, "object": number, "args": [self.encode(each) for each in args]}
        if kwargs:
            message["kwargs"] = {name: self.encode(each) for name, each in kwargs.items()}
        reply = self.exchange(message)
        if "error" in reply:
            self.throw(self.read(reply["error"]))
        value = self.read(reply["value"])
        if value is None and isinstance(reply.get("args"), list):
            for old, new in zip(given, reply["args"], strict=False):
                if new is not None:
                    self.change(old, self.read(new))
        return value

    def exchange(self, message: dict[str, Any]) -> dict[str, Any]:
        with self.lock:
            self.send(message)
            while "op" in (reply := self.receive()):  # it asks back before it answers
                self.send(self.respond(reply))
            return reply

    def send(self, message: dict[str, Any]) -> None:
        self.sink.write(json.dumps(message).encode() + b"\n")
        self.sink.flush()

    def receive(self) -> dict[str, Any]:
        message: dict[str, Any] = json.loads(self.source.readline())
        return message

    def throw(self, error: Any) -> NoReturn:
        raise error

    def change(self, old: Any, new: Any) -> None:
        """Give a container the content of another of its kind."""
        if type(old) is not type(new):
            raise TypeError("an argument of another kind")
        if not isinstance(old, CHANGING):
            old[...] = new  # an array
            return
        old.clear()
        if isinstance(old, dict | set):
            old.update(new)
        else:
            old.extend(new)

    def read(self, value: Any) -> Any:
        return decode(value, self.meet)

    def encode(self, value: Any) -> Any:
        return encode(value, self.refer)

    # Requests of the other side.

    def respond(self, request: dict[str, Any]) -> dict[str, Any]:
        """The reply to what the other side asks."""
        op, number = request["op"], request["object"]
        args = [self.read(each) for each in request["args"]]
        kwargs = {name: self.read(each) for name, each in request.get("kwargs", {}).items()}
        try:
            value = self.perform(op, self.kept[number], args, kwargs)
            reply = {"value": self.encode(value)}
            if value is None and op in ("call", "special"):
                reply["args"] = [self.encode(each) if changes(each) else None for each in (*args, *kwargs.values())]
        except BaseException as error:
            if isinstance(error, Lost):
                raise
            reply = {"error": self.error(error)}
        return reply

    def perform(self, op: str, target: Any, args: list[Any], kwargs: dict[str, Any]) -> Any:
        match op:
            case "call":
                return target(*args, **kwargs)
            case "get":
                return getattr(target, *args)
            case "set":
                return setattr(target, *args)
            case "delete":
                return delattr(target, *args)
            case "special":
                return SPECIAL[args[0]](target, *args[1:])
            case "next":
                try:
                    return [next(target)]
                except StopIteration:
                    return []
            case "content":
                return base_of(target)
        raise ValueError(op)

    # Policies of proxies; the tests' side is stricter.

    def attribute(self, proxy: Any, name: str) -> Any:
        return self.ask("get", proxy, (name,))

    def special(self, proxy: Any, name: str, args: tuple[Any, ...]) -> Any:
        return self.ask("special", proxy, (name, *args))

    def call(self, proxy: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return self.ask("call", proxy, args, kwargs)

    def equal(self, proxy: Any, other: Any) -> Any:
        return proxy is other or self.special(proxy, "__eq__", (other,))

    def hash_of(self, proxy: Any) -> Any:
        return self.special(proxy, "__hash__", ())

    def truth_of(self, proxy: Any) -> Any:
        return self.special(proxy, "__bool__", ())

    def is_instance(self, proxy: Any, value: Any) -> Any:
        return self.special(proxy, "__instancecheck__", (value,))

    def content_of(self, proxy: Any) -> Any:
        return self.ask("content", proxy, ())

    def class_of(self, proxy: Any) -> Any:
        """This side's own class of that name, or a proxy of the other side's class."""
        own: Any = self.scope.get(proxy._hpd_kind.get("name"))
        if issubclass(type(own), type) and own.__module__ == self.scope["__name__"]:
            return own
        found = self.ask("special", proxy, ("__type__",))
        # An object that claims to be a number must not count as one.
        return found if issubclass(type(found), Proxy) or found is type else type(proxy)

    def coroutine(self, number: int, how: str) -> Any:
        """The other side's coroutine as one of this side: its loop runs while this side's waits."""
        task = None

        async def wait() -> Any:
            nonlocal task
            task = self.ask("schedule", number, (how,))
            try:
                while not (done := self.ask("poll", task, ())):
                    await _pause()
                return done[0]
            except GeneratorExit:
                raise
            except BaseException as error:
                if type(error).__name__ == "CancelledError":
                    self.ask("cancel", task, ())
                raise

        found = wait()
        self.coroutines[found] = number
        return found

    # References.

    def keep(self, value: Any) -> int:
        if id(value) not in self.numbers:
            self.numbers[id(value)] = len(self.kept)
            self.kept.append(value)
        return self.numbers[id(value)]

    def refer(self, value: Any) -> dict[str, Any] | None:
        """The reference to a value that is not plain data."""
        kind: Any = type(value)
        if isinstance(value, Proxy):
            return {"yours": value._hpd_number}
        if isinstance(value, type):
            return self.refer_to_class(value)
        home = self.home_of(value)
        if home is not None:
            return {"yours": home}
        if kind is types.BuiltinFunctionType and _is_named(builtins, value):
            return {"builtin": value.__name__}
        if isinstance(value, BaseException):
            return self.error(value)
        if kind is types.TracebackType:
            return None
        if issubclass(kind, tuple) and type(getattr(kind, "_fields", None)) is tuple:
            more = kind.__bases__ != (tuple,) or vars(kind).keys() - vars(_named(kind.__name__, kind._fields)) - _ADDED
            items = [self.encode(each) for each in tuple.__iter__(value)]
            return {"named": [kind.__name__, list(kind._fields), items, self.keep(value) if more else None]}
        return self.refer_to_object(value)

    def home_of(self, value: Any) -> int | None:
        """The other side's number of what stands here for its object, where that is no proxy."""
        kind: Any = type(value)
        if kind is types.CoroutineType:
            return self.coroutines.get(value)
        if kind is types.FunctionType:
            number, own = value.__dict__.get("_hpd_home", (None, 0))  # copied by functools.wraps
            return number if own == id(value) else None
        if isinstance(value, type):
            return value.__dict__.get("_hpd_number")
        return value._hpd_number if "_hpd_number" in kind.__dict__ else None

    def refer_to_class(self, kind: Any) -> dict[str, Any]:
        home = self.home_of(kind)
        if home is not None:
            return {"yours": home}
        if _is_named(builtins, kind):
            return {"builtin": kind.__name__}
        if kind.__module__ in _LIBRARY and _is_named(sys.modules.get(kind.__module__), kind):
            return {"library": [kind.__module__, kind.__name__]}
        if issubclass(kind, BaseException):
            bases = [self.refer_to_class(each) for each in kind.__bases__ if issubclass(each, BaseException)]
            return {"exception": [self.keep(kind), kind.__name__, kind.__module__, bases]}
        return self.refer_to_object(kind)

    def refer_to_object(self, value: Any) -> dict[str, Any]:
        kind: Any = type(value)
        base = plain_base(kind)
        about: dict[str, Any] = {"name": kind.__name__}
        if type(getattr(kind, "__dataclass_fields__", None)) is dict:
            about["fields"] = list(kind.__dataclass_fields__)
        if isinstance(value, type):
            about["class"] = True
        if kind.__eq__ is object.__eq__ or _is_member(value):
            about["identity"] = True
        defined = set().union(*map(vars, kind.__mro__))
        names = [name for name in _NAMES if name in defined]
        if kind.__hash__ is None:
            about["unhashable"] = True
        if base is None:
            return {"object": [self.keep(value), names, about]}
        if issubclass(base, CHANGING):
            about["base"] = next(each.__name__ for each in CHANGING if issubclass(base, each))
            return {"container": [self.keep(value), names, about]}
        return {"value": [self.keep(value), encode(base_of(value), self.refer), about]}

    def error(self, error: BaseException) -> dict[str, Any]:
        """An exception: its class, arguments, text, attributes."""
        home = self.home_of(error)
        if home is not None:
            return {"yours": home}
        text = text_of(error)
        try:
            args = [self.encode(each) for each in error.args]
            if len(json.dumps(args)) > 10000:
                raise ValueError
        except Exception:
            args = [text]
        state = {name: each for name, each in vars(error).items() if type(each) in (str, int, float)}
        return {"raised": [self.refer_to_class(type(error)), args, text, self.keep(error), state]}

    def meet(self, tag: str, content: Any) -> Any:
        """This side's object for a reference to a value that is not plain data."""
        match tag:
            case "yours":
                return self.own(int(content))
            case "builtin":
                return self.builtin(str(content))
            case "library":
                module, name = content
                found = getattr(importlib.import_module(module), name) if module in _LIBRARY else None
                if not isinstance(found, type):
                    raise ValueError(f"no class {name!r}")
                return found
            case "named":
                return self.meet_named(*content)
            case "items":
                return iter([self.read(each) for each in content])
            case "coroutine":
                return self.coroutine(int(content), "awaited")
            case "object" | "container" | "exception" | "value" | "raised" | "function":
                number = int(content[3 if tag == "raised" else 0])
                if (tag, number) not in self.met:
                    self.met[tag, number] = getattr(self, f"meet_{tag}")(*content)
                return self.met[tag, number]
        raise ValueError(f"tag {tag!r}")

    def own(self, number: int) -> Any:
        if number < 0:
            raise LookupError(number)
        return self.kept[number]

    def builtin(self, name: str) -> Any:
        return getattr(builtins, name)

    def meet_object(self, number: int, names: list[str], about: dict[str, Any]) -> Any:
        fields = tuple(map(str, about.get("fields", ())))
        return _proxy_class(frozenset(map(str, names)), fields)(self, number, dict(about))

    def meet_container(self, number: int, names: list[str], about: dict[str, Any]) -> Any:
        methods = {name: _METHODS[name] for name in names if name in _METHODS and not hasattr(Container, name)}
        return type("Container", (Container,), {"__slots__": (), **methods})(self, number, dict(about))

    def meet_named(self, name: str, fields: list[str], items: list[Any], number: int | None) -> Any:
        values = [self.read(each) for each in items]
        own: Any = self.scope.get(name)
        if issubclass(type(own), type) and issubclass(own, tuple) and getattr(own, "_fields", None) == tuple(fields):
            return own(*values)
        kind: Any = _named(str(name), tuple(map(str, fields)))
        return kind(*values) if number is None else self.with_attributes(kind, int(number))(*values)

    def meet_value(self, number: int, value: Any, about: dict[str, Any]) -> Any:
        plain = self.read(value)
        kind = self.with_attributes(type(plain), int(number))
        if isinstance(plain, int | float | complex | str | bytes | tuple | frozenset):
            return kind(plain)
        if type(plain).__module__ in ("decimal", "fractions", "datetime"):
            return kind.__new__(kind, *plain.__reduce__()[1])
        return plain

    def with_attributes(self, base: Any, number: int) -> Any:
        """A class of values whose further attributes are asked for."""
        proxy = Proxy(self, number, {})
        found = type(base.__name__, (base,), {
            "_hpd_number": number,
            "__getattr__": lambda _, name: self.attribute(proxy, name),
            "__str__": lambda _: self.special(proxy, "__str__", ()),
            "__repr__": lambda _: self.special(proxy, "__repr__", ()),
            "__format__": lambda _, form: self.special(proxy, "__format__", (form,)),
            "__copy__": lambda self: self,
            "__deepcopy__": lambda self, memo: self,
        })  # fmt: skip
        return found

    def meet_exception(self, number: int, name: str, module: str, bases: list[Any]) -> Any:
        loaded = sys.modules.get(module) if module.split(".")[0] in sys.stdlib_module_names else None
        real = getattr(loaded, name, None)
        if isinstance(real, type) and issubclass(real, BaseException):
            return real
        found = type(str(name), tuple(self.read(each) for each in bases), {
            "__module__": str(module),
            "_hpd_number": number,
            "__new__": lambda cls, *args, **kwargs: self.new_exception(cls, number, args, kwargs),
            "__init__": lambda self, *args, **kwargs: None,
            "__str__": lambda self: self._hpd_text,
            "__getattr__": lambda error, attribute: self.attribute(
                Proxy(self, object.__getattribute__(error, "_hpd_number"), {}), attribute
            ),
        })  # fmt: skip
        return found

    def new_exception(self, kind: Any, number: int, args: Any, kwargs: Any) -> Any:
        """An exception of the other side's class, made by this side."""
        return self.ask("call", number, args, kwargs)

    def meet_raised(self, kind: Any, args: list[Any], text: str, number: int, state: dict[str, Any]) -> Any:
        found, values = self.read(kind), tuple(self.read(each) for each in args)
        if not isinstance(found, type) or not issubclass(found, BaseException):
            raise ValueError("no exception")
        try:
            if "_hpd_number" in vars(found):
                base = next(each for each in found.__mro__ if "_hpd_number" not in vars(each))
                error: Any = base.__new__(found, *values)
                error._hpd_text, error._hpd_number = str(text), number
            elif found.__module__ == "builtins":
                error = found(*values)
            else:
                error = found.__new__(found, *values)
                vars(error).update({name: each for name, each in state.items() if not name.startswith("_")})
            error.args = values
        except TypeError:
            error = CandidateError(f"{found.__name__}: {text}")
        return error

    def meet_function(self, number: int, name: str, text: Any) -> Any:
        def function(*args: Any, **kwargs: Any) -> Any:
            return self.ask("call", number, args, kwargs)

        function.__name__ = function.__qualname__ = str(name)
        function.__doc__, function.__module__ = text, "tests"
        function._hpd_home = number, id(function)  # type: ignore[attr-defined]
        return function


def _nothing() -> None:
    pass


@types.coroutine
def _pause() -> Iterator[None]:
    """Let others of this side's loop run."""
    yield


@functools.cache
def _named(name: str, fields: tuple[str, ...]) -> Any:
    return collections.namedtuple(name, fields)


def _parameters(function: Any) -> list[Any]:
    import inspect

    found = inspect.signature(function).parameters.values()
    return [(each.name, int(each.kind), each.default is each.empty, _plain_or_none(each.default)) for each in found]


def _plain_or_none(value: Any) -> Any:
    return value if is_plain(type(value)) else None


def _signature(parameters: list[Any]) -> Any:
    import inspect

    kinds: list[Any] = list(type(inspect.Parameter.POSITIONAL_ONLY))  # type: ignore[call-overload]
    return inspect.Signature([
        inspect.Parameter(name, kinds[kind], default=inspect.Parameter.empty if none else default)
        for name, kind, none, default in parameters
    ])  # fmt: skip


def _is_named(module: Any, value: Any) -> bool:
    """Whether a module has this under its name."""
    return getattr(module, value.__name__, None) is value


def _is_member(value: Any) -> bool:
    enum = sys.modules.get("enum")
    return enum is not None and isinstance(value, enum.Enum)


def changes(value: Any) -> bool:
    """Whether a value is plain and can be changed in place."""
    kind = type(value)
    return (kind in CHANGING or (issubclass(kind, CHANGING) and is_plain(kind))) or kind.__name__ == "ndarray"


def text_of(error: BaseException) -> str:
    """An exception's text; a custom class may fail to make one."""
    try:
        return str(error)[:300]
    except BaseException:
        return ""


class Printed(io.StringIO):
    """A candidate's output, up to a limit."""

    def write(self, text: str) -> int:
        return super().write(text) if self.tell() < PRINTED else len(text)


class CandidatePort(Port):
    """The candidate's side: it serves whatever its tests ask, runs its coroutines, and hands over what it prints."""

    loop: Any = None

    def send(self, message: dict[str, Any]) -> None:
        printed = sys.stdout
        if type(printed) is Printed and printed.tell():
            message = {**message, "printed": printed.getvalue()}
            printed.seek(printed.truncate(0))
        super().send(message)

    def perform(self, op: str, target: Any, args: list[Any], kwargs: dict[str, Any]) -> Any:
        if op not in ("schedule", "poll", "cancel"):
            return super().perform(op, target, args, kwargs)
        import asyncio

        if self.loop is None:
            self.loop = asyncio.new_event_loop()
            asyncio.set_event_loop(self.loop)
        if op == "schedule":
            waited = target if args[0] == "awaited" else _step(target)
            return self.keep(asyncio.ensure_future(waited, loop=self.loop))
        if op == "poll":
            self.loop.run_until_complete(asyncio.wait({target}, timeout=0.005))
            return [target.result()] if target.done() else []
        target.cancel()
        self.loop.run_until_complete(asyncio.wait({target}, timeout=0.1))
        return None

    def refer_to_object(self, value: Any) -> dict[str, Any]:
        if type(value) is types.CoroutineType:
            return {"coroutine": self.keep(value)}
        return super().refer_to_object(value)


async def _step(iterator: Any) -> list[Any]:
    try:
        return [await anext(iterator)]
    except StopAsyncIteration:
        return []


_SAFE = _ALWAYS.keys() - {"__signature__", "__dir__"}
_REACHING = ("gi_", "cr_", "ag_", "f_", "tb_", "co_", "func_")
"""How attributes begin by which an object leads to the code and the variables around it."""


class TestsPort(Port):
    """The tests' side. It trusts nothing that arrives: what is no result is a candidate lost."""

    def __init__(self, source: int, sink: int, scope: dict[str, Any]) -> None:
        super().__init__(source, sink, scope)
        self.calls = 0
        """How often something of the candidate's was called."""
        self.lost = ""
        self.results: collections.deque[Any] = collections.deque(maxlen=1000)
        """The last results that are containers."""

    def lose(self, why: str) -> NoReturn:
        self.lost = self.lost or why
        raise Lost(why)

    def send(self, message: dict[str, Any]) -> None:
        if self.lost:
            raise Lost(self.lost)
        try:
            super().send(message)
        except BrokenPipeError:
            self.lose("its process ended")

    def receive(self) -> dict[str, Any]:
        if self.lost:
            raise Lost(self.lost)
        line = self.source.readline(MESSAGE_BYTES + 1)
        if not line.endswith(b"\n"):
            self.lose("its result is too large" if len(line) > MESSAGE_BYTES else "its process ended")
        try:
            message = json.loads(line)
        except (ValueError, RecursionError):
            self.lose("its result cannot be read")
        if not isinstance(message, dict):
            self.lose("its result cannot be read")
        if isinstance(message.get("printed"), str):
            sys.stdout.write(message["printed"])
        return message

    def read(self, value: Any) -> Any:
        try:
            found = super().read(value)
        except (
            LookupError,
            ValueError,
            TypeError,
            AttributeError,
            ArithmeticError,
            RecursionError,
            ImportError,
        ) as error:
            self.lose(f"its result cannot be read: {error}"[:200])
        return found

    def exchange(self, message: dict[str, Any]) -> dict[str, Any]:
        reply = super().exchange(message)
        if "value" not in reply and "error" not in reply:
            self.lose("its result cannot be read")
        return reply

    def ask(self, op: str, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> Any:
        self.calls += op in ("call", "schedule") or (op == "special" and args[0] != "__type__")
        value = super().ask(op, target, args, kwargs)
        if type(value) in (list, tuple, str, range) or type(value).__name__ == "ndarray":
            self.results.append(value)
        return value

    def change(self, old: Any, new: Any) -> None:
        if changes(old):
            try:
                super().change(old, new)
            except (ValueError, TypeError) as error:
                self.lose(f"its result cannot be read: {error}")

    def throw(self, error: Any) -> NoReturn:
        """Raise an exception of the candidate, but none that ends a loop of the tests as if it had come to its end."""
        kind = type(error)
        if issubclass(kind, Exception | SystemExit | KeyboardInterrupt) and not issubclass(
            kind, StopIteration | StopAsyncIteration
        ):
            raise error
        if kind.__name__ == "CancelledError" and kind.__module__ == "asyncio.exceptions":
            raise error
        raise CandidateError(
            f"{kind.__name__}: {text_of(error) if issubclass(kind, BaseException) else 'no exception'}"
        )

    def respond(self, request: dict[str, Any]) -> dict[str, Any]:
        try:
            number, args, _ = request["object"], request["args"], request["op"]
            if not isinstance(number, int) or not isinstance(args, list) or not 0 <= number < len(self.kept):
                raise ValueError("no object")
            if not isinstance(request.get("kwargs", {}), dict):
                raise ValueError("no arguments")
        except (LookupError, ValueError) as error:
            self.lose(f"its call cannot be read: {error}")
        return super().respond(request)

    def perform(self, op: str, target: Any, args: list[Any], kwargs: dict[str, Any]) -> Any:
        """Carry out a candidate's operation on an object of its tests: use it, not look behind it."""
        name = args[0] if args else ""
        if op in ("get", "set", "delete") and (
            type(name) is not str or name.startswith(("__", *_REACHING)) or isinstance(target, _FUNCTIONS)
        ):  # fmt: skip
            raise AttributeError(f"{str(name)[:40]!r} of an object of the tests")
        if op in ("set", "delete") and isinstance(target, type):
            raise AttributeError(f"{name!r} of a class of the tests")
        if op == "special" and name not in _SAFE and (name not in SPECIAL or not hasattr(type(target), name)):
            raise TypeError(f"{str(name)[:40]!r} of an object of the tests")
        if op not in ("call", "get", "set", "delete", "special", "next"):
            raise TypeError("an object of the tests")
        return super().perform(op, target, args, kwargs)

    def builtin(self, name: str) -> Any:
        found = getattr(builtins, name, None)
        if not isinstance(found, type) and name not in _PURE:
            raise ValueError(f"no type {name!r}")
        return found

    def own(self, number: int) -> Any:
        if not 0 <= number < len(self.kept):
            raise ValueError("no object")
        return self.kept[number]

    def refer_to_object(self, value: Any) -> dict[str, Any]:
        """Functions and objects of the tests' own classes are handed over by reference; iterators by what they hold."""
        kind, module = type(value), self.scope["__name__"]
        if isinstance(value, _FUNCTIONS) or (callable(value) and kind.__module__ in ("numpy", "operator")):
            name = getattr(value, "__name__", kind.__name__)
            doc = getattr(value, "__doc__", None)
            return {"function": [self.keep(value), name, doc if type(doc) is str else None]}
        if isinstance(value, _PASSED_ON):
            return {"items": [self.encode(each) for each in value]}
        if plain_base(kind) is not None:
            return dict(encode(base_of(value), self.refer))
        owned = value.__module__ if isinstance(value, type) else kind.__module__
        if owned == module or isinstance(value, types.SimpleNamespace | io.StringIO | io.BytesIO):
            return super().refer_to_object(value)
        raise TypeError(f"an argument is a {kind.__name__}, which cannot be handed to a candidate")

    # Permitted uses of a candidate's proxy.

    def attribute(self, proxy: Any, name: str) -> Any:
        if name == "__signature__":
            return _signature(self.ask("special", proxy, (name,)))
        if name.startswith("__") and name.endswith("__") and name not in _SHOWN:
            raise AttributeError(name)
        return self.ask("get", proxy, (name,))

    def call(self, proxy: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        result = self.ask("call", proxy, args, kwargs)
        if isinstance(result, Proxy) and proxy._hpd_kind.get("class"):
            object.__setattr__(result, "_hpd_made", "made")
        return result

    def special(self, proxy: Any, name: str, args: tuple[Any, ...]) -> Any:
        """An operation that cannot stand for a comparison with what the tests expect."""
        if name in _ORDER and not (_is_made(proxy) and _is_made(*args)):
            raise TypeError(_NO_COMPARISON)
        if name in _NUMBERS and proxy._hpd_made == "derived":
            raise TypeError(_NO_COMPARISON)
        result = self.ask("special", proxy, (name, *args))
        if name in _ARITHMETIC or name in _REFLECTED:
            if not isinstance(result, Proxy) and not isinstance(args[0], Proxy):
                raise TypeError(_NO_COMPARISON)
            if isinstance(result, Proxy) and not _is_made(proxy, args[0]):
                # It may hold what the tests expect: only its attributes are given.
                object.__setattr__(result, "_hpd_made", "derived")
        if name == "__contains__" and result and self.holds_everything(proxy, *args):
            raise TypeError("the object of the candidate holds everything")
        return result

    def holds_everything(self, proxy: Any, item: Any) -> bool:
        """Whether an object says that it holds what it was never given."""
        if isinstance(item, Proxy):
            return False
        controls: list[Any] = [frozenset({"hpd"}), b"hpd\0"] if proxy._hpd_made == "made" else [*_controls(item)]

        def held(each: Any) -> bool:
            try:
                return bool(self.ask("special", proxy, ("__contains__", each)))
            except Exception:
                return False

        return all(map(held, controls))

    def equal(self, proxy: Any, other: Any) -> Any:
        if other is proxy:
            return True
        if other is None:
            return False
        if isinstance(other, Proxy):
            if proxy._hpd_kind.get("identity") and other._hpd_kind.get("identity"):
                return False
            if _is_made(proxy) and _is_made(other):
                return bool(self.ask("special", proxy, ("__eq__", other)))
        raise TypeError(_NO_COMPARISON)

    def hash_of(self, proxy: Any) -> Any:
        if proxy._hpd_kind.get("unhashable"):
            raise TypeError(f"unhashable type: {proxy._hpd_kind.get('name')!r}")
        return self.ask("special", proxy, ("__hash__",)) if _is_made(proxy) else proxy._hpd_number

    def truth_of(self, proxy: Any) -> Any:
        if hasattr(type(proxy), "__len__") and _is_made(proxy) and not proxy._hpd_kind.get("truth"):
            return self.ask("special", proxy, ("__len__",)) != 0
        if hasattr(type(proxy), "__len__") or proxy._hpd_kind.get("truth"):
            raise TypeError("the result is an object of the candidate, which is neither true nor false")
        return True

    def is_instance(self, proxy: Any, value: Any) -> Any:
        if isinstance(value, Proxy) or self.home_of(value) is not None:
            return self.ask("special", proxy, ("__instancecheck__", value))
        return False

    def meet_object(self, number: int, names: list[str], about: dict[str, Any]) -> Any:
        return super().meet_object(number, names, {**about, "truth": "__bool__" in names})


_PURE = {"abs", "all", "any", "bin", "callable", "chr", "divmod", "format", "hash", "hex", "id", "iter", "len", "max"}
_PURE |= {"min", "next", "oct", "ord", "pow", "print", "repr", "round", "sorted", "sum"}
"""Functions of Python's own that a candidate may hand back."""
_NO_COMPARISON = "the result is an object of the candidate, which cannot be compared"
_FUNCTIONS: tuple[Any, ...] = (types.FunctionType, types.BuiltinFunctionType, types.MethodType, functools.partial)
_FUNCTIONS += (
    types.MethodWrapperType,
    types.MethodDescriptorType,
    types.WrapperDescriptorType,
    type(functools.cache(_nothing)),
)
_PASSED_ON: tuple[Any, ...] = (types.GeneratorType, map, filter, zip, enumerate, reversed)
_PASSED_ON += tuple(map(type, (iter([]), iter(()), iter(""), iter({}), iter(set()), iter(range(0)), reversed([]))))
"""What is handed to a candidate as an iterator over what it holds."""


def _is_made(*values: Any) -> bool:
    """Whether the tests have made these themselves, by a call of a class of the candidate."""
    return all(isinstance(each, Proxy) and each._hpd_made == "made" for each in values)


def _controls(item: Any) -> list[Any]:
    """Values of an item's kind that no object was given."""
    if isinstance(item, str):
        return ["\0hpd", "hpd control 7f3a"]
    if isinstance(item, int | float):
        return [(1 << 61) + 3, -(1 << 61) - 8, 0.7310585786300049]
    return [frozenset({"hpd"}), b"hpd\0"]
