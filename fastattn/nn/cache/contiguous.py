"""Caches in which each request has its own block of memory."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastattn.nn.cache.base import BaseCache, Indices, require, require_sizes


class ContiguousCache(BaseCache):
    """Entry b is request b."""

    capacity: int

    def reorder(self, indices: Indices) -> None:
        """Request b becomes a copy of what request indices[b] was, in place: for beam search.

        Args:
            indices: (batch,), any of them as often as needed.
        """
        index = self._permutation(indices)
        used = self._used_rows()
        for storage in self._storages():
            rows = self._rows(storage)[:, :used]
            rows.copy_(rows.index_select(0, index))
        self._reorder_lengths(index)

    def select(self, indices: Indices) -> None:
        """Keep only these requests, in this order; the batch has their number afterwards.

        The tensors are new ones: a compiled step is compiled again for another batch.

        Args:
            indices: (n,), any of them as often as needed.
        """
        index = self._indices("indices", indices)
        for storages in self._lists():
            for layer, storage in enumerate(storages):
                storages[layer] = storage.index_select(0, index)
        self._reorder_lengths(index)

    def _used_rows(self) -> int:
        """At least as many as hold something; where only the device knows, all of them."""
        if self.device.type != "cpu" or self.batch == 0:
            return self.capacity
        return min(int(self.lengths.max()), self.capacity)

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(num_layers={self.num_layers}, batch={self.batch}, "
            f"kv_heads={self.kv_heads}, {self._room()}, head_dim={self.head_dim}, "
            f"value_head_dim={self.value_head_dim}, dtype={self.dtype}, device={self.device}, "
            f"layout={self.layout!r}, lengths={self.lengths.tolist()})"
        )

    def _room(self) -> str:
        raise NotImplementedError


class KVCache(ContiguousCache):
    """Keys and values of up to ``capacity`` rows of each request.

    Args:
        num_layers: each has its own keys and values; the lengths are common to all.
        batch: the number of requests.
        kv_heads, head_dim, value_head_dim: of key and value; value_head_dim is head_dim by default.
        capacity: the most rows of a request. ``grow`` makes it larger.
        dtype: that of key and value, torch's default by default. torch.int8 stores a float32 scale
            for each row of each head beside int8 numbers, and takes keys and values of any dtype.
        device: where the tensors live.
        layout: "bhsd" or "bshd", of query, key, value, out and of the memory.

    Two prompts of 5 and 3 rows, padded on the right, and then one new row of each:

    >>> cache = KVCache(num_layers=1, batch=2, kv_heads=2, capacity=16, head_dim=8)
    >>> q, k, v = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 5, 8), torch.randn(2, 2, 5, 8)
    >>> prompts = torch.tensor([5, 3])
    >>> out = cache.attend(0, q, k, v, query_lengths=prompts)
    >>> cache.advance(prompts)
    >>> out = cache.attend(0, q[:, :, :1], k[:, :, :1], v[:, :, :1])
    >>> cache.advance(1)
    >>> cache
    KVCache(num_layers=1, batch=2, kv_heads=2, capacity=16, head_dim=8, value_head_dim=8, \
dtype=torch.float32, device=cpu, layout='bhsd', lengths=[6, 4])

    Beam search, speculative decoding, a longer answer, a batch without its first request:

    >>> cache.reorder([1, 1])
    >>> cache.crop(cache.lengths - torch.tensor([0, 1]))
    >>> cache.grow(32)
    >>> cache.select([1])
    >>> cache.lengths, cache.capacity
    (tensor([3], dtype=torch.int32), 32)
    """

    def __init__(
        self,
        num_layers: int,
        batch: int,
        kv_heads: int,
        capacity: int,
        head_dim: int,
        *,
        value_head_dim: int | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        layout: str = "bhsd",
    ) -> None:
        require_sizes(capacity=capacity)
        self.capacity = capacity
        super().__init__(
            *(num_layers, batch, kv_heads, head_dim),
            value_head_dim=value_head_dim,
            dtype=dtype,
            device=device,
            layout=layout,
            entries=batch,
            rows=capacity,
        )

    def grow(self, capacity: int) -> None:
        """Make room for more rows of each request; what is there is copied.

        The tensors are new ones: a compiled step is compiled again for another capacity.
        """
        require_sizes(capacity=capacity, least=self.capacity)
        for storages in self._lists():
            for layer, storage in enumerate(storages):
                larger = self._empty(self.batch, capacity, *storage.shape[3:])
                self._rows(larger)[:, : self.capacity] = self._rows(storage)
                storages[layer] = larger
        self.capacity = capacity

    def _require_room(self, name: str, lengths: Tensor) -> None:
        message = f"{name}: expected at most {self.capacity} rows, the capacity of the cache (grow)"
        require((lengths <= self.capacity).all(), message)

    def _places(self, request: int) -> tuple[Tensor, Tensor]:
        rows = torch.arange(int(self.lengths[request]), device=self.device)
        return torch.full_like(rows, request), rows

    def _room(self) -> str:
        return f"capacity={self.capacity}"


class SlidingWindowKVCache(ContiguousCache):
    """The last keys and values of each request, as many as a window needs, for any length.

    The memory is a ring of ``window + max_chunk`` rows. New rows are attended to in chunks of at
    most max_chunk, so that a prompt may be longer than the ring; then out is what the whole prompt
    would give with ``window=(window, 0)``.

    Args:
        window: how many keys before its own a query sees. Hugging Face's ``sliding_window=n`` is
            ``window=n - 1``.
        max_chunk: the most new rows that are attended to at once, and the most rows that ``crop``
            can take back.

    The others are those of :class:`KVCache`. mask and bias have no columns here that could be told
    apart: hide what is padding by ``starts`` or ``query_lengths``.

    >>> from fastattn.functional import attention
    >>> cache = SlidingWindowKVCache(1, batch=1, kv_heads=2, window=3, head_dim=8, max_chunk=4)
    >>> q, k, v = torch.randn(3, 1, 2, 10, 8)
    >>> out = cache.attend(0, q, k, v)
    >>> cache.advance(10)
    >>> whole = attention(q, k, v, window=(3, 0))
    >>> torch.testing.assert_close(out, whole)
    >>> cache.capacity, cache.lengths
    (7, tensor([10], dtype=torch.int32))
    """

    def __init__(
        self,
        num_layers: int,
        batch: int,
        kv_heads: int,
        window: int,
        head_dim: int,
        *,
        max_chunk: int = 128,
        value_head_dim: int | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        layout: str = "bhsd",
    ) -> None:
        require_sizes(window=window, least=0)
        require_sizes(max_chunk=max_chunk)
        self.window = window
        self.max_chunk = max_chunk
        self.capacity = window + max_chunk
        super().__init__(
            *(num_layers, batch, kv_heads, head_dim),
            value_head_dim=value_head_dim,
            dtype=dtype,
            device=device,
            layout=layout,
            entries=batch,
            rows=self.capacity,
        )
        # One behind the last row ever written: what is a capacity before that, the ring has lost.
        self._written = torch.zeros_like(self.lengths)

    def crop(self, lengths: int | Sequence[int] | Tensor) -> None:
        """Keep the first so many rows of each request, an int or (batch,), and forget the others.

        Raises:
            ValueError: where the ring no longer holds the window before that row; it always does
                for the last max_chunk rows that were written.
        """
        super().crop(lengths)

    def free(self, requests: Indices) -> None:
        super().free(requests)
        self._written[self._indices("requests", requests)] = 0

    def reset(self) -> None:
        super().reset()
        self._written.zero_()

    def _attend(
        self, layer: int, query: Tensor, key: Tensor | None, value: Tensor | None, **options: Any
    ) -> Any:
        for name in ("window", "mask", "bias"):
            if options.pop(name, None) is not None:
                raise ValueError(f"{name}: expected None with a sliding-window cache, got another")
        if options["causal"] is False:
            raise ValueError("causal: expected True, as the ring forgets what is behind the window")
        options["window"] = (self.window, 0)
        if self._length(query) <= self.max_chunk:
            return super()._attend(layer, query, key, value, **options)
        options.pop("max_seqlen_q", None)  # chunks have their own
        if key is None or value is None:
            raise ValueError(
                f"query: expected at most max_chunk = {self.max_chunk} rows where no key is given, "
                f"got {self._length(query)}"
            )
        if options["cu_seqlens_q"] is not None:
            return self._attend_packed_chunks(layer, query, key, value, **options)
        return self._attend_chunks(layer, query, key, value, **options)

    def _attend_chunks(
        self,
        layer: int,
        *tensors: Tensor,
        cache_lengths: Tensor,
        query_lengths: Tensor | None,
        return_lse: bool = False,
        **options: Any,
    ) -> Any:
        rows = self._length(tensors[0])
        dim = 1 if self.layout == "bshd" else 2
        if query_lengths is not None:
            query_lengths = self._counts("query_lengths", query_lengths)
            message = f"query_lengths: expected at most {rows}, the rows of query"
            require((query_lengths <= rows).all(), message)
        outs, lses = [], []
        for first in range(0, rows, self.max_chunk):
            size = min(self.max_chunk, rows - first)
            before: int | Tensor = first
            part_lengths = None
            if query_lengths is not None:
                before = query_lengths.clamp(max=first)
                part_lengths = (query_lengths - first).clamp(0, size)
            out, lse = super()._attend(
                layer,
                *(x.narrow(dim, first, size) for x in tensors),
                cache_lengths=cache_lengths + before,
                query_lengths=part_lengths,
                return_lse=True,
                **options,
            )
            outs.append(out)
            lses.append(lse)
        out = torch.cat(outs, dim)
        return (out, torch.cat(lses, -1)) if return_lse else out

    def _attend_packed_chunks(
        self,
        layer: int,
        *tensors: Tensor,
        cache_lengths: Tensor,
        cu_seqlens_q: Tensor,
        return_lse: bool = False,
        **options: Any,
    ) -> Any:
        """The next max_chunk rows of every request at once, until no request has another."""
        query = tensors[0]
        first, last = cu_seqlens_q[:-1], cu_seqlens_q[1:]
        longest = int((last - first).max()) if len(first) else 0
        out = query.new_zeros((*query.shape[:-1], self.value_head_dim))
        lse = query.new_full(
            (query.shape[1], query.shape[0]),
            -math.inf,
            dtype=torch.promote_types(query.dtype, torch.float32),
        )
        for done in range(0, max(longest, 1), self.max_chunk):
            begin = torch.minimum(first + done, last)
            sizes = torch.minimum(begin + self.max_chunk, last) - begin
            tokens = torch.repeat_interleave(begin, sizes)
            bounds = torch.nn.functional.pad(sizes.cumsum(0).to(cu_seqlens_q.dtype), (1, 0))
            tokens = tokens + torch.arange(len(tokens), device=tokens.device)
            tokens = tokens - torch.repeat_interleave(bounds[:-1], sizes)
            part, part_lse = super()._attend(
                layer,
                *(x[tokens] for x in tensors),
                cache_lengths=cache_lengths + (begin - first),
                cu_seqlens_q=bounds,
                max_seqlen_q=self.max_chunk,
                return_lse=True,
                **options,
            )
            out[tokens] = part
            lse[:, tokens] = part_lse
        return (out, lse) if return_lse else out

    def _storage_options(self, layer: int) -> dict[str, Any]:
        return super()._storage_options(layer) | {"ring": True}

    def _wrote(self, lengths: Tensor, rows: int | Tensor) -> None:
        torch.maximum(self._written, lengths + rows, out=self._written)

    def _require_room(self, name: str, lengths: Tensor) -> None:
        needed = (lengths - self.window).clamp(min=0)
        held = (needed >= self._written - self.capacity).all()
        require(held, f"{name}: the ring no longer holds the window before that row")

    def _used_rows(self) -> int:
        if self.device.type != "cpu" or self.batch == 0:
            return self.capacity
        return min(int(self._written.max()), self.capacity)

    def _reorder_lengths(self, index: Tensor) -> None:
        super()._reorder_lengths(index)
        self._written = self._reordered(self._written, index)

    def _places(self, request: int) -> tuple[Tensor, Tensor]:
        length = int(self.lengths[request])
        rows = torch.arange(max(length - self.window, 0), length, device=self.device)
        return torch.full_like(rows, request), rows % self.capacity

    def _room(self) -> str:
        return f"window={self.window}, max_chunk={self.max_chunk}"
