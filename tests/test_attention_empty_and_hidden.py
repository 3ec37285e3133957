"""Empty tensors, rows that see nothing, and what hidden keys hold."""

import math

import pytest
import torch
from attention_options import here, skip_without_kernels, with_features

import fastattn.functional as fa
from fastattn import reference
from fastattn.testing import (
    DTYPES,
    assert_accurate,
    attention_inputs,
    attention_results,
    check_attention,
    inference_results,
    randn,
)

POISONS = (math.nan, math.inf, -math.inf)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize(
    "empty",
    [{"batch": (0,)}, {"queries": 0}, {"keys": 0}, {"queries": 0, "keys": 0}, {"batch": (2, 0)}],
    ids=str,
)
def test_empty_tensors(level, dtype, empty):
    skip_without_kernels(dtype)
    shape = {"queries": 3, "keys": 5, "heads": 4, "kv_heads": 2, "head_dim_v": 7} | empty
    inputs, options = with_features(
        ["bias", "sink", "mask", "alibi", "causal"], attention_inputs(**shape, dtype=dtype)
    )
    check_attention(fa.attention, inputs, **options)
    for layout in ("bhsd", "bshd"):
        inputs = attention_inputs(**shape, dtype=dtype, layout=layout)
        check_attention(fa.attention, inputs, layout=layout)


def test_no_keys_give_zeros_and_minus_infinity(level):
    inputs = attention_inputs(queries=3, keys=0)
    out, lse = fa.attention(*inputs.values(), sink=torch.ones(2), return_lse=True)
    assert (out == 0).all() and lse.isneginf().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("queries", [1, 3, 40])
def test_a_sequence_without_keys_beside_long_ones(level, dtype, queries):
    """Where keys are cut into parts, no part of a row may have any, and some rows take no part."""
    shape = {"batch": (3,), "queries": queries, "keys": 1000, "heads": 2, "kv_heads": 1}
    inputs = attention_inputs(**shape, dtype=dtype)
    for sink in ({}, {"sink": torch.tensor([1.0, -2.0])}):
        lengths = torch.tensor([1000, 0, 3])
        options = {"key_lengths": lengths, "query_lengths": (lengths + 1).clamp(max=queries)}
        got = inference_results(fa.attention, inputs | sink, options)
        assert (got["out"][1] == 0).all() and got["lse"][1].isneginf().all()
        check_attention(fa.attention, inputs | sink, **options)


