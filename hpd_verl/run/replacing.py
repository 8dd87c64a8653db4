"""Replace a function of another package, once.

wrapt's wrappers are objects: they are not pickled as the functions that they stand for, and each call adds one more.
"""

import functools
from collections.abc import Callable
from typing import Any

_MARK = "_hpd_verl_patch"


def replace(owner: Any, name: str, make: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    """Replace ``owner.name`` by ``make(original)``, once."""
    original = getattr(owner, name)
    if getattr(original, _MARK, False):
        return
    replacement = functools.wraps(original)(make(original))
    setattr(replacement, _MARK, True)
    setattr(owner, name, replacement)
