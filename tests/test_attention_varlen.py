"""Packed sequences equal attention over each sequence by itself."""

import math

import pytest
import torch
from attention_options import FEATURES, Place, skip_without_kernels

import fastattn.functional as fa
from fastattn import reference
from fastattn.testing import DTYPES, attention_results, check_attention, randn

# Lengths of the queries and of the keys of each sequence, and unused rows at the end of both.
PACKS = {
    "one": ((9,), (9,), 0),
    "several": ((5, 70, 1, 33), (5, 70, 1, 33), 0),
    "cross": ((3, 40, 17), (65, 7, 130), 0),
    "empty sequences": ((0, 4, 0, 0, 9), (3, 0, 0, 8, 9), 0),
    "unused rows": ((6, 31), (12, 20), 5),
    "decode": ((1, 1, 1, 1), (100, 3, 0, 257), 0),
    "mixed": ((64, 1, 1, 128), (64, 90, 31, 200), 3),
    "no rows": ((0, 0), (0, 0), 0),
    "nothing but unused rows": ((0,), (0,), 4),
}


def packed_inputs(pack, *, heads=4, kv_heads=2, head_dim=16, dtype=torch.float32, index=None):
    lengths_q, lengths_k, unused = PACKS[pack]
    rows_q, rows_k = sum(lengths_q) + unused, sum(lengths_k) + unused
    inputs = {
        "query": randn(rows_q, heads, head_dim, seed=1, dtype=dtype),
        "key": randn(rows_k, kv_heads, head_dim, seed=2, dtype=dtype),
        "value": randn(rows_k, kv_heads, head_dim + 4, seed=3, dtype=dtype),
    }
    bounds = (
        torch.tensor([0, *lengths]).cumsum(0).to(index or torch.int32)
        for lengths in (lengths_q, lengths_k)
    )
    return inputs, tuple(bounds)


def check(inputs, bounds, **options):
    return check_attention(
        fa.attention_varlen, inputs, oracle=reference.attention_varlen, packed=bounds, **options
    )


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("pack", PACKS)
def test_packed_sequences_keep_the_accuracy_contract(level, dtype, pack):
    skip_without_kernels(dtype)
    inputs, bounds = packed_inputs(pack, dtype=dtype)
    check(inputs, bounds)
    check(inputs, bounds, causal=True)
    check(inputs, bounds, causal="top_left", window=(20, 0))


@pytest.mark.parametrize("index", [torch.int32, torch.int64], ids=str)
def test_bounds_may_be_of_either_integer_dtype(level, index):
    inputs, bounds = packed_inputs("cross", index=index)
    longest = {"max_seqlen_q": 40, "max_seqlen_k": 130}
    want = fa.attention_varlen(*inputs.values(), *bounds, causal=True)
    assert torch.equal(fa.attention_varlen(*inputs.values(), *bounds, **longest, causal=True), want)


@pytest.mark.parametrize("feature", sorted({*FEATURES} - {"offsets"}))
def test_every_feature_works_on_packed_sequences(level, feature):
    for seed, pack in enumerate(["cross", "empty sequences", "mixed"]):
        inputs, bounds = packed_inputs(pack)
        lengths_q, lengths_k, _ = PACKS[pack]
        padded = {
            "query": torch.empty(len(lengths_q), 4, max(lengths_q), 1),
            "key": torch.empty(len(lengths_q), 2, max(lengths_k), 1),
        }
        options = FEATURES[feature](Place(padded, seed=seed))
        for name, lengths in (("query_lengths", lengths_q), ("key_lengths", lengths_k)):
            if name in options:
                options[name] = options[name].minimum(torch.tensor(lengths)).to(torch.int32)
        extra = {n: options.pop(n) for n in ("bias", "sink") if n in options}
        longest = {"max_seqlen_q": max(lengths_q), "max_seqlen_k": max(lengths_k)}
        check(inputs | extra, bounds, **longest, **options)


def test_unused_rows_are_zero_whatever_they_held(level):
    inputs, bounds = packed_inputs("unused rows")
    want = attention_results(fa.attention_varlen, inputs, {}, packed=bounds)
    for name, bound in (("query", bounds[0]), ("key", bounds[1]), ("value", bounds[1])):
        inputs[name][bound[-1] :] = math.nan
    got = attention_results(fa.attention_varlen, inputs, {}, packed=bounds)
    assert all(torch.equal(got[name], want[name]) for name in want)
    assert (got["out"][37:] == 0).all() and got["lse"][:, 37:].isneginf().all()
    assert (got["dquery"][37:] == 0).all()
    assert (got["dkey"][32:] == 0).all() and (got["dvalue"][32:] == 0).all()


def test_padding_inside_of_the_buffer_is_ignored(level):
    """Sequences of 8 rows each, of which only some are valid; the others hold NaN."""
    bounds = torch.arange(0, 33, 8)
    valid = torch.tensor([8, 3, 0, 5])
    inputs = {n: randn(32, 2, 16, seed=i) for i, n in enumerate(("query", "key", "value"))}
    padding = (torch.arange(8) >= valid[:, None]).flatten()
    dirty = {n: torch.where(padding[:, None, None], math.nan, x) for n, x in inputs.items()}
    options = {"query_lengths": valid, "key_lengths": valid, "causal": True}
    check(inputs, (bounds, bounds), **options)
    want = attention_results(fa.attention_varlen, inputs, options, packed=(bounds, bounds))
    got = attention_results(fa.attention_varlen, dirty, options, packed=(bounds, bounds))
    assert all(torch.equal(got[name], want[name]) for name in want)


def test_packed_and_padded_batches_agree(level):
    inputs, bounds = packed_inputs("several", kv_heads=4)
    out, lse = fa.attention_varlen(*inputs.values(), *bounds, causal=True, return_lse=True)
    for first, last in zip(bounds[0][:-1], bounds[0][1:], strict=True):
        alone = [x[None, first:last] for x in inputs.values()]
        want, want_lse = fa.attention(*alone, causal=True, layout="bshd", return_lse=True)
        torch.testing.assert_close(out[first:last], want[0])
        torch.testing.assert_close(lse[:, first:last], want_lse[0])
