"""ONNX nodes as functions of tensors, and the order of memory that programs rely on."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.onnx import ops

__all__ = ["in_rows_of", "in_wide", "node", "reordered", "wide_dtype"]


def node(
    operator: str,
    inputs: tuple[Tensor | None, ...],
    shape: Iterable[int],
    *,
    version: int,
    **attributes: Any,
) -> Tensor:
    """The first output of a node of the default domain, in the dtype of the first input.

    ``version`` is the opset that brought the operator as it is used here. Attributes of None are
    left out.
    """
    given = {name: x for name, x in attributes.items() if x is not None}
    first = inputs[0]
    assert first is not None
    dtype, sizes = first.dtype, tuple(shape)
    return ops.symbolic(operator, inputs, given, dtype=dtype, shape=sizes, version=version)


def wide_dtype(x: Tensor) -> torch.dtype:
    """What the kernels compute in: float32 for 16 bits. (A node computes in what it is given.)"""
    return torch.promote_types(x.dtype, torch.float32)


def in_wide(*tensors: Tensor | None, like: Tensor) -> tuple[Tensor | None, ...]:
    dtype = wide_dtype(like)
    return tuple(None if x is None else x.to(dtype) for x in tensors)


def reordered(x: Tensor, order: list[int]) -> Tensor:
    """x, dense in memory, with its dimensions there in this order, the outermost first."""
    if order == sorted(order):
        return x.contiguous()
    back = [order.index(d) for d in range(x.dim())]
    return x.permute(order).contiguous().permute(back)


def in_rows_of(like: Tensor, x: Tensor, kept: int) -> Tensor:
    """x with its dimensions in the memory order of like's, but for the last ``kept``, innermost.

    What follows in a program may view the results of our ops in the order that they have.
    """
    leading = list(range(x.dim() - kept))
    for d in range(1, len(leading)):  # insertion, which compares symbolic strides as seldom as may
        at = d
        while at > 0 and like.stride(leading[at - 1]) < like.stride(leading[at]):
            leading[at - 1], leading[at] = leading[at], leading[at - 1]
            at -= 1
    return reordered(x, leading + list(range(len(leading), x.dim())))
