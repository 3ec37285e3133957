"""What the kernels of Hopper (csrc/cuda/*_sm90*) have of their own: blocks that take one tile after
the other, parts of the keys, tiles that TMA fills beyond the end of a sequence, and what hides it.

On such a GPU, or on the one that is emulated as level "sm90".
"""

import math

import pytest
import torch
from attention_options import with_features

import fastattn
import fastattn.functional as fa
from fastattn import _C, reference
from fastattn.testing import (
    attention_inputs,
    check_attention,
    randn,
    restride,
)

BF16, F16 = torch.bfloat16, torch.float16
DTYPES = (BF16, F16)
POISONS = (math.nan, math.inf)

pytestmark = pytest.mark.usefixtures("hopper")


def explained(inputs, options):
    about = fastattn.explain(**inputs, **options)
    assert "/sm90/" in about.kernel and "sm80" in about.rejected, about
    return about


def check(inputs, **options):
    explained(inputs, options)
    check_attention(fa.attention, inputs, **options)


def inputs_of(*, batch=(1,), heads=2, kv_heads=1, dtype=BF16, **shape):
    return attention_inputs(batch=batch, heads=heads, kv_heads=kv_heads, dtype=dtype, **shape)


# ---- Shapes -------------------------------------------------------------------------------------

HEAD_DIMS = [
    *((1, 1), (8, 8), (20, 36), (64, 64), (64, 16), (72, 72), (80, 80), (96, 96), (128, 128)),
    *((40, 128), (160, 160), (192, 128), (192, 192), (130, 70), (256, 256), (256, 8)),
]


