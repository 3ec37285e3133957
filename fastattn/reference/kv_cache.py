"""The normative semantics of KV caches: where a row is stored, and what attends to it."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from fastattn.reference.attention import Window, attention
from fastattn.reference.rope import apply_rope

__all__ = ["attention_with_cache", "cached_rows", "kv_cache_update", "quantize_rows"]

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
    """Writes rows of key and value into the caches, in place.

    Where the row at position p of request b is stored:

        entry, row = b, p                                            (batch, .., capacity, ..)
        entry, row = b, p % capacity                                 ring
        entry, row = block_table[b, p // page_size], p % page_size   (pages, .., page_size, ..)

    ``positions`` is that of the first row of every request, (batch) of each request, (batch, new)
    of each row, negative: not written. Rows i >= lengths[b] are not written either. Packed rows
    (tokens, kv_heads, head_dim) have ``cu_seqlens`` and the position (batch) of each first row, or
    without it a flat slot each, (tokens), negative: not written; slot s is row s % size of entry s
    // size. Where two rows go to one place, the later one stays.

    ``rope`` = (cos, sin), (positions, rotary_dim / 2), rotates key by its position or
    ``rope_positions``. An int8 cache stores ``quantize_rows``. Nothing is written when a row has
    no place.
    """
    stores = (_rows_first(k_cache, layout), _rows_first(v_cache, layout))
    size = stores[0].shape[1]
    rows = [
        x.flatten(0, 1) if x.dim() == 4 else x for x in (_by_row(x, layout) for x in (key, value))
    ]
    requests, at = _row_positions(key, positions, lengths, cu_seqlens, layout, size)
    written = (at >= 0).nonzero().flatten()
    entry, row = _places(requests[written], at[written], stores[0], block_table, ring)
    places = list(zip(written.tolist(), entry.tolist(), row.tolist()))
    if rope is not None:
        turn_by = at if rope_positions is None else rope_positions.reshape(-1)
        if ((turn_by < 0) | (turn_by >= rope[0].shape[0]))[written].any():
            raise ValueError(f"rope: expected positions below {rope[0].shape[0]}")
        turn_by = turn_by.clamp(0, rope[0].shape[0] - 1)  # of rows that are not written
        rows[0] = _rotate(rows[0], turn_by, rope, interleaved, "bshd")
    for store, scale, new in zip(stores, (k_scale, v_scale), rows):
        if scale is not None:
            new, new_scale = quantize_rows(new)
            scales = scale.transpose(1, 2) if layout == "bhsd" else scale
            for token, *place in places:
                scales[tuple(place)] = new_scale[token]
        for token, *place in places:
            store[tuple(place)] = new[token].to(store.dtype)


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
    """Attention of new queries over what each request has cached, and over key and value.

    Request b has cache_lengths[b] rows; those of key and value, if given, are first written after
    them: as many as the request has queries. Of the then ``total`` rows, row j stands at position
    j, is seen from key_starts[b] on, and query i of n stands at total - n + i. ``rope`` rotates
    query and key by their positions, which count from key_starts, and are 0 before it.

    query is (batch, heads, queries, head_dim) with query_lengths (batch), or (tokens, heads,
    head_dim) with cu_seqlens_q. mask and bias broadcast to (batch, heads, queries, columns), with
    a column for each row that a request has room for; a ring takes neither, and a window with left
    + queries <= capacity. The other options are those of ``attention``; out and lse have its
    shapes, 0 and -inf for queries that do not exist.
    """
    queries = _queries(query, query_lengths, cu_seqlens_q, layout)
    batch = len(queries)
    before = torch.as_tensor(cache_lengths).expand(batch).tolist()
    starts = [0] * batch if key_starts is None else key_starts.tolist()
    totals = before
    if key is not None:
        assert value is not None
        totals = [n + q.shape[1] for n, q in zip(before, queries)]
        kv_cache_update(
            *(k_cache, v_cache, key, value, torch.tensor(before, dtype=torch.int64)),
            block_table=block_table,
            k_scale=k_scale,
            v_scale=v_scale,
            lengths=query_lengths,
            cu_seqlens=cu_seqlens_q,
            ring=ring,
            rope=rope,
            rope_positions=None
            if rope is None
            else _turns(key, before, starts, cu_seqlens_q, layout),
            interleaved=interleaved,
            layout=layout,
        )
    capacity = _rows_first(k_cache, layout).shape[1] * (
        1 if block_table is None else block_table.shape[1]
    )
    if ring:
        left = None if window is None else window[0]
        longest = max((q.shape[1] for q in queries), default=0)
        if left is None or left + longest > capacity:
            raise ValueError(
                f"window: expected left + {longest} queries <= {capacity}, got {window}"
            )
        if mask is not None or bias is not None:
            raise ValueError("mask, bias: expected None beside a ring")
    elif max(totals, default=0) > capacity:
        raise ValueError(f"cache_lengths: expected at most {capacity} rows, got {max(totals)}")
    parts = []
    for b, (q, total, start) in enumerate(zip(queries, totals, starts)):
        at = torch.arange(max(total - capacity, 0) if ring else 0, total)
        first_query = total - q.shape[1]
        if rope is not None:
            turn_by = torch.arange(first_query, total) - start
            if key_starts is not None:
                turn_by = turn_by.clamp(min=0)
            if (turn_by < 0).any():
                raise ValueError("cache_lengths: expected queries at positions >= 0")
            q = _rotate(q, turn_by, rope, interleaved, "bhsd").to(q.dtype)
        visible = _part(mask, b, q.shape[1], at)
        seen = at >= start
        parts.append(
            attention(
                q,
                *(
                    cached_rows(cache, b, at, block_table, s, ring=ring, layout=layout).to(q.dtype)
                    for cache, s in ((k_cache, k_scale), (v_cache, v_scale))
                ),
                causal=causal,
                window=window,
                mask=seen if visible is None else seen & visible,
                bias=_part(bias, b, q.shape[1], at),
                alibi_slopes=alibi_slopes[b] if _dims(alibi_slopes) == 2 else alibi_slopes,  # type: ignore[index]
                sink=sink,
                softcap=softcap,
                scale=scale,
                return_lse=True,
            )
        )
    out, lse = _gather_results(parts, query, v_cache.shape[-1], cu_seqlens_q, layout)
    return (out, lse) if return_lse else out


def cached_rows(
    cache: Tensor,
    request: int,
    at: Tensor,
    block_table: Tensor | None = None,
    scale: Tensor | None = None,
    *,
    ring: bool = False,
    layout: str = "bhsd",
) -> Tensor:
    """The rows of a request at positions ``at``, (kv_heads, rows, head_dim); int8 as float64."""
    store = _rows_first(cache, layout)
    places = _places(torch.full_like(at, request), at, store, block_table, ring)
    rows = store[places]
    if scale is not None:
        rows = rows.double() * (scale.transpose(1, 2) if layout == "bhsd" else scale)[
            places
        ].double().unsqueeze(-1)
    return rows.transpose(0, 1)


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """(int8 numbers, float32 scales) of (.., head_dim): scale = max |x| / 127, number = x / scale.

    Rounded half to even. A row of zeros has scale 0, a row with a NaN or an infinity scale NaN, and
    both have zeros for numbers.
    """
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    largest = x.abs().amax(-1) if x.shape[-1] else x.new_zeros(x.shape[:-1])
    scale = torch.where(largest.isfinite(), largest / 127, math.nan).to(torch.float32)
    usable = (scale > 0).unsqueeze(-1)
    divisor = torch.where(usable, scale.unsqueeze(-1), 1.0).to(x.dtype)
    numbers = torch.where(usable, x / divisor, 0.0).clamp(-127, 127)
    return numbers.round().to(torch.int8), scale


def _rotate(x: Tensor, positions: Tensor, rope: Rope, interleaved: bool, layout: str) -> Tensor:
    """x turned by its positions, and not yet rounded to its dtype."""
    wide = torch.promote_types(x.dtype, torch.float32)
    options: dict[str, Any] = {"interleaved": interleaved, "layout": layout}
    return apply_rope(x.to(wide), *rope, positions=positions, **options)


def _places(
    requests: Tensor, at: Tensor, store: Tensor, block_table: Tensor | None, ring: bool
) -> tuple[Tensor, Tensor]:
    """Where rows at positions are stored: entry and row of (entries, rows, kv_heads, dim)."""
    entries, size = store.shape[:2]
    if block_table is None:
        if (not ring and (at >= size).any()) or (requests >= entries).any():
            raise ValueError(f"positions: expected {entries} requests and positions below {size}")
        return requests, at % size
    if (at // size >= block_table.shape[1]).any():
        raise ValueError(f"positions: expected them below {block_table.shape[1] * size}")
    page = block_table.to(torch.int64)[requests, at // size]
    if ((page < 0) | (page >= entries)).any():
        raise ValueError(f"block_table: expected pages below {entries}, got {page.tolist()}")
    return page, at % size


def _row_positions(
    key: Tensor,
    positions: int | Tensor,
    lengths: Tensor | None,
    cu_seqlens: Tensor | None,
    layout: str,
    size: int,
) -> tuple[Tensor, Tensor]:
    """The request and the position of each row of key; negative: not written."""
    given = torch.as_tensor(positions).to(torch.int64)
    if key.dim() == 3 and cu_seqlens is None:
        return given // size, torch.where(given < 0, -1, given % size)
    if key.dim() == 3:
        assert cu_seqlens is not None
        request, index = _packed_rows(key.shape[0], cu_seqlens)
        at = given.expand(cu_seqlens.shape[0] - 1)[request] + index
    else:
        batch, new = _by_row(key, layout).shape[:2]
        index = torch.arange(new).expand(batch, new)
        request = torch.arange(batch).unsqueeze(-1).expand(batch, new)
        at = given if given.dim() == 2 else given.expand(batch).unsqueeze(-1) + index
    counted = request >= 0
    if lengths is not None:
        counted &= index < lengths.to(torch.int64)[request]
    if given.dim() < 2 and (at[counted] < 0).any():
        raise ValueError("positions: expected first positions >= 0")
    at = torch.where(counted, at, -1)
    return request.flatten(), at.flatten()


def _packed_rows(tokens: int, cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
    """For each packed row its sequence, -1 for none, and its index there."""
    sequence = torch.full((tokens,), -1)
    index = torch.zeros(tokens, dtype=torch.int64)
    bounds = cu_seqlens.tolist()
    for n, (first, last) in enumerate(pairwise(bounds)):
        sequence[first:last] = n
        index[first:last] = torch.arange(last - first)
    return sequence, index


def _turns(
    key: Tensor, before: list[int], starts: list[int], cu_seqlens: Tensor | None, layout: str
) -> Tensor:
    """The positions that new rows are rotated by: from their request's start on, at least 0."""
    first = torch.tensor(before, dtype=torch.int64) - torch.tensor(starts, dtype=torch.int64)
    if cu_seqlens is None:
        return (first.unsqueeze(-1) + torch.arange(_by_row(key, layout).shape[1])).clamp(min=0)
    sequence, index = _packed_rows(key.shape[0], cu_seqlens)
    return (first[sequence] + index).clamp(min=0) if before else index


def _queries(
    query: Tensor, query_lengths: Tensor | None, cu_seqlens_q: Tensor | None, layout: str
) -> list[Tensor]:
    """The queries of each request, (heads, queries, head_dim)."""
    if cu_seqlens_q is not None:
        bounds = cu_seqlens_q.tolist()
        return [query[a:b].transpose(0, 1) for a, b in pairwise(bounds)]
    rows = _by_row(query, layout).transpose(1, 2)
    lengths = [rows.shape[2]] * len(rows) if query_lengths is None else query_lengths.tolist()
    return [x[:, :n] for x, n in zip(rows, lengths)]


def _gather_results(
    parts: list[Any], query: Tensor, head_dim: int, cu_seqlens_q: Tensor | None, layout: str
) -> tuple[Tensor, Tensor]:
    """out and lse of all requests, from (heads, queries, head_dim) and (heads, queries) of each."""
    wide = torch.promote_types(query.dtype, torch.float32)
    out = query.new_zeros((*query.shape[:-1], head_dim))
    rows = _by_row(out, layout)
    lse = query.new_full((*rows.shape[:-3], rows.shape[-2], rows.shape[-3]), -math.inf, dtype=wide)
    for b, (part, part_lse) in enumerate(parts):
        n = part.shape[1]
        if cu_seqlens_q is None:
            rows[b, :n], lse[b, :, :n] = part.transpose(0, 1), part_lse
        else:
            first = int(cu_seqlens_q[b])
            rows[first : first + n], lse[:, first : first + n] = part.transpose(0, 1), part_lse
    return out, lse


def _part(x: Tensor | None, b: int, queries: int, columns: Tensor) -> Tensor | None:
    """The part of a mask or bias that concerns the queries and cached rows of one request."""
    if x is None:
        return None
    x = x[b if x.shape[0] > 1 else 0] if x.dim() == 4 else x
    x = x[..., columns] if x.shape[-1] > 1 else x
    return x[..., :queries, :] if x.dim() > 1 and x.shape[-2] > 1 else x


def _dims(x: Tensor | None) -> int:
    return 0 if x is None else x.dim()


def _rows_first(cache: Tensor, layout: str) -> Tensor:
    """(entries, rows, kv_heads, head_dim), a view."""
    return cache if layout == "bshd" else cache.transpose(1, 2)


def _by_row(x: Tensor, layout: str) -> Tensor:
    """(batch, length, heads, head_dim), or packed rows as they are."""
    return x.transpose(1, 2) if x.dim() == 4 and layout == "bhsd" else x
