"""Fused attention over dense and packed tensors, and its relatives."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastattn._ops import attention as _ops
from fastattn.functional import _arguments
from fastattn.functional._arguments import Window

__all__ = ["attention", "attention_varlen", "merge_attention"]


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
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Scaled dot-product attention, forward and backward in memory linear in the length.

    ::

        s_ij  = scale * q_i . k_j
        s_ij  = softcap * tanh(s_ij / softcap)            with softcap
        s_ij += bias_ij - slope * |p_j - p_i|             with bias, alibi_slopes
        lse_i = log(sum_j exp(s_ij) + exp(sink))          j over the visible keys; sink if given
        out_i = sum_j keep_ij / (1 - dropout_p) * exp(s_ij - lse_i) v_j

    Everything composes: key j is visible to query i when all of these allow it::

        causal              p_j <= p_i
        window=(l, r)       -l <= p_j - p_i <= r    (so many besides the diagonal; None: no limit)
        mask                mask_ij is True
        query_lengths       i < query_lengths
        key_lengths         j < key_lengths

    Positions are ``p_i = query_offset + i + corner`` and ``p_j = key_offset + j``, with ``corner =
    key length - query length``, so that the last query stands at the last key, and ``corner = 0``
    for ``causal="top_left"``. With 2 queries on 4 keys, and the opposite::

        "bottom_right" (True)   "top_left"      "bottom_right"   "top_left"
            1 1 1 0              1 0 0 0             0 0            1 0
            1 1 1 1              1 1 0 0             0 0            1 1
                                                     1 0            1 1
                                                     1 1            1 1

        window=(1, 0), 4 queries on 4 keys
            1 0 0 0
            1 1 0 0
            0 1 1 0
            0 0 1 1

    A query that sees no key has out 0, lse -inf and gradients 0. What a hidden key or value holds,
    NaN included, reaches neither results nor gradients.

    Args:
        query: (\*batch, heads, queries, head_dim), any strides; float32, bfloat16, float16 or, on
            the CPU, float64 (which runs on the scalar kernels). head_dim is 1 to 512, on CUDA 256.
        key: (\*batch, kv_heads, keys, head_dim), the dtype of query. kv_heads divides heads; query
            head h attends to key head h // (heads // kv_heads), and none is ever expanded.
        value: (\*batch, kv_heads, keys, value_head_dim), the dtype of query.
        causal: False, "top_left", "bottom_right", or True, which means "bottom_right".
        window: (left, right), each >= 0 or None.
        mask: bool, True = attend; broadcasts to (\*batch, heads, queries, keys), never expanded.
        bias: added to the scores; any of the four dtypes; broadcasts as mask does. Differentiable.
        query_lengths, key_lengths: (\*batch), int32 or int64; the valid rows of each sequence.
        alibi_slopes: (heads) or (\*batch, heads). Not differentiable.
        sink: (heads), one logit of each head that joins the denominator alone. Differentiable.
        softcap: a positive number, or None.
        dropout_p: the probability to drop a weight, in [0, 1], also when a module is in eval mode.
            The mask comes from torch's default generator: torch.manual_seed repeats it.
        scale: of the products; 1 / sqrt(head_dim) by default.
        query_offset, key_offset: the positions of the first query and key, for parts of a sequence.
        layout: "bhsd" as above, or "bshd": (\*batch, length, heads, head_dim), for query, key,
            value and out.
        return_lse: return (out, lse).
        deterministic: equal calls give gradients of equal bits. None: what
            torch.use_deterministic_algorithms says. On the CPU they always do; on CUDA it takes
            time, most of it where one kernel more is needed (on Hopper it mostly is not).
        batch_invariant: the same row gives the same bits whatever else is in the batch and however
            the queries are split over calls.

    Returns:
        out, of query's shape but value's head_dim, its memory in the order of query's; and lse,
        (\*batch, heads, queries) in either layout, the natural logarithm in float32 (float64 for
        float64), differentiable too.

    Raises:
        TypeError: for the type or dtype of an argument. ValueError: for its device, shape or value.
            Both name the argument.

    Under autocast, query, key and value are cast as SDPA casts them. A second derivative or a
    forward-mode one raises. On CUDA nothing waits for the GPU, and so the lengths and bounds that
    lie there are not checked: what is out of range is brought into it.

    Source: Dao et al., FlashAttention (2022) and FlashAttention-2 (2023).

    >>> q, k, v = torch.randn(2, 4, 5, 16), torch.randn(2, 2, 7, 16), torch.randn(2, 2, 7, 16)
    >>> out, lse = attention(q, k, v, causal=True, return_lse=True)
    >>> scores = q @ k.repeat_interleave(2, dim=1).transpose(2, 3) / 4
    >>> scores = scores.masked_fill(torch.ones(5, 7).triu(3).bool(), -torch.inf)
    >>> torch.testing.assert_close(lse, scores.logsumexp(-1))
    >>> torch.testing.assert_close(out, scores.softmax(-1) @ v.repeat_interleave(2, dim=1))
    """
    if not type(query) is type(key) is type(value) is Tensor:
        _arguments.require_tensors(query=query, key=key, value=value)
    bshd = _arguments.is_bshd(layout)
    if not 4 <= query.dim() <= 5:
        dims = _arguments.LeadingDims(query)
        result = attention(
            dims.group("query", query),
            dims.group("key", key),
            dims.group("value", value),
            causal=causal,
            window=window,
            mask=dims.group_broadcast("mask", mask, 3),
            bias=dims.group_broadcast("bias", bias, 3),
            query_lengths=dims.group_sequences("query_lengths", query_lengths),
            key_lengths=dims.group_sequences("key_lengths", key_lengths),
            alibi_slopes=dims.group_broadcast("alibi_slopes", alibi_slopes, 1),
            sink=sink,
            softcap=softcap,
            dropout_p=dropout_p,
            scale=scale,
            query_offset=query_offset,
            key_offset=key_offset,
            layout=layout,
            return_lse=return_lse,
            deterministic=deterministic,
            batch_invariant=batch_invariant,
        )
        if isinstance(result, tuple):
            return dims.restore(result[0]), dims.restore(result[1])
        return dims.restore(result)

    if torch.is_autocast_enabled("cuda" if query.is_cuda else "cpu"):
        query, key, value = _arguments.autocast(query, key, value)
    if (
        not (return_lse or batch_invariant)
        and (causal is False or causal is True)
        and window is None
        and mask is None
        and bias is None
        and query_lengths is None
        and key_lengths is None
        and alibi_slopes is None
        and sink is None
        and softcap is None
        and dropout_p == 0.0
        and query_offset == 0
        and key_offset == 0
        and (deterministic is None or isinstance(deterministic, bool))
        and not _ops.needs_autograd(query, key, value)
    ):
        return _ops.attend_plain(query, key, value, causal, scale, bshd)

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
    if sink is not None:
        options["sink"] = _arguments.in_real_dtype("sink", sink, query)
    if dropout_p != 0.0:
        options |= _arguments.dropout(dropout_p, query)
    if bshd:
        options["bshd"] = True
    if batch_invariant:
        options["batch_invariant"] = batch_invariant
    if _arguments.is_deterministic(deterministic):
        options["deterministic"] = True
    out, lse = _ops.attend(query, key, value, options)
    return (out, lse) if return_lse else out


