"""Caches in the kernel of Hopper: pages and rings, whose rows TMA brings box by box, and few
queries over many keys."""

import math
import random

import pytest
import torch
from attention_options import skip_on_gpu
from cuda_cases import hidden_from_host
from test_attention_bounds import fenced
from test_attention_hopper import BF16, F16, POISONS, inputs_of

import fastattn
import fastattn.functional as fa
from fastattn import reference
from fastattn.testing import assert_accurate, one_thread, randn, to_float64

pytestmark = pytest.mark.usefixtures("hopper")

NOWHERE = 10**6  # in a block table, where nobody is to look


def in_pages(x, lengths, page_size, poison=math.nan):
    """(pool, block_table): the first rows of each sequence in pages of a pool in random order, with
    poison in all other rows. Where a sequence has none, the table leads nowhere."""
    batch, heads, capacity, dim = x.shape
    count = -(-capacity // page_size)
    order = list(range(batch * count + 2))
    random.Random(3).shuffle(order)
    pool = x.new_full((len(order), heads, page_size, dim), poison)
    table = torch.full((batch, count), NOWHERE, dtype=torch.int32)
    for b, length in enumerate(lengths):
        for n in range(-(-length // page_size)):
            table[b, n] = page = order[b * count + n]
            rows = x[b, :, n * page_size : min((n + 1) * page_size, length)]
            pool[page, :, : rows.shape[1]] = rows
    return pool, table


def in_ring(x, lengths, rows):
    """The last rows of each sequence, round and round; NaN in what none has been written to."""
    ring = x.new_full((*x.shape[:2], rows, x.shape[-1]), math.nan)
    for b, length in enumerate(lengths):
        for j in range(max(0, length - rows), length):
            ring[b, :, j % rows] = x[b, :, j]
    return ring


def check_kernel(arguments, kernel):
    about = fastattn.explain(**arguments)
    assert f"/{kernel}" in about.kernel, about
    return about


def check_results(got, inputs, lengths, **options):
    """(out, lse) against attention over the sequences themselves."""
    options |= {"key_lengths": lengths, "return_lse": True}
    exact = {name: to_float64(x) for name, x in inputs.items()}
    exact_options = {name: to_float64(x) for name, x in options.items()}
    with one_thread():
        want = reference.attention(**exact, **exact_options)
        eager = reference.attention(**inputs, **options)
    for name, *tensors in zip(("out", "lse"), got, want, eager, strict=True):
        assert_accurate(*tensors, name, dtype=inputs["query"].dtype)


def check_pages(inputs, lengths, page_size, kernel="sm90/", **options):
    (k, table), (v, _) = (in_pages(inputs[n], lengths, page_size) for n in ("key", "value"))
    lengths = torch.tensor(lengths)
    arguments = {"query": inputs["query"], "k_cache": k, "v_cache": v, "block_table": table}
    arguments |= {"cache_lengths": lengths, **options}
    check_kernel(arguments, kernel)
    got = fa.attention_with_cache(**arguments, return_lse=True)
    check_results(got, inputs, lengths, **options)


# ---- Pages --------------------------------------------------------------------------------------

PAGE_SIZES = (8, 16, 24, 48, 64, 96, 128, 256)


@pytest.mark.parametrize("page_size", PAGE_SIZES)
@pytest.mark.parametrize("head_dim", [64, 128])
def test_pages_of_any_multiple_of_eight_rows(page_size, head_dim):
    """And lengths that end within a page, at its end, or before the first one."""
    inputs = inputs_of(batch=(4,), heads=4, kv_heads=2, queries=40, keys=290, head_dim=head_dim)
    lengths = (290, 0, page_size, 131)
    check_pages(inputs, lengths, page_size, causal=True)
    check_pages(inputs, lengths, page_size, window=(70, 9))


@pytest.mark.parametrize("dims", [(96, 96), (72, 40), (192, 128), (192, 192), (256, 256)], ids=str)
def test_pages_of_every_kernel(dims):
    shape = {"head_dim": dims[0], "head_dim_v": dims[1], "queries": 40, "keys": 150}
    for dtype in (BF16, F16):
        inputs = inputs_of(heads=4, kv_heads=2, dtype=dtype, **shape)
        check_pages(inputs, (150,), 16, causal=True)


@pytest.mark.parametrize("head_dim", [64, 128])
def test_pages_beside_terms_of_scores(head_dim):
    """Over tiles of 48 and of 80 keys, with boxes of 16 rows of a page of 32."""
    inputs = inputs_of(heads=4, kv_heads=2, queries=70, keys=200, head_dim=head_dim)
    options = {"softcap": 3.0, "sink": randn(4, seed=5), "alibi_slopes": fa.alibi_slopes(4)}
    check_pages(inputs, (183,), 32, causal=True, **options)
    options["bias"] = randn(4, 70, 200, seed=6)
    check_pages(inputs, (183,), 40, **options)


def test_sequences_share_pages():
    inputs = inputs_of(batch=(3,), heads=4, kv_heads=2, queries=40, keys=160, head_dim=64)
    for name in ("key", "value"):  # a prompt of 64 tokens is that of all
        inputs[name][1:, :, :64] = inputs[name][:1, :, :64]
    lengths = (160, 100, 64)
    (k, table), (v, _) = (in_pages(inputs[n], lengths, 32) for n in ("key", "value"))
    k[table[1:, :2]] = v[table[1:, :2]] = math.nan
    table[1:, :2] = table[:1, :2]
    arguments = {"k_cache": k, "v_cache": v, "block_table": table, "query": inputs["query"]}
    arguments |= {"cache_lengths": torch.tensor(lengths), "causal": True}
    check_kernel(arguments, "sm90/tile")
    got = fa.attention_with_cache(**arguments, return_lse=True)
    check_results(got, inputs, torch.tensor(lengths), causal=True)


def test_packed_queries_over_pages():
    inputs = inputs_of(batch=(3,), heads=4, kv_heads=2, queries=80, keys=160, head_dim=64)
    counts, lengths = (80, 3, 50), (160, 90, 50)
    (k, table), (v, _) = (in_pages(inputs[n], lengths, 16) for n in ("key", "value"))
    packed = torch.cat([x[:, :n] for x, n in zip(inputs["query"], counts, strict=True)], 1)
    bounds = torch.tensor([0, *counts]).cumsum(0).int()
    arguments = {"query": packed.transpose(0, 1).contiguous(), "cu_seqlens_q": bounds}
    arguments |= {"k_cache": k, "v_cache": v, "block_table": table, "causal": True}
    arguments |= {"cache_lengths": torch.tensor(lengths)}
    check_kernel(arguments, "sm90/")
    out, lse = fa.attention_with_cache(**arguments, return_lse=True)
    for b, (first, count) in enumerate(zip(bounds.tolist(), counts, strict=False)):
        rows = slice(first, first + count)
        alone = {name: x[b : b + 1] for name, x in inputs.items()}
        alone["query"] = alone["query"][:, :, :count]
        got = out[rows].transpose(0, 1)[None], lse[None, :, rows]
        check_results(got, alone, torch.tensor(lengths[b : b + 1]), causal=True)


@pytest.mark.parametrize("page_size, head_dim", [(16, 64), (32, 128)])
@pytest.mark.parametrize("poison", POISONS)
@pytest.mark.parametrize("poisoned", ["key", "value"])
def test_poison_in_a_page_reaches_only_those_who_see_it(page_size, head_dim, poison, poisoned):
    inputs = inputs_of(heads=2, queries=100, keys=300, head_dim=head_dim)

    def attend(window):
        (k, table), (v, _) = (in_pages(inputs[n], (300,), page_size) for n in ("key", "value"))
        arguments = {"query": inputs["query"], "k_cache": k, "v_cache": v, "block_table": table}
        arguments |= {"cache_lengths": torch.tensor([300]), "window": window}
        check_kernel(arguments, "sm90/")
        return fa.attention_with_cache(**arguments, return_lse=True)

    bad, queries = 250, torch.arange(100)
    for window in ((40, 25), (None, 0)):
        inputs[poisoned][:, :, bad] = 0
        clean = attend(window)
        inputs[poisoned][:, :, bad] = poison
        last = queries + 200 + window[1]
        sees = (bad <= last) & (bad >= (0 if window[0] is None else queries + 200 - window[0]))
        got = attend(window)
        for x, want in zip(got, clean, strict=True):
            torch.testing.assert_close(x[:, :, ~sees], want[:, :, ~sees])
        if poisoned == "value":
            assert not got[0][:, :, sees].isfinite().any()


def test_nothing_is_read_for_what_a_block_table_holds_beyond_the_pool():
    """A page that is not there is brought into the pool, as on all kernels of CUDA."""
    inputs = inputs_of(batch=(2,), heads=4, kv_heads=2, queries=40, keys=96, head_dim=64)
    (k, table), (v, _) = (in_pages(inputs[n], (96, 96), 32) for n in ("key", "value"))
    wild, last = table.clone(), len(k) - 1
    wild[0, 1], wild[0, 2], wild[1, 0] = -7, NOWHERE, -1
    tame = wild.clamp(0, last)
    for pool in (k, v):
        pool.nan_to_num_(nan=0.25)
    with hidden_from_host():
        got, want = (
            fa.attention_with_cache(
                *(inputs["query"], k, v), cache_lengths=96, block_table=entries, causal=True
            )
            for entries in (wild, tame)
        )
    assert torch.equal(got, want)


@pytest.mark.parametrize("at_end", [True, False])
@pytest.mark.parametrize("storage", ["paged", "ring"])
def test_nothing_is_read_beside_the_arguments(storage, at_end):
    """All of which lie at a page that traps; tiles have more keys than the block table has rows."""
    skip_on_gpu("the fence is one of the CPU")
    k, v = (fenced(randn(7, 2, 16, 64, seed=seed, dtype=BF16), at_end) for seed in (1, 2))
    query = fenced(randn(2, 4, 15, 64, seed=3, dtype=BF16), at_end)
    options = {"causal": True}
    if storage == "paged":
        table = torch.tensor([[0, 99, -1, 4, 5], [2**31 - 1, 1, 2, 3, -(2**31)]])
        options["block_table"] = fenced(table, at_end)
    else:
        k, v, options = k[:2], v[:2], {"ring": True, "window": (1, 0)}
    for lengths in (torch.tensor([80, 2**40]), torch.tensor([-9, 79])):
        arguments = {"query": query, "k_cache": k, "v_cache": v, **options}
        arguments["cache_lengths"] = fenced(lengths, at_end)
        with hidden_from_host():
            check_kernel(arguments, "sm90/decode")
            fa.attention_with_cache(**arguments)


# ---- Rings --------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [104, 128, 200])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_a_ring_past_its_window(rows, head_dim):
    inputs = inputs_of(batch=(3,), heads=4, kv_heads=2, queries=40, keys=450, head_dim=head_dim)
    lengths, window = (450, 40, 230), (rows - 40, 0)
    k, v = (in_ring(inputs[n], lengths, rows) for n in ("key", "value"))
    arguments = {"query": inputs["query"], "k_cache": k, "v_cache": v, "ring": True}
    arguments |= {"cache_lengths": torch.tensor(lengths), "window": window}
    check_kernel(arguments, "sm90/tile")
    got = fa.attention_with_cache(**arguments, return_lse=True)
    check_results(got, inputs, torch.tensor(lengths), window=window)


# ---- Few queries --------------------------------------------------------------------------------

# Queries, heads of a group: 17 to 64 rows that share their keys.
FEW = [(3, 6), (4, 5), (1, 17), (17, 1), (8, 8), (5, 7)]


@pytest.mark.parametrize("queries, group", FEW)
@pytest.mark.parametrize("head_dim", [64, 128])
def test_few_queries_share_one_pass_over_the_keys(queries, group, head_dim):
    shape = {"queries": queries, "keys": 700, "heads": 2 * group, "kv_heads": 2}
    inputs = inputs_of(batch=(2,), head_dim=head_dim, **shape)
    lengths, sink = (700, 333), randn(2 * group, seed=5)
    for options in ({"causal": True, "sink": sink}, {"causal": True, "window": (90, 0)}):
        check_pages(inputs, lengths, 64, "sm90/decode", **options)
        arguments = {"query": inputs["query"], "cache_lengths": torch.tensor(lengths)}
        arguments |= {"k_cache": inputs["key"].clone(), "v_cache": inputs["value"].clone()}
        arguments |= options
        for b, length in enumerate(lengths):
            arguments["k_cache"][b, :, length:] = arguments["v_cache"][b, :, length:] = math.nan
        about = check_kernel(arguments, "sm90/decode")
        assert f"heads in a tile: {group}," in about.reasons[-1]
        got = fa.attention_with_cache(**arguments, return_lse=True)
        check_results(got, inputs, torch.tensor(lengths), **options)


@pytest.mark.parametrize("dims", [(96, 96), (192, 128), (192, 192), (256, 256)], ids=str)
def test_few_queries_of_every_kernel(dims):
    shape = {"queries": 6, "keys": 500, "heads": 4, "kv_heads": 1}
    inputs = inputs_of(head_dim=dims[0], head_dim_v=dims[1], **shape)
    check_pages(inputs, (431,), 16, "sm90/decode", causal=True)
    check_pages(inputs, (431,), 16, "sm90/decode", causal=True, softcap=4.0)


# ---- What other kernels have --------------------------------------------------------------------


def cache_of(page_size, dtype=BF16):
    return torch.zeros(9, 2, page_size, 64, dtype=dtype), torch.arange(8)[None]


OTHERS = {
    "no multiple of 8": ({"page_size": 12}, {}, "tile"),
    "padding on the left": ({"page_size": 16}, {"key_starts": [3]}, "tile"),
    "float32": ({"page_size": 16, "dtype": torch.float32}, {}, "tile"),
    "few queries": ({"page_size": 16, "queries": 4}, {}, "decode"),
}


@pytest.mark.parametrize("why", OTHERS)
def test_explain_says_what_keeps_a_cache_on_other_kernels(why):
    shape, options, schedule = OTHERS[why]
    queries = shape.get("queries", 40)
    cache, table = cache_of(shape["page_size"], shape.get("dtype", BF16))
    options = {name: torch.tensor(x) for name, x in options.items()}
    query = torch.zeros(1, 8, queries, 64, dtype=cache.dtype)
    options = options | {"k_cache": cache, "v_cache": cache, "block_table": table}
    about = fastattn.explain(query, **options, cache_lengths=80)
    assert f"/sm80/{schedule}" in about.kernel and why in about.rejected["sm90"], about


def test_int8_stays_on_other_kernels():
    cache, table = cache_of(16, torch.int8)
    scale = torch.ones(9, 2, 16)
    options = {"k_cache": cache, "v_cache": cache, "k_scale": scale, "v_scale": scale}
    for queries in (1, 8, 40):
        query = torch.zeros(1, 8, queries, 64, dtype=BF16)
        about = fastattn.explain(query, **options, block_table=table, cache_lengths=80)
        assert "/sm80/" in about.kernel and about.rejected["sm90"] == "an int8 cache"


def test_explain_writes_nothing():
    cache, table = cache_of(16)
    before = cache.clone()
    new = torch.ones(1, 2, 40, 64, dtype=BF16)
    options = {"k_cache": cache, "v_cache": cache, "block_table": table, "cache_lengths": 70}
    about = fastattn.explain(new.repeat(1, 4, 1, 1), key=new, value=new, **options)
    assert "/sm90/" in about.kernel and torch.equal(cache, before)
