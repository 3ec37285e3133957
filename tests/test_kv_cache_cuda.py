"""Caches on CUDA, where the host reads no positions, lengths and pages: what they lead out of the
cache is not written, and a captured step serves all lengths.

On an emulated GPU as far as that goes (FASTATTN_CUDA=emulate), whose tensors the host then does not
read either.
"""

import random

import pytest
import torch
from attention_options import skip_on_gpu
from cache_cases import Caches, rope_tables
from cuda_cases import hidden_from_host
from generation_cases import VOCAB, language_model, prompts
from host_reads import no_host_reads
from test_attention_bounds import fenced
from test_attention_with_cache import CASES, check

import fastattn.functional as fa
from fastattn import _C, reference
from fastattn.nn import KVCache, PagedKVCache, SlidingWindowKVCache
from fastattn.support import cuda_level
from fastattn.testing import randn, running_on

gpu = pytest.mark.skipif(cuda_level() != "cuda", reason="no GPU, or a build without CUDA")
emulated = pytest.mark.skipif(not _C.emulated_levels, reason="a build without an emulated GPU")


@pytest.fixture
def cuda():
    level = cuda_level()
    if level is None:
        pytest.skip("no GPU, nor an emulated one")
    with running_on(level), hidden_from_host():
        yield level


# What the host has not checked


class Write:
    """A write whose arrays hold anything, and what it must do."""

    def __init__(self, seed, form, storage):
        self.pick, self.form = random.Random(seed), form
        shape = {"batch": 3, "kv_heads": 2, "capacity": 11, "head_dim": 8, "page_size": 4}
        more = {"layout": self.pick.choice(["bhsd", "bshd"]), "quantized": seed % 3 == 0}
        self.caches = Caches(storage, **shape, **more, seed=seed)
        self.new = self.pick.choice([1, 6, 15])
        packed = form in ("packed", "slots")
        self.pair = self.caches.rows_of(self.new, seed=seed, packed=packed)
        self.options = self.caches.options()
        if storage == "paged":
            table = self.caches.block_table.clone()
            table[0, 1], table[2, 0] = self.pick.choice([-1, -9, 99]), len(self.stores()[0])
            self.options["block_table"] = self.table = table
        if form == "packed":
            bounds = sorted(self.pick.randrange(self.new + 1) for _ in range(3))
            self.options["cu_seqlens"] = torch.tensor([0, *bounds])
        elif form != "slots" and self.pick.random() < 0.5:
            counts = [self.pick.randint(-2, self.new + 4) for _ in range(3)]
            self.options["lengths"] = torch.tensor(counts)
        self.positions = self.draw_positions()

    def stores(self):
        return self.caches.tensors()

    def draw_positions(self):
        room = self.caches.capacity
        wild = [-1, -7, room - 1, room, room + 3, 2**33, -(2**40), 2**62]

        def draw():
            return self.pick.choice([self.pick.randrange(room), self.pick.choice(wild)])

        if self.form == "slots":
            return torch.tensor([self.pick.randint(-3, 60) for _ in range(self.new)])
        if self.form == "rows":
            return torch.tensor([[draw() for _ in range(self.new)] for _ in range(3)])
        return torch.tensor([draw() for _ in range(3)])

    def rows(self):
        """(sequence, position) of every new row, None where it is none."""
        if self.form == "slots":
            yield from ((0, slot) for slot in self.positions.tolist())
            return
        if self.form == "packed":
            bounds, starts = self.options["cu_seqlens"].tolist(), self.positions.tolist()
            for token in range(self.new):
                found = [b for b in range(3) if bounds[b] <= token < bounds[b + 1]]
                yield (found[0], starts[found[0]] + token - bounds[found[0]]) if found else None
            return
        counts = self.options.get("lengths", torch.tensor([self.new] * 3)).tolist()
        for b in range(3):
            for i in range(self.new):
                at = self.positions[b].tolist()
                position = at[i] if self.form == "rows" else at + i
                yield (b, position) if i < counts[b] else None

    def slot(self, b, position):
        """Of all rows of all entries; -1: it has none."""
        entries, size = len(self.stores()[0]), self.caches.rows
        if position < 0:
            return -1
        if self.form == "slots":
            return position if position < entries * size else -1
        if self.caches.storage == "ring":
            return b * size + position % size
        if self.caches.storage != "paged":
            return b * size + position if position < size else -1
        page = position // size
        entry = self.table[b, page].item() if page < self.table.shape[1] else -1
        return entry * size + position % size if 0 <= entry < entries else -1

    def meant(self):
        """The caches as they must be, by the reference."""
        caches = self.caches.copy()
        slots = [-1 if row is None else self.slot(*row) for row in self.rows()]
        heads = 2 if self.caches.layout == "bhsd" else 3  # a dimension of key, and of no packed one
        pair = [
            (x.transpose(1, 2) if heads == 2 else x).flatten(0, 1) if x.dim() == 4 else x
            for x in self.pair
        ]
        options = {n: x for n, x in caches.options().items() if n not in ("block_table", "ring")}
        reference.kv_cache_update(*caches.tensors(), *pair, torch.tensor(slots), **options)
        return caches


