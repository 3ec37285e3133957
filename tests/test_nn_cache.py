"""The cache classes against lists of rows, under random sequences of operations."""

import copy

import hypothesis.strategies as st
import pytest
import torch
from cache_cases import rope_tables
from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch._dynamo.testing import CompileCounterWithBackend

import fastattn.functional as fa
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
    max_examples=40,
    stateful_step_count=25,
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


def tensors(new, *, batch=2, seed=1, layout="bhsd"):
    """query, key and value."""
    shapes = ((HEADS, DIM), (KV_HEADS, DIM), (KV_HEADS, VALUE_DIM))
    drawn = [randn(batch, heads, new, dim, seed=seed + i) for i, (heads, dim) in enumerate(shapes)]
    return drawn if layout == "bhsd" else [x.transpose(1, 2).contiguous() for x in drawn]


def contiguous(batch=2, capacity=32, **options):
    return KVCache(LAYERS, batch, KV_HEADS, capacity, DIM, **COMMON, **options)


def sliding(batch=2, window=6, max_chunk=4, **options):
    shape = (LAYERS, batch, KV_HEADS, window, DIM)
    return SlidingWindowKVCache(*shape, **COMMON, max_chunk=max_chunk, **options)


def paged(batch=2, capacity=32, page_size=5, **options):
    shape = (LAYERS, batch, KV_HEADS, capacity, DIM)
    return PagedKVCache(*shape, **COMMON, page_size=page_size, **options)


KINDS = (contiguous, sliding, paged)


