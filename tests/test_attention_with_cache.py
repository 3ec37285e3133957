"""Attention over caches is attention over the sequences that they hold."""

import math
import random

import pytest
import torch
from attention_options import here, skip_without_kernels
from cache_cases import Caches, rope_tables
from test_attention_ecosystem import Recorder
from torch._dynamo.testing import CompileCounterWithBackend

import fastattn
import fastattn.functional as fa
from fastattn import reference
from fastattn.testing import (
    DTYPES,
    assert_accurate,
    covering_sample,
    default_dtype,
    one_thread,
    randn,
    restride,
    to_float64,
)

TOTAL = 53


class Whole:
    """Whole sequences of 3 requests, and attention over each of them at once."""

    def __init__(self, dtype=None, *, head_dim=16, value_dim=None, layout="bhsd", **options):
        self.dtype, self.layout, self.options = dtype or default_dtype(), layout, options
        # TMA brings rows of whole chunks alone.
        self.for_tma = default_dtype() != torch.float32
        value_dim = value_dim or (16 if self.for_tma else 12)
        shapes = ((3, 4, TOTAL, head_dim), (3, 2, TOTAL, head_dim), (3, 2, TOTAL, value_dim))
        self.inputs = [randn(*s, seed=i + 1, dtype=self.dtype) for i, s in enumerate(shapes)]

    def attend(self, dtype):
        """(out, lse) in dtype, by the reference."""
        options = {
            n: to_float64(x) if dtype == torch.float64 else x for n, x in self.options.items()
        }
        query, key, value = (x.to(dtype) for x in self.inputs)
        rope = options.pop("rope", None)
        interleaved = options.pop("interleaved", False)
        if rope is not None:
            at = torch.arange(TOTAL)
            tables = tuple(to_float64(x) for x in rope) if dtype == torch.float64 else rope
            query, key = (
                reference.apply_rope(x, *tables, positions=at, interleaved=interleaved)
                for x in (query, key)
            )
        with one_thread():
            return reference.attention(query, key, value, **options, return_lse=True)

    def rows(self, first, last):
        """query, key and value of rows first[b] to last[b], NaN where a request has fewer."""
        most = max(b - a for a, b in zip(first, last))
        parts = []
        for x in self.inputs:
            part = x.new_full((*x.shape[:2], most, x.shape[3]), math.nan)
            for b in range(3):
                part[b, :, : last[b] - first[b]] = x[b, :, first[b] : last[b]]
            parts.append(part.transpose(1, 2).contiguous() if self.layout == "bshd" else part)
        return parts

    def caches(self, storage, page_size=16, capacity=TOTAL, quantized=False):
        shape = {"batch": 3, "kv_heads": 2, "capacity": capacity, "layout": self.layout}
        dims = {"head_dim": self.inputs[1].shape[-1], "value_dim": self.inputs[2].shape[-1]}
        more = {"page_size": page_size, "dtype": self.dtype, "quantized": quantized}
        more["aligned"] = self.for_tma
        return Caches(storage, **shape, **dims, **more)


def steps_of(split):
    """The lengths of all requests after each call."""
    done, pick = [0, 0, 0], random.Random(4)
    sizes = {"tokens": [1], "chunks": [7, 16, 1, 33], "halves": [34]}.get(split)
    for n in range(TOTAL):
        if sizes:
            new = [sizes[n % len(sizes)]] * 3
        else:  # prefill of one beside decoding of another, and a third that waits
            new = [pick.choice([0, 1, 1, 2, 5, 20]) for _ in range(3)]
        after = [min(a + b, TOTAL) for a, b in zip(done, new)]
        if after != done:
            yield done, after
        done = after


def attend_in_steps(whole, caches, split, kernels=None, **options):
    """(out, lse) of all rows, computed through the caches; ``kernels`` receives the names of those
    that ran."""
    query, kernels = whole.inputs[0], set() if kernels is None else kernels
    out = query.new_full((*query.shape[:-1], whole.inputs[2].shape[-1]), math.nan)
    lse = torch.full(
        query.shape[:-1], math.nan, dtype=torch.promote_types(query.dtype, torch.float32)
    )
    for first, last in steps_of(split):
        new = torch.tensor([b - a for a, b in zip(first, last)])
        q, k, v = whole.rows(first, last)
        ragged = {} if (new == new[0]).all() else {"query_lengths": new}
        k_cache, v_cache = caches.tensors()
        arguments = {"query": q, "k_cache": k_cache, "v_cache": v_cache, "key": k, "value": v}
        arguments |= {"cache_lengths": torch.tensor(first, dtype=torch.int32), **ragged}
        arguments |= {**caches.options(), **options}
        kernels.add(fastattn.explain(**arguments).kernel)
        part, part_lse = fa.attention_with_cache(**arguments, return_lse=True)
        part = part.transpose(1, 2) if whole.layout == "bshd" else part
        for b, n in enumerate(new.tolist()):
            assert not part[b, :, n:].any() and (part_lse[b, :, n:] == -math.inf).all()
            out[b, :, first[b] : last[b]] = part[b, :, :n]
            lse[b, :, first[b] : last[b]] = part_lse[b, :, :n]
    return out, lse


