"""What runs inside the sandbox: ``sandbox.py`` hands this file's text to interpreters of their own.

A candidate and its tests are two processes in two sandboxes. The tests see a candidate's functions and objects as
``Remote``: arguments go to the candidate's process, results come back as plain data (numbers, texts, lists, ...), so
that nothing the candidate defines, patches or ends is part of a comparison. A function among the arguments stays with
the tests, which the candidate asks for its results. Only the tests' process can report.
Standard library only.
"""

import ast
import builtins
import datetime
import itertools
import json
import os
import resource
import sys
import types
from collections import deque
from collections.abc import Callable, Iterator
from decimal import Decimal
from fractions import Fraction
from typing import Any, NoReturn

MESSAGE_BYTES = 1 << 24
"""Of one call or one result."""


class Lost(BaseException):
    """The candidate's process has ended, or what it sends is no result. No test can catch it by ``Exception``."""


class CandidateError(Exception):
    """An exception of the candidate that is no built-in one."""


def encode(value: Any, reference: Callable[[Any], int]) -> Any:
    """Plain data as JSON with tagged containers; ``reference`` gives a number for anything else, or raises TypeError.

    Subclasses become their base, so that a Counter is a dict and a named tuple a tuple.
    """

    def items(values: Any) -> list[Any]:
        return [encode(each, reference) for each in values]

    match value:
        case None | True | False:
            return value
        case int():
            plain = int.__index__(value)
            return plain if -(1 << 62) < plain < 1 << 62 else {"int": hex(plain)}
        case float():
            return float.__float__(value)
        case str():
            return str.__str__(value)
        case complex():
            return {"complex": [value.real, value.imag]}
        case bytes():
            return {"bytes": value.hex()}
        case bytearray():
            return {"bytearray": value.hex()}
        case list():
            return {"list": items(value)}
        case deque():
            return {"deque": items(value)}
        case tuple():
            return {"tuple": items(value)}
        case dict():
            return {"dict": [items(pair) for pair in dict.items(value)]}
        case set():
            return {"set": items(value)}
        case frozenset():
            return {"frozenset": items(value)}
        case range():
            return {"range": items((value.start, value.stop, value.step))}
        case Decimal():
            return {"decimal": Decimal.__str__(value)}
        case Fraction():
            return {"fraction": items((value.numerator, value.denominator))}
    if type(value) in _TIMES:
        constructor, parts = value.__reduce__()
        return {_TIMES[constructor]: items(parts)}
    if type(value).__module__ == "numpy" and hasattr(value, "tolist"):
        return encode(value.tolist(), reference)
    return {"iterator" if hasattr(type(value), "__next__") else "object": reference(value)}


_TIMES: dict[Any, str] = {
    each: each.__name__ for each in (datetime.datetime, datetime.date, datetime.time, datetime.timedelta)
}
"""Types of the standard library that are plain data, where they have no time zone."""


def decode(value: Any, dereference: Callable[[str, Any], Any]) -> Any:
    """The reverse of ``encode``; ``dereference`` is given tag and content of what is no plain data."""
    if isinstance(value, list):
        raise ValueError("a list without a tag")
    if not isinstance(value, dict):
        return value
    ((tag, content),) = value.items()

    def items(values: Any = content) -> Iterator[Any]:
        return (decode(each, dereference) for each in values)

    match tag:
        case "int":
            return int(content, 16)
        case "complex":
            return complex(*content)
        case "bytes":
            return bytes.fromhex(content)
        case "bytearray":
            return bytearray.fromhex(content)
        case "list":
            return list(items())
        case "tuple":
            return tuple(items())
        case "dict":
            return {key: each for key, each in map(items, content)}  # noqa: C416 (pairs are iterators)
        case "deque":
            return deque(items())
        case "set":
            return set(items())
        case "frozenset":
            return frozenset(items())
        case "range":
            return range(*items())
        case "decimal":
            return Decimal(content)
        case "fraction":
            return Fraction(*items())
        case "datetime" | "date" | "time" | "timedelta":
            return getattr(datetime, tag)(*items())
        case "object" | "iterator" | "function" | "builtin" | "items":
            return dereference(tag, content)
    raise ValueError(f"tag {tag!r}")


def read_all(descriptor: int) -> str:
    """The text of a file that is open from its start; closes it."""
    with open(descriptor, encoding="utf-8", errors="replace", newline="") as file:
        return file.read()


def confine(limits: dict[str, Any], user: int | None) -> None:
    """Limits that cannot be raised again, and another user where this one is root."""
    for name, value in limits.items():
        resource.setrlimit(getattr(resource, name), (value, value))
    if user is not None:
        os.setgroups([])
        os.setresgid(user, user, user)
        os.setresuid(user, user, user)