@pytest.mark.parametrize("make", KINDS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_prompts_are_continued_as_they_are_alone(level, make, side):
    """Bitwise, with batch_invariant: prompts of 9 and 4 rows, and 5 more of each."""
    options = {"rope": rope_tables(32, DIM), "batch_invariant": True, "softcap": 3.0}
    prompts, steps = [9, 4], 5
    whole = tensors(9 + steps, batch=2)
    cache, alone = make(), [make(batch=1) for _ in prompts]
    if side == "left":
        cache.starts = [9 - n for n in prompts]
    done = [0, 0]
    for step in range(steps + 1):
        new = prompts if step == 0 else [1, 1]
        parts = [[x[b : b + 1, :, done[b] :][:, :, : new[b]] for x in whole] for b in range(2)]
        wide = []
        for pair in zip(*parts):
            room = torch.full((2, *pair[0].shape[1:2], max(new), pair[0].shape[3]), torch.nan)
            for b, x in enumerate(pair):
                at = slice(max(new) - new[b], None) if side == "left" else slice(0, new[b])
                room[b, :, at] = x[0]
            wide.append(room)
        ragged = side == "right" and step == 0
        more = {"query_lengths": torch.tensor(new)} if ragged else {}
        if make is paged:
            cache.reserve(new)  # the host does not look for lengths on a GPU
        for layer in range(LAYERS):
            out = cache.attend(layer, *wide, **more, **options)
            for b, one in enumerate(alone):
                want = one.attend(layer, *parts[b], **options)[0]
                at = slice(max(new) - new[b], None) if side == "left" else slice(0, new[b])
                assert torch.equal(out[b, :, at], want), (step, b)
        cache.advance(torch.tensor(new) if ragged else max(new))
        for b, one in enumerate(alone):
            one.advance(new[b])
        done = [a + b for a, b in zip(done, new)]


@pytest.mark.parametrize("make", KINDS)
@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
def test_a_prompt_at_once_or_in_parts_gives_the_same(level, make, layout):
    window = {} if make is sliding else {"window": (6, 0)}
    q, k, v = tensors(30, layout=layout)
    whole = (x.transpose(1, 2) if layout == "bshd" else x for x in (q, k, v))
    want, want_lse = fa.attention(*whole, window=(6, 0), causal=True, return_lse=True)
    dim = 2 if layout == "bhsd" else 1
    for sizes in ([30], [13, 17], [1] * 30, [4, 4, 22]):
        cache = make(layout=layout)
        outs, lses, first = [], [], 0
        for size in sizes:
            part = [x.narrow(dim, first, size) for x in (q, k, v)]
            out, lse = cache.attend(1, *part, return_lse=True, **window)
            cache.advance(size)
            outs.append(out if layout == "bhsd" else out.transpose(1, 2))
            lses.append(lse)
            first += size
        torch.testing.assert_close(torch.cat(outs, 2), want)
        torch.testing.assert_close(torch.cat(lses, 2), want_lse)


def test_a_packed_prompt_longer_than_a_ring(level):
    counts = [23, 0, 3, 9]
    whole = tensors(23, batch=4)
    packed = [
        torch.cat([x[b, :, :n] for b, n in enumerate(counts)] + [x[0, :, :2]], 1).transpose(0, 1)
        for x in whole
    ]
    bounds = torch.tensor([0, 23, 23, 26, 35], dtype=torch.int32)
    options = {"rope": rope_tables(32, DIM), "return_lse": True}
    cache, padded = sliding(batch=4), sliding(batch=4)
    out, lse = cache.attend(0, *packed, cu_seqlens_q=bounds, **options)
    lengths = torch.tensor(counts)
    want, want_lse = padded.attend(0, *whole, query_lengths=lengths, **options)
    for b, (first, n) in enumerate(zip(bounds.tolist(), counts)):
        torch.testing.assert_close(out[first : first + n].transpose(0, 1), want[b, :, :n])
        torch.testing.assert_close(lse[:, first : first + n], want_lse[b, :, :n])
    assert not out[35:].any() and (lse[:, 35:] == -torch.inf).all()
    for one in (cache, padded):
        one.advance(lengths)
    for b in range(4):
        for x, y in zip(cache.read(0, b), padded.read(0, b)):
            torch.testing.assert_close(x, y)


@pytest.mark.parametrize("make", [contiguous, paged])
def test_cross_attention_writes_once_and_reads_often(level, make):
    cache, (_, k, v) = make(), tensors(20)
    lengths = torch.tensor([20, 11])
    if make is paged:
        cache.reserve([20, 11])
    for layer in range(LAYERS):
        cache.update(layer, k, v, lengths=lengths)
    cache.advance(lengths)
    for new in (1, 7):
        q = randn(2, HEADS, new, DIM, seed=new)
        out = cache.attend(1, q, causal=False)
        torch.testing.assert_close(out, fa.attention(q, k, v, key_lengths=lengths))


@pytest.mark.parametrize("make", KINDS)
def test_int8_takes_less_than_a_third_of_float32(make):
    big = {"capacity": 1024} if make is not sliding else {"window": 1020}
    assert make(dtype=torch.int8, **big).nbytes < make(dtype=torch.float32, **big).nbytes / 2
    cache = make()
    assert cache.nbytes >= sum(x.nbytes for x in (*cache.keys, *cache.values))


@pytest.mark.parametrize("make", KINDS)
def test_one_compiled_step_decodes_to_the_end_and_allocates_no_cache(make):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    rope = rope_tables(32, DIM)
    cache, eager = make(), make()

    def step(cache, q, k, v):
        x = q
        for layer in range(LAYERS):
            x = cache.attend(layer, q + layer, k, v, rope=rope)
        return x * 2

    compiled = torch.compile(step, backend=counter, fullgraph=True)
    addresses = [x.data_ptr() for x in (*cache.keys, *cache.values, cache.lengths)]
    for n in range(30):
        inputs = tensors(1, seed=n)
        if make is paged:
            cache.reserve(1)
        assert torch.equal(compiled(cache, *inputs), step(eager, *inputs))
        cache.advance(1)
        eager.advance(1)
    assert counter.frame_count == 1
    assert addresses == [x.data_ptr() for x in (*cache.keys, *cache.values, cache.lengths)]
    for x, y in zip(cache.read(1, 1), eager.read(1, 1)):
        assert torch.equal(x, y)


def test_a_compiled_step_may_advance_by_itself():
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    cache = contiguous()

    def step(q, k, v):
        out = cache.attend(0, q, k, v)
        cache.advance(1)
        return out

    compiled = torch.compile(step, backend=counter, fullgraph=True)
    for n in range(32):
        compiled(*tensors(1, seed=n))
    assert cache.lengths.tolist() == [32, 32]
    assert counter.frame_count == 1


def test_beams_share_pages_until_they_part():
    cache = paged(batch=4, page_size=4)
    counts = torch.tensor([9, 0, 0, 0])
    for layer in range(LAYERS):
        cache.attend(layer, *tensors(9, batch=4), query_lengths=counts)
    cache.advance(counts)
    cache.fork(0, [1, 2, 3])
    assert cache.pages - cache.free_pages == 3
    for step in range(3):  # rows 9 to 11, all in the third page of each beam
        for layer in range(LAYERS):
            cache.attend(layer, *tensors(1, batch=4, seed=step))
        cache.advance(1)
        assert cache.pages - cache.free_pages == 2 + 4
    cache.reorder([2, 2, 2, 2])
    assert cache.pages - cache.free_pages == 3
    cache.crop(8)
    assert cache.pages - cache.free_pages == 2
    cache.free([0, 1, 2])
    assert cache.pages - cache.free_pages == 2
    cache.free(3)
    assert cache.free_pages == cache.pages


def test_the_last_of_those_that_share_a_page_writes_to_it_without_a_copy():
    cache = paged(batch=3, page_size=4, pages=3)
    counts = torch.tensor([3, 0, 0])
    cache.attend(0, *tensors(3, batch=3), query_lengths=counts)
    cache.advance(counts)
    cache.fork(0, [1, 2])
    assert cache.free_pages == 2
    cache.attend(0, *tensors(1, batch=3))  # two copies fit, three would not
    cache.advance(1)
    assert cache.free_pages == 0 and cache.lengths.tolist() == [4, 4, 4]


def test_pages_reserved_for_one_request_do_not_stand_for_those_of_another():
    cache = paged(page_size=2)
    cache.reserve([5, 0])
    for rows in (1, 3):
        cache.attend(0, *tensors(rows))
        cache.advance(rows)
    assert cache.pages - cache.free_pages == 3 + 2


def test_out_of_pages_says_so_and_changes_nothing():
    cache = paged(pages=5, page_size=4)
    cache.attend(0, *tensors(8))
    cache.advance(8)
    before = copy.deepcopy(cache.__dict__)
    with pytest.raises(OutOfPages, match=r"at most 1 free pages, got 2.* 5 pages"):
        cache.attend(0, *tensors(1))
    for name, x in cache.__dict__.items():
        if isinstance(x, list) and x and isinstance(x[0], torch.Tensor):
            for a, b in zip(x, before[name]):
                torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
        elif isinstance(x, torch.Tensor):
            assert torch.equal(x, before[name])
        else:
            assert x == before[name], name
    cache.grow(6)
    cache.attend(0, *tensors(1))


def test_what_was_not_reserved_cannot_be_written():
    cache = paged()
    cache.attend(0, *tensors(5))
    cache.advance(5)
    with pytest.raises(ValueError, match="block_table"):
        fa.kv_cache_update(
            *(cache.keys[0], cache.values[0], *tensors(1)[1:], cache.lengths),
            block_table=cache.block_table,
        )
    with pytest.raises(ValueError, match="rows"):
        cache.advance(1)


def test_a_deep_copy_is_independent():
    for make in KINDS:
        cache = make()
        cache.attend(0, *tensors(3))
        cache.advance(3)
        other = copy.deepcopy(cache)
        other.attend(0, *tensors(3, seed=9))
        other.advance(3)
        other.crop(1)
        assert cache.lengths.tolist() == [3, 3]
        assert torch.equal(cache.read(0, 1)[0], tensors(3)[1][1])


WRONG = [
    (lambda: contiguous(capacity=0), ValueError, "capacity"),
    (lambda: contiguous(capacity=2.0), TypeError, "capacity"),
    (lambda: contiguous(batch=True), TypeError, "batch"),
    (lambda: contiguous(dtype=torch.int16), TypeError, "dtype"),
    (lambda: contiguous(layout="sbhd"), ValueError, "layout"),
    (lambda: sliding(window=-1), ValueError, "window"),
    (lambda: sliding(max_chunk=0), ValueError, "max_chunk"),
    (lambda: paged(page_size=0), ValueError, "page_size"),
    (lambda: paged(pages=0), ValueError, "pages"),
    (lambda: contiguous().advance(-1), ValueError, "rows"),
    (lambda: contiguous().advance(1.0), TypeError, "rows"),
    (lambda: contiguous().advance(33), ValueError, "rows"),
    (lambda: contiguous().advance(torch.tensor([1, 2, 3])), ValueError, "rows"),
    (lambda: contiguous().advance(torch.tensor([-1, 2])), ValueError, "rows"),
    (lambda: contiguous().crop(-1), ValueError, "lengths"),
    (lambda: contiguous().crop([1.5, 2.0]), TypeError, "lengths"),
    (lambda: contiguous().reorder([0]), ValueError, "indices"),
    (lambda: contiguous().reorder([0, 2]), ValueError, "indices"),
    (lambda: contiguous().reorder([0, -1]), ValueError, "indices"),
    (lambda: contiguous().select(torch.tensor([True, False])), TypeError, "indices"),
    (lambda: contiguous().select([[0, 1]]), ValueError, "indices"),
    (lambda: contiguous().free(2), ValueError, "requests"),
    (lambda: contiguous().grow(31), ValueError, "capacity"),
    (lambda: setattr(contiguous(), "starts", [1]), ValueError, "starts"),
    (lambda: setattr(contiguous(), "starts", [0, -1]), ValueError, "starts"),
    (lambda: contiguous().read(0, 2), ValueError, "request"),
    (lambda: contiguous().attend(0, *tensors(33)), ValueError, "cache_lengths"),
    (lambda: contiguous().attend(0, *tensors(1), dropout_p=0.1), TypeError, ".*dropout_p"),
    (lambda: sliding().attend(0, *tensors(1), window=(3, 0)), ValueError, "window"),
    (lambda: sliding().attend(0, *tensors(1), causal=False), ValueError, "causal"),
    (lambda: sliding().attend(0, *tensors(1), bias=torch.zeros(1)), ValueError, "bias"),
    (lambda: sliding().attend(0, tensors(5)[0]), ValueError, "query"),
    (
        lambda: sliding().attend(0, *tensors(9), query_lengths=torch.tensor([10, 1])),
        ValueError,
        "query_lengths",
    ),
    (lambda: paged().reserve(36), ValueError, "rows"),
    (lambda: paged().reserve([1, -1]), ValueError, "rows"),
    (lambda: paged().grow(1), ValueError, "pages"),
    (lambda: paged().fork(0, 0, 1), ValueError, "length"),
    (lambda: paged().fork(0, [1, 1]), ValueError, "targets"),
    (lambda: paged().fork(5, 1), ValueError, "source"),
]


@pytest.mark.parametrize("number", range(len(WRONG)))
def test_wrong_arguments_raise_by_name(number):
    call, error, name = WRONG[number]
    with pytest.raises(error, match=rf"^({name})\b"):
        call()


def test_a_ring_refuses_to_go_back_behind_what_it_holds():
    cache = sliding(window=6, max_chunk=4)
    cache.attend(0, *tensors(20))
    with pytest.raises(ValueError, match=r"rows.*no longer holds"):
        cache.advance(10)
    cache.advance(20)
    for length, allowed in ((15, False), (16, True)):
        if allowed:
            cache.crop(length)
        else:
            with pytest.raises(ValueError, match=r"lengths.*no longer holds"):
                cache.crop(length)
    assert cache.lengths.tolist() == [16, 16]
