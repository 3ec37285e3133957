"""A cache whose requests share a pool of pages."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastattn.nn.cache.base import BaseCache, Indices, integers, require_sizes

_NO_PAGE = -1


class OutOfPages(RuntimeError):
    """The pool has too few free pages for what was asked; nothing has changed."""


class PagedKVCache(BaseCache):
    """Keys and values in pages of ``page_size`` rows that requests take from a common pool.

    A request holds pages for the rows it has, not for those it may get. Requests can share the
    pages of a common prefix (``fork``) or history (``reorder``): a page that is shared is copied
    when somebody writes to it, and free again when the last of them gives it up.

    Rows need pages before they are written: ``reserve`` takes them. In eager mode ``update`` and
    ``attend`` call it where the host knows how many rows there are; before a compiled step or one
    that a CUDA graph captures, and with lengths on a device, it is for you to call. So are
    ``advance`` and all else that changes lengths, behind the step: the host counts along, and
    waits for a GPU where a number of rows lies there (an int does not).

    Args:
        capacity: the most rows of one request, rounded up to whole pages.
        pages: the number of pages in the pool; by default enough for every request to be full.
        page_size: the rows of a page, any number.

    The others are those of :class:`KVCache`.

    Two answers to one prompt of 5 rows share its first page, and part at its second:

    >>> cache = PagedKVCache(1, batch=2, kv_heads=2, capacity=16, head_dim=8, page_size=4)
    >>> q, k, v = torch.randn(3, 2, 2, 5, 8)
    >>> out = cache.attend(0, q, k, v, query_lengths=torch.tensor([5, 0]))
    >>> cache.advance([5, 0])
    >>> cache.fork(0, 1)
    >>> cache.pages - cache.free_pages
    2
    >>> out = cache.attend(0, q[:, :, :1], k[:, :, :1], v[:, :, :1])
    >>> cache.advance(1)
    >>> cache.pages - cache.free_pages, cache.lengths
    (3, tensor([6, 6], dtype=torch.int32))

    The first is done, and its place is another's:

    >>> cache.free(0)
    >>> out = cache.attend(0, q, k, v, query_lengths=torch.tensor([5, 1]))
    >>> cache.advance([5, 1])
    >>> cache
    PagedKVCache(num_layers=1, batch=2, kv_heads=2, capacity=16, pages=8, page_size=4, head_dim=8, \
value_head_dim=8, dtype=torch.float32, device=cpu, layout='bhsd', lengths=[5, 7], free_pages=4)
    """

    def __init__(
        self,
        num_layers: int,
        batch: int,
        kv_heads: int,
        capacity: int,
        head_dim: int,
        *,
        pages: int | None = None,
        page_size: int = 16,
        value_head_dim: int | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        layout: str = "bhsd",
    ) -> None:
        require_sizes(batch=batch, capacity=capacity, page_size=page_size)
        max_pages = -(-capacity // page_size)
        pages = batch * max_pages if pages is None else pages
        require_sizes(pages=pages)
        super().__init__(
            *(num_layers, batch, kv_heads, head_dim),
            value_head_dim=value_head_dim,
            dtype=dtype,
            device=device,
            layout=layout,
            entries=pages,
            rows=page_size,
        )
        self.page_size = page_size
        self.capacity = max_pages * page_size
        self.block_table = torch.full(
            (batch, max_pages), _NO_PAGE, dtype=torch.int32, device=self.device
        )
        self._pages: list[list[int]] = [[] for _ in range(batch)]
        self._rows_of = [0] * batch  # the lengths, as the host knows them
        self._users = [0] * pages
        self._free = list(range(pages - 1, -1, -1))
        self._ready: int | None = None  # so many rows of every request need nothing; None: unknown

    @property
    def pages(self) -> int:
        """The pages of the pool."""
        return len(self._users)

    @property
    def free_pages(self) -> int:
        """The pages that no request holds."""
        return len(self._free)

    @property
    def nbytes(self) -> int:
        return super().nbytes + self.block_table.nbytes

    def reserve(self, rows: int | Sequence[int] | Tensor) -> None:
        """Take the pages for the next rows of each request, an int or (batch,).

        A page that these rows would be written to while others share it is copied, in all layers.
        Pages that are reserved already are not taken again.

        Raises:
            OutOfPages: where the pool has too few. Nothing has changed then: ``free`` a request, or
                ``grow``.
            ValueError: for more rows than the capacity.
        """
        if isinstance(rows, int) and self._ready is not None and rows <= self._ready:
            return
        counts = self._host_counts("rows", rows)
        copied, added = self._plan(counts)
        needed = len(copied) + sum(added)
        if needed > len(self._free):
            raise OutOfPages(
                f"rows: expected a need of at most {len(self._free)} free pages, got {needed}; the "
                f"pool has {self.pages} pages of {self.page_size} rows"
            )
        self._copy_pages([(request, self._take_page()) for request in copied])
        for request, count in enumerate(added):
            if count:
                self._append(request, [self._take_page() for _ in range(count)])
        self._ready = min(counts, default=0)

    def advance(self, rows: int | Sequence[int] | Tensor) -> None:
        counts = self._host_counts("rows", rows)
        lengths = [a + b for a, b in zip(self._rows_of, counts, strict=True)]
        for request, length in enumerate(lengths):
            held = len(self._pages[request]) * self.page_size
            if length > held:
                raise ValueError(
                    f"rows: expected at most the {held - self._rows_of[request]} rows that are "
                    f"reserved for request {request}, got {length - self._rows_of[request]}"
                )
        self.lengths += rows if isinstance(rows, int) else self._counts("rows", rows)
        self._rows_of = lengths
        self._ready = None

    def crop(self, lengths: int | Sequence[int] | Tensor) -> None:
        """Keep the first so many rows of each request, an int or (batch,), and forget the others.

        A request that has fewer rows keeps them all. Pages that are no longer needed are free.
        """
        self.lengths.copy_(torch.minimum(self.lengths, self._counts("lengths", lengths)))
        for request, length in enumerate(self._host_counts("lengths", lengths)):
            self._rows_of[request] = min(self._rows_of[request], length)
            self._drop_unused(request)

    def free(self, requests: Indices) -> None:
        """Forget all rows of these requests: their pages are free, their places for others."""
        index = self._indices("requests", requests)
        super().free(index)
        for request in index.tolist():
            self._rows_of[request] = 0
            self._drop_unused(request)

    def reset(self) -> None:
        super().reset()
        self._rows_of = [0] * self.batch
        for request in range(self.batch):
            self._drop_unused(request)

    def fork(self, source: int, targets: Indices, length: int | None = None) -> None:
        """Let requests that have no rows begin as copies of another one, or of its first rows.

        Nothing is copied: they share its pages, until somebody writes to one of them.

        Args:
            source: a request.
            targets: requests without rows.
            length: the rows to share; all of them by default.
        """
        (origin,) = self._indices("source", [source]).tolist()
        index = self._indices("targets", targets)
        chosen = index.tolist()
        rows = self._rows_of[origin] if length is None else length
        require_sizes(length=rows, least=0)
        if rows > self._rows_of[origin]:
            raise ValueError(f"length: expected at most {self._rows_of[origin]}, got {rows}")
        if len(set(chosen)) < len(chosen) or any(self._rows_of[target] for target in chosen):
            raise ValueError(f"targets: expected different requests without rows, got {chosen}")
        for target in chosen:
            self._drop_unused(target)
            shared = self._pages[origin][: self._page_count(rows)]
            for page in shared:
                self._users[page] += 1
            self._append(target, shared)
            self._rows_of[target] = rows
        self.lengths[index] = rows
        if self._starts is not None:
            self._starts[index] = self._starts[origin].clone()
        self._ready = None

    def reorder(self, indices: Indices) -> None:
        """Request b becomes what request indices[b] was, by sharing its pages: for beam search.

        Args:
            indices: (batch,), any of them as often as needed.
        """
        self._choose(self._permutation(indices))

    def select(self, indices: Indices) -> None:
        """Keep only these requests, in this order; the batch has their number afterwards.

        Lengths and block_table are new tensors: a compiled step is compiled again.

        Args:
            indices: (n,), any of them as often as needed.
        """
        self._choose(self._indices("indices", indices))

    def grow(self, pages: int | None = None, *, capacity: int | None = None) -> None:
        """Make the pool or the capacity of each request larger; what is there stays.

        The tensors are new ones: a compiled step is compiled again.

        Args:
            pages: the new number of pages.
            capacity: the new most rows of one request, rounded up to whole pages.
        """
        if capacity is not None:
            require_sizes(capacity=capacity, least=self.capacity)
        if pages is not None:
            require_sizes(pages=pages, least=self.pages)
            self._grow_pool(pages)
        if capacity is not None:
            more = -(-capacity // self.page_size) - self.block_table.shape[1]
            self.block_table = torch.nn.functional.pad(self.block_table, (0, more), value=_NO_PAGE)
            self.capacity = self.block_table.shape[1] * self.page_size

    def __repr__(self) -> str:
        return (
            f"PagedKVCache(num_layers={self.num_layers}, batch={self.batch}, "
            f"kv_heads={self.kv_heads}, capacity={self.capacity}, pages={self.pages}, "
            f"page_size={self.page_size}, head_dim={self.head_dim}, "
            f"value_head_dim={self.value_head_dim}, dtype={self.dtype}, device={self.device}, "
            f"layout={self.layout!r}, lengths={self._rows_of}, free_pages={self.free_pages})"
        )

    def _prepare(self, rows: int | Tensor) -> None:
        if torch.compiler.is_compiling():
            return
        if isinstance(rows, Tensor) and (rows.device.type != "cpu" or rows.dim() != 1):
            return
        self.reserve(rows)

    def _host_counts(self, name: str, counts: int | Sequence[int] | Tensor) -> list[int]:
        """_counts, as numbers of the host."""
        if isinstance(counts, int) and not isinstance(counts, bool) and counts >= 0:
            return [counts] * self.batch
        return self._counts(name, counts).tolist()

    def _plan(self, counts: list[int]) -> tuple[list[int], list[int]]:
        """The requests whose last page must be copied, and how many pages each request lacks."""
        copied: list[int] = []
        added: list[int] = []
        left: Counter[int] = Counter()  # users that a page loses by the copies
        for request, count in enumerate(counts):
            pages, length = self._pages[request], self._rows_of[request]
            if length + count > self.capacity:
                raise ValueError(
                    f"rows: expected at most {self.capacity - length} more of request {request}, "
                    f"the capacity of the cache (grow), got {count}"
                )
            added.append(max(self._page_count(length + count) - len(pages), 0))
            page = pages[length // self.page_size] if length % self.page_size else None
            if count and page is not None and self._users[page] - left[page] > 1:
                copied.append(request)
                left[page] += 1
        return copied, added

    def _page_count(self, rows: int) -> int:
        return -(-rows // self.page_size)

    def _take_page(self) -> int:
        page = self._free.pop()
        self._users[page] = 1
        return page

    def _give_up(self, pages: list[int]) -> None:
        for page in pages:
            self._users[page] -= 1
            if self._users[page] == 0:
                self._free.append(page)

    def _append(self, request: int, pages: list[int]) -> None:
        first = len(self._pages[request])
        self._pages[request] += pages
        self.block_table[request, first : first + len(pages)] = integers(
            "pages", pages, self.device
        )

    def _drop_unused(self, request: int) -> None:
        """Gives up the pages behind the rows of a request."""
        kept = self._page_count(self._rows_of[request])
        self._ready = None
        if len(self._pages[request]) > kept:
            self._give_up(self._pages[request][kept:])
            del self._pages[request][kept:]
            self.block_table[request, kept:] = _NO_PAGE

    def _copy_pages(self, copies: list[tuple[int, int]]) -> None:
        """For each (request, new page): its copy of the page that its next row is written to."""
        if not copies:
            return
        old = []
        for request, page in copies:
            index = self._rows_of[request] // self.page_size
            old.append(self._pages[request][index])
            self._pages[request][index] = page
            self.block_table[request, index] = page
        source, target = (
            integers("pages", x, self.device) for x in (old, [page for _, page in copies])
        )
        for storage in self._storages():
            storage[target] = storage[source]
        self._give_up(old)

    def _choose(self, index: Tensor) -> None:
        for request in range(self.batch):
            self._drop_unused(request)
        before, chosen = self._pages, index.tolist()
        self._pages = [list(before[request]) for request in chosen]
        self._rows_of = [self._rows_of[request] for request in chosen]
        for page in (page for pages in self._pages for page in pages):
            self._users[page] += 1
        for pages in before:
            self._give_up(pages)
        self._reorder_lengths(index)
        self.block_table = self._reordered(self.block_table, index)
        self._ready = None

    def _grow_pool(self, pages: int) -> None:
        for storages in self._lists():
            for layer, storage in enumerate(storages):
                larger = self._empty(pages, self.page_size, *storage.shape[3:])
                larger[: self.pages] = storage
                storages[layer] = larger
        self._free[:0] = range(pages - 1, self.pages - 1, -1)
        self._users += [0] * (pages - self.pages)

    def _storage_options(self, layer: int) -> dict[str, Any]:
        return super()._storage_options(layer) | {"block_table": self.block_table}

    def _places(self, request: int) -> tuple[Tensor, Tensor]:
        rows = torch.arange(self._rows_of[request], device=self.device)
        return self.block_table[request, rows // self.page_size].long(), rows % self.page_size