def run_as(name: str, program: str) -> dict[str, Any]:
    """Execute a program as a module of this name; its globals."""
    module = types.ModuleType(name)
    sys.modules[name] = module
    exec(compile(program, f"<{name}>", "exec"), module.__dict__)
    return module.__dict__


class Objects:
    """The candidate's objects that its tests hold, by number."""

    def __init__(self) -> None:
        self.kept: list[Any] = []
        self.numbers: dict[int, int] = {}

    def number(self, value: Any) -> int:
        if id(value) not in self.numbers:
            self.numbers[id(value)] = len(self.kept)
            self.kept.append(value)
        return self.numbers[id(value)]


def serve(program: str, requests: int, replies: int) -> None:
    """The candidate's side: execute it, then answer what its tests ask."""
    objects = Objects()
    source, sink = os.fdopen(requests, "rb"), os.fdopen(replies, "wb")

    def send(message: dict[str, Any]) -> None:
        sink.write(json.dumps(message).encode() + b"\n")
        sink.flush()

    def enc(value: Any) -> Any:
        return encode(value, objects.number)

    def dec(value: Any) -> Any:
        return decode(value, dereference)

    def dereference(tag: str, content: Any) -> Any:
        match tag:
            case "function":
                return lambda *args: ask_back(content, args)
            case "builtin":
                return getattr(builtins, content)
            case "items":
                return iter(dec(content))
        return objects.kept[content]

    def ask_back(number: int, args: tuple[Any, ...]) -> Any:
        """The result of a function of the tests."""
        send({"function": number, "args": [enc(each) for each in args]})
        while "op" in (reply := json.loads(source.readline())):  # it calls the candidate meanwhile
            respond(reply)
        if "error" in reply:
            raise error_of(*reply["error"])
        return dec(reply["value"])

    def answer(request: dict[str, Any]) -> dict[str, Any]:
        if request["op"] == "names":
            found = {name: scope[name] for name in request["names"] if name in scope}
            modules = [name for name, value in found.items() if isinstance(value, types.ModuleType)]
            return {"value": {name: enc(value) for name, value in found.items() if name not in modules}, "m": modules}
        target, arguments = objects.kept[request["object"]], [dec(each) for each in request["args"]]
        match request["op"]:
            case "call":
                named = {name: dec(each) for name, each in request["kwargs"].items()}
                value = target(*arguments, **named)
                if value is None:
                    return {"value": None, "args": [enc(each) for each in (*arguments, *named.values())]}
            case "get":
                value = getattr(target, *arguments)
            case "set":
                setattr(target, *arguments)
                value = None
            case "item":
                value = target[arguments[0]]
            case "set_item":
                target[arguments[0]] = arguments[1]
                value = None
            case "length":
                value = len(target)
            case "text":
                value = str(target)
            case "iterate":
                return {"value": {"iterator": objects.number(iter(target))}}
            case "next":
                # A batch an exchange; what an endless one makes in a batch is bounded too.
                return {"value": enc(list(itertools.islice(target, 1)))}
        return {"value": enc(value)}

    def respond(request: dict[str, Any]) -> None:
        try:
            reply = answer(request)
        except BaseException as error:
            reply = {"error": described(error)}
        send(reply)

    send({"started": True})
    try:
        scope = run_as("candidate", program)
        send({"ready": True})
    except BaseException as error:
        send({"error": described(error)})
        return
    while line := source.readline():
        respond(json.loads(line))


def described(error: BaseException) -> list[str]:
    """Class, message and the nearest class of Python's own of an exception."""
    try:
        only = error.args[0] if len(error.args) == 1 else None  # of a KeyError, str(error) is its repr
        message = (only if type(only) is str else str(error))[:300]
    except BaseException:
        message = ""
    own = next(each.__name__ for each in type(error).__mro__ if each.__module__ == "builtins")
    return [type(error).__name__, message, own]


