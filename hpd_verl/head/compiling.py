"""Elementwise work fused by ``torch.compile``, where that is asked for."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._dynamo import maybe_mark_dynamic


@functools.cache
def _fused(function: Callable[..., Any]) -> Callable[..., Any]:
    compiled = torch.compile(function)

    @functools.wraps(function)
    def fused(matrix: Tensor, *arguments: Any) -> Any:
        # Every micro-batch has another number of tokens: said in advance, the first is not compiled for on its own.
        maybe_mark_dynamic(matrix, 0)
        return compiled(matrix, *arguments)

    return fused


def maybe_compiled(function: Callable[..., Any], compiled: bool) -> Callable[..., Any]:
    """The function of a matrix with a row a token, fused where ``compiled``; each is compiled once."""
    return _fused(function) if compiled else function
