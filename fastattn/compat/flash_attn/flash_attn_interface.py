"""flash-attn 2.8's attention functions.

What all of them share, beside flash-attn's own words:

    layout          (batch, seqlen, heads, head_dim), packed (total, heads, head_dim); any strides
    causal          aligned to the bottom right corner
    window_size     (left, right) keys besides the diagonal one; a negative number is no limit
    softcap         0.0, or less, is off
    alibi_slopes    (heads) or (batch, heads); not differentiable, so one that requires grad raises
    deterministic   asks for it; torch.use_deterministic_algorithms does so as well. On the CPU
                    everything is.
    dropout_p       its mask comes from torch's default generator; the numbers are not flash-attn's

Every dtype of ``fastattn.functional.attention`` is taken, and any head_dim it has; value may have
another one. Errors are its errors, and name the arguments of the functions here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

import fastattn.functional as fa
from fastattn.compat.flash_attn import _dropout_probs
from fastattn.compat.flash_attn._arguments import NAMES, renamed, require_shape, score_options
from fastattn.compat.flash_attn._kvcache import flash_attn_with_kvcache

__all__ = [
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
]

AttentionResult = Tensor | tuple[Tensor, Tensor, Tensor]


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Sequence[int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> AttentionResult:
    """Attention of a batch of equally long sequences.

    Args:
        q: (batch, seqlen_q, heads, head_dim).
        k, v: (batch, seqlen_k, kv_heads, head_dim); kv_heads divides heads.
        The others: at the top of this module.

    Returns:
        out, as q; with return_attn_probs (out, softmax_lse, S_dmask). softmax_lse: (batch, heads,
        seqlen_q), float32, the natural logarithm, -inf for a row that sees no key; differentiable.
        S_dmask: with dropout (batch, heads, seqlen_q, seqlen_k), in the dtype of q: the exact
        probabilities before dropout, negative where they were dropped; made for tests, in memory
        and time of that size. Without dropout it is empty, as in flash-attn.

    Raises:
        TypeError, ValueError: as ``fastattn.functional.attention`` does.
    """
    require_shape("q", q, "batch seqlen nheads headdim")
    require_shape("k", k, "batch seqlen nheads_k headdim")
    require_shape("v", v, "batch seqlen nheads_k headdim")
    scores = score_options(softmax_scale, causal, window_size, softcap, alibi_slopes)
    scores["layout"] = "bshd"
    with renamed(NAMES):
        philox = _dropout_probs.next_philox(q, dropout_p) if return_attn_probs else None
        result = fa.attention(
            q,
            k,
            v,
            **scores,
            dropout_p=dropout_p,
            deterministic=_deterministic(deterministic),
            return_lse=return_attn_probs,
        )
        if isinstance(result, Tensor):
            return result
        out, lse = result
        return out, lse, _dropout_probs.dense(q, k, lse, scores, dropout_p, philox)


def flash_attn_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Sequence[int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> AttentionResult:
    """:func:`flash_attn_func` with kv (batch, seqlen_k, 2, kv_heads, head_dim), read in place."""
    require_shape("kv", kv, "batch seqlen 2 nheads_k headdim", **{"2": 2})
    k, v = kv.unbind(2)
    return flash_attn_func(
        q,
        k,
        v,
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        softcap,
        alibi_slopes,
        deterministic,
        return_attn_probs,
    )


def flash_attn_qkvpacked_func(
    qkv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Sequence[int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> AttentionResult:
    """:func:`flash_attn_func` with qkv (batch, seqlen, 3, heads, head_dim), read in place."""
    require_shape("qkv", qkv, "batch seqlen 3 nheads headdim", **{"3": 3})
    q, k, v = qkv.unbind(2)
    return flash_attn_func(
        q,
        k,
        v,
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        softcap,
        alibi_slopes,
        deterministic,
        return_attn_probs,
    )


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Sequence[int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
) -> AttentionResult:
    """Attention of packed sequences.

    Args:
        q: (total_q, heads, head_dim).
        k, v: (total_k, kv_heads, head_dim); or, with a block_table, pages of a cache, (pages,
            page_size, kv_heads, head_dim), any page_size.
        cu_seqlens_q, cu_seqlens_k: (sequences + 1), int32 or int64.
        max_seqlen_q, max_seqlen_k: at least the longest sequence.
        block_table: (sequences, pages of a sequence), int32 or int64; cu_seqlens_k then gives the
            lengths alone. For inference: no dropout, no gradient.
        The others: at the top of this module.

    Returns:
        As flash_attn_func, with out (total_q, heads, head_dim), softmax_lse (heads, total_q) and
        S_dmask (sequences, heads, max_seqlen_q, max_seqlen_k), 0 outside of the sequences.

    Raises:
        TypeError, ValueError: as ``fastattn.functional.attention_varlen`` does.
    """
    require_shape("q", q, "total_q nheads headdim")
    scores = score_options(softmax_scale, causal, window_size, softcap, alibi_slopes)
    bounds = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    if block_table is not None:
        return _paged(q, k, v, *bounds, block_table, scores, dropout_p, return_attn_probs)
    require_shape("k", k, "total_k nheads_k headdim")
    require_shape("v", v, "total_k nheads_k headdim")
    with renamed(NAMES):
        philox = _dropout_probs.next_philox(q, dropout_p) if return_attn_probs else None
        result = fa.attention_varlen(
            q,
            k,
            v,
            *bounds,
            **scores,
            dropout_p=dropout_p,
            deterministic=_deterministic(deterministic),
            return_lse=return_attn_probs,
        )
        if isinstance(result, Tensor):
            return result
        out, lse = result
        return out, lse, _dropout_probs.packed(q, k, lse, bounds, scores, dropout_p, philox)


def flash_attn_varlen_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Sequence[int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> AttentionResult:
    """:func:`flash_attn_varlen_func` with kv (total_k, 2, kv_heads, head_dim), read in place."""
    require_shape("kv", kv, "total_k 2 nheads_k headdim", **{"2": 2})
    k, v = kv.unbind(1)
    return flash_attn_varlen_func(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        softcap,
        alibi_slopes,
        deterministic,
        return_attn_probs,
    )


def flash_attn_varlen_qkvpacked_func(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Sequence[int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> AttentionResult:
    """:func:`flash_attn_varlen_func` with qkv (total, 3, heads, head_dim), read in place."""
    require_shape("qkv", qkv, "total 3 nheads headdim", **{"3": 3})
    q, k, v = qkv.unbind(1)
    names = {f"{name}_{of}": name for name in ("cu_seqlens", "max_seqlen") for of in "qk"}
    with renamed(names):
        return flash_attn_varlen_func(
            q,
            k,
            v,
            cu_seqlens,
            cu_seqlens,
            max_seqlen,
            max_seqlen,
            dropout_p,
            softmax_scale,
            causal,
            window_size,
            softcap,
            alibi_slopes,
            deterministic,
            return_attn_probs,
        )


def _paged(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    block_table: Tensor,
    scores: dict[str, Any],
    dropout_p: float,
    return_attn_probs: bool,
) -> AttentionResult:
    """flash_attn_varlen_func over pages, which need neither bound of the lengths."""
    require_shape("k", k, "num_blocks page_block_size nheads_k headdim")
    require_shape("v", v, "num_blocks page_block_size nheads_k headdim")
    require_shape("cu_seqlens_k", cu_seqlens_k, "batch+1")
    if dropout_p != 0.0:
        raise ValueError(f"dropout_p: expected 0.0 with a block_table, got {dropout_p}")
    names = NAMES | {"k_cache": "k", "v_cache": "v", "cache_lengths": "cu_seqlens_k"}
    with renamed(names):
        result = fa.attention_with_cache(
            q,
            k,
            v,
            cache_lengths=cu_seqlens_k.diff(),
            cu_seqlens_q=cu_seqlens_q,
            block_table=block_table,
            layout="bshd",
            return_lse=return_attn_probs,
            **scores,
        )
    return (*result, q.new_empty(0)) if isinstance(result, tuple) else result


def _deterministic(deterministic: bool) -> bool | None:
    """False asks for nothing: then torch.use_deterministic_algorithms decides."""
    if not isinstance(deterministic, bool):
        raise TypeError(f"deterministic: expected a bool, got {deterministic!r}")
    return True if deterministic else None
