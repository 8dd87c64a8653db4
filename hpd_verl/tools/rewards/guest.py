"""Code that runs inside the sandbox: ``sandbox.py`` passes this module and its neighbours to the interpreters there.

A candidate and its tests are two processes in two sandboxes. The tests see a candidate's functions and objects through
``exchange.py``: arguments go to the candidate's process, results come back as plain data (numbers, texts, lists, ...),
so that nothing the candidate defines, patches or ends is part of a comparison. Only the tests' process can report.
Standard library only.
"""

import ast
import builtins
import contextlib
import json
import os
import re
import symtable
import sys
import types
from typing import Any

from hpd_verl.tools.rewards.comparing import guard_numpy, helpers, prepare
from hpd_verl.tools.rewards.confine import Unconfined, confine
from hpd_verl.tools.rewards.exchange import CandidatePort, Lost, Port, Printed, Proxy, TestsPort, text_of


def module_of(name: str) -> dict[str, Any]:
    """The globals of a new module of this name."""
    module = types.ModuleType(name)
    sys.modules[name] = module
    return module.__dict__


def serve(program: str, requests: int, replies: int) -> None:
    """The candidate's side: execute it, then answer what its tests ask."""
    scope = module_of("candidate")
    port = CandidatePort(requests, replies, scope)

    def found(names: list[str]) -> tuple[dict[str, Any], list[str]]:
        """The names that the candidate defines, and which of them are modules."""
        values = {name: scope[name] for name in names if name in scope}
        modules = [name for name, value in values.items() if isinstance(value, types.ModuleType)]
        return {name: value for name, value in values.items() if name not in modules}, modules

    port.keep(found)
    port.send({"started": True})
    try:
        exec(compile(program, "<candidate>", "exec"), scope)
    except BaseException as error:
        port.send({"ended": [type(error).__name__, text_of(error)]})
        return
    port.send({"ready": True})
    sys.stdout = Printed()
    while line := port.source.readline():
        port.send(port.respond(json.loads(line)))


def asked_names(tests: str, function: str = "", tree: ast.Module | None = None) -> tuple[list[str], list[str]]:
    """The candidate's names that tests use, and modules that they use without importing them.

    A name of Python's own (``abs``, ``len``) is the candidate's only if it is ``function``, or if the tests use no
    other and call this one alone, inside whatever they compare with, and with arguments that Python's own does not take
    (``judge`` tries): a candidate must not replace what it is compared with.

    Raises:
        SyntaxError, ValueError, RecursionError, MemoryError: they are no Python program.
    """
    top = symtable.symtable(tests, "<tests>", "exec")
    tables, used, own = [top], set(), {each.get_name() for each in top.get_symbols() if _is_bound(each)}
    while tables:
        table = tables.pop()
        tables += table.get_children()
        used |= {each.get_name() for each in table.get_symbols() if each.is_global() and each.is_referenced()}
        own |= {each.get_name() for each in table.get_symbols() if each.is_declared_global() and _is_bound(each)}
    used -= own
    nodes = _nodes(tree or ast.parse(tests))
    calls = [node for node in nodes if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)]
    called = {call.func.id for call in calls if isinstance(call.func, ast.Name)}
    bases = {node.value.id for node in nodes if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)}
    modules = used & (sys.stdlib_module_names | {"np", "numpy"}) - (called - bases)  # a module cannot be called
    named = _in_texts(nodes) - own - sys.stdlib_module_names if used & _BY_NAME else set()
    foreign = {name for name in (used - modules) | named if not hasattr(builtins, name)} | used & {function}
    return sorted(foreign or _only_call(calls, used - modules)), sorted(modules - foreign)


def _nodes(tree: ast.AST) -> list[ast.AST]:
    """All nodes but constants, of which tests may hold a megabyte."""
    found = [tree]
    for node in found:
        found += [each for each in ast.iter_child_nodes(node) if type(each) is not ast.Constant]
    return found


_BY_NAME = {"globals", "locals", "vars", "eval", "exec"}
"""What finds a name by a text."""


def _in_texts(nodes: list[ast.AST]) -> set[str]:
    """Words of short texts."""
    texts = (each for node in nodes for each in ast.iter_child_nodes(node) if isinstance(each, ast.Constant))
    short = (each.value for each in texts if isinstance(each.value, str) and len(each.value) < 500)
    return {word for text in short for word in re.findall(r"[^\W\d]\w*", text)}


def _is_bound(symbol: symtable.Symbol) -> bool:
    return symbol.is_assigned() or symbol.is_imported() or symbol.is_namespace() or symbol.is_parameter()


def _only_call(calls: list[ast.Call], names: set[str]) -> set[str]:
    """The one of these names that is called with no call among its arguments; none if there are several, or if it is
    called around another one too."""
    inner: set[str] = set()
    outer: set[str] = set()
    for call in calls:
        within = [node for each in (*call.args, *call.keywords) for node in ast.walk(each)]
        around = any(isinstance(node, ast.Call) for node in within)
        (outer if around else inner).update({call.func.id} & names if isinstance(call.func, ast.Name) else set())
    return inner if len(inner) == 1 and not inner & outer else set()


