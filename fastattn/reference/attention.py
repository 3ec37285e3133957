"""The normative semantics of attention."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fastattn.reference.philox import dropout_mask

__all__ = [
    "attention",
    "attention_column_sums",
    "attention_varlen",
    "attention_weights",
    "merge_attention",
    "relative_positions",
    "scaled_dot_product_attention",
    "sequences",
    "visibility",
]

Window = tuple[int | None, int | None]
Index = Tensor | Sequence[int] | slice


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    causal: bool | str = False,
    window: Window | None = None,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    query_lengths: Tensor | None = None,
    key_lengths: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    sink: Tensor | None = None,
    softcap: float | None = None,
    dropout_p: float = 0.0,
    scale: float | None = None,
    query_offset: int = 0,
    key_offset: int = 0,
    layout: str = "bhsd",
    return_lse: bool = False,
    deterministic: bool | None = None,
    batch_invariant: bool = False,
    philox: tuple[int, int] | None = None,
    batch_index: int = 0,
) -> Tensor | tuple[Tensor, Tensor]:
    """Scaled dot-product attention with every feature of the contract.

        s_ij  = scale * q_i . k_j
        s_ij  = softcap * tanh(s_ij / softcap)            with softcap
        s_ij += bias_ij - slope * |p_j - p_i|             with bias, alibi_slopes
        lse_i = log(sum_j exp(s_ij) + exp(sink))          j over the visible keys; sink when given
        out_i = sum_j keep_ij / (1 - dropout_p) * exp(s_ij - lse_i) v_j

    Shapes: query (*batch, heads, queries, head_dim), key (*batch, kv_heads, keys, head_dim), value
    the same with a head_dim of its own; ``layout="bshd"`` exchanges heads and length. mask and bias
    broadcast to (*batch, heads, queries, keys); lengths are (*batch); alibi_slopes (heads) or
    (*batch, heads); sink (heads). Returns out, or (out, lse) with lse (*batch, heads, queries), the
    natural logarithm in float32 or wider.

    A query that sees no key has out 0, lse -inf and no gradient. What a hidden key or value holds,
    NaN included, changes nothing. ``philox`` is the (seed, offset) of ``dropout_mask``, whose batch
    begins at ``batch_index``. ``deterministic`` and ``batch_invariant`` are always met here.
    """
    query, key, value = (_heads_first(x, layout) for x in (query, key, value))
    scores, visible = _scores(
        query,
        key,
        mask,
        bias,
        alibi_slopes,
        causal=causal,
        window=window,
        softcap=softcap,
        scale=scale,
        query_lengths=query_lengths,
        key_lengths=key_lengths,
        query_offset=query_offset,
        key_offset=key_offset,
    )
    lse, empty = _log_sum_exp(scores, visible, sink)
    weights = _probabilities(scores, visible, lse)
    if dropout_p > 0.0:
        if philox is None:
            raise ValueError("philox: dropout needs a (seed, offset) pair")
        keep = dropout_mask(weights.shape, dropout_p, philox, batch_index).to(weights.device)
        weights = torch.where(keep, weights, 0.0) / (1.0 - dropout_p if dropout_p < 1.0 else 1.0)
        visible = visible & keep
    value = _expand_heads(value, query.shape[-3])
    out = _matmul(weights.to(value.dtype), _finite(value)) + _seen_non_finite(visible, value)
    out = _heads_first(torch.where(empty.unsqueeze(-1), 0.0, out), layout)
    return (out, torch.where(empty, -math.inf, lse)) if return_lse else out


def attention_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    *,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    query_lengths: Tensor | None = None,
    key_lengths: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    return_lse: bool = False,
    **options: Any,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention over packed sequences: n owns the rows cu_seqlens[n] to cu_seqlens[n + 1] - 1.

    Shapes: query (total_q, heads, head_dim), key and value (total_k, kv_heads, head_dim), out like
    query with the head_dim of value, lse (heads, total_q). mask and bias broadcast to (sequences,
    heads, max_seqlen_q, max_seqlen_k); lengths are (sequences); alibi_slopes (heads) or (sequences,
    heads). Rows outside every sequence are 0 in out and -inf in lse. The other options are those of
    ``attention``, applied to each sequence by itself.
    """
    tensors = {
        "query": query,
        "key": key,
        "value": value,
        "mask": mask,
        "bias": bias,
        "query_lengths": query_lengths,
        "key_lengths": key_lengths,
        "alibi_slopes": alibi_slopes,
    }
    parts = [
        attention(**part, **options, layout="bshd", return_lse=True, batch_index=n)
        for n, part in enumerate(sequences(cu_seqlens_q, cu_seqlens_k, tensors))
    ]
    heads, unused = query.shape[1], query.shape[0] - int(cu_seqlens_q[-1])
    no_out = query.new_zeros(unused, heads, value.shape[-1])
    no_lse = query.new_full((heads, unused), -math.inf, dtype=_wide(query))
    out = torch.cat([*(out for out, _ in parts), no_out])
    return (out, torch.cat([*(lse for _, lse in parts), no_lse], dim=1)) if return_lse else out