FORMS = [
    *((form, storage) for form in ("sequences", "rows") for storage in ("contiguous", "ring")),
    *(("sequences", "paged"), ("rows", "paged"), ("packed", "contiguous"), ("packed", "ring")),
    *(("packed", "paged"), ("slots", "contiguous")),
]


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize(("form", "storage"), FORMS)
def test_rows_without_a_place_are_not_written(cuda, form, storage, seed):
    write = Write(seed, form, storage)
    meant = write.meant()
    fa.kv_cache_update(*write.stores(), *write.pair, write.positions, **write.options)
    assert write.caches.same_bytes_as(meant)


@pytest.mark.parametrize("seed", range(6))
def test_bounds_that_are_none_touch_no_other_memory(cuda, seed):
    pick = random.Random(seed)
    caches = Caches("contiguous", batch=3, capacity=9)
    before = caches.copy()
    key, value = caches.rows_of(7, seed=seed, packed=True)
    bounds = torch.tensor([pick.choice([-5, 0, 3, 7, 99, 2**40]) for _ in range(4)])
    fa.kv_cache_update(*caches.tensors(), key, value, torch.tensor([0, 1, 2]), cu_seqlens=bounds)
    for name in caches.views:
        before.views[name].copy_(caches.views[name])
    assert caches.same_bytes_as(before)


@pytest.mark.parametrize("at_end", [False, True])
@pytest.mark.parametrize("storage", ["contiguous", "ring", "paged"])
def test_nothing_is_read_beside_the_arguments(cuda, storage, at_end):
    """All of which lie at a page that traps, and hold what leads away from them."""
    skip_on_gpu("the fence is one of the CPU")
    wild = torch.tensor([5, 2**40, -(2**40)])
    caches = Caches(storage, batch=3, capacity=12, head_dim=16, page_size=4)
    views = {name: fenced(x.contiguous(), at_end) for name, x in caches.views.items()}
    options = {n: x for n, x in caches.options().items() if n != "block_table"}
    if storage == "paged":
        table = torch.tensor([[0, 99, -1], [2**31 - 1, 1, 2], [3, 4, -(2**31)]])
        options["block_table"] = fenced(table, at_end)
    rope = tuple(fenced(x, at_end) for x in rope_tables(8, 16))
    rows = [fenced(randn(3, 2, 5, 16, seed=seed), at_end) for seed in (1, 2, 3)]
    for positions in (wild, wild.unsqueeze(-1).expand(3, 5).contiguous()):
        fa.kv_cache_update(
            *(*views.values(), *rows[:2], fenced(positions, at_end)),
            lengths=fenced(torch.tensor([2**33, -4, 5]), at_end),
            rope=rope,
            **options,
        )
    for lengths in (torch.tensor([3, 2**40, -9]), torch.tensor([-1, 12, 11])):
        fa.attention_with_cache(
            *(rows[2], *views.values()),
            cache_lengths=fenced(lengths, at_end),
            key=rows[0],
            value=rows[1],
            key_starts=fenced(torch.tensor([2**40, -3, 1]), at_end),
            rope=rope,
            window=(4, 0),
            **options,
        )


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("quantized", [False, True])
def test_what_stands_outside_of_the_tables_is_nan(cuda, interleaved, quantized):
    caches = Caches(batch=2, capacity=12, head_dim=16, quantized=quantized)
    rope = rope_tables(6, 8)
    fa.kv_cache_update(*caches.tensors(), *caches.rows_of(12, seed=3), 0, **caches.options())
    key, value = caches.rows_of(4, seed=1)
    query = randn(2, 4, 4, 16, seed=2)
    out = fa.attention_with_cache(
        *(query, *caches.tensors()),
        cache_lengths=torch.tensor([4, 0]),
        key=key,
        value=value,
        rope=rope,
        interleaved=interleaved,
        causal=True,
        **caches.options(),
    )
    stored = caches.views["k_scale" if quantized else "k_cache"]
    rows = stored[0, :, 4:8] if quantized else stored[0, :, 4:8, 0]
    assert rows[:, :2].isfinite().all() and rows[:, 2:].isnan().all()
    assert out[0, :, :2].isfinite().all() and out[0, :, 2:].isnan().all()
    assert out[1].isfinite().all()


