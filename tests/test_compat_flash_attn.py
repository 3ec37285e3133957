"""flash-attn's attention functions mean here what flash-attn's documentation says."""

import math
import random

import pytest
import torch
from test_attention_varlen import PACKS, packed_inputs

from fastattn import reference
from fastattn.compat.flash_attn import (
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
)
from fastattn.testing import attention_inputs, check_attention, randn

DTYPES = (torch.float32, torch.bfloat16)

# flash-attn's arguments, and the same in the terms of the oracle.
OPTIONS = {
    "plain": ({}, {}),
    "no limit": ({"window_size": (-1, -1), "softcap": 0.0}, {}),
    "causal": ({"causal": True}, {"causal": "bottom_right"}),
    "window": ({"window_size": (5, 2)}, {"window": (5, 2)}),
    "left window": ({"window_size": (3, -1)}, {"window": (3, None)}),
    "causal window": (
        {"causal": True, "window_size": (6, 4)},
        {"causal": "bottom_right", "window": (6, 0)},
    ),
    "softcap": ({"softcap": 0.5}, {"softcap": 0.5}),
    "softcap off": ({"softcap": -1.0}, {}),
    "scale": ({"softmax_scale": 0.3}, {"scale": 0.3}),
    "all": (
        {"causal": True, "window_size": (9, -1), "softcap": 1.5, "softmax_scale": 0.4},
        {"causal": "bottom_right", "window": (9, None), "softcap": 1.5, "scale": 0.4},
    ),
}

SIZES = {  # queries, keys, heads, kv_heads
    "square": (17, 17, 2, 2),
    "more keys": (5, 33, 4, 2),
    "more queries": (33, 5, 4, 1),
    "decode": (1, 40, 6, 2),
}


def split(q, k, v, given, options):
    return flash_attn_func(q, k, v, **given, **options)


def kvpacked(q, k, v, given, options):
    return flash_attn_kvpacked_func(q, torch.stack((k, v), dim=2), **given, **options)


def qkvpacked(q, k, v, given, options):
    return flash_attn_qkvpacked_func(torch.stack((q, k, v), dim=2), **given, **options)


def adapted(function, given, *bounds):
    """What check_attention calls, in whose terms ``given`` holds no options."""

    def call(query, key, value, *cu_seqlens, return_lse, alibi_slopes=None, **oracle_options):
        options = {"alibi_slopes": alibi_slopes, "return_attn_probs": True}
        out, lse, probs = function(query, key, value, *cu_seqlens, *bounds, given, options)
        assert probs.shape == (0,)  # as in flash-attn 2.8, where there is no dropout
        return out, lse

    return call


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize(
    ("form", "size"),
    [(qkvpacked, "square"), *((form, size) for form in (split, kvpacked) for size in SIZES)],
)
def test_values_and_gradients(form, size, option, dtype):
    queries, keys, heads, kv_heads = SIZES[size]
    shape = {"queries": queries, "keys": keys, "heads": heads, "kv_heads": kv_heads}
    inputs = attention_inputs(**shape, dtype=dtype, layout="bshd")
    given, same = OPTIONS[option]
    check_attention(adapted(form, given), inputs, layout="bshd", **same)


@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_alibi_slopes_of_heads_and_of_every_batch(causal, batched):
    inputs = attention_inputs(queries=7, keys=19, heads=4, layout="bshd")
    slopes = randn(*((2, 4) if batched else (4,)), seed=9).abs()
    call = adapted(split, {"causal": causal})
    check_attention(call, inputs, layout="bshd", causal=causal, alibi_slopes=slopes)


def varlen(q, k, v, bound_q, bound_k, most_q, most_k, given, options):
    return flash_attn_varlen_func(q, k, v, bound_q, bound_k, most_q, most_k, **given, **options)


def varlen_kvpacked(q, k, v, bound_q, bound_k, most_q, most_k, given, options):
    bounds = (bound_q, bound_k, most_q, most_k)
    return flash_attn_varlen_kvpacked_func(q, torch.stack((k, v), 1), *bounds, **given, **options)


def varlen_qkvpacked(q, k, v, bound_q, bound_k, most_q, most_k, given, options):
    qkv = torch.stack((q, k, v), dim=1)
    return flash_attn_varlen_qkvpacked_func(qkv, bound_q, most_q, **given, **options)


def longest(bounds):
    return int(bounds.diff().max())