def sequences(
    cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, tensors: Mapping[str, Tensor | None]
) -> Iterator[dict[str, Any]]:
    """For each packed sequence, its part of the tensor arguments of ``attention_varlen``."""
    bounds_q, bounds_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    for n in range(len(bounds_q) - 1):
        rows, columns = slice(*bounds_q[n : n + 2]), slice(*bounds_k[n : n + 2])
        size = (rows.stop - rows.start, columns.stop - columns.start)
        part: dict[str, Any] = {}
        for name, x in tensors.items():
            if name in ("mask", "bias"):
                part[name] = _crop(_entry(x, n, 4), *size)
            elif x is None or name in ("query", "key", "value"):
                part[name] = x if x is None else x[rows if name == "query" else columns]
            else:
                part[name] = _entry(x, n, 2 if name == "alibi_slopes" else 1)
        yield part


def attention_weights(
    query: Tensor,
    key: Tensor,
    lse: Tensor,
    *,
    rows: Index | None = None,
    heads: Index | None = None,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    layout: str = "bhsd",
    **options: Any,
) -> Tensor:
    """The probabilities exp(s_ij - lse_i) of chosen query rows and heads, 0 where hidden.

    Returns (*batch, heads, rows, keys). With a sink in the lse, a row sums to 1 - p_sink. The
    options are those of ``attention`` that shape the scores.
    """
    query, key = _heads_first(query, layout), _heads_first(key, layout)
    scores, visible = _scores(query, key, mask, bias, alibi_slopes, **options)
    seen = lse > -math.inf
    weights = _probabilities(scores, visible & seen.unsqueeze(-1), torch.where(seen, lse, 0.0))
    return _select(_select(weights, heads, -3), rows, -2)


def attention_column_sums(query: Tensor, key: Tensor, lse: Tensor, **options: Any) -> Tensor:
    """How much attention each key receives: ``attention_weights`` summed over all queries.

    Returns (*batch, heads, keys).
    """
    return attention_weights(query, key, lse, **options).sum(-2)


def merge_attention(
    out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor, *, layout: str = "bhsd"
) -> tuple[Tensor, Tensor]:
    """Attention over the union of two disjoint sets of keys, from the result over each of them.

        lse = log(exp(lse_a) + exp(lse_b))
        out = exp(lse_a - lse) * out_a + exp(lse_b - lse) * out_b

    out is (*batch, heads, queries, head_dim) and lse (*batch, heads, queries); ``layout="bshd"``
    exchanges heads and length in out (packed results are such, without a batch). A part whose lse
    is -inf saw no key: what its out holds is ignored.
    """
    lses = torch.stack((lse_a, lse_b), dim=-1).to(_wide(lse_a))
    seen = lses > -math.inf
    lse, empty = _log_sum_exp(lses, seen, None)
    # exp(lse_a - lse), but as exact for a large lse as for a small one.
    shares = torch.where(seen, torch.where(empty.unsqueeze(-1), 0.0, lses).softmax(-1), 0.0)
    outs = torch.stack((_heads_first(out_a, layout), _heads_first(out_b, layout)), dim=-1)
    parts = torch.where(seen.unsqueeze(-2), outs, 0.0) * shares.unsqueeze(-2)
    out = _heads_first(parts.sum(-1), layout)
    return out.to(outs.dtype), torch.where(empty, -math.inf, lse)


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    philox: tuple[int, int] | None = None,
) -> Tensor:
    """What ``torch.nn.functional.scaled_dot_product_attention`` means: causal is top-left.

    Leading dimensions broadcast; with ``enable_gqa`` all but the heads, which repeat.
    """
    inputs = [x.unsqueeze(0) if x.dim() == 2 else x for x in (query, key, value)]
    kept = 3 if enable_gqa else 2
    leading = torch.broadcast_shapes(*(x.shape[:-kept] for x in inputs))  # type: ignore[no-untyped-call]
    boolean = attn_mask is not None and attn_mask.dtype == torch.bool
    out = attention(
        *(x.expand(*leading, *x.shape[-kept:]) for x in inputs),
        causal="top_left" if is_causal else False,
        mask=attn_mask if boolean else None,
        bias=None if boolean else attn_mask,
        dropout_p=dropout_p,
        scale=scale,
        philox=philox,
    )
    assert isinstance(out, Tensor)
    return out.squeeze(0) if max(query.dim(), key.dim(), value.dim()) == 2 else out


