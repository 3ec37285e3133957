"""KV caches: new keys and values go in, and attention reads them where they lie."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastattn._ops import kv_cache as _ops
from fastattn._ops.common import written
from fastattn._ops.errors import checked
from fastattn.functional import _arguments
from fastattn.functional._arguments import Window

__all__ = ["attention_with_cache", "kv_cache_update"]

Rope = tuple[Tensor, Tensor]


def kv_cache_update(
    k_cache: Tensor,
    v_cache: Tensor,
    key: Tensor,
    value: Tensor,
    positions: int | Tensor,
    *,
    block_table: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    lengths: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    ring: bool = False,
    rope: Rope | None = None,
    rope_positions: Tensor | None = None,
    interleaved: bool = False,
    layout: str = "bhsd",
) -> None:
    r"""Writes new keys and values into a cache, in place.

    Row p of sequence b lies in::

        contiguous      cache[b, :, p]
        ring=True       cache[b, :, p % capacity]
        block_table     cache[block_table[b, p // page_size], :, p % page_size]

    Every index is checked before anything is written. Where several rows go to one place, the last
    of them stays.

    On CUDA nothing waits for the GPU, and a captured call follows what its tensors hold later. So
    indices are not checked there: a row that has no place, as its position, slot or page is outside
    of the cache, is not written, and a key outside of the tables of rope becomes NaN. Where
    sequences meet in a page that several of them write to, one of them stays.

    Args:
        k_cache: (batch, kv_heads, capacity, head_dim), or (pages, kv_heads, page_size, head_dim)
            with a block_table, any page_size >= 1; any strides. In the dtype of key, or int8.
        v_cache: the same, with a head_dim of its own.
        key: (batch, kv_heads, new, head_dim); or packed, (tokens, kv_heads, head_dim).
        value: the same, with the head_dim of v_cache.
        positions: of the first new row of each sequence, an int or (batch); or of every row,
            (batch, new), where a negative one is not written. For packed rows: (batch) beside
            cu_seqlens; else (tokens) slots, counted over all rows of all entries of the cache, and
            a negative one is not written. int32 or int64.
        block_table: (batch, pages of a sequence), int32 or int64. Only the entries that are needed
            must be valid.
        k_scale, v_scale: float32, the shapes of the caches without head_dim; for int8 alone. Each
            row of each head is stored as round(row / scale) with scale = max|row| / 127, which is
            off by at most scale / 2. A row that is not finite gets the scale NaN.
        lengths: (batch), how many of the new rows of each sequence are written.
        cu_seqlens: (batch + 1), where the packed rows of each sequence begin.
        ring: the rows of a contiguous cache are used round and round.
        rope: (cos, sin), each (positions, rotary_dim / 2): key is rotated as by apply_rope, at its
            position, before it is stored; in float32 or wider, and rounded once.
        rope_positions: of every row, (batch, new) or (tokens), where they are not `positions`.
        interleaved: pairs are (2i, 2i + 1), not (i, i + rotary_dim / 2).
        layout: "bhsd" as above, or "bshd", where heads and rows are exchanged in the caches, the
            scales, key and value.

    Raises:
        TypeError: for the type or dtype of an argument. ValueError: for its device, shape or value,
            for a key or value that requires grad (caches are for inference), and, on the CPU, for a
            position outside the cache. Both name the argument, and the cache is as it was.

    Source: Kwon et al., "Efficient memory management for large language model serving with
    PagedAttention" (2023), for pages.

    >>> k_cache, v_cache = torch.zeros(2, 1, 4, 8, 16).unbind()
    >>> key, value = torch.randn(2, 1, 4, 3, 16).unbind()
    >>> kv_cache_update(k_cache, v_cache, key, value, torch.tensor([2]))
    >>> torch.testing.assert_close(k_cache[:, :, 2:5], key)
    """
    bshd = _arguments.is_bshd(layout)
    _arguments.require_tensors(k_cache=k_cache, v_cache=v_cache, key=key, value=value)
    _require_no_gradient(key=key, value=value)
    if isinstance(positions, int | torch.SymInt) and not isinstance(positions, bool):
        sequences = key.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
        positions = torch.full((sequences,), positions, dtype=torch.int64, device=key.device)
    _arguments.require_tensors(positions=positions)
    if torch.is_autocast_enabled("cuda" if key.is_cuda else "cpu"):
        key, value = _arguments.autocast(key, value)
    options: dict[str, Any] = _rotation(rope, interleaved)
    if block_table is not None:
        options["block_table"] = block_table
    if k_scale is not None or v_scale is not None:
        options |= {"k_scale": k_scale, "v_scale": v_scale}
    if lengths is not None:
        options["lengths"] = lengths
    if cu_seqlens is not None:
        options["cu_seqlens"] = cu_seqlens
    if rope_positions is not None:
        options["rope_positions"] = rope_positions
    if ring:
        options["ring"] = True
    if bshd:
        options["bshd"] = True
    checked(
        _ops.kv_cache_update,
        *(k_cache, v_cache, key, value, positions),
        names=("k_cache", "v_cache", "key", "value", "positions"),
        **options,
    )
    written(k_cache, v_cache, k_scale, v_scale)


def attention_with_cache(
    query: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    *,
    cache_lengths: int | Tensor,
    key: Tensor | None = None,
    value: Tensor | None = None,
    block_table: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    key_starts: Tensor | None = None,
    query_lengths: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    max_seqlen_q: int | None = None,
    ring: bool = False,
    rope: Rope | None = None,
    interleaved: bool = False,
    causal: bool | str = False,
    window: Window | None = None,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    sink: Tensor | None = None,
    softcap: float | None = None,
    scale: float | None = None,
    layout: str = "bhsd",
    return_lse: bool = False,
    batch_invariant: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Attention of new queries over a cache, written to first where key and value are given.

    With n_b queries in sequence b (all rows, or query_lengths, or those between cu_seqlens_q)::

        total_b = cache_lengths_b + n_b     where key and value are given; they are written to
                                            positions cache_lengths_b + i as by kv_cache_update
        total_b = cache_lengths_b           else
        p_i = total_b - n_b + i             the last query stands at the last key

    Then :func:`attention` of the queries over keys [key_starts_b, total_b), with its causal, window
    and all else. Any n_b: decoding, chunks of a prompt, several tokens to verify, and all of these
    in one batch. Lengths and positions are tensors, and nothing depends on their values in Python.
    For inference: there is no gradient. On CUDA nothing waits for the GPU, and a captured call
    follows what its tensors hold later; so values are not checked there, as kv_cache_update says,
    and a query outside of the tables of rope gives NaN.

    Args:
        query: (batch, heads, queries, head_dim); or packed, (rows, heads, head_dim), beside
            cu_seqlens_q.
        k_cache, v_cache, block_table, k_scale, v_scale, ring: as in kv_cache_update. kv_heads
            divides heads. An int8 cache is dequantised in the kernel.
        cache_lengths: an int or (batch), the valid rows of each sequence before key is written.
        key, value: the new rows, one for each query. All is checked before they are written.
        key_starts: (batch), rows before it are hidden: padding on the left.
        query_lengths: (batch), the queries that take part; rows beyond give 0 and lse -inf.
        cu_seqlens_q: (batch + 1), where the packed queries, keys and values of each sequence begin.
        max_seqlen_q: at least the longest packed sequence. Optional: on the CPU it is found, and on
            CUDA the number of rows stands for it, at the cost of idle thread blocks.
        ring: needs a window with window[0] + queries <= capacity, so that no visible key has been
            overwritten.
        rope: (cos, sin): query is rotated, and key before it is written, at positions that count
            from key_starts. What is in the cache already has been rotated before.
        mask, bias: broadcast to (batch, heads, queries, capacity), with max_seqlen_q queries where
            they are packed; the capacity of pages is that of the block table. Not for a ring.
        causal, window, alibi_slopes, sink, softcap, scale, layout, return_lse: as in attention.
        batch_invariant: the same query gives the same bits alone or in a batch, padded on either
            side or not, decoded or as part of a chunk.

    Returns:
        out, of query's shape but v_cache's head_dim; or (out, lse).

    Raises:
        TypeError, ValueError: as kv_cache_update and attention do.

    >>> q, k, v = torch.randn(3, 1, 2, 6, 16).unbind()
    >>> k_cache, v_cache = torch.zeros(2, 1, 2, 8, 16).unbind()
    >>> steps = [attention_with_cache(q[:, :, i : i + 1], k_cache, v_cache, cache_lengths=i,
    ...                               key=k[:, :, i : i + 1], value=v[:, :, i : i + 1])
    ...          for i in range(6)]
    >>> from fastattn.functional import attention
    >>> torch.testing.assert_close(torch.cat(steps, dim=2), attention(q, k, v, causal=True))
    """
    bshd = _arguments.is_bshd(layout)
    _arguments.require_tensors(query=query, k_cache=k_cache, v_cache=v_cache)
    if isinstance(cache_lengths, int | torch.SymInt) and not isinstance(cache_lengths, bool):
        sequences = query.shape[0] if cu_seqlens_q is None else cu_seqlens_q.shape[0] - 1
        cache_lengths = torch.full(
            (sequences,), cache_lengths, dtype=torch.int64, device=query.device
        )
    _arguments.require_tensors(cache_lengths=cache_lengths)
    _require_no_gradient(query=query, key=key, value=value, bias=bias, sink=sink)
    autocast = torch.is_autocast_enabled("cuda" if query.is_cuda else "cpu")
    if autocast:
        (query,) = _arguments.autocast(query)
    options = _arguments.options(
        query,
        causal=causal,
        window=window,
        mask=mask,
        bias=bias,
        query_lengths=query_lengths,
        key_lengths=None,
        alibi_slopes=alibi_slopes,
        softcap=softcap,
        scale=scale,
        query_offset=0,
        key_offset=0,
    )
    if options.pop("top_left", False):
        raise ValueError(
            "causal: expected False, True or 'bottom_right' (the last query stands at the last "
            "key), got 'top_left'"
        )
    options |= _rotation(rope, interleaved)
    if block_table is not None:
        options["block_table"] = block_table
    if k_scale is not None or v_scale is not None:
        options |= {"k_scale": k_scale, "v_scale": v_scale}
    if key_starts is not None:
        options["key_starts"] = key_starts
    if cu_seqlens_q is not None:
        options["cu_seqlens_q"] = cu_seqlens_q
    if max_seqlen_q is not None:
        if cu_seqlens_q is None:
            raise ValueError(
                f"max_seqlen_q: expected None without cu_seqlens_q, got {max_seqlen_q}"
            )
        options["max_seqlen_q"] = max_seqlen_q
    if sink is not None:
        options["sink"] = _arguments.in_real_dtype("sink", sink, query)
    if ring:
        options["ring"] = True
    if bshd:
        options["bshd"] = True
    if batch_invariant:
        options["batch_invariant"] = True
    if key is None and value is None:
        out, lse = checked(
            _ops.attention_with_cache,
            *(query, k_cache, v_cache, cache_lengths),
            names=("query", "k_cache", "v_cache", "cache_lengths"),
            **options,
        )
        return (out, lse) if return_lse else out
    _arguments.require_tensors(key=key, value=value)
    assert key is not None and value is not None
    if autocast:
        key, value = _arguments.autocast(key, value)
    out, lse = checked(
        _ops.attention_with_cache_,
        *(query, k_cache, v_cache, key, value, cache_lengths),
        names=("query", "k_cache", "v_cache", "key", "value", "cache_lengths"),
        **options,
    )
    written(k_cache, v_cache, k_scale, v_scale)
    return (out, lse) if return_lse else out


def _rotation(rope: Rope | None, interleaved: bool) -> dict[str, Any]:
    if rope is None:
        return {}
    if not isinstance(rope, tuple | list) or len(rope) != 2:
        raise TypeError(f"rope: expected a pair (cos, sin) of tensors, got {type(rope).__name__}")
    cos, sin = rope
    _arguments.require_tensors(rope=cos)
    _arguments.require_tensors(rope=sin)
    options: dict[str, Any] = {"cos": cos, "sin": sin}
    if interleaved:
        options["interleaved"] = True
    return options


def _require_no_gradient(**tensors: Tensor | None) -> None:
    if not torch.is_grad_enabled():
        return
    for name, x in tensors.items():
        if x is not None and isinstance(x, Tensor) and x.requires_grad:
            raise ValueError(
                f"{name}: expected a tensor that requires no gradient (a cache is for inference: "
                "use torch.no_grad(), or attention for training), got one that does"
            )
