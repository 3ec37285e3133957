"""The cache classes against lists of rows, under random sequences of operations."""

import copy

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from fastattn import reference
from fastattn.nn import KVCache, OutOfPages, PagedKVCache, SlidingWindowKVCache
from fastattn.testing import one_thread, randn

LAYERS, HEADS, KV_HEADS, DIM, VALUE_DIM = 2, 4, 2, 8, 6
COMMON = {"value_head_dim": VALUE_DIM}


class Model:
    """What a cache must behave like: for each request and layer, a list of rows."""

    def __init__(self, batch):
        self.requests = [self.nothing() for _ in range(batch)]

    @staticmethod
    def nothing():
        """(key, value) of each layer, rows first; and one behind the last row ever written."""
        rows = [(torch.empty(0, KV_HEADS, DIM), torch.empty(0, KV_HEADS, VALUE_DIM))] * LAYERS
        return {"layers": rows, "start": 0, "written": 0}

    def lengths(self):
        return [len(request["layers"][0][0]) for request in self.requests]

    def extend(self, b, new):
        """Appends (key, value) of each layer."""
        request = self.requests[b]
        request["layers"] = [
            tuple(torch.cat(pair) for pair in zip(old, more))
            for old, more in zip(request["layers"], new)
        ]

    def crop(self, b, length):
        request = self.requests[b]
        request["layers"] = [tuple(x[:length] for x in pair) for pair in request["layers"]]

    def choose(self, indices):
        self.requests = [copy.copy(self.requests[i]) for i in indices]