def assert_whole(whole, got):
    for name, x, want, eager in zip(
        ("out", "lse"), got, whole.attend(torch.float64), whole.attend(whole.dtype)
    ):
        assert_accurate(x, want, eager, name, dtype=whole.dtype)


OPTIONS = {
    "causal": {"causal": True},
    "window": {"causal": True, "window": (9, 0)},
    "everything": {
        "causal": True,
        "window": (20, None),
        "softcap": 4.0,
        "alibi_slopes": fa.alibi_slopes(4),
        "sink": randn(4, seed=9),
        "rope": rope_tables(TOTAL, 12),
        "scale": 0.3,
    },
    "interleaved": {"causal": True, "rope": rope_tables(TOTAL, 16), "interleaved": True},
}
SPLITS = ("tokens", "chunks", "halves", "mixed")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("options", OPTIONS)
def test_any_split_of_a_sequence_gives_what_the_whole_gives(level, dtype, split, options):
    given = here(OPTIONS[options])
    whole = Whole(dtype, **given)
    got = attend_in_steps(whole, whole.caches("contiguous"), split, **given)
    assert_whole(whole, got)


@pytest.mark.parametrize("page_size", [1, 16, 17, 256])
@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
def test_any_split_through_pages_of_any_size(level, page_size, split, layout):
    given = here(OPTIONS["everything"])
    whole = Whole(layout=layout, **given)
    caches, kernels = whole.caches("paged", page_size), set()
    assert_whole(whole, attend_in_steps(whole, caches, split, kernels, **given))
    has_boxes = level == "sm90" and page_size % 8 == 0 and split != "tokens"
    assert any("/sm90/" in kernel for kernel in kernels) == has_boxes


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("left", [0, 1, 9])
def test_any_split_through_a_ring_past_its_window(level, dtype, split, left):
    options = {"window": (left, 0), "softcap": 4.0, "rope": rope_tables(TOTAL, 8)}
    whole = Whole(dtype, **options)
    longest = max(max(b - a for a, b in zip(*step)) for step in steps_of(split))
    rows = left + longest
    rows += -rows % 8 if whole.for_tma else 0
    caches, kernels = whole.caches("ring", capacity=rows), set()
    assert_whole(whole, attend_in_steps(whole, caches, split, kernels, **options))
    assert any("/sm90/" in kernel for kernel in kernels) == (level == "sm90" and split != "tokens")


def int8_bounds(query, key, value, scale):
    """What rounding keys and values to int8 may change at most: of (out, lse).

    Half a step of a row x is max |x| / 254. So a score is off by at most

        e = scale * |q|_1 * max |k| / 254

    which bounds lse too; softcap makes it smaller. Weights change by 2 tanh(e / 2) <= e in
    sum, and values by half a step each: out is off by at most (e + 1 / 254) * max |v|.
    """
    most_k, most_v = (x.double().abs().amax((-2, -1)).repeat_interleave(2, 1) for x in (key, value))
    scores = abs(scale) * query.double().abs().sum(-1) * most_k.unsqueeze(-1) / 254
    return (scores + 1 / 254).unsqueeze(-1) * most_v[..., None, None], scores


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("storage", ["contiguous", "paged", "ring"])
@pytest.mark.parametrize("softcap", [None, 4.0])
def test_int8_is_within_its_bound(level, dtype, storage, softcap):
    options = {"window": (TOTAL - 8, 0), "softcap": softcap, "sink": randn(4, seed=9)}
    whole = Whole(dtype, **options)
    capacity = TOTAL + 26 if storage == "ring" else TOTAL
    caches = whole.caches(storage, capacity=capacity, quantized=True)
    got = attend_in_steps(whole, caches, "chunks", **options)
    bounds = int8_bounds(*whole.inputs, 0.25)
    exact = whole.attend(torch.float64)
    rounded = whole.attend(dtype)
    for x, want, eager, bound in zip(got, exact, rounded, bounds):
        slack = 2 * (eager - want).abs().max() + 4 * torch.finfo(dtype).eps * want.abs().max()
        assert ((x - want).abs() <= bound + slack).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("split", SPLITS)
