"""flash-attn's rotary embedding, over ``fastattn.functional.apply_rope``.

cos and sin are tables (positions, rotary_dim / 2) of any dtype, without a gradient; the arithmetic
is in float32, in float64 for float64. Pairs are (i, i + rotary_dim / 2), with ``interleaved``
(2i, 2i + 1). A position outside of the tables raises.
"""

from __future__ import annotations

import torch
from torch import Tensor

import fastattn.functional as fa
from fastattn.compat.flash_attn._arguments import renamed, require_shape

__all__ = [
    "RotaryEmbedding",
    "apply_rotary_emb",
    "apply_rotary_emb_func",
    "apply_rotary_emb_kv_",
    "apply_rotary_emb_qkv_",
    "apply_rotary_emb_torch",
    "rotate_half",
]


def rotate_half(x: Tensor, interleaved: bool = False) -> Tensor:
    """(-b, a) in place of every pair (a, b)."""
    if interleaved:
        pairs = x.reshape(*x.shape[:-1], x.shape[-1] // 2, 2)
        return torch.stack((-pairs[..., 1], pairs[..., 0]), dim=-1).flatten(-2)
    a, b = x.chunk(2, dim=-1)
    return torch.cat((-b, a), dim=-1)


def apply_rotary_emb_torch(
    x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False
) -> Tensor:
    """The formula in plain torch, differentiable in all three.

    x: (batch, seqlen, heads, head_dim); cos, sin: (seqlen, rotary_dim / 2), or with a batch.
    """
    rotary_dim = 2 * cos.shape[-1]
    if rotary_dim > x.shape[-1]:
        raise ValueError(f"cos: expected at most {x.shape[-1] // 2} columns, got {cos.shape[-1]}")
    cos, sin = (
        table.repeat_interleave(2, dim=-1) if interleaved else torch.cat((table, table), dim=-1)
        for table in (cos.unsqueeze(-2), sin.unsqueeze(-2))
    )
    turned, rest = x[..., :rotary_dim], x[..., rotary_dim:]
    turned = turned * cos + rotate_half(turned, interleaved) * sin
    return torch.cat((turned, rest), dim=-1)


def apply_rotary_emb(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    interleaved: bool = False,
    inplace: bool = False,
    seqlen_offsets: int | Tensor = 0,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
) -> Tensor:
    """Rotates the first rotary_dim columns of x; differentiable.

    Args:
        x: (batch, seqlen, heads, head_dim), or with cu_seqlens (total, heads, head_dim).
        inplace: x itself is overwritten, and returned.
        seqlen_offsets: an int or (batch), the position of the first row of each sequence.
        cu_seqlens: (batch + 1). Rows behind the last bound have the position 0.
        max_seqlen: needed by flash-attn with cu_seqlens. Not here, and it changes nothing.
    """
    if cu_seqlens is None:
        require_shape("x", x, "batch seqlen nheads headdim")
        positions, offset = None, seqlen_offsets
    else:
        require_shape("x", x, "total_seqlen nheads headdim")
        positions, offset = _packed_positions(x.shape[0], cu_seqlens, seqlen_offsets), 0
    apply = fa.apply_rope_ if inplace else fa.apply_rope
    with renamed({"offset": "seqlen_offsets", "positions": "seqlen_offsets"}):
        return apply(
            *(x, cos, sin),
            interleaved=interleaved,
            positions=positions,
            offset=offset,
            layout="bshd",
        )


apply_rotary_emb_func = apply_rotary_emb


def apply_rotary_emb_qkv_(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    cos_k: Tensor | None = None,
    sin_k: Tensor | None = None,
    interleaved: bool = False,
    seqlen_offsets: int | Tensor = 0,
    num_heads_q: int | None = None,
) -> Tensor:
    """Rotates q and k of a fused projection in place; differentiable.

    Args:
        qkv: (batch, seqlen, 3, heads, head_dim), or (batch, seqlen, num_heads_q + 2 * num_heads_k,
            head_dim) with num_heads_q; any strides.
        cos_k, sin_k: tables of k, where it has its own.
        seqlen_offsets: as for :func:`apply_rotary_emb`.

    Returns:
        qkv itself.
    """
    q, k = _query_and_key(qkv, num_heads_q)
    cos_k = cos if cos_k is None else cos_k
    sin_k = sin if sin_k is None else sin_k
    for x, cosine, sine in ((q, cos, sin), (k, cos_k, sin_k)):
        apply_rotary_emb(x, cosine, sine, interleaved, True, seqlen_offsets)
    return qkv


def apply_rotary_emb_kv_(
    kv: Tensor,
    cos: Tensor,
    sin: Tensor,
    interleaved: bool = False,
    seqlen_offsets: int | Tensor = 0,
) -> Tensor:
    """Rotates k of kv (batch, seqlen, 2, heads, head_dim) in place, and returns kv."""
    require_shape("kv", kv, "batch seqlen 2 nheads headdim", **{"2": 2})
    apply_rotary_emb(kv[:, :, 0], cos, sin, interleaved, True, seqlen_offsets)
    return kv


class RotaryEmbedding(torch.nn.Module):
    """Tables that grow with what they are asked for, and their rotation of a fused projection.

    ::

        angle[p, n] = p * inv_freq[n]           inv_freq[n] = base^(-2 n / dim)

    With ``scale_base`` (xPos; Sun et al., A Length-Extrapolatable Transformer, 2022) the tables of
    q are multiplied by s, and those of k divided by it::

        s[p, n] = ((2 n + 0.4 dim) / (1.4 dim))^((p - length // 2) / scale_base)

    where length is that of the tables. Nothing is learned, and nothing is in the state_dict.
    Angles are computed in float64. The tables are float32, float64 for float64: flash-attn rounds
    them to the dtype of the projection, in which far positions of bfloat16 coincide.

    Args:
        dim: rotary_dim, even.
        interleaved: pairs are (2i, 2i + 1).
        device: of inv_freq.
    """

    inv_freq: Tensor
    scale: Tensor | None

    def __init__(
        self,
        dim: int,
        base: float = 10000.0,
        interleaved: bool = False,
        scale_base: float | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        if dim < 0 or dim % 2:
            raise ValueError(f"dim: expected an even number >= 0, got {dim}")
        self.dim = dim
        self.base = float(base)
        self.interleaved = interleaved
        self.scale_base = scale_base
        self.register_buffer("inv_freq", self._compute_inv_freq(device), persistent=False)
        ramp = torch.arange(0, dim, 2, device=device, dtype=torch.float32)
        scale = None if scale_base is None else (ramp + 0.4 * dim) / (1.4 * dim)
        self.register_buffer("scale", scale, persistent=False)
        self._seq_len_cached = 0
        self._cos_cached: Tensor | None = None
        self._sin_cached: Tensor | None = None
        self._cos_k_cached: Tensor | None = None
        self._sin_k_cached: Tensor | None = None

    def forward(
        self,
        qkv: Tensor,
        kv: Tensor | None = None,
        seqlen_offset: int | Tensor = 0,
        max_seqlen: int | None = None,
        num_heads_q: int | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Rotates in place.

        Args:
            qkv: as for :func:`apply_rotary_emb_qkv_`; or, beside kv, q (batch, seqlen, heads,
                head_dim).
            kv: (batch, seqlen, 2, heads, head_dim).
            seqlen_offset: an int or (batch), the position of the first row.
            max_seqlen: what the tables must reach at least; a tensor of offsets needs it, or
                tables that reach far enough already.

        Returns:
            qkv, or (q, kv): the arguments themselves.
        """
        if max_seqlen is None and isinstance(seqlen_offset, int):
            max_seqlen = qkv.shape[1] + seqlen_offset
        if max_seqlen is not None:
            self._update_cos_sin_cache(max_seqlen, device=qkv.device, dtype=qkv.dtype)
        cos, sin = self._cos_cached, self._sin_cached
        if cos is None or sin is None:
            raise ValueError("max_seqlen: expected a length beside a tensor as seqlen_offset")
        cos_k, sin_k = self._cos_k_cached, self._sin_k_cached
        with renamed({"seqlen_offsets": "seqlen_offset"}):
            if kv is None:
                return apply_rotary_emb_qkv_(
                    qkv, cos, sin, cos_k, sin_k, self.interleaved, seqlen_offset, num_heads_q
                )
            q = apply_rotary_emb(qkv, cos, sin, self.interleaved, True, seqlen_offset)
            cos_k, sin_k = (cos, sin) if cos_k is None or sin_k is None else (cos_k, sin_k)
            return q, apply_rotary_emb_kv_(kv, cos_k, sin_k, self.interleaved, seqlen_offset)

    def _compute_inv_freq(self, device: torch.device | str | None = None) -> Tensor:
        exponents = torch.arange(0, self.dim, 2, device=device, dtype=torch.float64) / self.dim
        return (self.base**-exponents).to(torch.float32)

    def _update_cos_sin_cache(
        self,
        seqlen: int,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Makes the tables anew where they are too short, or not what this call can use."""
        dtype = torch.promote_types(dtype or torch.float32, torch.float32)
        known = self._cos_cached
        if (
            known is not None
            and seqlen <= self._seq_len_cached
            and (known.device, known.dtype) == (device or known.device, dtype)
            and (torch.is_inference_mode_enabled() or not known.is_inference())
        ):
            return
        self._seq_len_cached = seqlen
        inv_freq = self.inv_freq  # what scales the context may have changed it
        if inv_freq.dtype != torch.float32:  # module.to(bfloat16) has rounded it
            inv_freq = self._compute_inv_freq(device)
        positions = torch.arange(max(seqlen, 0), device=device, dtype=torch.float64)
        angles = torch.outer(positions, inv_freq.to(device, torch.float64))
        cos, sin = angles.cos(), angles.sin()
        if self.scale is not None and self.scale_base is not None:
            power = (positions - seqlen // 2) / self.scale_base
            scale = self.scale.to(device, torch.float64) ** power.unsqueeze(-1)
            self._cos_k_cached, self._sin_k_cached = (
                (cos / scale).to(dtype),
                (sin / scale).to(dtype),
            )
            cos, sin = cos * scale, sin * scale
        self._cos_cached, self._sin_cached = cos.to(dtype), sin.to(dtype)


def _query_and_key(qkv: Tensor, num_heads_q: int | None) -> tuple[Tensor, Tensor]:
    if qkv.dim() == 5:
        require_shape("qkv", qkv, "batch seqlen 3 nheads headdim", **{"3": 3})
        return qkv[:, :, 0], qkv[:, :, 1]
    require_shape("qkv", qkv, "batch seqlen nheads headdim")
    heads = qkv.shape[2]
    if num_heads_q is None or not 0 <= num_heads_q <= heads or (heads - num_heads_q) % 2:
        raise ValueError(
            "num_heads_q: expected the number of query heads of a qkv of shape "
            f"{tuple(qkv.shape)}, as (heads - num_heads_q) / 2 are those of k, got {num_heads_q}"
        )
    key_end = num_heads_q + (heads - num_heads_q) // 2
    return qkv[:, :, :num_heads_q], qkv[:, :, num_heads_q:key_end]


def _packed_positions(total: int, cu_seqlens: Tensor, seqlen_offsets: int | Tensor) -> Tensor:
    """The position of each row inside of its sequence, with the offset of that sequence."""
    require_shape("cu_seqlens", cu_seqlens, "batch+1")
    sequences = cu_seqlens.shape[0] - 1
    rows = torch.arange(total, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
    sequence = torch.searchsorted(cu_seqlens[1:].contiguous(), rows, right=True)
    if isinstance(seqlen_offsets, Tensor):
        require_shape("seqlen_offsets", seqlen_offsets, "batch", batch=sequences)
        seqlen_offsets = torch.nn.functional.pad(seqlen_offsets, (0, 1))
    first = (cu_seqlens - seqlen_offsets)[sequence]
    return torch.where(sequence < sequences, rows - first, 0)