class CacheMachine(RuleBasedStateMachine):
    """Operations that all caches have."""

    most_new = 5
    quantized = False

    def __init__(self):
        super().__init__()
        self.seed = 0
        self.threads = one_thread()
        self.threads.__enter__()

    def teardown(self):
        self.threads.__exit__(None, None, None)

    def begin(self, cache):
        self.cache, self.model = cache, Model(cache.batch)
        self.options = {}

    def drawn(self, *shape):
        self.seed += 1
        return randn(*shape, seed=self.seed)

    def in_layout(self, x):
        return x.transpose(1, 2) if self.cache.layout == "bshd" else x

    def stored(self, x):
        """Rows as the cache gives them back."""
        if not self.quantized:
            return x
        numbers, scale = reference.quantize_rows(x)
        return numbers * scale.unsqueeze(-1)

    def room(self):
        """The most new rows of each request."""
        return [self.cache.capacity - n for n in self.model.lengths()]

    def visible(self, key, new, start):
        """Arguments of the reference for the last ``new`` of all rows."""
        seen = torch.arange(len(key)) >= start
        return {"causal": True, "mask": seen}

    def new_rows(self, data):
        """How many rows each request gets in a call, and the rows of query, key and value."""
        if not self.cache.batch:
            return None
        counts = [
            data.draw(st.integers(0, max(min(room, self.most_new), 0))) for room in self.room()
        ]
        return counts if sum(counts) else None

    @rule(data=st.data(), form=st.sampled_from(["padded", "packed"]))
    def attend_and_advance(self, data, form):
        counts = self.new_rows(data)
        if counts is None:
            return
        batch, longest = self.cache.batch, max(counts)
        even = min(counts) == longest
        news = [[] for _ in range(batch)]
        for layer in range(LAYERS):
            q, k, v = (
                self.drawn(batch, heads, longest, dim)
                for heads, dim in ((HEADS, DIM), (KV_HEADS, DIM), (KV_HEADS, VALUE_DIM))
            )
            if form == "packed":
                inputs = [
                    torch.cat([x[b, :, :n].transpose(0, 1) for b, n in enumerate(counts)])
                    for x in (q, k, v)
                ]
                bounds = torch.tensor([0, *torch.tensor(counts).cumsum(0).tolist()])
                out = self.cache.attend(layer, *inputs, cu_seqlens_q=bounds)
                outs = [x.transpose(0, 1) for x in out.split(counts)]
            else:
                ragged = {} if even else {"query_lengths": torch.tensor(counts)}
                inputs = (self.in_layout(x) for x in (q, k, v))
                out = self.in_layout(self.cache.attend(layer, *inputs, **ragged))
                outs = [x[:, :n] for x, n in zip(out, counts)]
            for b, n in enumerate(counts):
                new = tuple(self.stored(x[b, :, :n].transpose(0, 1)) for x in (k, v))
                news[b].append(new)
                self.assert_attends(layer, b, q[b, :, :n], new, outs[b])
        for b, new in enumerate(news):
            self.model.extend(b, new)
            request = self.model.requests[b]
            request["written"] = max(request["written"], self.model.lengths()[b])
        self.cache.advance(longest if even else torch.tensor(counts))

    def assert_attends(self, layer, b, query, new, out):
        request = self.model.requests[b]
        key, value = (torch.cat(pair) for pair in zip(request["layers"][layer], new))
        want = reference.attention(
            *(x.transpose(0, 1).double() for x in (query.transpose(0, 1), key, value)),
            **self.visible(key, query.shape[1], request["start"]),
        )
        torch.testing.assert_close(out, want.float())

    @rule(data=st.data())
    def crop(self, data):
        lengths = self.model.lengths()
        if data.draw(st.booleans()):
            wanted = [data.draw(st.integers(0, max(lengths, default=0) + 1))] * len(lengths)
            given = wanted[0] if wanted else 0
        else:
            wanted = [data.draw(st.integers(0, n + 1)) for n in lengths]
            given = torch.tensor(wanted, dtype=torch.int64)
        wanted = [min(a, b) for a, b in zip(wanted, lengths)]
        if self.can_crop(wanted):
            self.cache.crop(given)
            for b, n in enumerate(wanted):
                self.model.crop(b, n)
        else:
            with pytest.raises(ValueError, match="lengths"):
                self.cache.crop(given)

    def can_crop(self, lengths):
        return True

    @precondition(lambda self: self.cache.batch)
    @rule(data=st.data())
    def reorder(self, data):
        batch = self.cache.batch
        indices = data.draw(st.lists(st.integers(0, batch - 1), min_size=batch, max_size=batch))
        addresses = [x.data_ptr() for x in self.cache.keys]
        self.cache.reorder(torch.tensor(indices))
        assert addresses == [x.data_ptr() for x in self.cache.keys]
        self.model.choose(indices)

    @precondition(lambda self: self.cache.batch)
    @rule(data=st.data())
    def select(self, data):
        batch = self.cache.batch
        indices = data.draw(st.lists(st.integers(0, batch - 1), min_size=1, max_size=4))
        self.cache.select(indices)
        self.model.choose(indices)

    @precondition(lambda self: self.cache.batch)
    @rule(data=st.data())
    def free(self, data):
        b = data.draw(st.integers(0, self.cache.batch - 1))
        self.cache.free(b)
        self.model.requests[b] = Model.nothing()

    @rule()
    def reset(self):
        self.cache.reset()
        self.model = Model(self.cache.batch)

    @precondition(lambda self: self.cache.batch and max(self.model.lengths()) > 0)
    @rule(data=st.data())
    def pad_on_the_left(self, data):
        starts = [data.draw(st.integers(0, n)) for n in self.model.lengths()]
        self.cache.starts = starts
        for request, start in zip(self.model.requests, starts):
            request["start"] = start

    def held(self, rows):
        """The rows of the model that the cache can give back."""
        return rows

    @invariant()
    def it_holds_the_rows_of_the_model(self):
        if not hasattr(self, "cache"):
            return
        lengths = self.model.lengths()
        assert self.cache.lengths.tolist() == lengths
        for b, request in enumerate(self.model.requests):
            for layer in range(LAYERS):
                for got, rows in zip(self.cache.read(layer, b), request["layers"][layer]):
                    got = got if self.cache.layout == "bshd" else got.transpose(0, 1)
                    assert torch.equal(got, self.held(rows))


class ContiguousMachine(CacheMachine):
    @initialize(
        batch=st.integers(1, 3),
        capacity=st.integers(1, 12),
        layout=st.sampled_from(["bhsd", "bshd"]),
    )
    def create(self, batch, capacity, layout):
        dtype = torch.int8 if self.quantized else torch.float32
        shape = (LAYERS, batch, KV_HEADS, capacity, DIM)
        self.begin(KVCache(*shape, **COMMON, dtype=dtype, layout=layout))

    @rule(more=st.integers(0, 5))
    def grow(self, more):
        self.cache.grow(self.cache.capacity + more)

    @rule()
    def advance_too_far(self):
        if self.cache.batch:
            with pytest.raises(ValueError, match="rows"):
                self.cache.advance(self.cache.capacity + 1)


class QuantizedMachine(ContiguousMachine):
    quantized = True


