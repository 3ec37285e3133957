"""flash-attn's arguments in the terms of ``fastattn.functional``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

NAMES = {
    "query": "q",
    "key": "k",
    "value": "v",
    "window": "window_size",
    "scale": "softmax_scale",
}


@contextmanager
def renamed(names: dict[str, str]) -> Iterator[None]:
    """Errors of fastattn name its arguments; inside of this they name the caller's."""
    try:
        yield
    except (TypeError, ValueError) as error:
        argument, colon, rest = str(error).partition(":")
        if colon and argument in names:
            raise type(error)(f"{names[argument]}:{rest}") from None
        raise


def score_options(
    softmax_scale: float | None,
    causal: bool,
    window_size: Sequence[int],
    softcap: float,
    alibi_slopes: Tensor | None,
) -> dict[str, Any]:
    """The options of ``fastattn.functional`` that shape the scores."""
    if not isinstance(causal, bool):
        raise TypeError(f"causal: expected a bool, got {causal!r}")
    if isinstance(softcap, bool) or not isinstance(softcap, int | float):
        raise TypeError(f"softcap: expected a number (0.0 is off), got {softcap!r}")
    return {
        "causal": causal,
        "window": window(window_size),
        "softcap": float(softcap) if softcap > 0.0 else None,
        "scale": softmax_scale,
        "alibi_slopes": alibi_slopes,
    }


def window(window_size: Sequence[int]) -> tuple[int | None, int | None] | None:
    """(left, right) with None where flash-attn has a negative number: no limit."""
    if not isinstance(window_size, Sequence) or isinstance(window_size, str):
        raise TypeError(f"window_size: expected a pair (left, right), got {window_size!r}")
    if len(window_size) != 2:
        raise ValueError(f"window_size: expected a pair (left, right), got {window_size!r}")
    for width in window_size:
        if isinstance(width, bool) or not isinstance(width, int | torch.SymInt):
            raise TypeError(f"window_size: expected integers (-1 is no limit), got {window_size!r}")
    left, right = window_size
    if left < 0 and right < 0:
        return None
    return None if left < 0 else left, None if right < 0 else right


def require_shape(name: str, x: Tensor | None, dims: str, **sizes: int) -> None:
    """x has the dimensions that are named, and some of them have these sizes, as 3 in a qkv."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(x).__name__}")
    expected = dims.split()
    wrong = x.dim() != len(expected) or any(
        x.shape[expected.index(dim)] != size for dim, size in sizes.items()
    )
    if wrong:
        shape = ", ".join(str(sizes.get(dim, dim)) for dim in expected)
        raise ValueError(f"{name}: expected shape ({shape}), got {tuple(x.shape)}")
