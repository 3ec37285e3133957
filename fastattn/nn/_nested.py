"""Jagged nested tensors: rows of all sequences in one tensor, without padding."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

__all__ = ["is_nested", "longest", "on_rows", "pack", "rows"]


def is_nested(name: str, x: Tensor) -> bool:
    """Whether x is a jagged nested tensor; TypeError for no tensor, or one of another layout."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(x).__name__}")
    if not x.is_nested:
        return False
    if x.layout != torch.jagged:
        raise TypeError(
            f"{name}: expected a dense tensor or a nested one with layout torch.jagged, got a "
            f"nested one with layout {x.layout}"
        )
    ragged: Any = x
    if x.dim() < 2 or ragged._ragged_idx != 1:
        raise ValueError(f"{name}: expected shape (batch, ragged length, ...), got {x.shape}")
    return True


def rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """The rows of all sequences, (total, ...), and their bounds, (sequences + 1) int64."""
    nested = _without_gaps(x)
    return nested.values(), nested.offsets()


def longest(x: Tensor) -> int:
    """The length of the longest sequence; read from the data where x does not know it yet."""
    length: int = _without_gaps(x)._get_max_seqlen()
    return length


def pack(values: Tensor, like: Tensor) -> Tensor:
    """Rows as a nested tensor with the sequences of ``like``."""
    nested = _without_gaps(like)
    return torch.nested.nested_tensor_from_jagged(
        values,
        nested.offsets(),
        min_seqlen=nested._maybe_min_seqlen,
        max_seqlen=nested._maybe_max_seqlen,
    )


def on_rows(input: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
    """function(input), where it works on each row by itself and input may be nested."""
    if not is_nested("input", input):
        return function(input)
    return pack(function(rows(input)[0]), input)


def _without_gaps(x: Any) -> Any:
    """x itself, unless there are rows between its sequences."""
    return x if x.lengths() is None else x.contiguous()