HIDE_ALL = {
    "mask": {"mask": torch.zeros(1, 1, 6, 9, dtype=torch.bool)},
    "key_lengths": {"key_lengths": torch.zeros(2, dtype=torch.int64)},
    "query_lengths": {"query_lengths": torch.zeros(2, dtype=torch.int32)},
    "bias": {"bias": torch.full((6, 9), -math.inf)},
    "offset": {"causal": "top_left", "key_offset": 100},
    "window": {"window": (0, 0), "key_offset": 100},
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("how", HIDE_ALL)
def test_rows_that_see_nothing_are_zero_and_pass_no_gradient(level, dtype, how):
    inputs = attention_inputs(queries=6, keys=9, dtype=dtype) | {"sink": torch.tensor([1.0, -1.0])}
    options = here(HIDE_ALL[how])
    got = attention_results(fa.attention, inputs, options)
    inferred = inference_results(fa.attention, inputs, options)
    assert got.pop("lse").isneginf().all() and inferred["lse"].isneginf().all()
    got["out in inference"] = inferred["out"]
    assert all((x == 0).all() for x in got.values()), {n: x.abs().max() for n, x in got.items()}


def test_a_sink_of_minus_infinity_is_none_and_has_no_gradient(level):
    inputs, sink = attention_inputs(queries=40), torch.tensor([-math.inf, 0.5]).requires_grad_()
    out = fa.attention(**inputs, sink=sink)
    torch.testing.assert_close(out[:, 0], fa.attention(**inputs)[:, 0])
    dout = randn(*out.shape, seed=7)
    dout[:, 0, 20] = math.nan
    (dsink,) = torch.autograd.grad(out, sink, dout)
    assert dsink[0] == 0 and dsink[1].isfinite() and dsink[1] != 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_derivative_of_softcap_at_a_hidden_key_leaks_nothing(level, dtype):
    inputs = attention_inputs(queries=40, keys=70, dtype=dtype)
    mask = torch.arange(70) % 7 != 3
    for name in ("key", "value"):
        inputs[name] = inputs[name].masked_fill(~mask.unsqueeze(-1), math.nan)
    check_attention(fa.attention, inputs, mask=mask, softcap=2.0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_more_queries_than_keys_leave_the_first_rows_empty(level, dtype):
    for queries, keys in ((9, 4), (130, 3), (70, 65)):
        inputs = attention_inputs(queries=queries, keys=keys, dtype=dtype)
        out, lse = fa.attention(*inputs.values(), causal=True, return_lse=True)
        assert (out[:, :, : queries - keys] == 0).all()
        assert lse[:, :, : queries - keys].isneginf().all() and lse[:, :, -1].isfinite().all()
        check_attention(fa.attention, inputs, causal=True)


def poisoned(inputs, hidden, poison):
    """Poison in the rows of key and value that no query sees, as ``hidden`` (batch, keys) says."""
    rows = hidden[:, None, :, None]
    return inputs | {n: torch.where(rows, poison, inputs[n]) for n in ("key", "value")}


def hiding_options(batch, queries, keys):
    """Arguments under which each of ``hidden`` (batch, keys) is hidden from every query."""
    lengths = torch.arange(batch) * (keys // 3) + 1
    by_length = torch.arange(keys) >= lengths[:, None]
    by_mask = randn(batch, keys, seed=3) < 0
    by_corner = (torch.arange(keys) > queries - 1).expand(batch, keys)
    far = (torch.arange(keys) > queries + 4).expand(batch, keys)
    bias = torch.where(by_mask[:, None, None], -math.inf, randn(batch, 1, queries, keys, seed=4))
    return {
        "key_lengths": ({"key_lengths": lengths}, by_length),
        "mask": ({"mask": ~by_mask[:, None, None]}, by_mask),
        "bias": ({"bias": bias}, by_mask),
        "causal": ({"causal": "top_left"}, by_corner),
        "window": ({"window": (None, 5), "key_offset": keys - queries}, far),
        "all": (
            {"mask": ~by_mask[:, None, None], "key_lengths": lengths, "causal": "top_left"},
            by_mask | by_length | by_corner,
        ),
    }


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("how", ["key_lengths", "mask", "bias", "causal", "window", "all"])
def test_poison_in_hidden_keys_and_values_changes_nothing(level, dtype, how):
    for queries, keys in ((40, 100), (1, 70), (3, 200)):
        shape = {"batch": (3,), "queries": queries, "keys": keys, "heads": 4, "kv_heads": 2}
        inputs = attention_inputs(**shape, dtype=dtype)
        options, hidden = hiding_options(3, queries, keys)[how]
        for poison in POISONS:
            what = f"{how}, {poison}, {queries} queries, {keys} keys"
            check_attention(fa.attention, poisoned(inputs, hidden, poison), what=what, **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("offset", [-300.0, 0.0, 300.0])
def test_poison_that_a_long_bias_hides_changes_nothing(level, dtype, offset):
    """In every block, also in the first one; all scores may be further from 0 than an exponential
    takes."""
    inputs = attention_inputs(batch=(1,), queries=70, keys=704, heads=2, kv_heads=1, dtype=dtype)
    hidden = randn(1, 704, seed=5) < -0.5
    hidden[:, :40] = True
    bias = torch.where(hidden[:, None, None], -math.inf, randn(1, 2, 70, 704, seed=6) + offset)
    for poison in (*POISONS, -math.nan):
        bad = poisoned(inputs, hidden, poison)
        for bias_dtype in (torch.float32, dtype):
            what = f"{poison}, bias {bias_dtype}"
            check_attention(fa.attention, bad, what=what, bias=bias.to(bias_dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_before_a_poisoned_key_do_not_see_it(level, dtype):
    """Key and value 50 are visible to the later rows, whose results are NaN; the others are not."""
    inputs = attention_inputs(queries=100, keys=100, dtype=dtype)
    exact = reference.attention(*(x.double() for x in inputs.values()), causal=True)
    eager = reference.attention(*inputs.values(), causal=True)
    for name in ("key", "value"):
        for poison in POISONS:
            bad = inputs | {name: inputs[name].clone()}
            bad[name][:, :, 50] = poison
            out, lse = fa.attention(*bad.values(), causal=True, return_lse=True)
            before = (x[:, :, :50] for x in (out, exact, eager))
            assert_accurate(*before, f"rows before {poison} in {name}", magnitude=1.0)
            assert lse[:, :, :50].isfinite().all()
            if name == "value" or math.isnan(poison):
                assert not out[:, :, 50:].isfinite().any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_before_a_poisoned_key_have_finite_gradients(level, dtype):
    inputs = attention_inputs(queries=40, keys=40, dtype=dtype)
    inputs["key"][:, :, 30], inputs["value"][:, :, 30] = math.nan, math.nan
    leaves = [x.requires_grad_() for x in inputs.values()]
    fa.attention(*leaves, causal=True)[:, :, :30].float().square().sum().backward()
    clean = [x.detach()[:, :, :30].requires_grad_() for x in inputs.values()]
    fa.attention(*clean, causal=True).float().square().sum().backward()
    eager = [x.detach().clone().requires_grad_() for x in clean]
    reference.attention(*eager, causal=True).float().square().sum().backward()
    exact = [x.detach().double().requires_grad_() for x in clean]
    reference.attention(*exact, causal=True).square().sum().backward()
    got = leaves[0].grad[:, :, :30]
    assert_accurate(got, exact[0].grad, eager[0].grad, "dquery", magnitude=1.0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_poison_in_padding_queries_and_their_gradients_changes_nothing(level, dtype):
    inputs = attention_inputs(queries=50, keys=60, dtype=dtype)
    options = {"query_lengths": torch.tensor([17, 50]), "causal": True}
    dout, dlse = randn(2, 2, 50, 16, seed=1, dtype=dtype), randn(2, 2, 50, seed=2)
    results = []
    for poison in (0.0, *POISONS):
        leaves = {n: x.clone() for n, x in inputs.items()}
        leaves["query"][0, :, 17:], dout[0, :, 17:], dlse[0, :, 17:] = poison, poison, poison
        leaves = [x.requires_grad_() for x in leaves.values()]
        outputs = fa.attention(*leaves, **options, return_lse=True)
        results.append((*outputs, *torch.autograd.grad(outputs, leaves, (dout, dlse))))
    for got in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(got, results[0], strict=True))
    out, lse, dquery, *_ = results[0]
    assert (out[0, :, 17:] == 0).all() and (dquery[0, :, 17:] == 0).all()
    assert lse[0, :, 17:].isneginf().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_padding_queries_give_nothing_whatever_the_other_rows_see(level, dtype):
    for queries, keys in ((50, 60), (3, 60), (1, 300)):
        inputs = attention_inputs(queries=queries, keys=keys, dtype=dtype)
        inputs["value"][:, :, keys // 2] = math.nan
        lengths = torch.tensor([queries // 2, queries])
        out, lse = fa.attention(**inputs, query_lengths=lengths, return_lse=True)
        padding = slice(queries // 2, None)
        assert (out[0, :, padding] == 0).all() and lse[0, :, padding].isneginf().all()
        assert out[1].isnan().all() and lse[1].isfinite().all()
