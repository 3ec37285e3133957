"""Merging of partial results, exact weights on demand, and column sums."""

import math

import pytest
import torch
from attention_options import FEATURES, skip_on_gpu, skip_without_kernels, with_features

import fastattn.functional as fa
from fastattn import reference
from fastattn.testing import DTYPES, assert_accurate, attention_inputs, randn, to_float64

SCORES = sorted({*FEATURES} - {"sink"})
NO_WEIGHTS = "attention_weights and attention_column_sums have no kernels there"


def accurate(function, inputs, options, name, **more):
    """``function``, a name in both modules, keeps the accuracy contract."""
    exact = [to_float64(x) for x in inputs]
    exact_options = {n: to_float64(x) for n, x in options.items()}
    oracle = getattr(reference, function)(*exact, **exact_options)
    eager = getattr(reference, function)(*inputs, **options)
    actual = getattr(fa, function)(*inputs, **options)
    for results in zip(*(x if isinstance(x, tuple) else (x,) for x in (actual, oracle, eager))):
        assert_accurate(*results, name, **more)
    return actual


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_merging_keeps_the_accuracy_contract(level, dtype):
    out_a, out_b = (randn(2, 3, 9, 8, seed=s, dtype=dtype) for s in (1, 2))
    lse_a, lse_b = (randn(2, 3, 9, seed=s) * 5 for s in (3, 4))
    lse_a[0, 0], lse_b[:, 1], lse_a[1, 1, 2:5] = -math.inf, -math.inf, -math.inf
    accurate("merge_attention", (out_a, lse_a, out_b, lse_b), {}, "merged", magnitude=1.0)
    turned = (out_a.transpose(1, 2), lse_a, out_b.transpose(1, 2), lse_b)
    accurate("merge_attention", turned, {"layout": "bshd"}, "merged", magnitude=1.0)


def test_a_part_that_saw_nothing_is_ignored_whatever_it_holds(level):
    out, lse = randn(1, 2, 5, 8, seed=1), randn(1, 2, 5, seed=2)
    nothing = torch.full_like(out, math.nan), torch.full_like(lse, -math.inf)
    for parts in ((out, lse, *nothing), (*nothing, out, lse)):
        merged, merged_lse = fa.merge_attention(*parts)
        torch.testing.assert_close(merged, out)
        torch.testing.assert_close(merged_lse, lse)
    merged, merged_lse = fa.merge_attention(*nothing, *nothing)
    assert (merged == 0).all() and merged_lse.isneginf().all()


def test_large_logarithms_do_not_overflow(level):
    out, lse = randn(1, 1, 4, 8, seed=1), torch.tensor([[[1e4, -1e4, 88.8, 3e38]]])
    merged, merged_lse = fa.merge_attention(out, lse, out, lse)
    torch.testing.assert_close(merged, out)
    torch.testing.assert_close(merged_lse, lse + math.log(2.0))