def test_a_full_cache_takes_no_more(cuda):
    """And the other sequences do not notice."""
    caches = Caches(batch=3, capacity=8)
    fa.kv_cache_update(*caches.tensors(), *caches.rows_of(8, seed=1), 0)
    alone = caches.copy()
    query, (key, value) = randn(3, 4, 2, 8, seed=4), caches.rows_of(2, seed=3)
    lengths = torch.tensor([3, 7, 100])
    got = fa.attention_with_cache(
        query, *caches.tensors(), cache_lengths=lengths, key=key, value=value, causal=True
    )
    want = fa.attention_with_cache(
        *(query[:1], *(x[:1] for x in alone.tensors())),
        cache_lengths=lengths[:1],
        key=key[:1],
        value=value[:1],
        causal=True,
    )
    torch.testing.assert_close(got[:1], want)
    meant = alone  # which has the rows of the first sequence, and gets the one that has a place
    reference.kv_cache_update(
        *meant.tensors(), key, value, torch.tensor([[-1, -1], [7, -1], [-1, -1]])
    )
    assert caches.same_bytes_as(meant) and got.isfinite().all()


@emulated
@pytest.mark.parametrize("seed", range(0, len(CASES), 4))
def test_attention_needs_nothing_that_the_host_reads(cuda, seed):
    check(CASES[seed], seed)


# Places and memory


@pytest.mark.parametrize("form", ["rows", "slots", "ring"])
def test_the_later_row_stays_in_any_order_of_threads(cuda, form):
    pick, runs = random.Random(1), []
    caches = Caches("ring" if form == "ring" else "contiguous", capacity=8, batch=2)
    key, value = caches.rows_of(100, seed=1, packed=form == "slots")
    many = [pick.randrange(16 if form == "slots" else 8) for _ in range(200)]
    positions = {
        "rows": torch.tensor(many).view(2, 100),
        "slots": torch.tensor(many[:100]),
        "ring": torch.tensor([3, 1000]),
    }[form]
    for seed in range(3):
        if _C.emulated_levels:
            _C.set_emulator_seed(seed + 1)
        got = caches.copy()
        fa.kv_cache_update(*got.tensors(), key, value, positions, **got.options())
        runs.append(got)
    want = caches.copy()
    reference.kv_cache_update(*want.tensors(), key, value, positions, **want.options())
    assert all(run.same_bytes_as(want) for run in runs)


@pytest.mark.parametrize("far", ["entries", "heads", "rows"])
def test_caches_beyond_32_bits(cuda, far, tmp_path):
    skip_on_gpu("its memory has no holes")
    step = 2**31 + 64
    size = 2 * step + 4096
    strides = {
        "entries": (step, 64, 16, 1),
        "heads": (64, step, 16, 1),
        "rows": (64, 16, step, 1),
    }[far]
    shape = (2, 2, 2, 16)
    views = []
    for name in ("key", "value"):
        path = tmp_path / name
        with path.open("wb") as file:
            file.truncate(size)
        memory = torch.from_file(str(path), shared=True, size=size, dtype=torch.int8)
        views.append(memory.as_strided(shape, strides))
    scales = [torch.zeros(shape[:3]) for _ in range(2)]
    near = [torch.zeros(shape, dtype=torch.int8) for _ in range(2)]
    rows = [randn(2, 2, 2, 16, seed=seed) for seed in (1, 2)]
    options = {"k_scale": scales[0], "v_scale": scales[1]}
    fa.kv_cache_update(*views, *rows, 0, **options)
    fa.kv_cache_update(*near, *rows, 0, **options)
    assert all(torch.equal(x, y) for x, y in zip(views, near, strict=True))


# Steps


@pytest.mark.parametrize("positions", ["rope", "learned", "sinusoidal", "alibi"])
@pytest.mark.parametrize("kind", [KVCache, SlidingWindowKVCache, PagedKVCache])
@torch.no_grad()
def test_a_decode_step_reads_no_tensor(monkeypatch, kind, positions):
    """Not on a GPU either, where checks are the device's."""
    for module in ("base", "contiguous"):
        require = f"fastattn.nn.cache.{module}.require"
        monkeypatch.setattr(require, lambda right, message: torch._assert_async(right, message))
    model = language_model(window=5 if kind is SlidingWindowKVCache else None, positions=positions)
    cache = model.make_cache(3, 32, kind=kind)
    if kind is PagedKVCache:
        cache.reserve(7)
    tokens = prompts(length=7)
    for _ in range(12):
        with no_host_reads():
            logits = model(tokens, cache=cache, rows=-1)
            cache.advance(tokens.shape[1])
            tokens = logits.argmax(-1, keepdim=True)
            if kind is PagedKVCache:
                cache.reserve(1)
    assert cache.lengths.tolist() == [7 + 11] * 3


