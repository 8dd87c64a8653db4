"""Elementwise work fused by ``torch.compile``, where that is asked for."""

import functools
from collections.abc import Callable
from typing import Any

import torch


@functools.cache
def _fused(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function)


def maybe_compiled(function: Callable[..., Any], compiled: bool) -> Callable[..., Any]:
    """The function, fused where ``compiled``; each is compiled once."""
    return _fused(function) if compiled else function
