"""The normative semantics of rotary embedding."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["apply_rope", "apply_rope_qk"]


def apply_rope(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    interleaved: bool = False,
    positions: Tensor | None = None,
    offset: int | Tensor = 0,
    layout: str = "bhsd",
) -> Tensor:
    """Rotary embedding, for one tensor.

        p_i   = positions_i + offset                     i + offset without positions
        out_a = x_a cos[p_i, n] - x_b sin[p_i, n]        (a, b) = (n, n + rotary_dim / 2), or
        out_b = x_b cos[p_i, n] + x_a sin[p_i, n]                 (2 n, 2 n + 1) when interleaved

    with rotary_dim = 2 * cos.shape[-1]; columns from there on are copied. cos and sin with more
    than two dimensions hold a row for each token.
    """
    bshd = layout == "bshd"
    if not bshd:
        x = x.transpose(-3, -2)  # (*batch, length, heads, head_dim)
    real = torch.promote_types(x.dtype, torch.float32)
    cos, sin = cos.to(real), sin.to(real)
    if cos.dim() == 2:
        rows = torch.arange(x.shape[-3], device=x.device) if positions is None else positions
        shift = offset.unsqueeze(-1) if isinstance(offset, Tensor) else offset
        rows = rows + shift
        cos, sin = cos[rows], sin[rows]
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)
    half = cos.shape[-1]
    turned, rest = x[..., : 2 * half].to(real), x[..., 2 * half :]
    if interleaved:
        a, b = turned[..., 0::2], turned[..., 1::2]
        turned = torch.stack((a * cos - b * sin, b * cos + a * sin), dim=-1).flatten(-2)
    else:
        a, b = turned[..., :half], turned[..., half:]
        turned = torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)
    out = torch.cat((turned.to(x.dtype), rest), dim=-1)
    return out if bshd else out.transpose(-3, -2)


def apply_rope_qk(
    query: Tensor,
    key: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    interleaved: bool = False,
    positions: Tensor | None = None,
    offset: int | Tensor = 0,
    layout: str = "bhsd",
) -> tuple[Tensor, Tensor]:
    """apply_rope of query and of key."""
    query, key = (
        apply_rope(
            x,
            cos,
            sin,
            interleaved=interleaved,
            positions=positions,
            offset=offset,
            layout=layout,
        )
        for x in (query, key)
    )
    return query, key