class SlidingWindowMachine(CacheMachine):
    most_new = 11

    @initialize(
        batch=st.integers(1, 3),
        window=st.integers(0, 5),
        max_chunk=st.integers(1, 4),
        layout=st.sampled_from(["bhsd", "bshd"]),
    )
    def create(self, batch, window, max_chunk, layout):
        shape = (LAYERS, batch, KV_HEADS, window, DIM)
        self.begin(SlidingWindowKVCache(*shape, **COMMON, max_chunk=max_chunk, layout=layout))

    def room(self):
        return [self.most_new] * self.cache.batch

    def visible(self, key, new, start):
        return super().visible(key, new, start) | {"window": (self.cache.window, 0)}

    def can_crop(self, lengths):
        window, capacity = self.cache.window, self.cache.capacity
        return all(
            max(n - window, 0) >= request["written"] - capacity
            for n, request in zip(lengths, self.model.requests)
        )

    def held(self, rows):
        return rows[max(len(rows) - self.cache.window, 0) :]

    @rule()
    def accept_only_a_part(self):
        """A chunk is tried and given up, as speculative decoding does."""
        if not self.cache.batch:
            return
        n = self.cache.max_chunk
        for layer in range(LAYERS):
            tensors = (
                self.drawn(self.cache.batch, heads, n, dim)
                for heads, dim in ((HEADS, DIM), (KV_HEADS, DIM), (KV_HEADS, VALUE_DIM))
            )
            self.cache.attend(layer, *(self.in_layout(x) for x in tensors))
        for request, length in zip(self.model.requests, self.model.lengths()):
            request["written"] = max(request["written"], length + n)
        self.cache.advance(0)


class PagedMachine(CacheMachine):
    @initialize(
        batch=st.integers(1, 4),
        capacity=st.integers(1, 12),
        page_size=st.sampled_from([1, 2, 3, 5, 16]),
        pages=st.integers(1, 12),
        layout=st.sampled_from(["bhsd", "bshd"]),
        quantized=st.booleans(),
    )
    def create(self, batch, capacity, page_size, pages, layout, quantized):
        self.quantized = quantized
        dtype = torch.int8 if quantized else torch.float32
        shape = (LAYERS, batch, KV_HEADS, capacity, DIM)
        more = {"page_size": page_size, "pages": pages, "layout": layout, "dtype": dtype}
        self.begin(PagedKVCache(*shape, **COMMON, **more))

    def new_rows(self, data):
        counts = super().new_rows(data)
        return counts if counts and self.reserved(counts) else None

    def reserved(self, counts):
        before = self.state()
        try:
            self.cache.reserve(counts)
        except OutOfPages:
            assert self.state() == before
            return False
        return True

    def state(self):
        cache = self.cache
        return (cache.block_table.tolist(), cache.free_pages, cache.lengths.tolist())

    @rule(data=st.data())
    def reserve(self, data):
        """Without using it; what is reserved stays when it is asked for again."""
        counts = [data.draw(st.integers(0, n)) for n in self.room()]
        if self.reserved(counts):
            before = self.state()
            self.cache.reserve(counts)
            assert self.state() == before

    @precondition(lambda self: 0 in self.model.lengths() and max(self.model.lengths()) > 0)
    @rule(data=st.data())
    def fork(self, data):
        lengths = self.model.lengths()
        source = data.draw(st.sampled_from([b for b, n in enumerate(lengths) if n]))
        empty = [b for b, n in enumerate(lengths) if not n]
        targets = data.draw(st.lists(st.sampled_from(empty), min_size=1, unique=True))
        length = data.draw(st.none() | st.integers(0, lengths[source]))
        free = self.cache.free_pages
        self.cache.fork(source, targets, length)
        assert self.cache.free_pages >= free
        for b in targets:
            self.model.requests[b] = copy.copy(self.model.requests[source])
            self.model.crop(b, lengths[source] if length is None else length)

    @rule(pages=st.integers(0, 4), rows=st.integers(0, 5))
    def grow(self, pages, rows):
        self.cache.grow(self.cache.pages + pages, capacity=self.cache.capacity + rows)

    @invariant()
    def every_page_is_free_or_held(self):
        if not hasattr(self, "cache"):
            return
        held = [p for row in self.cache.block_table.tolist() for p in row if p >= 0]
        assert len(set(held)) + self.cache.free_pages == self.cache.pages
        assert sorted({*held} | set(self.cache._free)) == list(range(self.cache.pages))


QUICK = settings(
    max_examples=25,
    stateful_step_count=20,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)
for machine in (ContiguousMachine, QuantizedMachine, SlidingWindowMachine, PagedMachine):
    machine.TestCase.settings = QUICK
TestContiguous = ContiguousMachine.TestCase
TestQuantized = QuantizedMachine.TestCase
TestSlidingWindow = SlidingWindowMachine.TestCase
TestPaged = PagedMachine.TestCase
