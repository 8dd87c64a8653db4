"""Run a function right after a module is first imported, without importing it ourselves; replace a function, once.

verl loads its plugins in every process, most of which (reward workers, vLLM servers) never touch the
trainer. Registering from here costs those processes nothing.
"""

import functools
import importlib.util
import sys
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

_callbacks: dict[str, list[Callable[[], None]]] = {}


class _NotifyingLoader(Loader):
    """The module's own loader, followed by the callbacks that wait for the module."""

    def __init__(self, loader: Loader) -> None:
        self.loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.loader.exec_module(module)
        for callback in _callbacks.pop(module.__name__, []):
            callback()

    def __getattr__(self, name: str) -> object:  # is_package, get_source, ... as tools expect them
        return getattr(self.loader, name)


class _Finder(MetaPathFinder):
    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name not in _callbacks:
            return None
        sys.meta_path.remove(self)  # ask the other finders
        try:
            spec = importlib.util.find_spec(name)
        finally:
            sys.meta_path.insert(0, self)
        if spec is not None and spec.loader is not None:
            spec.loader = _NotifyingLoader(spec.loader)
        return spec


_finder = _Finder()


def when_imported(module: str, callback: Callable[[], None]) -> None:
    """Call ``callback()`` once, right after ``module`` has been imported (now, if it already is)."""
    if module in sys.modules:
        callback()
        return
    _callbacks.setdefault(module, []).append(callback)
    if _finder not in sys.meta_path:
        sys.meta_path.insert(0, _finder)


_MARK = "_hpd_verl_patch"


def replace(owner: Any, name: str, make: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    """Replace ``owner.name`` by ``make(original)``, once."""
    original = getattr(owner, name)
    if getattr(original, _MARK, False):
        return
    replacement = functools.wraps(original)(make(original))
    setattr(replacement, _MARK, True)
    setattr(owner, name, replacement)
