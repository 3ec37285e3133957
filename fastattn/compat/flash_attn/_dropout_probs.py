"""S_dmask: the probabilities of attention, negative where dropout dropped them. For tests."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastattn import reference
from fastattn.functional import _arguments

Philox = tuple[int, int]


def next_philox(q: Tensor, dropout_p: float) -> Philox | None:
    """The (seed, offset) that the next call of attention will draw; None without dropout."""
    if dropout_p == 0.0:
        return None
    with torch.random.fork_rng(devices=[q.device] if q.is_cuda else []):
        seed, offset = _arguments.dropout(dropout_p, q)["philox"].tolist()
    return seed, offset


def dense(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    scores: dict[str, Any],
    dropout_p: float,
    philox: Philox | None,
) -> Tensor:
    """(batch, heads, queries, keys), or nothing without dropout."""
    if philox is None:
        return q.new_empty(0)
    query, key = _wide(q, k)
    probs = reference.attention_weights(query, key, lse.detach(), **scores)
    return _signed(probs, dropout_p, philox).to(q.dtype)


def packed(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    bounds: tuple[Tensor, Tensor, int, int],
    scores: dict[str, Any],
    dropout_p: float,
    philox: Philox | None,
) -> Tensor:
    """(sequences, heads, max_seqlen_q, max_seqlen_k), or nothing without dropout."""
    if philox is None:
        return q.new_empty(0)
    cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k = bounds
    sizes = (cu_seqlens_q.shape[0] - 1, q.shape[1], int(max_seqlen_q), int(max_seqlen_k))
    probs = q.new_zeros(sizes, dtype=lse.dtype)
    options = {name: x for name, x in scores.items() if name != "alibi_slopes"}
    query, key = _wide(q, k)
    tensors = {"query": query, "key": key, "alibi_slopes": scores["alibi_slopes"]}
    parts = reference.sequences(cu_seqlens_q, cu_seqlens_k, tensors)
    rows = cu_seqlens_q.tolist()
    for n, part in enumerate(parts):
        part["lse"] = lse.detach()[:, rows[n] : rows[n + 1]]
        found = reference.attention_weights(**part, **options, layout="bshd")
        probs[n, :, : found.shape[1], : found.shape[2]] = found
    return _signed(probs, dropout_p, philox).to(q.dtype)


def _wide(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(x.detach().to(torch.promote_types(x.dtype, torch.float32)) for x in tensors)


def _signed(probs: Tensor, dropout_p: float, philox: Philox) -> Tensor:
    keep = reference.philox.dropout_mask(probs.shape, dropout_p, philox).to(probs.device)
    return torch.where(keep, probs, -probs)
