"""flash_attn_with_kvcache: attention over a cache that the call may write to first."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

import fastattn.functional as fa
from fastattn.compat.flash_attn._arguments import NAMES, renamed, require_shape, score_options

_NAMES = NAMES | {
    "x": "q",
    "cache_lengths": "cache_seqlens",
    "positions": "cache_seqlens",
    "offset": "cache_seqlens",
    "key_starts": "cache_leftpad",
    "rope": "rotary_cos",
    "cos": "rotary_cos",
    "sin": "rotary_sin",
    "interleaved": "rotary_interleaved",
}


def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    cache_seqlens: int | Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    block_table: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Sequence[int] = (-1, -1),
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: Tensor | None = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention over a KV cache; k and v, where given, are written to it first, in place.

    Sequence b has the rows ``cache_leftpad_b <= j < cache_seqlens_b + seqlen_new``, of which the
    last seqlen_new are k and v. The last query stands at the last row: causal, window_size and
    alibi_slopes count from there. With rotary tables, k is rotated before it is written, and q:

        row i of k      at position cache_seqlens_b + i
        row i of q      at position cache_seqlens_b + i, causal or with a window;
                        at position cache_seqlens_b otherwise

    These are rows of the cache, and count the padding on the left.

    Args:
        q: (batch, seqlen_q, heads, head_dim).
        k_cache, v_cache: (cache_batch, capacity, kv_heads, head_dim), or with a block_table (pages,
            page_size, kv_heads, head_dim), any page_size; any strides.
        k, v: (batch, seqlen_new, kv_heads, head_dim). seqlen_new may differ from seqlen_q.
        rotary_cos, rotary_sin: (positions, rotary_dim / 2), any dtype; only with k and v.
        cache_seqlens: an int or (batch), the rows before k is written. None: the cache is full.
        cache_batch_idx: (batch), which entry of the cache each sequence has; not with a
            block_table. The cache is not copied. Where entries repeat, their writes collide.
        cache_leftpad: (batch), the first row of each sequence.
        block_table: (batch, pages of a sequence).
        rotary_interleaved: pairs are (2i, 2i + 1), and not (i, i + rotary_dim / 2).
        num_splits: how flash-attn shares work out; here the schedule is the library's own, and the
            number changes nothing.
        softmax_scale, causal, window_size, softcap, alibi_slopes: as in flash_attn_func.

    Returns:
        out, as q; with return_softmax_lse (out, softmax_lse), the latter (batch, heads, seqlen_q).

    Raises:
        TypeError, ValueError: as ``fastattn.functional.attention_with_cache`` does; for a q, k or v
            that requires grad too, as there is no gradient. The cache is then as it was.
    """
    _require_inputs(q, k_cache, v_cache, k, v, cache_seqlens)
    _require_rotary(k, rotary_cos, rotary_sin)
    names = _NAMES
    if cache_batch_idx is not None:
        if block_table is not None:
            raise ValueError("cache_batch_idx: expected None with a block_table")
        require_shape("cache_batch_idx", cache_batch_idx, "batch", batch=q.shape[0])
        block_table = cache_batch_idx.unsqueeze(1)  # the whole entry is one page
        names = _NAMES | {"block_table": "cache_batch_idx"}
    cache: dict[str, Any] = {"block_table": block_table, "layout": "bshd"}
    if cache_seqlens is None:
        pages = 1 if block_table is None else block_table.shape[1]
        cache_seqlens = pages * k_cache.shape[1]
    options = score_options(softmax_scale, causal, window_size, softcap, alibi_slopes)
    options |= cache | {"key_starts": cache_leftpad, "return_lse": return_softmax_lse}
    rope = None if rotary_cos is None or rotary_sin is None else (rotary_cos, rotary_sin)
    with renamed(names):
        if k is None or v is None:
            return fa.attention_with_cache(
                q, k_cache, v_cache, cache_lengths=cache_seqlens, **options
            )
        local = causal or options["window"] is not None
        same_positions = rope is None or (cache_leftpad is None and (local or q.shape[1] == 1))
        if k.shape[1] == q.shape[1] and same_positions:
            return fa.attention_with_cache(
                q,
                k_cache,
                v_cache,
                cache_lengths=cache_seqlens,
                key=k,
                value=v,
                rope=rope,
                interleaved=rotary_interleaved,
                **options,
            )
        if rope is not None:
            q = fa.apply_rope(
                q,
                *rope,
                interleaved=rotary_interleaved,
                positions=None if local else _zeros(q),
                offset=cache_seqlens,
                layout="bshd",
            )
        total = cache_seqlens + k.shape[1]
        # Of no query: all arguments are checked before anything is written.
        fa.attention_with_cache(q[:, :0], k_cache, v_cache, cache_lengths=total, **options)
        fa.kv_cache_update(
            *(k_cache, v_cache, k, v, cache_seqlens),
            rope=rope,
            interleaved=rotary_interleaved,
            **cache,
        )
        return fa.attention_with_cache(q, k_cache, v_cache, cache_lengths=total, **options)


def _zeros(q: Tensor) -> Tensor:
    return torch.zeros(q.shape[1], dtype=torch.int64, device=q.device)


def _require_inputs(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    cache_seqlens: int | Tensor | None,
) -> None:
    require_shape("q", q, "batch seqlen nheads headdim")
    require_shape("k_cache", k_cache, "batch_cache seqlen_cache nheads_k headdim")
    require_shape("v_cache", v_cache, "batch_cache seqlen_cache nheads_k headdim")
    if k is None and v is None:
        return
    require_shape("k", k, "batch seqlen_new nheads_k headdim", batch=q.shape[0])
    require_shape("v", v, "batch seqlen_new nheads_k headdim", batch=q.shape[0])
    if cache_seqlens is None:
        raise ValueError("cache_seqlens: expected an int or a tensor with k and v, got None")
    if isinstance(cache_seqlens, bool) or not isinstance(
        cache_seqlens, int | torch.SymInt | Tensor
    ):
        raise TypeError(f"cache_seqlens: expected an int or a tensor, got {cache_seqlens!r}")


def _require_rotary(k: Tensor | None, cos: Tensor | None, sin: Tensor | None) -> None:
    if cos is None and sin is None:
        return
    if cos is None or sin is None:
        missing = "rotary_cos" if cos is None else "rotary_sin"
        raise ValueError(f"{missing}: expected both tables, or none, got None")
    if k is None:
        raise ValueError("rotary_cos: expected None without k and v, which are rotated with q")