def relative_positions(
    queries: int,
    keys: int,
    *,
    causal: bool | str = False,
    query_lengths: Tensor | None = None,
    key_lengths: Tensor | None = None,
    query_offset: int = 0,
    key_offset: int = 0,
) -> Tensor:
    """p_j - p_i as (queries, keys), or (*batch, 1, queries, keys) when there are lengths.

    p_i = query_offset + i + corner,    p_j = key_offset + j
    corner = key length - query length (the last query stands at the last key)
    corner = 0 when causal is "top_left"
    """
    lengths = query_lengths if query_lengths is not None else key_lengths
    device = None if lengths is None else lengths.device
    i = torch.arange(queries, device=device).unsqueeze(-1) + query_offset
    j = torch.arange(keys, device=device) + key_offset
    if causal == "top_left":
        return j - i
    length_q = queries if query_lengths is None else _per_batch(query_lengths)
    length_k = keys if key_lengths is None else _per_batch(key_lengths)
    return j - i - (length_k - length_q)


def visibility(
    relative: Tensor,
    *,
    causal: bool | str = False,
    window: Window | None = None,
    mask: Tensor | None = None,
    query_lengths: Tensor | None = None,
    key_lengths: Tensor | None = None,
) -> Tensor:
    """True where query i sees key j, from ``relative_positions``; (*batch, heads, queries, keys).

    -left <= p_j - p_i <= right    window = (left, right), None: no limit; causal: right <= 0
    i < query length,    j < key length,    mask_ij
    """
    left, right = window or (None, None)
    visible = torch.ones_like(relative, dtype=torch.bool)
    if left is not None:
        visible = visible & (relative >= -left)
    if right is not None:
        visible = visible & (relative <= right)
    if causal:
        visible = visible & (relative <= 0)
    if query_lengths is not None:
        i = torch.arange(relative.shape[-2], device=relative.device).unsqueeze(-1)
        visible = visible & (i < _per_batch(query_lengths))
    if key_lengths is not None:
        j = torch.arange(relative.shape[-1], device=relative.device)
        visible = visible & (j < _per_batch(key_lengths))
    return visible if mask is None else visible & mask


def _scores(
    query: Tensor,
    key: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    alibi_slopes: Tensor | None,
    *,
    causal: bool | str = False,
    window: Window | None = None,
    softcap: float | None = None,
    scale: float | None = None,
    query_lengths: Tensor | None = None,
    key_lengths: Tensor | None = None,
    query_offset: int = 0,
    key_offset: int = 0,
) -> tuple[Tensor, Tensor]:
    """The scores (*batch, heads, queries, keys), -inf where hidden, and the visible pairs.

    A bias of -inf hides its key as a mask does.
    """
    relative = relative_positions(
        query.shape[-2],
        key.shape[-2],
        causal=causal,
        query_lengths=query_lengths,
        key_lengths=key_lengths,
        query_offset=query_offset,
        key_offset=key_offset,
    ).to(query.device)
    visible = visibility(
        relative,
        causal=causal,
        window=window,
        mask=mask,
        query_lengths=query_lengths,
        key_lengths=key_lengths,
    )
    scores = _products(query, _expand_heads(key, query.shape[-3]))
    scores = scores * (query.shape[-1] ** -0.5 if scale is None else scale)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if bias is not None:
        scores = scores + bias
        visible = visible & (bias != -math.inf)
    if alibi_slopes is not None:
        scores = scores - alibi_slopes[..., None, None] * relative.abs()
    visible = visible.broadcast_to(scores.shape)
    return torch.where(visible, scores.to(_wide(scores)), -math.inf), visible