def test_int8_is_exact_for_what_it_holds(level, dtype, split):
    """Keys and values that are int8 numbers times a power of two lose nothing."""
    whole = Whole(dtype, causal=True)
    for i in (1, 2):
        x = (whole.inputs[i].float() * 30).round().clamp(-127, 127)
        x[..., 0] = 127
        whole.inputs[i] = (x / 64).to(dtype)
        assert torch.equal(whole.inputs[i].float() * 64, x)
    caches = whole.caches("paged", quantized=True)
    assert_whole(whole, attend_in_steps(whole, caches, split, causal=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("queries", [1, 40])
def test_the_scale_of_a_hidden_key_may_be_anything(level, dtype, queries):
    query, seen = randn(2, 4, queries, 16, seed=1, dtype=dtype), torch.arange(70) % 7 != 3
    k_cache, v_cache = ((randn(2, 2, 70, 16, seed=seed) * 30).to(torch.int8) for seed in (2, 3))
    results = []
    for hidden in (1.0, math.nan, math.inf):
        scales = torch.where(seen, 0.03, hidden).expand(2, 2, 70).contiguous()
        cache = {"k_scale": scales, "v_scale": scales, "cache_lengths": 70}
        results.append(fa.attention_with_cache(query, k_cache, v_cache, **cache, mask=seen))
    for result in results[1:]:
        torch.testing.assert_close(result, results[0])


# Everything composes

AXES = {
    "storage": ("contiguous", "contiguous", "ring", "paged", "paged"),
    "dtype": (*DTYPES, torch.float64),
    "quantized": (False, False, True),
    "layout": ("bhsd", "bshd"),
    "aligned": (False, True),
    "head_dim": (3, 8, 17, 64),
    "value_dim": (None, 5, 32),
    "heads": ((1, 1), (4, 2), (6, 1), (3, 3), (14, 2)),
    "page_size": (1, 3, 16, 17, 64),
    "capacity": (40, 90, 300),
    "queries": (0, 1, 1, 2, 3, 5, 9, 16, 17, 40),
    "rows": ("dense", "ragged", "packed"),
    "new": (True, True, False),
    "starts": (False, True),
    "rope": (None, "half", "interleaved"),
    "causal": (False, True),
    "window": (None, "left", "both"),
    "mask": (None, "full", "keys", "one"),
    "bias": (None, "full", "heads"),
    "alibi": (False, True),
    "sink": (False, True),
    "softcap": (None, 3.0),
    "batch_invariant": (False, False, True),
}


def fits(case):
    if case["storage"] == "ring":
        free = case["mask"] is None and case["bias"] is None
        return free and case["window"] is not None and case["queries"] < case["capacity"]
    return case["queries"] <= case["capacity"]


CASES = covering_sample(AXES, 150, 11, fits)


class Case:
    """Caches with random rows, NaN elsewhere, and a call that fits them."""

    def __init__(self, case, seed):
        pick = random.Random(seed)
        heads, kv_heads = case["heads"]
        names = ("storage", "dtype", "quantized", "layout", "aligned", "head_dim", "value_dim")
        shape = {n: case[n] for n in (*names, "page_size", "capacity")}
        self.caches = Caches(**shape, batch=3, kv_heads=kv_heads, seed=seed)
        self.case, self.pick, self.seed = case, pick, seed
        queries, room, ring = case["queries"], self.caches.capacity, case["storage"] == "ring"
        most = 3 * room if ring else room - (queries if case["new"] else 0)
        least = queries if case["rope"] and not case["new"] else 0  # no query before the first row
        before = [pick.choice([least, pick.randint(least, most), most]) for _ in range(3)]
        self.fill(before, ring)
        counts = [queries] * 3
        packed = case["rows"] == "packed"
        if case["rows"] != "dense":
            counts = [pick.choice([0, 1, queries, pick.randint(0, queries)]) for _ in range(3)]
            counts = [min(n, queries) for n in counts]
        integer = pick.choice([torch.int32, torch.int64])
        options = {"cache_lengths": torch.tensor(before, dtype=integer)}
        self.after = [a + n for a, n in zip(before, counts)] if case["new"] else before
        rows = queries
        if case["rows"] == "ragged":
            options["query_lengths"] = torch.tensor(counts, dtype=integer)
        if packed:
            bounds = [0, *torch.tensor(counts).cumsum(0).tolist()]
            options["cu_seqlens_q"] = torch.tensor(bounds, dtype=integer)
            options["max_seqlen_q"] = queries
            rows = bounds[-1] + pick.choice([0, 2])
        if case["starts"]:
            starts = [pick.choice([pick.randint(0, n), n + 3]) for n in self.after]
            options["key_starts"] = torch.tensor(starts, dtype=integer)
        self.query = self.query_of(rows, heads, packed)
        if case["new"]:
            pair = self.caches.rows_of(rows, seed=seed + 9, packed=packed)
            options |= dict(zip(("key", "value"), pair))
        if case["rope"]:
            tables = rope_tables(4 * room, case["head_dim"] // 2 * 2, dtype=case["dtype"])
            options |= {"rope": tables, "interleaved": case["rope"] == "interleaved"}
        options |= self.scores(heads, queries)
        self.options = options

    def query_of(self, rows, heads, packed):
        dim = self.case["head_dim"]
        if packed:
            shape = (rows, heads, dim)
        else:
            shape = (
                (3, heads, rows, dim) if self.case["layout"] == "bhsd" else (3, rows, heads, dim)
            )
        return randn(*shape, seed=self.seed, dtype=self.case["dtype"])

    def fill(self, before, ring):
        """Writes rows 0 to before[b], or the last ones of a ring."""
        room = self.caches.capacity
        new = min(max(before, default=0), room)
        first = torch.tensor([max(n - new, 0) for n in before])
        at = first.unsqueeze(-1) + torch.arange(new)
        at = torch.where(at < torch.tensor(before).unsqueeze(-1), at, -1)
        pair = self.caches.rows_of(new, seed=self.seed + 5)
        reference.kv_cache_update(*self.caches.tensors(), *pair, at, **self.caches.options())

    def scores(self, heads, queries):
        case, pick, columns = self.case, self.pick, self.caches.capacity
        options = {n: case[n] for n in ("causal", "softcap", "batch_invariant")}
        if case["window"]:
            left = pick.randint(0, columns - queries)
            right = None if case["window"] == "left" else pick.choice([0, 3])
            options["window"] = (left, right)
        shapes = {
            "full": (3, heads, queries, columns),
            "keys": (columns,),
            "one": (3, 1, 1, columns),
            "heads": (1, heads, queries, 1),
        }
        if case["mask"]:
            options["mask"] = randn(*shapes[case["mask"]], seed=self.seed + 20) < 0.8
        if case["bias"]:
            options["bias"] = randn(*shapes[case["bias"]], seed=self.seed + 21)
        if case["alibi"]:
            shape = pick.choice([(heads,), (3, heads)])
            options["alibi_slopes"] = randn(*shape, seed=self.seed + 22).abs() * 0.2
        if case["sink"]:
            options["sink"] = randn(heads, seed=self.seed + 23)
        return options

    def run(self, function):
        """(out, lse) and the caches after the call."""
        caches = self.caches.copy()
        results = function(
            *(self.query, *caches.tensors()), **caches.options(), **self.options, return_lse=True
        )
        return results, caches

    def read(self, caches, dtype):
        """(out, lse) of the reference, over caches that hold the new rows already."""
        options = {n: x for n, x in self.options.items() if n not in ("key", "value")}
        options["cache_lengths"] = torch.tensor(self.after)
        views, query = caches.views, self.query.to(dtype)
        if dtype == torch.float64:
            options = {n: to_float64(x) for n, x in options.items()}
            if "rope" in options:
                options["rope"] = tuple(x.double() for x in options["rope"])
            views = {n: to_float64(x) for n, x in views.items()}
        stored = caches.options() | {n: x for n, x in views.items() if "scale" in n}
        return reference.attention_with_cache(
            *(query, views["k_cache"], views["v_cache"]), **stored, **options, return_lse=True
        )


@pytest.mark.parametrize("seed", range(len(CASES)))
def test_everything_composes(level, seed):
    check(CASES[seed], seed)


def check(drawn, seed):
    skip_without_kernels(drawn["dtype"])
    case = Case(drawn, seed)
    results, caches = case.run(fa.attention_with_cache)
    with one_thread():
        _, meant = case.run(reference.attention_with_cache)
        exact, eager = case.read(caches, torch.float64), case.read(caches, drawn["dtype"])
    if drawn["rope"] and drawn["new"]:
        for name, x in caches.views.items():
            y = meant.views[name]
            if x.dtype == torch.int8:  # a tie may fall to either side
                assert (x.int() - y.int()).abs().max() <= 1
            else:
                torch.testing.assert_close(x, y, equal_nan=True)
    else:
        assert caches.same_bytes_as(meant)
    for name, got, want, plain in zip(("out", "lse"), results, exact, eager):
        assert got.dtype == plain.dtype
        assert_accurate(got, want, plain, name, magnitude=4.0, dtype=drawn["dtype"])


# Padding


def singles(inputs, counts, **options):
    """(out, lse) of every sequence alone, in a cache of its own."""
    for b, n in enumerate(counts):
        q, k, v = (x[b : b + 1, :, :n] for x in inputs)
        one = Caches(batch=1, kv_heads=2, capacity=48, head_dim=16, dtype=q.dtype)
        yield fa.attention_with_cache(
            *(q, *one.tensors()), cache_lengths=0, key=k, value=v, return_lse=True, **options
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("side", ["left", "right", "packed"])
@pytest.mark.parametrize("storage", ["contiguous", "paged"])
def test_padded_batches_have_the_bits_of_single_samples(level, dtype, side, storage):
    counts, longest = [30, 0, 1, 17, 40], 40
    shapes = ((5, 4, longest, 16), (5, 2, longest, 16), (5, 2, longest, 16))
    inputs = [randn(*s, seed=i + 1, dtype=dtype) for i, s in enumerate(shapes)]
    options = {
        "causal": True,
        "window": (21, 0),
        "rope": rope_tables(64, 16),
        "alibi_slopes": fa.alibi_slopes(4),
        "sink": randn(4, seed=8),
        "softcap": 5.0,
        "batch_invariant": True,
    }
    caches = Caches(storage, batch=5, capacity=48, head_dim=16, dtype=dtype)
    lengths = torch.tensor(counts)
    padded, more = [], {"cache_lengths": 0}
    for x in inputs:
        parts = [x[b, :, :n] for b, n in enumerate(counts)]
        if side == "packed":
            padded.append(torch.cat(parts, 1).transpose(0, 1))
        else:
            y = torch.full_like(x, math.nan)
            for b, part in enumerate(parts):
                n = counts[b]
                y[b, :, longest - n if side == "left" else 0 :][:, :n] = part
            padded.append(y)
    if side == "left":
        more["key_starts"] = longest - lengths
    elif side == "right":
        more["query_lengths"] = lengths
    else:
        more["cu_seqlens_q"] = torch.tensor([0, *lengths.cumsum(0).tolist()])
    out, lse = fa.attention_with_cache(
        *(padded[0], *caches.tensors()),
        key=padded[1],
        value=padded[2],
        return_lse=True,
        **(more | caches.options() | options),
    )
    first = 0
    for b, (want, want_lse) in enumerate(singles(inputs, counts, **options)):
        n = counts[b]
        if side == "packed":
            got, got_lse = out[first : first + n].transpose(0, 1), lse[:, first : first + n]
        else:
            at = slice(longest - n, longest) if side == "left" else slice(0, n)
            got, got_lse = out[b, :, at], lse[b, :, at]
        assert torch.equal(got, want[0]) and torch.equal(got_lse, want_lse[0])
        first += n


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("storage", ["contiguous", "ring", "paged"])
def test_batch_invariant_bits_do_not_depend_on_split_or_storage(level, dtype, storage):
    options = {"window": (30, 0), "rope": rope_tables(TOTAL, 16), "batch_invariant": True}
    whole = Whole(dtype, **options)
    query, key, value = whole.inputs
    dense = Caches(batch=3, capacity=TOTAL, head_dim=16, value_dim=12, dtype=dtype)
    want = fa.attention_with_cache(
        *(query, *dense.tensors()),
        cache_lengths=0,
        key=key,
        value=value,
        return_lse=True,
        **options,
    )
    for split in ("tokens", "mixed", "chunks"):
        caches = whole.caches(storage, capacity=TOTAL + 40)
        got = attend_in_steps(whole, caches, split, **options)
        assert all(torch.equal(a, b) for a, b in zip(got, want)), split


@pytest.mark.parametrize("side", ["left", "right"])
def test_generation_continues_from_padded_prompts(level, side):
    """Prompts of 9, 2 and 5 rows, then 20 single rows, equal the sequences alone."""
    given = here(OPTIONS["everything"])
    whole = Whole(**given)
    prompts, longest, steps = [9, 2, 5], 9, 20
    lengths = torch.tensor(prompts)
    caches = whole.caches("paged", 3)
    wanted = whole.attend(torch.float64)[0]
    starts = longest - lengths if side == "left" else None
    before = torch.zeros(3, dtype=torch.int64)
    done = [0, 0, 0]
    for step in range(steps + 1):
        new = prompts if step == 0 else [1, 1, 1]
        after = [a + b for a, b in zip(done, new)]
        rows = whole.rows(done, after)
        more = {}
        if step == 0 and side == "left":
            rows = [
                torch.stack([x[b].roll(longest - n, 1) for b, n in enumerate(prompts)])
                for x in rows
            ]
        elif step == 0:
            more["query_lengths"] = lengths
        q, k, v = rows
        out = fa.attention_with_cache(
            *(q, *caches.tensors()),
            cache_lengths=before,
            key=k,
            value=v,
            key_starts=starts,
            **(caches.options() | given | more),
        )
        before = before + (lengths if more else q.shape[2])
        for b, n in enumerate(new):
            at = slice(q.shape[2] - n, None) if side == "left" else slice(0, n)
            want = wanted[b, :, done[b] : after[b]]
            torch.testing.assert_close(out[b, :, at].double(), want, rtol=1e-5, atol=1e-5)
        done = after


# Memory


@pytest.mark.parametrize("kind", ["transposed", "fused", "strided", "columns", "guarded"])
@pytest.mark.parametrize("queries", [1, 20])
def test_any_strides(level, kind, queries):
    caches = Caches(batch=3, capacity=60, head_dim=16)
    filled = caches.rows_of(40, seed=1)
    fa.kv_cache_update(*caches.tensors(), *filled, 0)
    key, value = caches.rows_of(queries, seed=2)
    query = randn(3, 4, queries, 16, seed=3)
    options = {"cache_lengths": torch.tensor([40, 3, 0]), "causal": True}
    want = fa.attention_with_cache(query, *caches.tensors(), key=key, value=value, **options)
    k_cache, v_cache = (restride(x, kind) for x in caches.tensors())
    got = fa.attention_with_cache(
        *(restride(query, kind), k_cache, v_cache),
        key=restride(key, kind),
        value=restride(value, kind),
        **options,
    )
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    for x, y in zip((k_cache, v_cache), caches.tensors()):
        torch.testing.assert_close(x, y, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("storage", ["contiguous", "ring", "paged"])
@pytest.mark.parametrize("quantized", [False, True])
def test_reading_and_writing_touch_no_guard_band(level, storage, quantized):
    shape = {"batch": 3, "capacity": 30, "head_dim": 13, "page_size": 7}
    caches = Caches(storage, **shape, quantized=quantized)
    pick = random.Random(5)
    for step in range(60):
        queries = pick.choice([1, 2, 5, 12])
        key, value = caches.rows_of(queries, seed=step)
        lengths = torch.tensor([pick.randint(0, 30 - queries) for _ in range(3)])
        meant = caches.copy()
        reference.kv_cache_update(*meant.tensors(), key, value, lengths, **meant.options())
        fa.attention_with_cache(
            *(randn(3, 2, queries, 13, seed=step), *caches.tensors()),
            cache_lengths=lengths,
            key=key,
            value=value,
            window=(3, 0),
            **caches.options(),
        )
        assert caches.same_bytes_as(meant)


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("queries", [1, 33])
def test_the_number_of_threads_changes_no_bit(level, threads, count, queries):
    caches = Caches("paged", batch=3, capacity=400, kv_heads=2, head_dim=64, page_size=16)
    fa.kv_cache_update(*caches.tensors(), *caches.rows_of(350, seed=1), 0, **caches.options())
    query = randn(3, 8, queries, 64, seed=2)
    lengths = torch.tensor([350, 0, 199])
    runs = []
    for n in (1, count):
        threads(n)
        runs.append(
            fa.attention_with_cache(
                query, *caches.tensors(), cache_lengths=lengths, causal=True, **caches.options()
            )
        )
    assert torch.equal(*runs)


def test_empty_requests_and_batches(level):
    for storage in ("contiguous", "paged"):
        caches = Caches(storage, batch=2)
        q, (k, v) = randn(2, 4, 3, 8, seed=1), caches.rows_of(3, seed=2)
        out, lse = fa.attention_with_cache(
            q, *caches.tensors(), cache_lengths=0, return_lse=True, **caches.options()
        )
        assert not out.any() and (lse == -math.inf).all()
        none = fa.attention_with_cache(
            *(q[:, :, :0], *caches.tensors()),
            cache_lengths=5,
            key=k[:, :, :0],
            value=v[:, :, :0],
            **caches.options(),
        )
        assert none.shape == (2, 4, 0, 8)
    caches = Caches(batch=2)
    empty = (x[:0] for x in (q, *caches.tensors(), k, v))
    q, k_cache, v_cache, k, v = empty
    lengths = torch.zeros(0, dtype=torch.int32)
    out = fa.attention_with_cache(q, k_cache, v_cache, cache_lengths=lengths, key=k, value=v)
    assert out.shape == (0, 4, 3, 8)


# Errors


def right():
    caches = Caches(batch=2, kv_heads=3, capacity=9, head_dim=6, value_dim=4)
    fa.kv_cache_update(*caches.tensors(), *caches.rows_of(9, seed=1), 0)
    key, value = caches.rows_of(2, seed=1)
    arguments = dict(zip(("k_cache", "v_cache", "key", "value"), (*caches.tensors(), key, value)))
    return arguments | {"query": randn(2, 6, 2, 6, seed=4), "cache_lengths": torch.tensor([3, 7])}


def reading():
    arguments = right() | {"cache_lengths": torch.tensor([3, 9])}
    del arguments["key"], arguments["value"]
    return arguments


def in_ring():
    return right() | {"ring": True, "window": (7, 0)}


def paged():
    caches = Caches("paged", batch=2, kv_heads=3, capacity=9, head_dim=6, value_dim=4, page_size=3)
    fa.kv_cache_update(*caches.tensors(), *caches.rows_of(9, seed=1), 0, **caches.options())
    return right() | dict(zip(("k_cache", "v_cache"), caches.tensors())) | caches.options()


def quantized():
    caches = Caches(quantized=True, batch=2, kv_heads=3, capacity=9, head_dim=6, value_dim=4)
    fa.kv_cache_update(*caches.tensors(), *caches.rows_of(9, seed=1), 0, **caches.options())
    return right() | dict(zip(("k_cache", "v_cache"), caches.tensors())) | caches.options()


def packed():
    key, value = Caches(kv_heads=3, head_dim=6, value_dim=4).rows_of(5, seed=1, packed=True)
    return right() | {
        "query": randn(5, 6, 6, seed=4),
        "key": key,
        "value": value,
        "cu_seqlens_q": torch.tensor([0, 3, 5]),
    }


def rotated():
    return right() | {"rope": rope_tables(9, 6), "key_starts": torch.tensor([1, 0])}


def everything():
    return right() | {
        "query_lengths": torch.tensor([1, 2], dtype=torch.int32),
        "causal": True,
        "window": (5, None),
        "mask": torch.ones(9, dtype=torch.bool),
        "bias": torch.zeros(6, 2, 9),
        "alibi_slopes": fa.alibi_slopes(6),
        "sink": torch.zeros(6),
        "softcap": 3.0,
        "scale": 0.1,
        "batch_invariant": True,
        "return_lse": True,
    }


FORMS = (right, reading, in_ring, paged, quantized, packed, rotated, everything)
zeros, i64 = torch.zeros, torch.int64
ERRORS = [
    (right, {"query": None}, TypeError, "query"),
    (right, {"k_cache": [1.0]}, TypeError, "k_cache"),
    (right, {"query": zeros(2, 6, 2, 6).double()}, TypeError, "query|key|k_cache"),
    (right, {"query": zeros(2, 6, 2, 5)}, ValueError, "query|key|k_cache"),
    (right, {"query": zeros(2, 5, 2, 6)}, ValueError, "query|key|k_cache"),
    (right, {"query": zeros(3, 6, 2, 6)}, ValueError, "query|key|k_cache"),
    (right, {"query": zeros(6, 2, 6)}, ValueError, "query|cu_seqlens_q"),
    (right, {"value": None}, (TypeError, ValueError), "value"),
    (right, {"key": None}, (TypeError, ValueError), "key"),
    (right, {"cache_lengths": None}, TypeError, "cache_lengths"),
    (right, {"cache_lengths": 1.5}, TypeError, "cache_lengths"),
    (right, {"cache_lengths": 8}, ValueError, "cache_lengths"),
    (right, {"cache_lengths": -1}, ValueError, "cache_lengths"),
    (right, {"cache_lengths": torch.tensor([0, 8])}, ValueError, "cache_lengths"),
    (right, {"cache_lengths": torch.tensor([0, -1])}, ValueError, "cache_lengths"),
    (right, {"cache_lengths": torch.tensor([0, 1, 2])}, ValueError, "cache_lengths"),
    (right, {"cache_lengths": torch.tensor([0.0, 1.0])}, TypeError, "cache_lengths"),
    (reading, {"cache_lengths": 10}, ValueError, "cache_lengths"),
    (reading, {"cache_lengths": torch.tensor([10, 0])}, ValueError, "cache_lengths"),
    (right, {"query_lengths": torch.tensor([0, 3])}, ValueError, "query_lengths"),
    (right, {"query_lengths": torch.tensor([0])}, ValueError, "query_lengths"),
    (right, {"key_starts": torch.tensor([-1, 0])}, ValueError, "key_starts"),
    (right, {"key_starts": torch.tensor([0])}, ValueError, "key_starts"),
    (right, {"key_starts": torch.tensor([0.0, 1.0])}, TypeError, "key_starts"),
    (right, {"causal": "top_left"}, ValueError, "causal"),
    (right, {"causal": "diagonal"}, ValueError, "causal"),
    (right, {"window": (-1, 0)}, ValueError, "window"),
    (right, {"window": 3}, TypeError, "window"),
    (right, {"mask": torch.ones(2, 6, 2, 2, dtype=torch.bool)}, ValueError, "mask"),
    (right, {"mask": zeros(2, 6, 2, 9)}, TypeError, "mask"),
    (right, {"bias": zeros(2, 6, 2, 8)}, ValueError, "bias"),
    (right, {"alibi_slopes": zeros(5)}, ValueError, "alibi_slopes"),
    (right, {"sink": zeros(5)}, ValueError, "sink"),
    (right, {"softcap": -1.0}, ValueError, "softcap"),
    (right, {"layout": "sbhd"}, ValueError, "layout"),
    (in_ring, {"window": None}, ValueError, "window"),
    (in_ring, {"window": (None, 0)}, ValueError, "window"),
    (in_ring, {"window": (8, 0)}, ValueError, "window"),
    (in_ring, {"mask": torch.ones(9, dtype=torch.bool)}, ValueError, "mask"),
    (in_ring, {"bias": zeros(9)}, ValueError, "bias"),
    (paged, {"block_table": torch.tensor([[0, 1, 2], [3, 4, 99]])}, ValueError, "block_table"),
    (paged, {"block_table": torch.tensor([[0, 1, 2], [-1, 4, 5]])}, ValueError, "block_table"),
    (paged, {"block_table": torch.tensor([[0, 1, 2]])}, ValueError, "block_table|query"),
    (paged, {"block_table": zeros(2, 3)}, TypeError, "block_table"),
    (paged, {"cache_lengths": 8}, ValueError, "cache_lengths"),
    (quantized, {"k_scale": None}, (TypeError, ValueError), "k_scale"),
    (quantized, {"v_scale": zeros(2, 3, 8)}, ValueError, "v_scale"),
    (right, {"max_seqlen_q": 5}, ValueError, "max_seqlen_q"),
    (packed, {"max_seqlen_q": 1}, ValueError, "max_seqlen_q"),
    (packed, {"cu_seqlens_q": torch.tensor([0, 3, 2])}, ValueError, "cu_seqlens_q"),
    (packed, {"cu_seqlens_q": torch.tensor([0, 3, 6])}, ValueError, "cu_seqlens_q"),
    (packed, {"cu_seqlens_q": torch.tensor([0, 5])}, ValueError, "cu_seqlens_q|cache_lengths"),
    (rotated, {"rope": rope_tables(7, 6)}, ValueError, "rope|cache_lengths"),
    (rotated, {"rope": rope_tables(9, 8)}, ValueError, "rope"),
    (rotated, {"rope": rope_tables(9, 6)[0]}, (TypeError, ValueError), "rope"),
]


@pytest.mark.parametrize("number", range(len(ERRORS)))
def test_wrong_arguments_raise_by_name_and_write_nothing(number):
    make, changes, error, name = ERRORS[number]
    arguments = make() | changes
    stores = [arguments[n] for n in ("k_cache", "v_cache") if torch.is_tensor(arguments[n])]
    before = [x.clone() for x in stores]
    positional = [arguments.pop(n) for n in ("query", "k_cache", "v_cache")]
    with pytest.raises(error, match=rf"^({name})\b"):
        fa.attention_with_cache(*positional, **arguments)
    for x, kept in zip(stores, before):
        torch.testing.assert_close(x, kept, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("name", ["query", "key", "value", "bias", "sink"])
def test_gradients_are_refused(name):
    arguments = everything()
    arguments[name].requires_grad_()
    with pytest.raises((ValueError, RuntimeError), match=name):
        fa.attention_with_cache(**arguments)
    with torch.no_grad():
        fa.attention_with_cache(**arguments)


# Inside of torch


def test_the_ops_pass_opcheck():
    with Recorder() as recorder:
        for make in (reading, packed, quantized, everything):
            fa.attention_with_cache(**make())
    names = {str(function) for function, _, _ in recorder.calls}
    assert names >= {
        "fastattn.attention_with_cache.default",
        "fastattn.attention_with_cache_.default",
    }
    for function, args, kwargs in recorder.calls:
        torch.library.opcheck(function, args, kwargs)


@pytest.mark.parametrize("make", FORMS)
def test_every_form_compiles_to_one_graph(make):
    torch._dynamo.reset()
    eager, traced = make(), make()

    def step(arguments):
        return fa.attention_with_cache(**arguments)

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    results = compiled(traced), step(eager)
    torch.testing.assert_close(*results, rtol=0, atol=0)
    for name in ("k_cache", "v_cache"):
        torch.testing.assert_close(traced[name], eager[name], rtol=0, atol=0, equal_nan=True)


def test_one_graph_decodes_to_the_end():
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")

    def step(query, k_cache, v_cache, lengths, key, value):
        out = fa.attention_with_cache(
            *(query, k_cache, v_cache), cache_lengths=lengths, key=key, value=value, causal=True
        )
        lengths += 1
        return out

    compiled = torch.compile(step, backend=counter, fullgraph=True)
    whole = Whole(causal=True)
    stores = [whole.caches("contiguous") for _ in range(2)]
    lengths = [torch.zeros(3, dtype=torch.int32) for _ in range(2)]
    for n in range(TOTAL):
        q, k, v = whole.rows([n] * 3, [n + 1] * 3)
        outs = [
            function(q, *caches.tensors(), at, k, v)
            for function, caches, at in zip((step, compiled), stores, lengths)
        ]
        assert torch.equal(*outs)
    assert counter.frame_count == 1
    assert stores[0].same_bytes_as(stores[1]) and lengths[1].tolist() == [TOTAL] * 3


def test_one_graph_serves_all_numbers_of_queries():
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(fa.attention_with_cache, backend=counter, fullgraph=True, dynamic=True)
    whole = Whole(causal=True)
    for new in range(2, 20):
        rows = whole.rows([5] * 3, [5 + new] * 3)
        outs = []
        for function in (compiled, fa.attention_with_cache):
            caches = whole.caches("contiguous")
            fa.kv_cache_update(*caches.tensors(), *whole.rows([0] * 3, [5] * 3)[1:], 0)
            outs.append(
                function(
                    *(rows[0], *caches.tensors()),
                    cache_lengths=torch.tensor([5, 5, 5]),
                    key=rows[1],
                    value=rows[2],
                    causal=True,
                )
            )
        assert torch.equal(*outs)
    assert counter.frame_count <= 2
