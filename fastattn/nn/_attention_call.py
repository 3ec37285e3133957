"""What the attention modules share: the arguments of a call, and what is asked of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastattn.nn.cache import KVCache, PagedKVCache, SlidingWindowKVCache
from fastattn.nn.norm import LayerNorm, RMSNorm

Cache = KVCache | SlidingWindowKVCache | PagedKVCache
QKNorm = str | Callable[[int], nn.Module]


class Given(NamedTuple):
    """The optional arguments of one call."""

    mask: Tensor | None = None
    bias: Tensor | None = None
    query_lengths: Tensor | None = None
    key_lengths: Tensor | None = None
    positions: Tensor | None = None
    cu_seqlens: Tensor | None = None
    context_cu_seqlens: Tensor | None = None
    max_seqlen: int | None = None


def default_head_dim(embed_dim: int, num_heads: int) -> int:
    if embed_dim % num_heads:
        raise ValueError(
            f"num_heads: expected a divisor of embed_dim, {embed_dim}, where no head_dim is given, "
            f"got {num_heads}"
        )
    return embed_dim // num_heads


def make_norm(kind: QKNorm | None, size: int, factory: dict[str, Any]) -> nn.Module | None:
    """The norm of queries or keys: ``qk_norm`` of Attention."""
    if kind is None:
        return None
    if not isinstance(kind, str):
        return kind(size)
    if kind == "rms":
        return RMSNorm(size, eps=1e-6, **factory)
    if kind == "layer":
        return LayerNorm(size, **factory)
    raise ValueError(f"qk_norm: expected 'rms', 'layer' or a function of the size, got {kind!r}")


def longest(given: Given) -> int:
    """The rows of the longest packed sequence; the host waits for it where nobody said it."""
    if given.max_seqlen is not None:
        return given.max_seqlen
    bounds = (given.cu_seqlens, given.context_cu_seqlens)
    lengths = torch.cat([x.diff() for x in bounds if x is not None])
    return int(lengths.max()) if len(lengths) else 0


def masked_to_lengths(given: Given, queries: int, keys: int) -> Tensor | None:
    """The mask of a call, with all that lies beyond its lengths hidden as well."""
    mask = given.mask
    for lengths, size, shape in (
        (given.query_lengths, queries, (1, queries, 1)),
        (given.key_lengths, keys, (1, 1, keys)),
    ):
        if lengths is not None:
            inside = torch.arange(size, device=lengths.device) < lengths.unsqueeze(-1)
            inside = inside.view(*lengths.shape, *shape)
            mask = inside if mask is None else mask & inside
    return mask


def skewed(x: Tensor, start: int, keys: int) -> Tensor:
    """out[..., i, j] = x[..., i, start - i + j], from distances to keys; a view if x is contiguous.

    Key j of query i is in memory where it would be if rows were one shorter and began at start.
    """
    rows, columns = x.shape[-2:]
    flat = x.reshape(*x.shape[:-2], rows * columns).narrow(-1, start, rows * (columns - 1))
    return flat.view(*flat.shape[:-1], rows, columns - 1)[..., :keys]


def layer_in(cache: Cache, layer: int | None) -> int:
    if layer is None:
        if cache.num_layers > 1:
            raise ValueError(f"layer: expected 0 to {cache.num_layers - 1} with a cache, got None")
        return 0
    if not 0 <= layer < cache.num_layers:
        raise ValueError(f"layer: expected 0 to {cache.num_layers - 1}, got {layer}")
    return layer


def as_in(cache: Cache, x: Tensor) -> Tensor:
    """(batch, length, heads, head_dim) in the layout of the cache, and back."""
    return x.transpose(1, 2) if x.dim() == 4 and cache.layout == "bhsd" else x


def require_rows(name: str, x: Tensor, size: int, packed: bool) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(x).__name__}")
    if x.shape[-1:] != (size,) or (x.dim() != 2 if packed else x.dim() < 2):
        shape = f"(rows, {size}) with cu_seqlens" if packed else f"(*batch, length, {size})"
        raise ValueError(f"{name}: expected shape {shape}, got {tuple(x.shape)}")
