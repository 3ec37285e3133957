"""Exact attention probabilities on demand, from query, key and the LSE of a forward pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastattn._ops import attention as _ops
from fastattn._ops.attention_weights import weights as _weights
from fastattn._ops.errors import checked
from fastattn.functional import _arguments
from fastattn.functional._arguments import Window

__all__ = ["attention_column_sums", "attention_weights"]

Indices = Tensor | Sequence[int] | slice


def attention_weights(
    query: Tensor,
    key: Tensor,
    lse: Tensor,
    *,
    rows: Indices | None = None,
    heads: Indices | None = None,
    causal: bool | str = False,
    window: Window | None = None,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    query_lengths: Tensor | None = None,
    key_lengths: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    softcap: float | None = None,
    scale: float | None = None,
    query_offset: int = 0,
    key_offset: int = 0,
    layout: str = "bhsd",
) -> Tensor:
    r"""The probabilities of chosen query rows and heads: exp(s_ij - lse_i), 0 for hidden keys.

    These are the weights that :func:`attention` multiplied the values by (before dropout), not an
    approximation. A row sums to 1; to 1 - p_sink when the lse has a sink in it; to 0 when it sees
    no key. Time and memory are those of the chosen part alone, in the backward pass too.

    Differentiable in query, key, lse and bias, as often as you like. The lse of attention carries
    the rest of the gradient: through both, a loss on weights has the gradient of a softmax.

    Args:
        query, key: as given to attention.
        lse: (\*batch, heads, queries), as attention returned it.
        rows: which queries: a 1-D int64 tensor, a list or a slice, negative from the end; all by
            default.
        heads: which query heads, likewise.
        causal, window, mask, bias, query_lengths, key_lengths, alibi_slopes, softcap, scale,
            query_offset, key_offset, layout: as given to attention.

    Returns:
        (\*batch, chosen heads, chosen rows, keys), float32 (float64 for float64).

    Raises:
        TypeError, ValueError: as attention does.

    >>> from fastattn.functional import attention
    >>> q, k, v = torch.randn(3, 1, 4, 6, 16).unbind()
    >>> out, lse = attention(q, k, v, causal=True, return_lse=True)
    >>> last = attention_weights(q, k, lse, rows=[-1], causal=True)
    >>> last.shape
    torch.Size([1, 4, 1, 6])
    >>> torch.testing.assert_close(last @ v, out[:, :, -1:])
    """
    _arguments.require_tensors(query=query, key=key, lse=lse)
    head_dim, row_dim = (-2, -3) if _arguments.is_bshd(layout) else (-3, -2)
    if query.dim() < 3:
        _arguments.LeadingDims(query)
    chosen_rows = _indices("rows", rows, query.shape[row_dim], query.device)
    chosen_heads = _indices("heads", heads, query.shape[head_dim], query.device)

    def weights(query: Tensor, key: Tensor, lse: Tensor, options: dict[str, Any]) -> Tensor:
        return _weights(query, key, lse, chosen_rows, chosen_heads, options)

    return _call(
        weights,
        (query, key, lse),
        causal=causal,
        window=window,
        mask=mask,
        bias=bias,
        query_lengths=query_lengths,
        key_lengths=key_lengths,
        alibi_slopes=alibi_slopes,
        softcap=softcap,
        scale=scale,
        query_offset=query_offset,
        key_offset=key_offset,
        layout=layout,
    )


def attention_column_sums(
    query: Tensor,
    key: Tensor,
    lse: Tensor,
    *,
    causal: bool | str = False,
    window: Window | None = None,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    query_lengths: Tensor | None = None,
    key_lengths: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    softcap: float | None = None,
    scale: float | None = None,
    query_offset: int = 0,
    key_offset: int = 0,
    layout: str = "bhsd",
) -> Tensor:
    r"""How much attention each key receives: sum_i exp(s_ij - lse_i), in memory linear in length.

    What cache eviction and attribution ask for. Arguments are those of :func:`attention_weights`.

    Returns:
        (\*batch, heads, keys), float32 (float64 for float64). No gradient.

    Raises:
        TypeError, ValueError: as attention does.

    >>> from fastattn.functional import attention
    >>> q, k, v = torch.randn(3, 1, 4, 6, 16).unbind()
    >>> _, lse = attention(q, k, v, return_lse=True)
    >>> sums = attention_column_sums(q, k, lse)
    >>> torch.testing.assert_close(sums, attention_weights(q, k, lse).sum(-2))
    """
    _arguments.require_tensors(query=query, key=key, lse=lse)
    return _call(
        _column_sums,
        (query, key, lse),
        causal=causal,
        window=window,
        mask=mask,
        bias=bias,
        query_lengths=query_lengths,
        key_lengths=key_lengths,
        alibi_slopes=alibi_slopes,
        softcap=softcap,
        scale=scale,
        query_offset=query_offset,
        key_offset=key_offset,
        layout=layout,
    )


def require_kernel(argument: str, query: Tensor) -> None:
    """Refuses an argument that asks attention for its weights where no kernel makes them."""
    if query.is_cuda:
        raise ValueError(
            f"{argument}: expected False on {query.device}, as attention_weights has no CUDA "
            "kernel in this version, got True"
        )


def _column_sums(query: Tensor, key: Tensor, lse: Tensor, options: dict[str, Any]) -> Tensor:
    with torch.no_grad():
        sums: Tensor = checked(_ops.attention_column_sums, query, key, lse, **options)
    return sums


def _indices(name: str, indices: Indices | None, size: int, device: torch.device) -> Tensor | None:
    if indices is None:
        return None
    if isinstance(indices, slice):
        return torch.arange(*indices.indices(size), device=device)
    chosen = torch.as_tensor(indices, device=device)
    if chosen.numel() == 0 and not isinstance(indices, Tensor):
        chosen = chosen.to(torch.int64)
    if chosen.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"{name}: expected int64 indices, got {chosen.dtype}")
    chosen = chosen.to(torch.int64)
    return torch.where(chosen < 0, chosen + size, chosen)


def _call(
    function: Callable[[Tensor, Tensor, Tensor, dict[str, Any]], Tensor],
    inputs: tuple[Tensor, Tensor, Tensor],
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
    layout: str,
) -> Tensor:
    query, key, lse = inputs
    bshd = _arguments.is_bshd(layout)
    dims = None
    if not 4 <= query.dim() <= 5:
        dims = _arguments.LeadingDims(query)
        query, key = dims.group("query", query), dims.group("key", key)
        lse = dims.group_sequences("lse", lse, 2)  # type: ignore[assignment]
        mask = dims.group_broadcast("mask", mask, 3)
        bias = dims.group_broadcast("bias", bias, 3)
        query_lengths = dims.group_sequences("query_lengths", query_lengths)
        key_lengths = dims.group_sequences("key_lengths", key_lengths)
        alibi_slopes = dims.group_broadcast("alibi_slopes", alibi_slopes, 1)
    if torch.is_autocast_enabled("cuda" if query.is_cuda else "cpu"):
        query, key = _arguments.autocast(query, key)
    options = _arguments.options(
        query,
        causal=causal,
        window=window,
        mask=mask,
        bias=bias,
        query_lengths=query_lengths,
        key_lengths=key_lengths,
        alibi_slopes=alibi_slopes,
        softcap=softcap,
        scale=scale,
        query_offset=query_offset,
        key_offset=key_offset,
    )
    result = function(query, key, lse, options | {"bshd": bshd})
    return result if dims is None else dims.restore(result)