def ring(query, key, value, cuts, **options):
    """Attention as a ring of workers computes it: query and key chunks at their global positions.

    Top-left positions are global ones, without a corner that depends on the lengths of the chunks.
    """
    rows = []
    bounds = list(zip([0, *cuts], [*cuts, key.shape[2]], strict=True))
    for first_q, last_q in bounds:
        merged = None
        for first, last in bounds:
            part = fa.attention(
                query[:, :, first_q:last_q],
                key[:, :, first:last],
                value[:, :, first:last],
                query_offset=first_q,
                key_offset=first,
                return_lse=True,
                **options,
            )
            merged = part if merged is None else fa.merge_attention(*merged, *part)
        rows.append(merged)
    outs, lses = zip(*rows, strict=True)
    return torch.cat(outs, dim=2), torch.cat(lses, dim=2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("cuts", [[32], [20, 21, 60], [0, 40, 40, 80]], ids=str)
def test_a_ring_of_chunks_at_global_positions_is_the_whole(level, dtype, cuts):
    tensors = list(attention_inputs(queries=80, heads=4, kv_heads=2, dtype=dtype).values())
    dout, dlse = randn(2, 4, 80, 16, seed=5, dtype=dtype), randn(2, 4, 80, seed=6)
    for window in (None, (17, 0)):
        options = {"causal": "top_left", "window": window}
        leaves = [x.detach().requires_grad_() for x in tensors]
        parts = ring(*leaves, cuts, **options)
        got = (*parts, *torch.autograd.grad(parts, leaves, (dout, dlse)))
        results = []
        for convert in (torch.Tensor.double, lambda x: x):
            leaves = [convert(x).detach().requires_grad_() for x in tensors]
            whole = reference.attention(*leaves, **options, return_lse=True)
            given = dout.to(whole[0].dtype), dlse.to(whole[1].dtype)
            results.append((*whole, *torch.autograd.grad(whole, leaves, given)))
        names = ("out", "lse", "dquery", "dkey", "dvalue")
        for name, actual, oracle, eager in zip(names, got, *results, strict=True):
            # Every merge rounds once more to the dtype.
            assert_accurate(actual, oracle, eager, name, magnitude=4.0 * len(cuts))


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("feature", ["nothing", *SCORES, "everything"])
def test_weights_and_column_sums_keep_the_accuracy_contract(level, dtype, feature):
    skip_without_kernels(dtype)
    skip_on_gpu(NO_WEIGHTS)
    names = {"nothing": [], "everything": SCORES}.get(feature, [feature])
    for seed, (queries, keys) in enumerate([(7, 9), (40, 70), (1, 130)]):
        shape = {"queries": queries, "keys": keys, "heads": 4, "kv_heads": 2, "dtype": dtype}
        for layout in ("bhsd", "bshd"):
            inputs = attention_inputs(**shape, layout=layout, seed=seed)
            inputs, options = with_features(names, inputs, layout=layout, seed=seed)
            query, key, value = (inputs.pop(n) for n in ("query", "key", "value"))
            options |= inputs
            _, lse = fa.attention(query, key, value, **options, return_lse=True)
            given = (query, key, lse.double() if dtype == torch.float64 else lse)
            chosen = options | {"rows": [queries - 1, 0], "heads": torch.tensor([3, 1])}
            # A weight exp(score - LSE) is off by what its score is rounded by, and a score that
            # weighs is about as large as the LSE. Eager's error over these few weights is luck.
            largest = max([1.0, *lse[lse.isfinite()].abs().tolist()])
            got = accurate("attention_weights", given, chosen, "weights", magnitude=largest)
            assert got.shape == (2, 2, 2, keys)
            many = float(max(queries, 1))
            accurate("attention_column_sums", given, options, "column sums", magnitude=many)


def test_rows_and_heads_may_be_chosen_in_any_way(level):
    skip_on_gpu(NO_WEIGHTS)
    query, key, value = attention_inputs(queries=6, keys=8, heads=4).values()
    _, lse = fa.attention(query, key, value, return_lse=True)
    all_of_them = fa.attention_weights(query, key, lse)
    assert all_of_them.shape == (2, 4, 6, 8)
    for chosen in ([1, 3], torch.tensor([1, 3]), slice(1, 4, 2)):
        assert torch.equal(
            fa.attention_weights(query, key, lse, rows=chosen), all_of_them[:, :, [1, 3]]
        )
        assert torch.equal(
            fa.attention_weights(query, key, lse, heads=chosen), all_of_them[:, [1, 3]]
        )
    assert torch.equal(fa.attention_weights(query, key, lse, rows=[-1]), all_of_them[:, :, -1:])
    assert fa.attention_weights(query, key, lse, rows=[]).shape == (2, 4, 0, 8)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_weights_of_a_row_sum_to_one_minus_the_share_of_the_sink(level, dtype):
    skip_on_gpu(NO_WEIGHTS)
    query, key, value = attention_inputs(queries=33, keys=70, dtype=dtype).values()
    sink = torch.tensor([2.0, -1.0])
    _, plain = fa.attention(query, key, value, causal=True, return_lse=True)
    _, lse = fa.attention(query, key, value, causal=True, sink=sink, return_lse=True)
    ones = fa.attention_weights(query, key, plain, causal=True).sum(-1)
    torch.testing.assert_close(ones, torch.ones_like(ones))
    rest = fa.attention_weights(query, key, lse, causal=True).sum(-1)
    torch.testing.assert_close(rest, 1 - torch.exp(sink[None, :, None] - lse))


def test_weights_times_values_are_the_output_and_column_sums_its_row_sums(level):
    skip_on_gpu(NO_WEIGHTS)
    shape = {"queries": 50, "keys": 60, "head_dim": 24, "dtype": torch.float32}
    query, key, value = attention_inputs(**shape).values()
    out, lse = fa.attention(query, key, value, causal=True, return_lse=True)
    weights = fa.attention_weights(query, key, lse, causal=True)
    torch.testing.assert_close(weights @ value, out)
    sums = fa.attention_column_sums(query, key, lse, causal=True)
    torch.testing.assert_close(sums, weights.sum(-2))


def test_hidden_keys_have_weight_zero_even_when_they_hold_nan(level):
    skip_on_gpu(NO_WEIGHTS)
    query, key, value = attention_inputs(queries=5, keys=9).values()
    lengths = torch.tensor([4, 0])
    key[0, :, 4:], key[1] = math.nan, math.nan
    _, lse = fa.attention(query, key, value, key_lengths=lengths, return_lse=True)
    weights = fa.attention_weights(query, key, lse, key_lengths=lengths)
    assert (weights[0, :, :, 4:] == 0).all() and (weights[1] == 0).all()
    assert weights[0, :, :, :4].isfinite().all()
    sums = fa.attention_column_sums(query, key, lse, key_lengths=lengths)
    assert (sums[0, :, 4:] == 0).all() and (sums[1] == 0).all()
