"""Tests that also compare shapes: results that are empty or of another shape fail.

Runs inside the sandbox, in the tests' process. Some comparisons pass without comparing: numpy repeats the shorter
operand, an empty one is close to everything, ``zip`` ends with the shorter one. ``prepare`` compiles tests so that
these fail. Everything else is plain Python.
"""

import ast
import functools
import itertools
import operator
import sys
import types
from collections.abc import Callable, Iterable, Sequence
from typing import Any

_COMPARISONS: dict[Any, tuple[str, Callable[[Any, Any], Any]]] = {
    ast.Eq: ("==", operator.eq),
    ast.NotEq: ("!=", operator.ne),
    ast.Lt: ("<", operator.lt),
    ast.LtE: ("<=", operator.le),
    ast.Gt: (">", operator.gt),
    ast.GtE: (">=", operator.ge),
}
_BY_SIGN = dict(_COMPARISONS.values())
_SIZED = (list, tuple, str, bytes, range, dict, set, frozenset)


def prepare(tests: ast.Module) -> types.CodeType:
    """The code of tests, in which comparisons, subtractions and ``type`` ask the functions below; changes the tree.

    Raises:
        SyntaxError, ValueError, RecursionError, MemoryError: they are no Python program.
    """
    return compile(_Checked().visit(tests), "<tests>", "exec")


class _Checked(ast.NodeTransformer):
    def visit_List(self, node: Any) -> ast.AST:
        # Tests may hold a megabyte of numbers.
        return node if all(type(each) is ast.Constant for each in node.elts) else self.generic_visit(node)

    visit_Tuple = visit_List

    def visit_Assert(self, node: ast.Assert) -> ast.AST:
        node.test = self.truth(node.test)
        node.msg = node.msg and self.visit(node.msg)
        return node

    def truth(self, node: Any) -> Any:
        """An expression of which only the truth counts."""
        if isinstance(node, ast.BoolOp):
            node.values = [self.truth(each) for each in node.values]
        elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
            node.operand = self.truth(node.operand)
        elif isinstance(node, ast.Compare) and len(node.ops) == 1 and isinstance(node.ops[0], ast.Eq):
            self.generic_visit(node)
            return _call("same", node, node.left, node.comparators[0])
        else:
            return self.visit(node)
        return node

    def visit_Compare(self, node: ast.Compare) -> ast.AST:
        self.generic_visit(node)
        sign = _COMPARISONS.get(type(node.ops[0])) if len(node.ops) == 1 else None
        if sign is None:
            return node
        name = ast.copy_location(ast.Constant(sign[0]), node)
        return _call("compared", node, name, node.left, node.comparators[0])

    def visit_BinOp(self, node: ast.BinOp) -> ast.AST:
        self.generic_visit(node)
        return _call("difference", node, node.left, node.right) if isinstance(node.op, ast.Sub) else node

    def visit_Call(self, node: ast.Call) -> ast.AST:
        self.generic_visit(node)
        if isinstance(node.func, ast.Name) and node.func.id == "type" and len(node.args) == 1 and not node.keywords:
            return _call("type_of", node, *node.args)
        return node


def _call(name: str, at: ast.AST, *args: Any) -> ast.AST:
    function = ast.copy_location(ast.Name(f"__hpd_{name}__", ast.Load()), at)
    return ast.copy_location(ast.Call(function, list(args), []), at)


def helpers(results: Iterable[Any], proxies: Any) -> dict[str, Any]:
    """Helpers of prepared tests, by name.

    Args:
        results: the candidate's last results, as they arrived; looked at anew each time.
        proxies: type of the candidate's objects.
    """

    def type_of(value: Any) -> Any:
        return value.__class__ if isinstance(value, proxies) else type(value)

    def is_result(value: Any) -> bool:
        return any(value is each for each in results)

    def whole(iterables: Sequence[Any]) -> list[Any]:
        """The arguments of ``zip`` or ``map``: no result of the candidate ends before what it is held against."""
        expected = [len(each) for each in iterables if _is_sized(each) and not is_result(each)]
        wanted, given = max(expected, default=0), []
        for each in iterables:
            length = wanted
            if isinstance(each, proxies):
                rest = iter(each)
                first = list(itertools.islice(rest, wanted))
                length, each = len(first), itertools.chain(first, rest)
            elif _is_sized(each) and is_result(each):
                length = len(each)
            if length < wanted:
                raise AssertionError(f"the candidate gives {length} items, {wanted} are compared")
            given.append(each)
        return given

    class Zip(zip):
        def __new__(cls, *iterables: Any, **strict: Any) -> Any:
            return super().__new__(cls, *whole(iterables), **strict)

    class Map(map):
        def __new__(cls, function: Any, *iterables: Any) -> Any:
            return super().__new__(cls, function, *whole(iterables))

    named = {"same": same, "compared": compared, "difference": difference, "type_of": type_of}
    return {"zip": Zip, "map": Map, **{f"__hpd_{name}__": function for name, function in named.items()}}


