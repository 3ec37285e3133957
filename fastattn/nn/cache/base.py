"""What all caches share: their tensors, their lengths, and the calls of a model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from fastattn.functional import kv_cache as functional

Indices = int | Sequence[int] | Tensor
Rope = tuple[Tensor, Tensor]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int8)


class BaseCache:
    """Keys and values of every layer, in ``entries`` of ``rows`` rows.

    Attributes:
        lengths: (batch,) int32, how many rows each request has. Read it, also in a compiled graph;
            change it by ``advance``, ``crop`` and the like.
        keys, values: the storage of each layer, (entries, kv_heads, rows, head_dim), or for layout
            "bshd" (entries, rows, kv_heads, head_dim).
        key_scales, value_scales: of each layer, float32, without the last dimension; None unless
            the cache is int8.
    """

    def __init__(
        self,
        num_layers: int,
        batch: int,
        kv_heads: int,
        head_dim: int,
        *,
        value_head_dim: int | None,
        dtype: torch.dtype | None,
        device: torch.device | str | None,
        layout: str,
        entries: int,
        rows: int,
    ) -> None:
        value_head_dim = head_dim if value_head_dim is None else value_head_dim
        require_sizes(
            num_layers=num_layers,
            batch=batch,
            kv_heads=kv_heads,
            head_dim=head_dim,
            value_head_dim=value_head_dim,
        )
        dtype = torch.get_default_dtype() if dtype is None else dtype
        if dtype not in _DTYPES:
            raise TypeError(f"dtype: expected one of {', '.join(map(str, _DTYPES))}, got {dtype}")
        if layout not in ("bhsd", "bshd"):
            raise ValueError(f"layout: expected 'bhsd' or 'bshd', got {layout!r}")
        self.num_layers = num_layers
        self.kv_heads = kv_heads
        self.head_dim = head_dim
        self.value_head_dim = value_head_dim
        self.dtype = dtype
        self.layout = layout
        self.lengths = torch.zeros(batch, dtype=torch.int32, device=device)
        self._starts: Tensor | None = None
        self.keys = [self._empty(entries, rows, head_dim) for _ in range(num_layers)]
        self.values = [self._empty(entries, rows, value_head_dim) for _ in range(num_layers)]
        self.key_scales: list[Tensor] | None = None
        self.value_scales: list[Tensor] | None = None
        if dtype == torch.int8:
            self.key_scales = [self._empty(entries, rows) for _ in range(num_layers)]
            self.value_scales = [self._empty(entries, rows) for _ in range(num_layers)]

    @property
    def batch(self) -> int:
        """The number of requests."""
        return self.lengths.shape[0]

    @property
    def device(self) -> torch.device:
        return self.lengths.device

    @property
    def nbytes(self) -> int:
        """The bytes of all tensors."""
        starts = [] if self._starts is None else [self._starts]
        return sum(x.nbytes for x in (*self._storages(), self.lengths, *starts))

    @property
    def starts(self) -> Tensor | None:
        """(batch,) int32: the first row of each request that is seen, where prompts are padded on
        the left; None: all. RoPE counts from there. What is assigned is copied."""
        return self._starts

    @starts.setter
    def starts(self, starts: Sequence[int] | Tensor | None) -> None:
        if starts is None:
            self._starts = None
            return
        given = integers("starts", starts, self.device)
        if given.shape != self.lengths.shape:
            raise ValueError(f"starts: expected shape ({self.batch},), got {tuple(given.shape)}")
        require((given >= 0).all(), "starts: expected numbers >= 0")
        self._starts = given.to(torch.int32, copy=True)

    def update(
        self,
        layer: int,
        key: Tensor,
        value: Tensor,
        *,
        rope: Rope | None = None,
        interleaved: bool = False,
        lengths: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> None:
        """Write key and value behind the rows of each request, without attending.

        For what is written once and read often: ``update`` every layer with the keys and values of
        an encoder, ``advance``, and then ``attend(layer, query, causal=False)``. Arguments as those
        of :func:`fastattn.functional.kv_cache_update`. RoPE turns a row by its position; padding
        on the left is for ``attend`` alone.
        """
        self._prepare(self._new_rows(key, lengths, cu_seqlens))
        functional.kv_cache_update(
            self.keys[layer],
            self.values[layer],
            key,
            value,
            self.lengths,
            rope=rope,
            interleaved=interleaved,
            lengths=lengths,
            cu_seqlens=cu_seqlens,
            **self._storage_options(layer),
        )
        self._wrote(self.lengths, self._new_rows(key, lengths, cu_seqlens))

    def attend(
        self,
        layer: int,
        query: Tensor,
        key: Tensor | None = None,
        value: Tensor | None = None,
        *,
        causal: bool = True,
        query_lengths: Tensor | None = None,
        cu_seqlens_q: Tensor | None = None,
        **options: Any,
    ) -> Any:
        """Write key and value behind the rows of each request, and attend to all of them.

        The lengths stay until :meth:`advance`: every layer, and a step that is repeated, writes to
        the same rows.

        Args:
            layer: 0 to num_layers - 1.
            query: (batch, heads, new, head_dim) in the layout of the cache, or packed, (tokens,
                heads, head_dim), with cu_seqlens_q.
            key, value: the same with kv_heads heads, or None: attend to what is there.
            causal: True unless every query may see all rows, as in cross-attention.
            query_lengths: (batch,), where the new rows are padded on the right. The rest is
                neither written nor attended, and 0 in the result. 0 leaves a request out.
            cu_seqlens_q: (batch + 1), the bounds of packed rows; a request may have none.
            options: rope=(cos, sin), interleaved, window, mask, bias, alibi_slopes, sink, softcap,
                scale, return_lse, batch_invariant and max_seqlen_q of
                :func:`fastattn.functional.attention_with_cache`.

        Returns:
            out, or (out, lse) with return_lse, as attention_with_cache.
        """
        if key is not None:
            self._prepare(self._new_rows(key, query_lengths, cu_seqlens_q))
        return self._attend(
            layer,
            query,
            key,
            value,
            cache_lengths=self.lengths,
            causal=causal,
            query_lengths=query_lengths,
            cu_seqlens_q=cu_seqlens_q,
            **options,
        )

    def advance(self, rows: int | Tensor) -> None:
        """Count the rows that every layer has written: as many of each request, or (batch,).

        Raises:
            ValueError: for more rows than there is room for.
        """
        lengths = self.lengths + self._counts("rows", rows)
        self._require_room("rows", lengths)
        self.lengths.copy_(lengths)

    def crop(self, lengths: int | Sequence[int] | Tensor) -> None:
        """Keep the first so many rows of each request, an int or (batch,), and forget the others.

        A request that has fewer rows keeps them all. After speculative decoding, for example:
        ``cache.crop(cache.lengths - rejected)``.
        """
        lengths = torch.minimum(self.lengths, self._counts("lengths", lengths))
        self._require_room("lengths", lengths)
        self.lengths.copy_(lengths)

    def free(self, requests: Indices) -> None:
        """Forget all rows of these requests, so that others can take their places."""
        index = self._indices("requests", requests)
        self.lengths[index] = 0
        if self._starts is not None:
            self._starts[index] = 0

    def reset(self) -> None:
        """Forget all rows of all requests, and the starts."""
        self.lengths.zero_()
        self._starts = None

    def read(self, layer: int, request: int) -> tuple[Tensor, Tensor]:
        """The key and value that a request has, (kv_heads, rows, head_dim), or (rows, kv_heads,
        head_dim) for layout "bshd"; of an int8 cache in float32. A copy: to look at, or to keep."""
        entries, rows = self._places(int(self._indices("request", request)))
        lists = tuple(self._lists())
        key, value = (self._rows(x[layer])[entries, rows] for x in lists[:2])
        if len(lists) > 2:
            scales = (self._rows(x[layer])[entries, rows].unsqueeze(-1) for x in lists[2:])
            key, value = (x * scale for x, scale in zip((key, value), scales, strict=True))
        if self.layout == "bshd":
            return key, value
        return key.transpose(0, 1), value.transpose(0, 1)

    def _places(self, request: int) -> tuple[Tensor, Tensor]:
        """The entry and the row in it where each row of a request is stored."""
        raise NotImplementedError

    def _attend(
        self,
        layer: int,
        query: Tensor,
        key: Tensor | None,
        value: Tensor | None,
        *,
        cache_lengths: Tensor,
        query_lengths: Tensor | None,
        cu_seqlens_q: Tensor | None,
        **options: Any,
    ) -> Any:
        results = functional.attention_with_cache(
            query,
            self.keys[layer],
            self.values[layer],
            cache_lengths=cache_lengths,
            key=key,
            value=value,
            key_starts=self._starts,
            query_lengths=query_lengths,
            cu_seqlens_q=cu_seqlens_q,
            **self._storage_options(layer),
            **options,
        )
        if key is not None:
            self._wrote(cache_lengths, self._new_rows(key, query_lengths, cu_seqlens_q))
        return results

    def _prepare(self, rows: int | Tensor) -> None:
        """What must be done before so many rows of each request are written."""

    def _wrote(self, lengths: Tensor, rows: int | Tensor) -> None:
        """What must be noted when so many rows of each request were written behind ``lengths``."""

    def _new_rows(
        self, key: Tensor, lengths: Tensor | None, cu_seqlens: Tensor | None
    ) -> int | Tensor:
        """How many rows of key each request writes."""
        if cu_seqlens is not None:
            return cu_seqlens.diff()
        return self._length(key) if lengths is None else lengths

    def _length(self, x: Tensor) -> int:
        """The length of a query or key; of packed ones all tokens."""
        return x.shape[-2 if self.layout == "bhsd" and x.dim() == 4 else -3]

    def _require_room(self, name: str, lengths: Tensor) -> None:
        """Raises where the cache cannot hold, or no longer holds, so many rows."""

    def _storage_options(self, layer: int) -> dict[str, Any]:
        """The arguments of both functions that say how this cache stores its rows."""
        options: dict[str, Any] = {"layout": self.layout}
        if self.key_scales is not None and self.value_scales is not None:
            options |= {"k_scale": self.key_scales[layer], "v_scale": self.value_scales[layer]}
        return options

    def _reorder_lengths(self, index: Tensor) -> None:
        self.lengths = self._reordered(self.lengths, index)
        if self._starts is not None:
            self._starts = self._reordered(self._starts, index)

    def _reordered(self, x: Tensor, index: Tensor) -> Tensor:
        """x[index], in the memory of x where the number of requests stays."""
        chosen = x.index_select(0, index)
        return x.copy_(chosen) if chosen.shape == x.shape else chosen

    def _empty(self, entries: int, rows: int, *columns: int) -> Tensor:
        inner = (rows, self.kv_heads) if self.layout == "bshd" else (self.kv_heads, rows)
        dtype = self.dtype if columns else torch.float32
        return torch.empty((entries, *inner, *columns), dtype=dtype, device=self.device)

    def _lists(self) -> Iterator[list[Tensor]]:
        """The tensors of all layers, by what they hold."""
        yield self.keys
        yield self.values
        if self.key_scales is not None and self.value_scales is not None:
            yield self.key_scales
            yield self.value_scales

    def _storages(self) -> Iterator[Tensor]:
        for tensors in self._lists():
            yield from tensors

    def _rows(self, storage: Tensor) -> Tensor:
        """(entries, rows, ..), whatever the layout."""
        return storage if self.layout == "bshd" else storage.transpose(1, 2)

    def _counts(self, name: str, counts: int | Sequence[int] | Tensor) -> Tensor:
        """A number of rows of each request, (batch,), checked."""
        if isinstance(counts, int | torch.SymInt) and not isinstance(counts, bool):
            if counts < 0:
                raise ValueError(f"{name}: expected a number >= 0, got {counts}")
            return torch.full_like(self.lengths, counts)
        given = integers(name, counts, self.device)
        if given.shape != self.lengths.shape:
            raise ValueError(
                f"{name}: expected an int or shape ({self.batch},), got {tuple(given.shape)}"
            )
        require((given >= 0).all(), f"{name}: expected numbers >= 0")
        return given.to(torch.int32)

    def _indices(self, name: str, requests: Indices) -> Tensor:
        """Numbers of requests, (n,) int64, checked."""
        given = integers(name, requests, self.device).to(torch.int64)
        if given.dim() > 1:
            raise ValueError(f"{name}: expected one dimension, got shape {tuple(given.shape)}")
        inside = (given >= 0) & (given < self.batch)
        require(inside.all(), f"{name}: expected numbers from 0 to {self.batch - 1}")
        return given.reshape(-1)

    def _permutation(self, indices: Indices) -> Tensor:
        """The argument of ``reorder``."""
        index = self._indices("indices", indices)
        if index.shape != self.lengths.shape:
            raise ValueError(
                f"indices: expected shape ({self.batch},), got {tuple(index.shape)}; select takes "
                "any number of them"
            )
        return index


def require(condition: Tensor, message: str) -> None:
    """ValueError unless the boolean scalar is True. On a device, and in a compiled graph, where the
    host does not wait to see it, the program fails when it gets there."""
    if torch.compiler.is_compiling() or condition.device.type != "cpu":
        torch._assert_async(condition, message)
    elif not condition:
        raise ValueError(message)


def integers(name: str, x: Indices, device: torch.device) -> Tensor:
    """An int32 or int64 tensor on the device. The host does not wait for a GPU to take it."""
    try:
        given = x if isinstance(x, Tensor) else torch.as_tensor(x, device="cpu")
    except (TypeError, RuntimeError, ValueError):
        raise TypeError(f"{name}: expected integers, got {x!r}") from None
    if given.numel() == 0 and not isinstance(x, Tensor):
        given = given.to(torch.int64)
    if given.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name}: expected dtype int32 or int64, got {given.dtype}")
    if given.device.type == "cpu" and device.type == "cuda":
        return given.pin_memory().to(device, non_blocking=True)
    return given.to(device)


def require_sizes(*, least: int = 1, **sizes: Any) -> None:
    for name, size in sizes.items():
        if not isinstance(size, int) or isinstance(size, bool):
            raise TypeError(f"{name}: expected an int, got {size!r}")
        if size < least:
            raise ValueError(f"{name}: expected a number >= {least}, got {size}")