def attention_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
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
    return_lse: bool = False,
    deterministic: bool | None = None,
    batch_invariant: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention over packed sequences: sequence n owns rows cu_seqlens[n] to cu_seqlens[n + 1] - 1.

    No row attends across a bound; positions, corners and lengths are those of each sequence, and
    every option is as in :func:`attention`. Two documents of 3 and 2 rows, causal::

        cu_seqlens = (0, 3, 5)
            1 . . . .
            1 1 . . .
            1 1 1 . .
            . . . 1 .
            . . . 1 1

    Args:
        query: (total_q, heads, head_dim).
        key: (total_k, kv_heads, head_dim).
        value: (total_k, kv_heads, value_head_dim).
        cu_seqlens_q, cu_seqlens_k: (sequences + 1), int32 or int64, from 0 and never decreasing.
            Rows from the last value on belong to no sequence: they are 0 in out, -inf in lse, and 0
            in the gradients. See cu_seqlens_from_lengths and its neighbours.
        max_seqlen_q, max_seqlen_k: at least the longest sequence. Optional: on the CPU it is found,
            and on CUDA the number of rows stands for it, at the cost of idle thread blocks. One
            that is too small is refused on the CPU. On CUDA the lengths are out of the host's
            reach: the rows of a longer sequence beyond it take no part, as those that belong to
            none.
        mask, bias: broadcast to (sequences, heads, max_seqlen_q, max_seqlen_k), or to more.
        query_lengths, key_lengths: (sequences), where a sequence is padded inside its rows.
        alibi_slopes: (heads) or (sequences, heads).

    Returns:
        out (total_q, heads, value_head_dim), and with return_lse also lse (heads, total_q).

    Raises:
        TypeError, ValueError: as attention does.

    >>> q, k, v = torch.randn(3, 5, 2, 16).unbind()
    >>> bounds = torch.tensor([0, 3, 5])
    >>> out = attention_varlen(q, k, v, bounds, bounds, causal=True)
    >>> first = attention(q[None, :3], k[None, :3], v[None, :3], causal=True, layout="bshd")
    >>> torch.testing.assert_close(out[:3], first[0])
    """
    _arguments.require_tensors(
        query=query, key=key, value=value, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k
    )
    if torch.is_autocast_enabled("cuda" if query.is_cuda else "cpu"):
        query, key, value = _arguments.autocast(query, key, value)
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
    options |= {"cu_seqlens_q": cu_seqlens_q, "cu_seqlens_k": cu_seqlens_k}
    if max_seqlen_q is not None:
        options["max_seqlen_q"] = max_seqlen_q
    if max_seqlen_k is not None:
        options["max_seqlen_k"] = max_seqlen_k
    if sink is not None:
        options["sink"] = _arguments.in_real_dtype("sink", sink, query)
    options |= _arguments.dropout(dropout_p, query)
    if batch_invariant:
        options["batch_invariant"] = batch_invariant
    if _arguments.is_deterministic(deterministic):
        options["deterministic"] = True
    out, lse = _ops.attend(query, key, value, options)
    return (out, lse) if return_lse else out


def merge_attention(
    out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor, *, layout: str = "bhsd"
) -> tuple[Tensor, Tensor]:
    """Attention over the union of two disjoint sets of keys, from the result over each of them.

    ::

        lse = log(exp(lse_a) + exp(lse_b))
        out = exp(lse_a - lse) * out_a + exp(lse_b - lse) * out_b

    in float32 or wider, whatever the dtype of out. A part with lse -inf saw no key, and what its
    out holds is ignored; where both are, out is 0 and lse -inf. Differentiable in all four, as
    often as you like.

    Args:
        out_a, out_b: (*batch, heads, queries, head_dim) or, for layout "bshd", (*batch, queries,
            heads, head_dim); packed rows are the latter without a batch.
        lse_a, lse_b: (*batch, heads, queries), natural logarithms.

    Returns:
        (out, lse), out in the wider dtype of the two outs.

    >>> q, k, v = torch.randn(3, 1, 2, 6, 16).unbind()
    >>> parts = [attention(q, k[:, :, s], v[:, :, s], return_lse=True)
    ...          for s in (slice(0, 4), slice(4, 6))]
    >>> out, lse = merge_attention(*parts[0], *parts[1])
    >>> torch.testing.assert_close(out, attention(q, k, v))
    """
    bshd = _arguments.is_bshd(layout)
    _arguments.require_tensors(out_a=out_a, lse_a=lse_a, out_b=out_b, lse_b=lse_b)
    expected = list(out_a.shape[:-1])
    if bshd:
        expected[-2:] = expected[:-3:-1]
    for name, x, shape in (
        ("out_b", out_b, list(out_a.shape)),
        ("lse_a", lse_a, expected),
        ("lse_b", lse_b, expected),
    ):
        if list(x.shape) != shape:
            raise ValueError(f"{name}: expected shape {tuple(shape)}, got {tuple(x.shape)}")

    real = torch.promote_types(torch.promote_types(lse_a.dtype, lse_b.dtype), torch.float32)
    lses = torch.stack((lse_a.to(real), lse_b.to(real)))
    unseen = lses == -math.inf
    empty = unseen.all(0)
    lses = lses.masked_fill(empty, 0.0)
    shares = torch.softmax(lses, 0)  # not exp(lses - lse): a large lse has few digits left
    lse = torch.logsumexp(lses, 0).masked_fill(empty, -math.inf)
    shares, unseen = shares.masked_fill(unseen, 0.0).unsqueeze(-1), unseen.unsqueeze(-1)
    if bshd:
        shares, unseen = shares.transpose(-3, -2), unseen.transpose(-3, -2)
    outs = torch.stack((out_a, out_b)).to(real).masked_fill(unseen, 0.0)
    out = (shares * outs).sum(0)
    dtype = torch.promote_types(out_a.dtype, out_b.dtype)
    return out.to(dtype), lse