def judge(tests: str, helper: str, function: str, requests: int, replies: int, report: int) -> None:
    """The tests' side: execute them on the candidate, and say how it went.

    Args:
        tests: statements.
        helper: what the tests have of their own: executed before them, and never the candidate's.
        function: a name that is the candidate's, though Python has one of that name; "" for none.
        requests: a descriptor.
        replies: a descriptor.
        report: a descriptor.
    """

    def say(status: str, message: str = "") -> None:
        os.write(report, json.dumps({"status": status, "message": message[:1000]}).encode())
        os.close(report)

    os.write(report, b"started\n")
    scope = module_of("__main__")
    port = TestsPort(replies, requests, scope)
    scope.update(helpers(port.results, Proxy))
    own: dict[str, Any] = {}
    try:
        tree = ast.parse(tests)
        names, modules = asked_names(tests, function, tree)
        code = prepare(tree)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        return say("bad_tests", f"they are no Python program: {error}")
    try:
        if not port.receive().get("started"):
            return say("not_started")
    except Lost:
        return say("not_started")
    try:
        if "numpy" in tests or "np" in modules:
            guard_numpy(port.results)
        if "unittest" in tests:
            guard_unittest()
        own = before(helper, scope)
        reply = port.receive()
        if "ready" not in reply:
            ended = reply.get("ended")
            name, text = ended if isinstance(ended, list) and len(ended) == 2 else ("nothing", "")
            return say("failed", f"the program ends with {name}: {text}".rstrip(": "))
        asked = [name for name in names if name not in own or name == function]
        if any(hasattr(builtins, name) and name != function for name in asked) and _can_do_without(code, scope):
            asked = []
        values, imported = Port.ask(port, "call", 0, ([*asked, *modules],))
        for name in modules:
            if name in imported and name not in own:
                scope[name] = __import__({"np": "numpy"}.get(name, name))
        scope.update({name: values[name] for name in asked if name in values})
        exec(code, scope)
    except Lost as error:
        return say("failed", f"the candidate was lost: {error}")
    except BaseException as error:
        line = error.__traceback__.tb_next if error.__traceback__ is not None else None
        where = f"line {line.tb_lineno} of the tests: " if line is not None else ""
        return say("failed", f"{where}{type(error).__name__}: {text_of(error)}".strip(": "))
    if port.lost:
        return say("failed", f"the candidate was lost: {port.lost}")
    if not port.calls:
        return say("failed", "the tests have called nothing of the candidate")
    say("passed")


def guard_unittest() -> None:
    """Let ``unittest.main`` raise where a test fails, or there is none, instead of ending the process or going on."""
    import unittest

    class Program(unittest.TestProgram):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **{**kwargs, "exit": False})
            if not self.result.testsRun or not self.result.wasSuccessful():
                wrong = [why.strip().rpartition("\n")[2] for _, why in (*self.result.failures, *self.result.errors)]
                raise AssertionError("; ".join(wrong) or "unittest finds no test")

    unittest.main = Program


def _can_do_without(code: types.CodeType, scope: dict[str, Any]) -> bool:
    """Whether tests that use Python's own names alone mean Python's own: that takes their arguments."""
    try:
        exec(code, dict(scope))
    except TypeError:
        return False
    except BaseException:
        return True
    return True


def before(helper: str, scope: dict[str, Any]) -> dict[str, Any]:
    """Execute what stands before an answer in its problem, as far as it is a program of its own; what that defines."""
    lines, known = helper.splitlines(keepends=True), set(scope)
    while lines:
        # It may end within a statement that the answer continues: a decorator, the first line of a class.
        with contextlib.suppress(SyntaxError):
            exec(compile("".join(lines), "<helper>", "exec"), scope)
            break
        lines.pop()
    return {name: value for name, value in scope.items() if name not in known}


def main(settings: dict[str, Any], given: dict[str, str]) -> None:
    """One of three roles.

    Args:
        settings: ``role``, limits, file descriptors, as ``sandbox.py`` makes them.
        given: ``text`` to execute, and what else belongs to it.
    """
    text = given["text"]
    sys.argv = [""]
    sys.path.append(settings["packages"])
    sys.set_int_max_str_digits(0)
    vars(builtins).update(exit=sys.exit, quit=sys.exit)  # of the module site, which is not loaded
    # A pool of as many processes as a large machine has processors would meet the limit.
    count = min(4, os.cpu_count() or 1)
    os.cpu_count = lambda: count
    try:
        confine(settings["limits"], settings["user"], settings["writable"], settings["hidden"])
    except Unconfined as error:
        sys.exit(f"{error}")
    if settings["role"] != "program":
        # Until here standard error has said why a sandbox does not start; from here on it would be the candidate's.
        nowhere = os.open(os.devnull, os.O_RDWR)
        os.dup2(nowhere, 2)
        os.close(nowhere)
    match settings["role"]:
        case "candidate":
            serve(text, settings["requests"], settings["replies"])
        case "tests":
            own = given["helper"], given["function"]
            judge(text, *own, settings["requests"], settings["replies"], settings["report"])
        case "program":
            os.write(settings["report"], b"started\n")
            os.close(settings["report"])
            exec(compile(text, "<program>", "exec"), module_of("__main__"))
