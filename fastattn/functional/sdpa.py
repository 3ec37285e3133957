"""Attention in the signature of torch."""

from __future__ import annotations

import torch
from torch import Tensor

from fastattn.functional import _arguments
from fastattn.functional.attention import attention

__all__ = ["scaled_dot_product_attention"]


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """``torch.nn.functional.scaled_dot_product_attention``, in signature and meaning.

    Unlike :func:`attention`, is_causal is the top-left corner, attn_mask is boolean (True = attend)
    or added to the scores, and fewer key heads than query heads need enable_gqa. As in torch,
    dropout_p applies whether or not a module is training.

    Args:
        query: (..., heads, queries, head_dim), or (queries, head_dim).
        key: (..., kv_heads, keys, head_dim); leading dimensions broadcast with query's.
        value: (..., kv_heads, keys, value_head_dim).
        attn_mask: broadcasts to (..., heads, queries, keys). A floating one is differentiable.
        is_causal: not together with attn_mask.
        scale: 1 / sqrt(head_dim) by default.
        enable_gqa: kv_heads may be any divisor of heads.

    Returns:
        (..., heads, queries, value_head_dim)

    Raises:
        TypeError, ValueError: as attention does.

    >>> q, k, v = torch.randn(3, 2, 4, 6, 16).unbind()
    >>> torch.testing.assert_close(
    ...     scaled_dot_product_attention(q, k, v, is_causal=True),
    ...     torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True),
    ... )
    """
    _arguments.require_tensors(query=query, key=key, value=value)
    if attn_mask is not None:
        _arguments.require_tensors(attn_mask=attn_mask)
        if is_causal:
            raise ValueError("attn_mask: expected None when is_causal is set, got a tensor")
        if attn_mask.dtype != torch.bool and not attn_mask.is_floating_point():
            raise TypeError(
                f"attn_mask: expected dtype bool or a floating one, got {attn_mask.dtype}"
            )
    matrices = query.dim() == key.dim() == value.dim() == 2
    if matrices:
        query, key, value = query.unsqueeze(0), key.unsqueeze(0), value.unsqueeze(0)
    square = query.shape == key.shape == value.shape
    if not square:
        query, key, value = _broadcast(query, key, value, enable_gqa)
    boolean = attn_mask is None or attn_mask.dtype == torch.bool
    try:
        out = attention(
            query,
            key,
            value,
            causal=is_causal if square or not is_causal else "top_left",
            mask=attn_mask if boolean else None,
            bias=None if boolean else attn_mask,
            dropout_p=dropout_p,
            scale=scale,
        )
    except (TypeError, ValueError) as error:
        name, colon, rest = str(error).partition(":")
        if colon and name in ("mask", "bias"):
            raise type(error)(f"attn_mask:{rest}") from None
        raise
    assert isinstance(out, Tensor)
    return out.squeeze(0) if matrices else out


def _broadcast(
    query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Leading dimensions as those of torch.matmul; with enable_gqa, all of them but the heads."""
    kept = 3 if enable_gqa else 2
    for name, x in (("query", query), ("key", key), ("value", value)):
        if x.dim() < kept:
            raise ValueError(
                f"{name}: expected at least {kept} dimensions, got shape {tuple(x.shape)}"
            )
    leading = [x.shape[:-kept] for x in (query, key, value)]
    if leading[0] == leading[1] == leading[2]:
        return query, key, value
    try:
        shape = torch.broadcast_shapes(*leading)  # type: ignore[no-untyped-call]
    except RuntimeError:
        raise ValueError(
            f"key: expected leading dimensions that broadcast with query's (heads as well, unless "
            f"enable_gqa is set), got shapes {tuple(query.shape)}, {tuple(key.shape)} and "
            f"{tuple(value.shape)}"
        ) from None
    query, key, value = (x.expand(*shape, *x.shape[-kept:]) for x in (query, key, value))
    return query, key, value