def _log_sum_exp(scores: Tensor, visible: Tensor, sink: Tensor | None) -> tuple[Tensor, Tensor]:
    """log(sum_j exp(s_ij) + exp(sink)), and the rows that see no key: for these it is finite."""
    empty = ~visible.any(-1)
    if sink is not None:
        column = sink.to(scores.dtype)[:, None, None].expand(*scores.shape[:-1], 1)
        scores = torch.cat([scores, column], dim=-1)
    lse = torch.logsumexp(torch.where(empty.unsqueeze(-1), 0.0, scores), dim=-1)
    return torch.where(empty, 0.0, lse), empty


def _probabilities(scores: Tensor, visible: Tensor, lse: Tensor) -> Tensor:
    return torch.where(visible, torch.exp(scores - lse.unsqueeze(-1)), 0.0)


def _products(query: Tensor, key: Tensor) -> Tensor:
    """q_i . k_j, in whose gradient a NaN meets only the pairs that it belongs to."""
    finite = _matmul(_finite(query), _finite(key).transpose(-2, -1))
    exact = _matmul(query.detach(), key.detach().transpose(-2, -1))
    return torch.where(torch.isfinite(exact), finite, exact)


def _matmul(a: Tensor, b: Tensor) -> Tensor:
    """a @ b, summed in float32 or wider whatever the machine's kernel for the dtype would do."""
    return (a.to(_wide(a)) @ b.to(_wide(b))).to(a.dtype)


def _finite(x: Tensor) -> Tensor:
    """x with 0 for what is not finite, so that a weight of zero times it is zero."""
    return torch.where(torch.isfinite(x), x, 0.0)


def _seen_non_finite(visible: Tensor, value: Tensor) -> Tensor:
    """What the numbers of value that ``_finite`` left out add to the rows that see them."""
    value = value.detach()
    total = value.new_zeros(())
    if not torch.isfinite(value).all():
        seen = visible.to(torch.float32)
        for number in (math.inf, -math.inf, math.nan):
            here = value.isnan() if math.isnan(number) else value == number
            total = total + torch.where(seen @ here.to(torch.float32) > 0, number, 0.0)
    return total.to(value.dtype)


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _heads_first(x: Tensor, layout: str) -> Tensor:
    """(*batch, heads, length, dim) from either layout; being its own inverse, also the way back."""
    return x.transpose(-3, -2) if layout == "bshd" else x


def _expand_heads(x: Tensor, heads: int) -> Tensor:
    """Repeats each key or value head for the contiguous group of query heads that shares it."""
    return x if x.shape[-3] == heads else x.repeat_interleave(heads // x.shape[-3], dim=-3)


def _per_batch(lengths: Tensor) -> Tensor:
    return lengths[..., None, None, None]


def _entry(x: Tensor | None, n: int, dims: int) -> Tensor | None:
    """Entry n of the leading dimension of a tensor that has all its dimensions; 0 if broadcast."""
    return x if x is None or x.dim() < dims else x[n if x.shape[0] > 1 else 0]


def _crop(x: Tensor | None, queries: int, keys: int) -> Tensor | None:
    """The part of a mask or bias that belongs to a sequence shorter than the longest one."""
    if x is None:
        return None
    x = x[..., :keys] if x.shape[-1] > 1 else x
    return x[..., :queries, :] if x.dim() > 1 and x.shape[-2] > 1 else x


def _select(x: Tensor, index: Index | None, dim: int) -> Tensor:
    if index is None:
        return x
    size = x.shape[dim]
    chosen = torch.as_tensor(range(size)[index] if isinstance(index, slice) else index)
    return x.index_select(dim, chosen.to(x.device, torch.int64) % max(size, 1))