@pytest.mark.parametrize("form", [varlen, varlen_kvpacked], ids=lambda f: f.__name__)
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("pack", PACKS)
def test_packed_values_and_gradients(pack, option, form):
    inputs, bounds = packed_inputs(pack)
    if form is varlen_kvpacked:
        inputs["value"] = inputs["value"][..., : inputs["key"].shape[-1]]
    given, same = OPTIONS[option]
    call = adapted(form, given, *map(longest, bounds))
    check_attention(call, inputs, oracle=reference.attention_varlen, packed=bounds, **same)


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("index", [torch.int32, torch.int64], ids=str)
def test_packed_self_attention(option, index):
    inputs, bounds = packed_inputs("several", heads=2, kv_heads=2, index=index)
    inputs["value"] = inputs["value"][..., :16]
    given, same = OPTIONS[option]
    call = adapted(varlen_qkvpacked, given, *map(longest, bounds))
    check_attention(call, inputs, oracle=reference.attention_varlen, packed=bounds, **same)


def test_packed_slopes_of_every_sequence():
    inputs, bounds = packed_inputs("cross")
    call = adapted(varlen, {"causal": True}, *map(longest, bounds))
    slopes = {"alibi_slopes": randn(3, 4, seed=9).abs()}
    oracle = reference.attention_varlen
    check_attention(call, inputs, oracle=oracle, packed=bounds, causal=True, **slopes)


def visible(queries, keys, **options):
    """Which keys a query sees, from a value that is a unit vector for every key."""
    zeros = torch.zeros(1, queries, 1, keys), torch.zeros(1, keys, 1, keys)
    out = flash_attn_func(*zeros, torch.eye(keys)[None, :, None], **options)
    return (out[0, :, 0] > 0).int().tolist()