class Channel:
    """The tests' side of the exchange with a candidate."""

    def __init__(self, requests: int, replies: int) -> None:
        self.sink, self.source = os.fdopen(requests, "wb"), os.fdopen(replies, "rb")
        self.calls = 0
        self.lost = ""
        self.functions: list[Any] = []

    def read(self) -> dict[str, Any]:
        line = self.source.readline(MESSAGE_BYTES + 1)
        if not line.endswith(b"\n"):
            self.lose("its result is too large" if len(line) > MESSAGE_BYTES else "its process ended")
        try:
            message = json.loads(line)
        except (ValueError, RecursionError):
            self.lose("its result cannot be read")
        if not isinstance(message, dict):
            self.lose("its result cannot be read")
        return message

    def lose(self, why: str) -> NoReturn:
        self.lost = self.lost or why
        raise Lost(why)

    def ask(self, op: str, number: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The result of an operation on a candidate's object.

        Arguments are copies: what the candidate changes in them, the tests do not see, unless the call has no result
        (None), as of a function that works in place.
        """
        coded = [self.encode(each) for each in args]
        named = {name: self.encode(each) for name, each in kwargs.items()}
        reply = self.exchange({"op": op, "object": number, "args": coded, "kwargs": named})
        self.calls += op == "call"
        if "error" in reply:
            raise error_of(*map(str, reply["error"]))
        try:
            result = self.decode(reply["value"])
            for old, new in zip((*args, *kwargs.values()), reply.get("args", ()), strict=False):
                if type(old) in (list, dict, set, deque, bytearray):
                    change(old, self.decode(new))
            return result
        except (LookupError, ValueError, TypeError, AttributeError, OverflowError, RecursionError) as error:
            self.lose(f"its result cannot be read: {error}")

    def exchange(self, request: dict[str, Any]) -> dict[str, Any]:
        while True:
            if self.lost:
                raise Lost(self.lost)
            try:
                self.sink.write(json.dumps(request).encode() + b"\n")
                self.sink.flush()
            except BrokenPipeError:
                self.lose("its process ended")
            reply = self.read()
            if "function" not in reply:
                return reply
            request = self.call_back(reply)

    def call_back(self, request: dict[str, Any]) -> dict[str, Any]:
        """The result of a function that was handed to the candidate."""
        try:
            function, args = self.functions[request["function"]], [self.decode(each) for each in request["args"]]
        except (LookupError, ValueError, TypeError, AttributeError, OverflowError, RecursionError) as error:
            self.lose(f"its call cannot be read: {error}")
        try:
            return {"value": self.encode(function(*args))}
        except Exception as error:
            return {"error": described(error)}

    def encode(self, value: Any) -> Any:
        """Arguments of the candidate."""
        if isinstance(value, type | types.BuiltinFunctionType) and value in vars(builtins).values():
            return {"builtin": value.__name__}
        if isinstance(value, types.FunctionType | types.BuiltinFunctionType):
            self.functions.append(value)
            return {"function": len(self.functions) - 1}
        if isinstance(value, _PASSED_ON):
            return {"items": encode([*value], number_of)}
        return encode(value, number_of)

    def decode(self, value: Any) -> Any:
        def dereference(tag: str, content: Any) -> Any:
            return {"object": Remote, "iterator": RemoteIterator}[tag](self, int(content))

        return decode(value, dereference)


_PASSED_ON: tuple[Any, ...] = (types.GeneratorType, map, filter, zip, enumerate, reversed)
_PASSED_ON += tuple(map(type, (iter([]), iter(()), iter(""), {}.keys(), {}.values(), {}.items())))
"""What is handed to a candidate as an iterator over what it holds."""


def change(old: Any, new: Any) -> None:
    """Give a container the content of another of its kind."""
    if type(old) is not type(new):
        raise TypeError("an argument of another kind")
    old.clear()
    (old.update if isinstance(old, dict | set) else old.extend)(new)


def error_of(name: str, message: str, own: str = "") -> Exception:
    """An exception of the other side: of its class, or of the nearest class of Python's own.

    StopIteration would end a loop of the tests as if it had come to its end.
    """
    for each in (name, own):
        kind = getattr(builtins, each, None)
        if not isinstance(kind, type) or not issubclass(kind, Exception) or kind is Exception:
            continue
        if issubclass(kind, UnicodeError):  # wants more than a message
            return UnicodeError(message)
        if not issubclass(kind, StopIteration | StopAsyncIteration):
            return kind(message)
    return CandidateError(f"{name}: {message}")


class Remote:
    """An object of the candidate. It has no truth and no equality: only plain data is compared."""

    __slots__ = ("_channel", "_number")

    def __init__(self, channel: Channel, number: int) -> None:
        object.__setattr__(self, "_channel", channel)
        object.__setattr__(self, "_number", number)

    def _ask(self, op: str, *args: Any) -> Any:
        return self._channel.ask(op, self._number, args, {})

    def __call__(self, /, *args: Any, **kwargs: Any) -> Any:
        return self._channel.ask("call", self._number, args, kwargs)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self._ask("get", name)

    def __setattr__(self, name: str, value: Any) -> None:
        self._ask("set", name, value)

    def __getitem__(self, key: Any) -> Any:
        return self._ask("item", key)

    def __setitem__(self, key: Any, value: Any) -> None:
        self._ask("set_item", key, value)

    def __len__(self) -> int:
        return self._ask("length")

    def __str__(self) -> str:
        return self._ask("text")

    def __iter__(self) -> Iterator[Any]:
        iterator = self._ask("iterate")
        while batch := iterator._ask("next"):
            yield batch[0]

    def __bool__(self) -> bool:
        raise TypeError("the result is an object of the candidate, which is neither true nor false")

    def __eq__(self, other: object) -> bool:
        raise TypeError("the result is an object of the candidate, which cannot be compared")

    __hash__ = object.__hash__


class RemoteIterator(Remote):
    """An iterator of the candidate."""

    __slots__ = ()

    def __next__(self) -> Any:
        batch = self._ask("next")
        if not batch:
            raise StopIteration
        return batch[0]


def number_of(value: Any) -> int:
    """The number of a candidate's object in arguments."""
    if isinstance(value, Remote):
        return value._number
    raise TypeError(f"an argument is a {type(value).__name__}, which cannot be handed to a candidate")


def asked_names(tests: str) -> tuple[list[str], list[str]]:
    """The candidate's names that tests use, and modules that they use without an import of their own.

    A name of Python's own (``abs``, ``math``) is among the former only where the tests use no other: a candidate must
    not replace what its tests compare with, but may be asked for a function ``sum``.
    """
    nodes = list(ast.walk(ast.parse(tests)))
    own = {node.id for node in nodes if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load)}
    own |= {node.name for node in nodes if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.AsyncFunctionDef)}
    own |= {node.arg for node in nodes if isinstance(node, ast.arg)}
    own |= {(node.asname or node.name).split(".")[0] for node in nodes if isinstance(node, ast.alias)}
    used = {node.id for node in nodes if isinstance(node, ast.Name)} - own
    called = {node.func.id for node in nodes if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)}
    bases = {node.value.id for node in nodes if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)}
    modules = used & (sys.stdlib_module_names | {"np", "numpy"}) - (called - bases)  # a module cannot be called
    foreign = {name for name in used - modules if not hasattr(builtins, name)}
    return sorted(foreign or called & used), sorted(modules)


