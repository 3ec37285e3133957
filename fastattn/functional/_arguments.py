"""What the attention functions do with their arguments before an op sees them.

The ops check shapes, dtypes, devices and values. Here stands what no op can know: names in place of
numbers, the leading dimensions beyond two, autocast.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

Window = tuple[int | None, int | None]

UNLIMITED = -1  # of a window


def require_tensors(**tensors: Any) -> None:
    for name, x in tensors.items():
        if not isinstance(x, Tensor):
            raise TypeError(f"{name}: expected a tensor, got {type(x).__name__}")


def options(
    query: Tensor,
    *,
    causal: bool | str,
    window: Window | None,
    mask: Tensor | None,
    bias: Tensor | None,
    query_lengths: Tensor | None,
    key_lengths: Tensor | None,
    alibi_slopes: Tensor | None,
    softcap: float | None,
    scale: float | None,
    query_offset: int,
    key_offset: int,
) -> dict[str, Any]:
    """The options of an op that are not at their defaults: those that shape the scores."""
    given: dict[str, Any] = {}
    top_left, left, right = visibility(causal, window)
    if top_left:
        given["top_left"] = True
    if left != UNLIMITED:
        given["window_left"] = left
    if right != UNLIMITED:
        given["window_right"] = right
    if mask is not None:
        given["mask"] = mask
    if bias is not None:
        given["bias"] = bias
    if query_lengths is not None:
        given["query_lengths"] = query_lengths
    if key_lengths is not None:
        given["key_lengths"] = key_lengths
    if alibi_slopes is not None:
        given["alibi_slopes"] = in_real_dtype("alibi_slopes", alibi_slopes, query)
        if alibi_slopes.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                "alibi_slopes: expected a tensor that requires no gradient (it has none): detach "
                "it, or pass the product of slopes and distances as bias"
            )
    if softcap is not None:
        given["softcap"] = softcap
    if scale is not None:
        given["scale"] = scale
    if query_offset != 0:
        given["query_offset"] = query_offset
    if key_offset != 0:
        given["key_offset"] = key_offset
    return given


def visibility(causal: bool | str, window: Window | None) -> tuple[bool, int, int]:
    """(top_left, window_left, window_right) of the ops."""
    if causal is False:
        top_left, right = False, UNLIMITED
    elif causal is True or causal == "bottom_right":
        top_left, right = False, 0
    elif causal == "top_left":
        top_left, right = True, 0
    else:
        error = ValueError if isinstance(causal, str) else TypeError
        raise error(f"causal: expected False, True, 'top_left' or 'bottom_right', got {causal!r}")
    if window is None:
        return top_left, UNLIMITED, right
    if not isinstance(window, tuple | list):
        raise TypeError(
            f"window: expected None or a pair (left, right), got {window!r}; "
            "window_from_hf makes one of Hugging Face's sliding_window"
        )
    if len(window) != 2:
        raise ValueError(f"window: expected a pair (left, right), got {window!r}")
    left, ahead = _width(window[0], window), _width(window[1], window)
    return top_left, left, ahead if right == UNLIMITED else right


def _width(width: int | None, window: Any) -> int:
    if width is None:
        return UNLIMITED
    if isinstance(width, bool) or not isinstance(width, int | torch.SymInt):
        raise TypeError(f"window: expected integers or None, got {window!r}")
    if width < 0:
        raise ValueError(f"window: expected widths >= 0 (None is unlimited), got {window!r}")
    return width


def is_bshd(layout: str) -> bool:
    if layout == "bhsd":
        return False
    if layout == "bshd":
        return True
    raise ValueError(f"layout: expected 'bhsd' or 'bshd', got {layout!r}")


def in_real_dtype(name: str, x: Tensor, query: Tensor) -> Tensor:
    """A parameter of each head in the dtype of lse, which the ops take it in."""
    require_tensors(**{name: x})
    if not x.is_floating_point():
        raise TypeError(f"{name}: expected dtype float32 or another floating one, got {x.dtype}")
    return x.to(torch.float64 if query.dtype == torch.float64 else torch.float32)


def autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """As SDPA under autocast: every floating tensor in its dtype, but for float64."""
    dtype = torch.get_autocast_dtype(tensors[0].device.type)
    return tuple(
        x.to(dtype) if x.is_floating_point() and x.dtype != torch.float64 else x for x in tensors
    )


def dropout(dropout_p: float, query: Tensor) -> dict[str, Any]:
    """The options of dropout. The (seed, offset) of the mask comes from torch's generator, so that
    torch.manual_seed, and the recomputation of an activation checkpoint, repeat it."""
    if dropout_p == 0.0:
        return {}
    philox = torch.randint(2**63 - 1, (2,), dtype=torch.int64, device=query.device)
    return {"dropout_p": dropout_p, "philox": philox}


def is_deterministic(deterministic: bool | None) -> bool:
    if deterministic is None:
        return torch.are_deterministic_algorithms_enabled()
    if isinstance(deterministic, bool):
        return deterministic
    raise TypeError(f"deterministic: expected a bool or None, got {deterministic!r}")


class LeadingDims:
    """Leading dimensions that are not the ops' one or two: none, or more than two."""

    def __init__(self, query: Tensor) -> None:
        if query.dim() < 3:
            raise ValueError(
                "query: expected at least 3 dimensions (*batch, heads, length, head_dim), "
                f"got shape {tuple(query.shape)}"
            )
        self.shape = query.shape[:-3]
        self.grouped = (math.prod(self.shape[:-1]), self.shape[-1]) if self.shape else (1,)

    def group(self, name: str, x: Tensor) -> Tensor:
        """query, key, value"""
        if x.shape[:-3] != self.shape:
            raise ValueError(
                f"{name}: expected the leading dimensions of query, {tuple(self.shape)}, "
                f"got shape {tuple(x.shape)}"
            )
        return x.reshape(*self.grouped, *x.shape[-3:])

    def group_broadcast(self, name: str, x: Tensor | None, kept: int) -> Tensor | None:
        """mask and bias (kept: the 3 dimensions of scores), slopes (kept: 1)"""
        if x is None or x.dim() <= kept + 1:
            return x
        try:
            x = x.expand(*self.shape, *x.shape[-kept:])
        except RuntimeError:
            raise ValueError(
                f"{name}: expected leading dimensions that broadcast to {tuple(self.shape)}, "
                f"got shape {tuple(x.shape)}"
            ) from None
        return x.reshape(*self.grouped, *x.shape[-kept:])

    def group_sequences(self, name: str, x: Tensor | None, kept: int = 0) -> Tensor | None:
        """lengths (kept: 0), lse (kept: 2)"""
        if x is None or (not self.shape and x.shape[: x.dim() - kept] == (1,)):
            return x
        if x.shape[: x.dim() - kept] != self.shape:
            raise ValueError(
                f"{name}: expected the leading dimensions of query, {tuple(self.shape)}, "
                f"got shape {tuple(x.shape)}"
            )
        return x.reshape(*self.grouped, *x.shape[x.dim() - kept :])

    def restore(self, x: Tensor) -> Tensor:
        return x.reshape(*self.shape, *x.shape[len(self.grouped) :])