def test_the_pictures_of_the_documentation():
    assert visible(2, 5, causal=True) == [[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]
    assert visible(5, 2, causal=True) == [[0, 0], [0, 0], [0, 0], [1, 0], [1, 1]]
    assert visible(2, 5, window_size=(1, 0)) == [[0, 0, 1, 1, 0], [0, 0, 0, 1, 1]]
    assert visible(3, 3, window_size=(0, 1)) == [[1, 1, 0], [0, 1, 1], [0, 0, 1]]
    assert visible(1, 3, window_size=(-1, -1)) == [[1, 1, 1]]


def test_a_row_that_sees_no_key_is_zero():
    q, k = randn(1, 5, 1, 8, seed=0), randn(1, 2, 1, 8, seed=1)
    out, lse, _ = flash_attn_func(q, k, k, causal=True, return_attn_probs=True)
    assert lse.shape == (1, 1, 5)
    assert (lse[0, 0, :3] == -math.inf).all()
    assert not out[:, :3].any()
    assert out[:, 3:].any(dim=-1).all()


def out_of(probs, v, dropout_p):
    """Attention from S_dmask, in float64: what is negative was dropped."""
    weights = torch.where(probs >= 0, probs.double(), 0.0) / (1.0 - dropout_p)
    v = v.double().repeat_interleave(weights.shape[1] // v.shape[2], dim=2)
    return torch.einsum("bhqk,bkhd->bqhd", weights, v)


def test_with_dropout_the_probabilities_tell_what_was_dropped():
    inputs = attention_inputs(queries=40, keys=50, heads=4, kv_heads=2, layout="bshd")
    q, k, v = inputs.values()
    torch.manual_seed(5)
    options = {"causal": True, "softcap": 3.0, "return_attn_probs": True}
    out, lse, probs = flash_attn_func(q, k, v, dropout_p=0.3, **options)
    assert probs.shape == (2, 4, 40, 50)
    torch.testing.assert_close(out.double(), out_of(probs, v, 0.3), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(probs.abs().sum(-1), torch.ones(2, 4, 40))
    dropped = (probs < 0).sum() / (probs != 0).sum()
    assert abs(dropped - 0.3) < 0.02
    _, plain, _ = flash_attn_func(q, k, v, **options)
    assert torch.equal(lse, plain)
    torch.manual_seed(5)
    assert torch.equal(flash_attn_func(q, k, v, dropout_p=0.3, causal=True, softcap=3.0), out)


def test_the_gradient_of_dropout_is_that_of_what_was_kept():
    inputs = attention_inputs(queries=12, keys=9, layout="bshd", dtype=torch.float64)
    q, k, v = (x.requires_grad_() for x in inputs.values())
    out, _, probs = flash_attn_func(q, k, v, dropout_p=0.4, return_attn_probs=True)
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / 4.0
    weights = torch.where(probs >= 0, scores.softmax(-1), 0.0) / 0.6
    want = torch.einsum("bhqk,bkhd->bqhd", weights, v)
    dout = randn(*out.shape, seed=3, dtype=torch.float64)
    torch.testing.assert_close(out, want)
    for got, expected in zip(
        torch.autograd.grad(out, (q, k, v), dout), torch.autograd.grad(want, (q, k, v), dout)
    ):
        torch.testing.assert_close(got, expected)


def test_packed_probabilities_with_dropout():
    inputs, bounds = packed_inputs("empty sequences")
    q, k, v = inputs.values()
    sizes = tuple(map(longest, bounds))
    torch.manual_seed(2)
    out, _, probs = flash_attn_varlen_func(
        *(q, k, v, *bounds, *sizes), dropout_p=0.25, causal=True, return_attn_probs=True
    )
    assert probs.shape == (5, 4, *sizes)
    (starts_q, starts_k), count = (b.tolist() for b in bounds), len(probs)
    for n in range(count):
        rows = slice(starts_q[n], starts_q[n + 1])
        keys = slice(starts_k[n], starts_k[n + 1])
        part, queries = v[None, keys], rows.stop - rows.start
        want = out_of(probs[n : n + 1, :, :queries, : part.shape[1]], part, 0.25)
        torch.testing.assert_close(out[rows].double(), want[0], rtol=1e-5, atol=1e-6)
        assert not probs[n, :, queries:].any()
        assert not probs[n, :, :, part.shape[1] :].any()


def pages_of(rows, bounds, page_size, seed=0):
    """(pages, block_table) that hold packed rows, in random pages with NaN in the rest."""
    lengths = bounds.diff().tolist()
    most = max(-(-n // page_size) for n in lengths)
    order = list(range(most * len(lengths) + 2))
    random.Random(seed).shuffle(order)
    table = torch.tensor(order[: most * len(lengths)], dtype=torch.int32).view(-1, most)
    pages = rows.new_full((len(order), page_size, *rows.shape[1:]), math.nan)
    for n, (start, length) in enumerate(zip(bounds.tolist(), lengths)):
        for j in range(length):
            pages[table[n, j // page_size], j % page_size] = rows[start + j]
    return pages, table


@pytest.mark.parametrize("page_size", [1, 7, 256])
@pytest.mark.parametrize("option", OPTIONS)
def test_packed_queries_over_pages(option, page_size):
    inputs, bounds = packed_inputs("empty sequences")
    q, k, v = inputs.values()
    (k_pages, table), (v_pages, _) = (pages_of(x, bounds[1], page_size) for x in (k, v))
    given, same = OPTIONS[option]
    sizes = tuple(map(longest, bounds))
    out, lse, probs = flash_attn_varlen_func(
        *(q, k_pages, v_pages, *bounds, *sizes),
        block_table=table,
        return_attn_probs=True,
        **given,
    )
    assert probs.shape == (0,)
    exact = (x.double() for x in (q, k, v))
    want, want_lse = reference.attention_varlen(*exact, *bounds, return_lse=True, **same)
    torch.testing.assert_close(out.double(), want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lse.double(), want_lse, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        flash_attn_varlen_func(*(q, k_pages, v_pages, *bounds, *sizes), block_table=table, **given),
        out,
        rtol=0,
        atol=0,
    )


def test_the_log_sum_exp_is_differentiable():
    inputs = attention_inputs(queries=6, layout="bshd", dtype=torch.float64)
    q, k, v = (x.requires_grad_() for x in inputs.values())
    _, lse, _ = flash_attn_func(q, k, v, return_attn_probs=True)
    (got,) = torch.autograd.grad(lse.square().sum(), (q,))
    want = torch.logsumexp(torch.einsum("bqhd,bkhd->bhqk", q, k) / 4.0, dim=-1)
    torch.testing.assert_close(got, torch.autograd.grad(want.square().sum(), (q,))[0])


def test_determinism_is_passed_on():
    inputs = attention_inputs(queries=70, layout="bshd")
    grads = []
    for _ in range(2):
        q, k, v = (x.clone().requires_grad_() for x in inputs.values())
        flash_attn_func(q, k, v, deterministic=True).square().sum().backward()
        grads.append((q.grad, k.grad, v.grad))
    assert all(torch.equal(a, b) for a, b in zip(*grads))


@pytest.mark.parametrize("form", ["func", "varlen_func", "with_lse"])
def test_it_compiles_whole(form):
    q, k, v = attention_inputs(queries=9, heads=2, layout="bshd").values()
    bounds = torch.tensor([0, 4, 9], dtype=torch.int32)

    def attend(q, k, v):
        if form == "func":
            return flash_attn_func(q, k, v, causal=True, window_size=(3, 0))
        if form == "with_lse":
            return flash_attn_func(q, k, v, softcap=3.0, return_attn_probs=True)[1]
        return flash_attn_varlen_func(q[0], k[0], v[0], bounds, bounds, 5, 5, causal=True)

    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(q, k, v), attend(q, k, v))


Q, BOUNDS = torch.zeros(1, 3, 2, 8), torch.tensor([0, 3], dtype=torch.int32)
PACKED = (Q[0], Q[0], Q[0], BOUNDS, BOUNDS, 3, 3)
PAGED = {"block_table": torch.zeros(1, 1, dtype=torch.int32)}


@pytest.mark.parametrize(
    ("error", "message", "call"),
    [
        (ValueError, "q: expected shape", lambda: flash_attn_func(Q[0], Q, Q)),
        (ValueError, "k: ", lambda: flash_attn_func(Q, Q[..., :4], Q)),
        (TypeError, "k: ", lambda: flash_attn_func(Q, Q.double(), Q)),
        (ValueError, "v: ", lambda: flash_attn_func(Q, Q, Q[:, :2])),
        (TypeError, "causal: ", lambda: flash_attn_func(Q, Q, Q, causal="top_left")),
        (TypeError, "window_size: ", lambda: flash_attn_func(Q, Q, Q, window_size=3)),
        (TypeError, "window_size: ", lambda: flash_attn_func(Q, Q, Q, window_size=(None, 0))),
        (ValueError, "window_size: ", lambda: flash_attn_func(Q, Q, Q, window_size=(1, 2, 3))),
        (TypeError, "softcap: ", lambda: flash_attn_func(Q, Q, Q, softcap=None)),
        (TypeError, "softmax_scale: ", lambda: flash_attn_func(Q, Q, Q, softmax_scale="a")),
        (ValueError, "dropout_p: ", lambda: flash_attn_func(Q, Q, Q, dropout_p=1.5)),
        (TypeError, "deterministic: ", lambda: flash_attn_func(Q, Q, Q, deterministic=1)),
        (ValueError, "alibi_slopes: ", lambda: flash_attn_func(Q, Q, Q, alibi_slopes=Q[0, 0, 0])),
        (ValueError, "qkv: expected shape", lambda: flash_attn_qkvpacked_func(Q)),
        (ValueError, "qkv: ", lambda: flash_attn_qkvpacked_func(torch.zeros(1, 3, 2, 2, 8))),
        (ValueError, "kv: ", lambda: flash_attn_kvpacked_func(Q, torch.zeros(1, 3, 3, 2, 8))),
        (ValueError, "q: ", lambda: flash_attn_varlen_func(Q, *PACKED[1:])),
        (
            ValueError,
            "cu_seqlens: ",
            lambda: flash_attn_varlen_qkvpacked_func(
                Q[0, :, None].expand(-1, 3, -1, -1), BOUNDS - 1, 3
            ),
        ),
        (
            ValueError,
            "max_seqlen: ",
            lambda: flash_attn_varlen_qkvpacked_func(
                Q[0, :, None].expand(-1, 3, -1, -1), BOUNDS, 2
            ),
        ),
        (ValueError, "k: expected shape", lambda: flash_attn_varlen_func(*PACKED, **PAGED)),
        (
            ValueError,
            "dropout_p: ",
            lambda: flash_attn_varlen_func(Q[0], Q, Q, *PACKED[3:], 0.1, **PAGED),
        ),
        (
            ValueError,
            "q: .*requires no gradient",
            lambda: flash_attn_varlen_func(
                Q[0].clone().requires_grad_(), Q, Q, *PACKED[3:], **PAGED
            ),
        ),
    ],
)
def test_errors_name_the_arguments_of_flash_attn(error, message, call):
    with pytest.raises(error, match=f"^{message}"):
        call()