def captured(step):
    """A graph of the step, which ran a few times before, as torch asks for."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph


class Decoding:
    """A model that chooses one token after another, from its cache."""

    def __init__(self, kind, dtype=torch.float32, device="cuda"):
        window = 5 if kind is SlidingWindowKVCache else None
        self.model = language_model(window=window).to(device, dtype)
        self.cache = self.model.make_cache(3, 96, kind=kind)
        self.prompts = prompts(length=7).to(device)
        self.tokens = self.prompts[:, :1].clone()
        self.logits = torch.zeros(3, VOCAB, dtype=dtype, device=device)

    def begin(self):
        self.cache.reset()
        if isinstance(self.cache, PagedKVCache):
            self.cache.reserve(self.prompts.shape[1])
        logits = self.model(self.prompts, cache=self.cache, rows=-1)
        self.cache.advance(self.prompts.shape[1])
        self.tokens.copy_(logits.argmax(-1, keepdim=True))

    def prepare(self):
        if isinstance(self.cache, PagedKVCache):
            self.cache.reserve(1)

    def step(self):
        self.logits.copy_(self.model(self.tokens, cache=self.cache, rows=-1))
        self.tokens.copy_(self.logits.argmax(-1, keepdim=True))
        if not isinstance(self.cache, PagedKVCache):
            self.cache.advance(1)

    def finish(self):
        if isinstance(self.cache, PagedKVCache):
            self.cache.advance(1)


KINDS = (KVCache, SlidingWindowKVCache, PagedKVCache)


@gpu
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@torch.no_grad()
def test_one_captured_step_serves_64_lengths(kind, dtype):
    eager, replayed = Decoding(kind, dtype), Decoding(kind, dtype)
    replayed.begin()
    replayed.prepare()
    graph = captured(replayed.step)
    for decoding in (eager, replayed):
        decoding.begin()
    for _ in range(64):
        for decoding, step in ((eager, eager.step), (replayed, graph.replay)):
            decoding.prepare()
            step()
            decoding.finish()
        torch.testing.assert_close(replayed.logits, eager.logits)
        assert torch.equal(replayed.tokens, eager.tokens)
    assert replayed.cache.lengths.tolist() == [71] * 3


@gpu
@torch.no_grad()
def test_a_decode_step_never_waits_for_the_gpu():
    for kind in KINDS:
        decoding = Decoding(kind)
        decoding.begin()
        decoding.step()  # what is done once is done
        decoding.finish()
        torch.cuda.set_sync_debug_mode("error")
        try:
            for _ in range(20):
                decoding.prepare()
                decoding.step()
                decoding.finish()
        finally:
            torch.cuda.set_sync_debug_mode("default")


@gpu
@torch.no_grad()
def test_two_streams_write_and_attend_at_once():
    query, key = randn(2, 8, 1, 64, seed=1).cuda(), randn(2, 2, 1, 64, seed=2).cuda()
    streams = [torch.cuda.Stream() for _ in range(2)]
    stores = [torch.zeros(2, 2, 2, 512, 64, device="cuda").unbind() for _ in range(3)]
    lengths = torch.zeros(3, 2, dtype=torch.int64, device="cuda")
    rope = tuple(x.cuda() for x in rope_tables(512, 64))
    torch.cuda.synchronize()
    outs = {}

    def decode(n):
        for _ in range(100):
            outs[n] = fa.attention_with_cache(
                *(query, *stores[n]), cache_lengths=lengths[n], key=key, value=key, rope=rope
            )
            lengths[n] += 1

    for n, stream in enumerate(streams):
        with torch.cuda.stream(stream):
            decode(n)
    torch.cuda.synchronize()
    decode(2)
    for n in range(2):
        torch.testing.assert_close(outs[n], outs[2])
        assert all(map(torch.equal, stores[n], stores[2]))


@gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
@torch.no_grad()
def test_the_device_of_the_tensors_is_used_and_the_current_one_stays():
    decoding, on_first = Decoding(KVCache, device="cuda:1"), Decoding(KVCache, device="cuda:0")
    for each in (decoding, on_first):
        each.begin()
        each.step()
    assert torch.cuda.current_device() == 0
    torch.testing.assert_close(decoding.logits.cpu(), on_first.logits.cpu())
