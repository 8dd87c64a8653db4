"""Bodies through ``torch.compile``: each once for all numbers of rows, and counted.

A body is a function of a module, ``body(form, rows, others)``. It is compiled for its form and its tensors' dtypes and
device; the number of rows is dynamic. Kernels are kept between runs in inductor's cache folder.
"""

import logging
import types
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor
from torch._dynamo import lookup_backend, maybe_mark_dynamic
from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException
from torch.utils._pytree import tree_leaves

Body = Callable[..., Any]

logger = logging.getLogger(__name__)

_compiled: dict[Hashable, Body] = {}
_compilations = 0
_given_up: set[Hashable] = set()
_ERRORS = (TorchDynamoException, FailOnRecompileLimitHit)  # of tracing and of the compiler, before anything runs


class NotCompilable(Exception):
    """A body holds what cannot be compiled; the message says what, and where."""


def compilations() -> int:
    """Graphs that this process has compiled so far."""
    return _compilations


def give_up(form: Hashable, what: str, error: NotCompilable) -> None:
    """Have a form run uncompiled from now on, which the log says, with ``what`` as its name."""
    _given_up.add(form)
    logger.warning(
        "%s: cannot be compiled (%s); runs operation by operation, at about 10 times the memory traffic", what, error
    )


def given_up(form: Hashable) -> bool:
    """Whether ``give_up`` was called for a form."""
    return form in _given_up


def run_compiled(body: Body, form: Hashable, rows: Any, others: Any) -> Any:
    """``body(form, rows, others)``, compiled.

    Args:
        body: a module's function.
        form: what it is compiled for.
        rows: tensors with an entry a token, at least one of them, in tuples; None among them.
        others: tensors of fixed shapes, in tuples; None among them.

    Raises:
        NotCompilable: before anything is computed.
    """
    tensors = [each for each in tree_leaves(rows) if isinstance(each, Tensor)]
    if len(tensors[0]) == 1:
        return body(form, rows, others)  # torch would compile one row apart from several
    for each in tensors:
        maybe_mark_dynamic(each, 0)
    kinds = [None if each is None else (each.dtype, each.device, each.shape[1:]) for each in tree_leaves(rows)]
    kinds += [None if each is None else each.shape for each in tree_leaves(others)]
    key = body, form, tuple(kinds)
    if key not in _compiled:
        _compiled[key] = _compile(body, form)
    try:
        return _compiled[key](rows, others)
    except _ERRORS as error:
        del _compiled[key]
        raise NotCompilable(_reason(error)) from error


def check_traceable(function: Callable[..., Any], *arguments: Any, **keywords: Any) -> None:
    """Trace a function of tensors without compiling it.

    Raises:
        NotCompilable: it holds what cannot be compiled.
    """
    try:
        torch.compile(function, fullgraph=True, backend="eager")(*arguments, **keywords)
    except _ERRORS as error:
        raise NotCompilable(_reason(error)) from error


def _compile(body: Body, form: Hashable) -> Body:
    def bound(rows: Any, others: Any) -> Any:
        if not torch.compiler.is_compiling():  # on all rows at once it would take memory many times theirs
            raise NotCompilable("torch.compile is switched off, as by TORCHDYNAMO_DISABLE=1")
        return body(form, rows, others)

    # torch limits the compilations of a code object, and runs what is beyond uncompiled: this one is the key's own.
    code = bound.__code__.replace(co_name=f"{body.__name__}_{len(_compiled)}")
    own = types.FunctionType(code, bound.__globals__, code.co_name, None, bound.__closure__)
    return torch.compile(own, fullgraph=True, backend=_counted_inductor)


def _counted_inductor(graph: Any, inputs: Any) -> Any:
    global _compilations
    _compilations += 1
    return lookup_backend("inductor")(graph, inputs)


def _reason(error: Exception) -> str:
    """The error's first line, or the second after a mere "raised:", and the last line of code that it names."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    lines = lines[1:] if lines[:1] and lines[0].endswith("raised:") else lines
    place = [line for line in lines if line.startswith("File ")]
    return " ".join([*(lines[:1] or [type(error).__name__]), *place[-1:]])