def judge(tests: str, requests: int, replies: int, report: int) -> None:
    """The tests' side: execute them on the candidate, and say how it went."""

    def say(status: str, message: str = "") -> None:
        os.write(report, json.dumps({"status": status, "message": message[:1000]}).encode())
        os.close(report)

    os.write(report, b"started\n")

    channel = Channel(requests, replies)
    try:
        (names, modules), code = asked_names(tests), compile(tests, "<tests>", "exec")
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        return say("bad_tests", f"they are no Python program: {error}")
    try:
        if not channel.read().get("started"):
            return say("not_started")
    except Lost:
        return say("not_started")
    try:
        reply = channel.read()
        if "ready" not in reply:
            return say("failed", f"the program ends with {': '.join(map(str, reply.get('error', ['nothing'])[:2]))}")
        found = channel.exchange({"op": "names", "names": [*names, *modules]})
        scope: dict[str, Any] = {"__name__": "tests"}
        for name in modules:
            if name in found.get("m", ()):
                scope[name] = __import__({"np": "numpy"}.get(name, name))
        for name in names:
            if name in found.get("value", {}):
                scope[name] = channel.decode(found["value"][name])
        exec(code, scope)
    except Lost as error:
        return say("failed", f"the candidate was lost: {error}")
    except BaseException as error:
        line = getattr(getattr(error, "__traceback__", None), "tb_next", None)
        where = f"line {line.tb_lineno} of the tests: " if line is not None else ""
        return say("failed", where + ": ".join(described(error)[:2]).strip(": "))
    if channel.lost:
        return say("failed", f"the candidate was lost: {channel.lost}")
    if not channel.calls:
        return say("failed", "the tests have called nothing of the candidate")
    say("passed")


def main() -> None:
    """One of three roles, with its file descriptors, from the command line."""
    settings = json.loads(sys.argv[1])
    text = read_all(settings["text"])
    sys.argv = [""]
    sys.path.append(settings["packages"])
    sys.set_int_max_str_digits(0)
    vars(builtins).update(exit=sys.exit, quit=sys.exit)  # of the module site, which is not loaded
    confine(settings["limits"], settings["user"])
    if settings["role"] != "program":
        # Until here standard error has said why a sandbox does not start; from here on it would be the candidate's.
        nowhere = os.open(os.devnull, os.O_RDWR)
        os.dup2(nowhere, 2)
        os.close(nowhere)
    match settings["role"]:
        case "candidate":
            serve(text, settings["requests"], settings["replies"])
        case "tests":
            judge(text, settings["requests"], settings["replies"], settings["report"])
        case "program":
            os.write(settings["report"], b"started\n")
            os.close(settings["report"])
            run_as("__main__", text)


if __name__ == "__main__":
    main()
