"""Attention keeps the accuracy contract, forward and backward, on every level and dtype."""

import math

import pytest
import torch
from attention_options import (
    BROADCASTS,
    FEATURES,
    Place,
    skip_on_sm90,
    skip_without_kernels,
    with_features,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import fastattn.functional as fa
from fastattn.testing import (
    DTYPES,
    HEAD_DIMS,
    HEAD_GROUPS,
    LENGTHS,
    attention_inputs,
    check_attention,
    covering_sample,
    randn,
)

EXAMPLES = settings(
    deadline=None,
    derandomize=True,
    max_examples=40,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


def work(case):
    heads = case["group"] * case.get("kv_heads", 1)
    return heads * case["queries"] * case["keys"] * (case["head_dim"] + case["head_dim_v"])


SHAPES = covering_sample(
    {
        "queries": LENGTHS,
        "keys": LENGTHS,
        "head_dim": HEAD_DIMS,
        "head_dim_v": HEAD_DIMS,
        "group": HEAD_GROUPS,
        "kv_heads": (1, 2),
        "batch": (1, 2),
        "causal": (False, True, "top_left"),
    },
    count=45,
    seed=1,
    fits=lambda case: work(case) < 3_000_000,
)


def shape_of(case):
    shape = {n: case[n] for n in ("queries", "keys", "head_dim", "head_dim_v", "kv_heads")}
    return shape | {"batch": (case["batch"],), "heads": case["group"] * case["kv_heads"]}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", SHAPES, ids=lambda c: "-".join(map(str, c.values())))
def test_every_shape(level, dtype, case):
    skip_without_kernels(dtype, case["head_dim"], case["head_dim_v"])
    inputs = attention_inputs(**shape_of(case), dtype=dtype)
    check_attention(fa.attention, inputs, causal=case["causal"])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_whole_tiles_and_many_of_them(level, dtype, head_dim):
    lengths = {"queries": 320, "keys": 576} if level != "scalar" else {"queries": 160, "keys": 192}
    inputs = attention_inputs(batch=(1,), heads=1, head_dim=head_dim, **lengths, dtype=dtype)
    check_attention(fa.attention, inputs)
    check_attention(fa.attention, inputs, causal=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("feature", FEATURES)
def test_every_feature_alone(level, dtype, feature):
    for seed, (queries, keys) in enumerate([(1, 1), (5, 3), (70, 70), (33, 131), (131, 40)]):
        shape = {"queries": queries, "keys": keys, "heads": 4, "kv_heads": 2, "head_dim": 24}
        inputs = attention_inputs(**shape, dtype=dtype, seed=seed)
        inputs, options = with_features([feature], inputs, seed=seed)
        check_attention(fa.attention, inputs, **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("pattern", BROADCASTS)
def test_masks_and_biases_of_every_broadcast_shape(level, dtype, pattern):
    """Over several tiles, some of them wholly hidden and some wholly visible."""
    for queries, keys in ((140, 131), (3, 200)):
        shape = {"queries": queries, "keys": keys, "heads": 4, "kv_heads": 2, "head_dim": 8}
        inputs = attention_inputs(**shape, dtype=dtype)
        place = Place(inputs)
        place.random.choice = lambda _: pattern
        mask = randn(*place.broadcast_shape(), seed=3) < 0.5
        if mask.shape[-1] == keys:
            mask[..., :64], mask[..., 64:129] = False, True
        inputs["bias"] = randn(*place.broadcast_shape(), seed=4, dtype=dtype)
        check_attention(fa.attention, inputs, mask=mask)


def test_every_feature_in_float64():
    skip_without_kernels(torch.float64)
    for seed, names in enumerate([*([name] for name in FEATURES), list(FEATURES)]):
        shape = {"queries": 19, "keys": 37, "heads": 4, "kv_heads": 2, "head_dim": 10}
        inputs = attention_inputs(**shape, dtype=torch.float64, seed=seed)
        inputs, options = with_features(names, inputs, seed=seed)
        check_attention(fa.attention, inputs, **options)


@EXAMPLES
@given(
    names=st.sets(st.sampled_from(sorted(FEATURES)), min_size=2),
    queries=st.integers(0, 90),
    keys=st.integers(0, 150),
    head_dim=st.integers(1, 70),
    head_dim_v=st.integers(1, 70),
    kv_heads=st.integers(1, 3),
    group=st.sampled_from(HEAD_GROUPS),
    batch=st.sampled_from([(1,), (2,), (3,), (2, 2), ()]),
    layout=st.sampled_from(["bhsd", "bshd"]),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 1000),
)
def test_features_compose(level, names, group, kv_heads, layout, seed, **shape):
    if shape["batch"] == ():
        names -= {"query_lengths", "key_lengths"}
    shape |= {"kv_heads": kv_heads, "heads": group * kv_heads}
    inputs = attention_inputs(**shape, seed=seed, layout=layout)
    inputs, options = with_features(names, inputs, layout=layout, seed=seed)
    check_attention(fa.attention, inputs, what=f"{shape} {names} {layout} {seed}", **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("magnitude", [1.0, 10.0, 100.0, 1000.0, 10000.0])
def test_large_logits(level, dtype, magnitude):
    inputs = attention_inputs(queries=33, keys=70, head_dim=32, dtype=dtype)
    inputs["query"] = (inputs["query"] * magnitude**0.5).to(dtype)
    inputs["key"] = (inputs["key"] * magnitude**0.5).to(dtype)
    check_attention(fa.attention, inputs)
    check_attention(fa.attention, inputs, causal=True)
    check_attention(fa.attention, inputs | {"sink": torch.tensor([-2.0, 3.0])})


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("first", [1, 33, 530])
@pytest.mark.parametrize("size", [8.0, 90.0, 3000.0])
@pytest.mark.parametrize("queries", [2, 40])
def test_scores_that_outgrow_all_before_them(level, dtype, first, size, queries):
    """Later keys may have weights that are 2^10 to 2^4000 times as large as those of the keys
    before them, in the same block or in another one."""
    if queries < 17:
        skip_on_sm90("so few queries run on the kernel of sm80")
    inputs = attention_inputs(queries=queries, keys=560, dtype=dtype)
    inputs["query"][..., 0] = 1
    inputs["key"][..., 0] = 0
    inputs["key"][..., first::7, 0] = size
    inputs["key"][:1, :, first + 20 :, 0] = 2 * size
    for options in ({}, {"bias": randn(queries, 560, seed=9, dtype=dtype)}, {"causal": True}):
        check_attention(fa.attention, inputs, scale=1.0, **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [1e6, 1e10, -1e12, 1e30, -1e30, torch.finfo(torch.float32).min])
def test_biases_far_from_zero(level, dtype, size):
    """A row with such a bias everywhere, as an additive mask has for a query that is padding, has
    equal weights: next to it nothing is left of the products. Others are as without."""
    query, key, value = attention_inputs(queries=40, keys=70, dtype=dtype, batch=(1,)).values()
    key[..., 0] = query[..., 0] = 0  # scores of a few units, which 1e6 leaves nothing of
    bias = torch.zeros(40, 70)
    bias[0], bias[7], bias[39, :50] = size, size, -abs(size)
    out, lse = fa.attention(query, key, value, bias=bias, return_lse=True, scale=2.0**-12)

    def assert_same(got, want):
        tolerance = 4 * torch.finfo(dtype).eps * value.abs().max().item()
        torch.testing.assert_close(got.double(), want.double(), rtol=0, atol=tolerance)

    for row in (0, 7):
        assert_same(out[:, :, row], value.double().mean(2))
        torch.testing.assert_close(
            lse[:, :, row], torch.full_like(lse[:, :, row], size + math.log(70))
        )
    plain, plain_lse = fa.attention(query, key, value, scale=2.0**-12, return_lse=True)
    others = [row for row in range(40) if row not in (0, 7, 39)]
    assert_same(out[:, :, others], plain[:, :, others])
    torch.testing.assert_close(lse[:, :, others], plain_lse[:, :, others])
    last = fa.attention(query[:, :, 39:], key[:, :, 50:], value[:, :, 50:], scale=2.0**-12)
    assert_same(out[:, :, 39:], last)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [-1e12, 1e30, torch.finfo(torch.float32).min])
def test_gradients_beside_biases_far_from_zero(level, dtype, size):
    """Rows that nothing depends on, as those of padding, give nothing to any gradient, however far
    their scores are; the others' gradients are as without them."""
    inputs = attention_inputs(queries=40, keys=70, dtype=dtype, batch=(1,))
    bias = torch.zeros(40, 70)
    bias[0], bias[39] = size, size
    used = slice(1, 39)

    def gradients(inputs, bias, rows):
        leaves = {name: x.detach().clone().requires_grad_() for name, x in inputs.items()}
        bias = bias.clone().requires_grad_()
        out = fa.attention(**leaves, bias=bias)[:, :, rows]
        cotangent = randn(*out.shape, seed=5, dtype=torch.bfloat16).to(dtype)
        return torch.autograd.grad(out, [*leaves.values(), bias], cotangent)

    query, key, value, dbias = gradients(inputs, bias, used)
    plain = inputs | {"query": inputs["query"][:, :, used]}
    want = gradients(plain, bias[used], slice(None))
    assert (query[:, :, [0, 39]] == 0).all() and (dbias[[0, 39]] == 0).all()
    for got, expected in zip((query[:, :, used], key, value, dbias[used]), want, strict=True):
        tolerance = 8 * torch.finfo(dtype).eps * expected.abs().max().item()
        torch.testing.assert_close(got, expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_constant_value_comes_back(level, dtype):
    """Within one ulp in 16 bits: what is summed below the fraction is what is summed above it.

    In float32 the two sums themselves round, each in its own order.
    """
    ulps = 8 if dtype == torch.float32 else 1
    for keys in (1, 3, 64, 257, 1000):
        query, key, value = attention_inputs(
            queries=9, keys=keys, head_dim=64, dtype=dtype
        ).values()
        out = fa.attention(query, key, torch.ones_like(value))
        error = (out.double() - 1.0).abs().max().item() / torch.finfo(dtype).eps
        assert error <= ulps, f"{keys} keys: {error} ulps"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("keys", [1, 2, 3, 7, 31, 64, 100, 255, 1023, 4099])
def test_decode_shapes(level, dtype, keys):
    skip_on_sm90("so few queries run on the kernel of sm80")
    for queries, group in ((1, 4), (1, 1), (2, 7), (8, 2)):
        shape = {"queries": queries, "keys": keys, "heads": 2 * group, "kv_heads": 2}
        inputs = attention_inputs(**shape, batch=(1,), head_dim=32, dtype=dtype)
        check_attention(fa.attention, inputs, causal=True)
        inputs, options = with_features(
            ["sink", "key_lengths", "bias", "window"], inputs, seed=keys
        )
        check_attention(fa.attention, inputs, **options)