def on_chunks(x):
    """The same numbers in rows of whole chunks of 16 bytes, which end in NaN."""
    chunked = x.new_full((*x.shape[:-1], (x.shape[-1] + 7) // 8 * 8), math.nan)
    chunked[..., : x.shape[-1]] = x
    return chunked[..., : x.shape[-1]]


@pytest.mark.parametrize("dims", HEAD_DIMS, ids=str)
def test_head_dims(dims):
    for dtype, queries, keys in ((BF16, 70, 150), (F16, 150, 33)):
        shape = {"queries": queries, "keys": keys, "head_dim": dims[0], "head_dim_v": dims[1]}
        inputs = inputs_of(**shape, dtype=dtype)
        check({name: on_chunks(x) for name, x in inputs.items()}, causal=True)


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("queries, keys", [(127, 129), (128, 128), (193, 97), (384, 96)])
def test_tiles_that_are_whole_but_for_a_row(head_dim, queries, keys):
    inputs = inputs_of(heads=1, queries=queries, keys=keys, head_dim=head_dim)
    check(inputs)
    check(inputs, causal=True)


@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_blocks_take_tile_after_tile_some_of_them_empty(head_dim):
    inputs = inputs_of(batch=(5,), heads=2, kv_heads=2, queries=200, keys=140, head_dim=head_dim)
    lengths = {
        "query_lengths": torch.tensor([200, 0, 1, 150, 200]),
        "key_lengths": torch.tensor([140, 140, 30, 0, 129]),
    }
    check(inputs | {"sink": randn(2, seed=5)}, **lengths, causal=True)


@pytest.mark.parametrize("head_dim, keys", [(64, 1000), (128, 1100), (256, 600)])
def test_keys_are_cut_into_parts(head_dim, keys):
    """Of which some are empty, where a sequence or a window is short."""
    inputs = inputs_of(batch=(2,), heads=1, queries=70, keys=keys, head_dim=head_dim)
    inputs["sink"] = randn(1, seed=5)
    lengths = {"key_lengths": torch.tensor([keys, 70]), "query_lengths": torch.tensor([33, 70])}
    for options in ({}, {"causal": True, "window": (100, 0)}, lengths, {"softcap": 3.0}):
        assert explained(inputs, options).kernel.endswith("split tile")
        check(inputs, **options)


GROUPS = [(64, 2), (64, 3), (64, 4), (64, 8), (128, 2), (128, 3), (128, 4), (128, 5), (192, 8)]


@pytest.mark.parametrize("head_dim, group", GROUPS)
def test_heads_of_a_group_share_a_tile(head_dim, group):
    shape = {"heads": group, "queries": 37, "keys": 140, "head_dim": head_dim}
    inputs = inputs_of(batch=(2,), **shape) | {"sink": randn(group, seed=5)}
    lengths = {"query_lengths": torch.tensor([20, 37]), "key_lengths": torch.tensor([130, 45])}
    for options in ({"causal": True}, lengths | {"window": (9, 3)}):
        # 128 rows are no multiple of 5, nor of 3, but the rows of 3 heads are a tile's alone.
        pack = 1 if group == 5 else group
        assert f"heads in a tile: {pack}," in explained(inputs, options).reasons[-1]
        check(inputs, **options)


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("window", [(30, 20), (0, 0), (None, 3), (100, None)], ids=str)
def test_windows_on_both_sides(head_dim, window):
    check(inputs_of(heads=1, queries=260, keys=300, head_dim=head_dim), window=window)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [64, 128, 192, 256])
def test_terms_of_scores(dtype, head_dim):
    """Over tiles of fewer keys than without, as wide as the operands are."""
    inputs = inputs_of(queries=140, keys=131, head_dim=head_dim, dtype=dtype)
    names = ["alibi", "bias", "causal", "key_lengths", "mask", "sink", "softcap"]
    inputs, options = with_features(names, inputs, seed=3)
    check(inputs, **options)


@pytest.mark.parametrize("head_dim", [64, 128, 192, 256])
def test_terms_that_hide_nothing(head_dim):
    """Of tiles that all see."""
    inputs = inputs_of(queries=150, keys=140, head_dim=head_dim)
    check(inputs, softcap=3.0)
    check(inputs, softcap=2.0, alibi_slopes=torch.tensor([0.3, 0.01]))


# ---- Places in memory ---------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
@pytest.mark.parametrize("kind", ["transposed", "fused"])
def test_strides_and_batches_of_two_dimensions(layout, kind):
    shape = {"queries": 70, "keys": 131, "heads": 4, "kv_heads": 2, "head_dim": 72}
    inputs = inputs_of(batch=(2, 3), layout=layout, **shape)
    inputs = {name: restride(x, kind) for name, x in inputs.items()}
    check(inputs, causal=True, layout=layout)


def test_a_fused_projection():
    fused = randn(2, 133, 3, 2, 64, seed=1, dtype=BF16)
    names = ("query", "key", "value")
    check(dict(zip(names, fused.unbind(2), strict=True)), layout="bshd", causal=True)


def test_what_tma_cannot_bring_runs_on_other_kernels():
    inputs = inputs_of(queries=100, head_dim=64)
    shifted = {name: restride(x, "guarded") for name, x in inputs.items()}
    expanded = inputs | {"key": inputs["key"][:, :, :1].expand(1, 1, 100, 64)}
    for tensors in (shifted, expanded, inputs_of(queries=100, head_dim=20)):
        about = fastattn.explain(**tensors)
        assert "/sm80/" in about.kernel
        assert "multiples of 16 bytes, or expanded" in about.rejected["sm90"]
        check_attention(fa.attention, tensors)


def test_caches_with_padding_on_the_left():
    query, key, value = inputs_of(batch=(3,), queries=40, keys=150, head_dim=64).values()
    starts, lengths = torch.tensor([0, 21, 100]), torch.tensor([150, 130, 141])
    hidden = torch.arange(150) < starts[:, None]
    key, value = (torch.where(hidden[:, None, :, None], math.nan, x) for x in (key, value))
    options = {"cache_lengths": lengths, "key_starts": starts, "causal": True}
    got = fa.attention_with_cache(query, key, value, **options, return_lse=True)
    for b, (first, last) in enumerate(zip(starts.tolist(), lengths.tolist(), strict=True)):
        tensors = query[b : b + 1], key[b : b + 1, :, first:last], value[b : b + 1, :, first:last]
        want = reference.attention(*tensors, causal=True, return_lse=True)
        for x, y in zip(got, want, strict=True):
            torch.testing.assert_close(x[b : b + 1], y, rtol=0.02, atol=0.02)


OTHER_KERNELS = {
    "float32": ({"queries": 100, "dtype": torch.float32}, {}),
    "batch_invariant": ({"queries": 100}, {"batch_invariant": True}),
    "few queries": ({"queries": 3, "keys": 100}, {}),
}


@pytest.mark.parametrize("why", OTHER_KERNELS)
def test_explain_says_what_else_runs_on_other_kernels(why):
    shape, options = OTHER_KERNELS[why]
    about = fastattn.explain(**inputs_of(**shape), **options)
    assert "/sm90/" not in about.kernel and about.rejected["sm90"].startswith(why)


# What keeps the gradients from the kernels of Hopper.
OTHER_BACKWARDS = {
    "float32": ({"dtype": torch.float32}, {}),
    "batch_invariant": ({}, {"batch_invariant": True}),
    "no gradient of query": ({}, {}),
}


@pytest.mark.parametrize("why", OTHER_BACKWARDS)
def test_explain_says_what_keeps_gradients_on_other_kernels(why):
    shape, options = OTHER_BACKWARDS[why]
    inputs = inputs_of(queries=100, **{"head_dim": 64} | shape)
    for name, x in inputs.items():
        x.requires_grad_(name != "query" or why != "no gradient of query")
    about = fastattn.explain(**inputs, **options).backward
    assert "/sm80/" in about.kernel and about.rejected["sm90"].startswith(why), about


def test_explain_tells_of_gradients_that_are_asked_for():
    inputs = inputs_of(queries=100, head_dim=64)
    assert fastattn.explain(**inputs).backward is None
    for x in inputs.values():
        x.requires_grad_()
    assert fastattn.explain(**inputs).backward.kernel.endswith("/sm90/fused")
    with torch.no_grad():
        assert fastattn.explain(**inputs).backward is None


@pytest.mark.parametrize("head_dim", [64, 256])
@pytest.mark.parametrize("options", [{}, {"deterministic": True}, {"softcap": 3.0}], ids=str)
def test_gradients_run_on_kernels_of_hopper(head_dim, options):
    inputs = inputs_of(queries=100, head_dim=head_dim)
    for x in inputs.values():
        x.requires_grad_()
    schedule = "fused in order" if "deterministic" in options else "fused"
    assert fastattn.explain(**inputs, **options).backward.kernel.endswith(f"/sm90/{schedule}")


# ---- Packed sequences ---------------------------------------------------------------------------

LENGTHS_Q, LENGTHS_K, UNUSED = (70, 1, 0, 200, 64), (130, 5, 90, 33, 0), 9


def packed_inputs(head_dim):
    rows_q, rows_k = sum(LENGTHS_Q) + UNUSED, sum(LENGTHS_K) + UNUSED
    inputs = {
        "query": randn(rows_q, 4, head_dim, seed=1, dtype=BF16),
        "key": randn(rows_k, 2, head_dim, seed=2, dtype=BF16),
        "value": randn(rows_k, 2, head_dim, seed=3, dtype=BF16),
    }
    lengths = (torch.tensor([0, *x]) for x in (LENGTHS_Q, LENGTHS_K))
    return inputs, tuple(x.cumsum(0).to(torch.int32) for x in lengths)


def check_packed(inputs, bounds, **options):
    named = dict(zip(("cu_seqlens_q", "cu_seqlens_k"), bounds, strict=True))
    leaves = {name: x.clone().requires_grad_() for name, x in inputs.items()}
    about = explained(leaves, named | options)
    schedule = "fused in order" if options.get("deterministic") else "fused"
    assert about.backward.kernel.endswith(f"/sm90/{schedule}"), about
    oracle = reference.attention_varlen
    check_attention(fa.attention_varlen, inputs, oracle=oracle, packed=bounds, **options)


@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
def test_packed_sequences(head_dim):
    """Their tiles bring rows of the next sequence, too."""
    inputs, bounds = packed_inputs(head_dim)
    check_packed(inputs, bounds, causal=True)
    lengths = {
        "query_lengths": torch.tensor([70, 1, 0, 130, 10]),
        "key_lengths": torch.tensor([100, 5, 7, 33, 0]),
    }
    check_packed(inputs, bounds, window=(50, 9), **lengths)


def varlen_results(inputs, bounds, dout, options):
    """By rows of queries and of keys; of both passes, and of inference, which has kernels of its
    own."""
    leaves = {name: x.clone().requires_grad_() for name, x in inputs.items()}
    options = {**bounds, **options, "return_lse": True}
    inferred, inferred_lse = fa.attention_varlen(**inputs, **options)
    out, lse = fa.attention_varlen(**leaves, **options)
    grads = torch.autograd.grad((out, lse), list(leaves.values()), (dout, dout.sum(-1).mT.float()))
    of_queries = (inferred, inferred_lse.mT, out, lse.mT, grads[0])
    return {"query": of_queries, "key": grads[1:]}


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("poison", POISONS)
def test_poison_in_one_sequence_reaches_no_other(head_dim, poison):
    inputs, bounds = packed_inputs(head_dim)
    dout = randn(*inputs["query"].shape, seed=7, dtype=BF16)
    named = dict(zip(("cu_seqlens_q", "cu_seqlens_k"), bounds, strict=True))
    clean = varlen_results(inputs, named, dout, {})
    rows = {"query": slice(*bounds[0][3:5].tolist()), "key": slice(*bounds[1][3:5].tolist())}
    ends = {"query": int(bounds[0][-1]), "key": int(bounds[1][-1])}
    for name, x in (*inputs.items(), ("query", dout)):
        side = "query" if name == "query" else "key"
        x[rows[side]] = poison
        x[ends[side] :] = poison
    got = varlen_results(inputs, named, dout, {})
    for side, tensors in got.items():
        for x, want in zip(tensors, clean[side], strict=True):
            others = torch.ones(x.shape[0], dtype=torch.bool)
            others[rows[side]] = False
            torch.testing.assert_close(x[others], want[others])
            assert not x[rows[side]].float().isfinite().all()


@pytest.mark.parametrize("head_dim", [64, 128])
def test_poison_beyond_the_lengths_within_a_packed_buffer(head_dim):
    inputs, bounds = packed_inputs(head_dim)
    dout = randn(*inputs["query"].shape, seed=7, dtype=BF16)
    named = dict(zip(("cu_seqlens_q", "cu_seqlens_k"), bounds, strict=True))
    lengths_q, lengths_k = torch.tensor([50, 1, 0, 199, 3]), torch.tensor([99, 2, 0, 30, 0])
    options = {"query_lengths": lengths_q, "key_lengths": lengths_k, "causal": True}
    clean = varlen_results(inputs, named, dout, options)
    for first, last, length in zip(bounds[0], bounds[0][1:], lengths_q, strict=False):
        inputs["query"][first + length : last] = dout[first + length : last] = math.nan
    for first, last, length in zip(bounds[1], bounds[1][1:], lengths_k, strict=False):
        inputs["key"][first + length : last] = inputs["value"][first + length : last] = math.nan
    got = varlen_results(inputs, named, dout, options)
    for side, tensors in got.items():
        for x, want in zip(tensors, clean[side], strict=True):
            torch.testing.assert_close(x, want)


# ---- Sums in a fixed order ----------------------------------------------------------------------

ORDERED = {
    "all": ({"queries": 200, "keys": 600}, {}),
    "causal": ({"queries": 500, "keys": 500}, {"causal": True}),
    "no multiples of tiles": ({"queries": 333, "keys": 401}, {"causal": True}),
    "more queries than keys": ({"queries": 400, "keys": 260}, {"causal": True}),
    "window": ({"queries": 300, "keys": 600}, {"window": (200, 40)}),
    "narrow window": ({"queries": 420, "keys": 420}, {"window": (3, 0)}),
    "keys that nobody sees": ({"queries": 150, "keys": 520}, {"causal": "top_left"}),
    "lengths": (
        {"batch": (3,), "queries": 300, "keys": 420},
        {
            "query_lengths": torch.tensor([300, 0, 130]),
            "key_lengths": torch.tensor([129, 420, 400]),
            "causal": True,
        },
    ),
    "heads of two groups": ({"heads": 6, "kv_heads": 2, "queries": 260, "keys": 300}, {}),
}


ORDERED_CASES = [
    *((name, 128) for name in ORDERED),
    *(("causal", 64), ("window", 96), ("no multiples of tiles", 192), ("lengths", 256)),
]


def gradients(inputs, options, *, function=fa.attention, seed=1):
    """Of query, key and value, with blocks and threads in an order of their own."""
    if _C.emulated_levels:
        _C.set_emulator_seed(seed)
    leaves = [x.clone().requires_grad_() for x in inputs.values()]
    out = function(**dict(zip(inputs, leaves, strict=True)), **options)
    dout = randn(*out.shape, seed=9, dtype=out.dtype)
    return torch.autograd.grad(out, leaves, dout)


def check_order(inputs, options, **more):
    """The bits are always the same, and but for dQ those of sums in any order: it is the same
    kernel."""
    free = gradients(inputs, options, **more)
    first, *others = (
        gradients(inputs, options | {"deterministic": True}, seed=s, **more) for s in (1, 2, 3)
    )
    for other in others:
        assert all(torch.equal(x, y) for x, y in zip(first, other, strict=True))
    assert torch.equal(first[1], free[1]) and torch.equal(first[2], free[2])


@pytest.mark.parametrize("name, head_dim", ORDERED_CASES)
def test_sums_in_a_fixed_order(name, head_dim):
    """Over many tiles of keys; of which not all meet all queries."""
    shape, options = ORDERED[name]
    inputs = inputs_of(**shape, head_dim=head_dim)
    check_order(inputs, options)
    check(inputs, **options, deterministic=True)


def test_sums_of_scores_with_terms_in_a_fixed_order():
    inputs = inputs_of(heads=4, kv_heads=2, queries=150, keys=210, head_dim=128)
    options = {"causal": True, "softcap": 4.0, "alibi_slopes": torch.tensor([0.1, 0.2, 0.3, 0.0])}
    check_order(inputs, options)
    check(inputs, **options, deterministic=True)


@pytest.mark.parametrize("head_dim", [128, 256])
def test_sums_of_packed_sequences_in_a_fixed_order(head_dim):
    inputs, bounds = packed_inputs(head_dim)
    named = dict(zip(("cu_seqlens_q", "cu_seqlens_k"), bounds, strict=True))
    for options in ({}, {"causal": True}, {"window": (50, 9)}):
        check_order(inputs, named | options, function=fa.attention_varlen)
        check_packed(inputs, bounds, **options, deterministic=True)


@pytest.mark.parametrize("poison", POISONS)
def test_poison_and_a_fixed_order(poison):
    """Of a key that most queries do not see: they get what they get without it."""
    inputs = inputs_of(heads=1, queries=200, keys=300, head_dim=64)
    options = {"window": (40, 25), "deterministic": True}
    clean = gradients(inputs, options)
    inputs["key"][:, :, 130] = poison
    got = gradients(inputs, options)
    unseeing = torch.ones(200, dtype=torch.bool)
    unseeing[5:71] = False  # query i stands at key i + 100
    assert torch.equal(got[0][:, :, unseeing], clean[0][:, :, unseeing])
    assert not got[0][:, :, 30].isfinite().any()


# ---- What hidden rows hold ----------------------------------------------------------------------


def results(inputs, dout, options):
    """out and lse of inference, the same of training, and the gradients."""
    leaves = [x.clone().requires_grad_() for x in inputs.values()]
    inferred = fa.attention(*inputs.values(), **options, return_lse=True)
    out, lse = fa.attention(*leaves, **options, return_lse=True)
    grads = torch.autograd.grad((out, lse), leaves, (dout, torch.ones_like(lse)))
    return *inferred, out, lse, *grads


# Which of 300 keys each of 200 queries sees. (Window and corner count from the last of both.)
ALIBI = {"alibi_slopes": torch.tensor([0.1])}
SEEN = {
    "causal": ({"causal": "top_left"}, lambda i, j: j <= i),
    "window": ({"window": (40, 25)}, lambda i, j: (i + 100 - 40 <= j) & (j <= i + 100 + 25)),
    "alibi": ({"causal": "top_left"} | ALIBI, lambda i, j: j <= i),
    "mask": ({"mask": torch.ones(200, 300).tril(20).bool()}, lambda i, j: j <= i + 20),
    "bias": ({"bias": torch.full((200, 300), -math.inf).triu(21)}, lambda i, j: j <= i + 20),
}
SEEN_AT = [*((how, dim) for how in ("causal", "window") for dim in (64, 128, 256))]
SEEN_AT += [("alibi", 64), ("alibi", 256), ("mask", 128), ("bias", 64)]


@pytest.mark.parametrize("poison", POISONS)
@pytest.mark.parametrize("how, head_dim", SEEN_AT)
@pytest.mark.parametrize("poisoned", ["query", "key", "value", "dout"])
def test_poison_reaches_only_those_who_see_it(head_dim, poison, how, poisoned):
    """Of a row in the middle of a tile, which some rows of other tiles see and others do not."""
    inputs = inputs_of(heads=1, queries=200, keys=300, head_dim=head_dim)
    dout = randn(1, 1, 200, head_dim, seed=7, dtype=BF16)
    options, sees = SEEN[how]
    rows = {"query": inputs["query"], "dout": dout, "key": inputs["key"], "value": inputs["value"]}
    bad = 130
    rows[poisoned][:, :, bad] = 0
    clean = results(inputs, dout, options)
    rows[poisoned][:, :, bad] = poison
    got = results(inputs, dout, options)
    queries, keys = torch.arange(200), torch.arange(300)
    seen = sees(queries[:, None], keys)
    if poisoned in ("query", "dout"):
        hit_queries = queries == bad
        hit_keys = seen[bad]
    else:
        hit_queries = seen[:, bad]
        hit_keys = seen[hit_queries].any(0) | (keys == bad)
    hits = (*[hit_queries] * 5, hit_keys, hit_keys)
    for x, want, hit in zip(got, clean, hits, strict=True):
        torch.testing.assert_close(x[:, :, ~hit], want[:, :, ~hit])
    # Who has met it does not look as if nothing had been: it is in out, or in a gradient.
    if poisoned == "value":
        assert not any(x[:, :, hit_queries].isfinite().any() for x in (got[0], got[2]))
    elif poisoned == "dout":
        assert not got[6][:, :, hit_keys].isfinite().any()
    elif poisoned == "query" or math.isnan(poison):
        assert not got[5][:, :, hit_keys].isfinite().any()