def _is_array(value: Any) -> bool:
    numpy = sys.modules.get("numpy")
    return numpy is not None and issubclass(type(value), numpy.ndarray)


def _is_sized(value: Any) -> bool:
    return issubclass(type(value), _SIZED) or (_is_array(value) and value.ndim > 0)


def _shape(value: Any) -> Any:
    try:
        return sys.modules["numpy"].shape(value)
    except ValueError:  # rows of different lengths
        return None


def _is_empty(shape: Any) -> bool:
    return shape is not None and 0 in shape


def compared(sign: str, left: Any, right: Any) -> Any:
    """A comparison; of arrays only of like shapes, or with a number."""
    if not (_is_array(left) or _is_array(right)):
        try:
            return _BY_SIGN[sign](left, right)
        except ValueError:
            if sign in ("==", "!=") and "numpy" in sys.modules:  # containers of arrays
                return _alike(left, right) == (sign == "==")
            raise
    shapes = _shape(left), _shape(right)
    with_a_number = () in shapes and not any(map(_is_empty, shapes))
    if sign in ("==", "!=") and shapes[0] != shapes[1] and not with_a_number:
        return sys.modules["numpy"].bool_(sign == "!=")
    _check_emptiness(*shapes)
    return _BY_SIGN[sign](left, right)


def same(left: Any, right: Any) -> Any:
    """``left == right`` in an assertion, where arrays are compared as a whole."""
    if _is_array(left) or _is_array(right):
        return _alike(left, right)
    return compared("==", left, right)


def _alike(left: Any, right: Any) -> bool:
    if _is_array(left) or _is_array(right):
        if _shape(left) is None or _shape(left) != _shape(right):
            return False
        return bool(sys.modules["numpy"].all(sys.modules["numpy"].equal(left, right)))
    if isinstance(left, list | tuple) and isinstance(right, list | tuple):
        return (
            isinstance(left, list) == isinstance(right, list)
            and len(left) == len(right)
            and all(map(_alike, left, right))
        )
    if isinstance(left, dict) and isinstance(right, dict):
        return left.keys() == right.keys() and all(_alike(left[key], right[key]) for key in left)
    return bool(left == right)


def difference(left: Any, right: Any) -> Any:
    """``left - right``; none where one operand is empty and the other is not."""
    if _is_array(left) or _is_array(right):
        _check_emptiness(_shape(left), _shape(right))
    return left - right


def _check_emptiness(left: Any, right: Any) -> None:
    if _is_empty(left) != _is_empty(right):
        raise AssertionError(f"unlike shapes: {left} and {right}")


def guard_numpy(results: Iterable[Any]) -> None:
    """Let numpy's functions that compare refuse operands of unlike shapes.

    A number may stand for a whole array where that is no result of the candidate's own, as what the tests compute.
    """
    import numpy
    import numpy.testing

    def guarded(function: Any, whole: bool = True) -> Any:
        @functools.wraps(function)
        def checked(*args: Any, **kwargs: Any) -> Any:
            found = [*args[:2], *(kwargs[name] for name in _OPERANDS if name in kwargs)]
            shapes = [*map(_shape, found)]
            if len(found) == 2 and shapes[0] != shapes[1]:
                _check_emptiness(*shapes)
                result = any(found[0] is each for each in results)
                if whole and (result or shapes[1] != () or not _is_array(found[0])):
                    raise AssertionError(f"unlike shapes: {shapes[0]} and {shapes[1]}")
            return function(*args, **kwargs)

        return checked

    for name in ("allclose", "isclose", "array_equiv", "equal", "not_equal"):
        setattr(numpy, name, guarded(getattr(numpy, name)))
    for name in ("subtract", "less", "less_equal", "greater", "greater_equal"):
        setattr(numpy, name, guarded(getattr(numpy, name), whole=False))
    for name in (
        "equal",
        "almost_equal",
        "approx_equal",
        "allclose",
        "array_equal",
        "array_almost_equal",
        "array_less",
    ):
        setattr(numpy.testing, f"assert_{name}", guarded(getattr(numpy.testing, f"assert_{name}")))


_OPERANDS = ("a", "b", "actual", "desired", "x", "y", "a1", "a2", "x1", "x2")
