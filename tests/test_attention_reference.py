"""The reference itself, against torch and against loops that are written out by hand."""

import math

import pytest
import torch
import torch.nn.functional as F
from attention_options import FEATURES, with_features

from fastattn import reference
from fastattn.testing import attention_inputs, attention_results, randn


def inputs(**shape):
    defaults = {"batch": (2,), "heads": 4, "kv_heads": 2, "queries": 5, "keys": 7, "head_dim": 6}
    return attention_inputs(**(defaults | shape), dtype=torch.float64)


def by_hand(x, *, visible, score, sink=None):
    """Attention by nested loops; visible and score are functions of (b, h, i, j)."""
    query, key, value = x["query"], x["key"], x["value"]
    batch, heads, queries, _ = query.shape
    group = heads // key.shape[1]
    out = torch.zeros(batch, heads, queries, value.shape[-1], dtype=torch.float64)
    lse = torch.full((batch, heads, queries), -math.inf, dtype=torch.float64)
    for b in range(batch):
        for h in range(heads):
            for i in range(queries):
                seen = [j for j in range(key.shape[2]) if visible(b, h, i, j)]
                if not seen:
                    continue
                scores = [score(query[b, h, i] @ key[b, h // group, j], b, h, i, j) for j in seen]
                total = sum(math.exp(s) for s in scores)
                total += 0.0 if sink is None else math.exp(sink[h])
                lse[b, h, i] = math.log(total)
                for j, s in zip(seen, scores, strict=True):
                    out[b, h, i] += math.exp(s) / total * value[b, h // group, j]
    return out, lse


def test_plain_attention_is_that_of_torch():
    x = inputs(head_dim_v=9)
    got = reference.attention(**x)
    want = F.scaled_dot_product_attention(**x, enable_gqa=True)
    torch.testing.assert_close(got, want)


def test_corners_windows_and_lengths_are_those_of_a_loop():
    x = inputs()
    lengths_q, lengths_k = torch.tensor([5, 3]), torch.tensor([0, 6])
    for causal, left, right in ((True, 2, None), ("top_left", None, None), (False, 1, 2)):
        got = reference.attention(
            **x,
            causal=causal,
            window=(left, right),
            query_lengths=lengths_q,
            key_lengths=lengths_k,
            query_offset=3,
            key_offset=2,
            return_lse=True,
        )

        def visible(b, _h, i, j, causal=causal, left=left, right=right):
            corner = 0 if causal == "top_left" else (lengths_k[b] - lengths_q[b]).item()
            relative = (2 + j) - (3 + i + corner)
            return (
                i < lengths_q[b]
                and j < lengths_k[b]
                and (not causal or relative <= 0)
                and (left is None or relative >= -left)
                and (right is None or relative <= right)
            )

        want = by_hand(x, visible=visible, score=lambda s, *_: s.item() / math.sqrt(6))
        torch.testing.assert_close(got, want)


PICTURES = [
    (2, 5, {"causal": True}, "1111. 11111"),
    (2, 5, {"causal": "top_left"}, "1.... 11..."),
    (4, 2, {"causal": "bottom_right"}, ".. .. 1. 11"),
    (4, 2, {"causal": "top_left"}, "1. 11 11 11"),
    (4, 4, {"window": (1, 0)}, "1... 11.. .11. ..11"),
    (4, 4, {"window": (0, 2)}, "111. .111 ..11 ...1"),
    (4, 4, {"causal": True, "window": (2, None)}, "1... 11.. 111. .111"),
    (2, 5, {"causal": True, "key_lengths": torch.tensor(3)}, "11... 111.."),
]


@pytest.mark.parametrize("picture", PICTURES, ids=str)
def test_the_pictures_of_the_documentation_are_right(picture):
    queries, keys, options, rows = picture
    places = {n: x for n, x in options.items() if n in ("causal", "key_lengths")}
    relative = reference.relative_positions(queries, keys, **places)
    seen = reference.visibility(relative, **options).reshape(queries, keys)
    assert " ".join("".join(".1"[x] for x in row) for row in seen.int().tolist()) == rows


def test_score_modifiers_come_in_the_stated_order():
    x, (bias, slopes, sink) = inputs(), (randn(1, 4, 5, 7, seed=5), randn(4, seed=6), [0.5] * 4)
    mask = randn(2, 1, 5, 7, seed=7) < 0.5
    got = reference.attention(
        **x,
        mask=mask,
        bias=bias.double(),
        alibi_slopes=slopes.double(),
        sink=torch.tensor(sink, dtype=torch.float64),
        softcap=0.7,
        scale=0.9,
        return_lse=True,
    )

    def score(product, b, h, i, j):
        capped = 0.7 * math.tanh(0.9 * product.item() / 0.7)
        return capped + bias[0, h, i, j].item() - slopes[h].item() * abs(j - i - 2)

    want = by_hand(x, visible=lambda b, h, i, j: mask[b, 0, i, j], score=score, sink=sink)
    torch.testing.assert_close(got, want)


def test_layouts_and_ranks_agree():
    x = inputs(batch=(2, 3))
    want, want_lse = reference.attention(**x, causal=True, return_lse=True)
    turned = {name: t.transpose(-3, -2) for name, t in x.items()}
    got, got_lse = reference.attention(**turned, causal=True, layout="bshd", return_lse=True)
    torch.testing.assert_close(got.transpose(-3, -2), want)
    torch.testing.assert_close(got_lse, want_lse)
    unbatched = reference.attention(**{n: t[1, 2] for n, t in x.items()}, causal=True)
    torch.testing.assert_close(unbatched, want[1, 2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_is_the_eager_formula_with_a_float32_softmax(dtype):
    x = {name: t.to(dtype) for name, t in inputs(kv_heads=4).items()}
    scores = x["query"] @ x["key"].transpose(-2, -1) * 6**-0.5
    want = torch.softmax(scores, dim=-1, dtype=torch.float32).to(dtype) @ x["value"]
    got, lse = reference.attention(**x, return_lse=True)
    torch.testing.assert_close(got, want, rtol=0, atol=2 * torch.finfo(dtype).eps)
    assert got.dtype == dtype and lse.dtype == torch.float32


@pytest.mark.parametrize("feature", [*FEATURES, "all"])
def test_gradients_are_those_of_finite_differences(feature):
    names = FEATURES if feature == "all" else [feature]
    x, options = with_features(names, inputs(heads=2, kv_heads=1, queries=3, keys=4, head_dim=2))
    x = {name: t.double().requires_grad_() for name, t in x.items()}

    def function(*tensors):
        out, lse = reference.attention(
            **dict(zip(x, tensors, strict=True)), **options, return_lse=True
        )
        return out, torch.where(lse.isinf(), 0.0, lse)

    assert torch.autograd.gradcheck(function, tuple(x.values()))


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_hidden_poison_reaches_neither_results_nor_gradients(poison):
    x = inputs()
    options = {"key_lengths": torch.tensor([4, 7]), "causal": "top_left"}
    want = attention_results(reference.attention, x, options)
    x["key"][0, :, 4:], x["value"][0, :, 4:] = poison, poison
    x["key"][1, :, 5:], x["value"][1, :, 5:] = poison, poison
    torch.testing.assert_close(attention_results(reference.attention, x, options), want)


def test_visible_poison_reaches_the_rows_that_see_it():
    x = inputs(heads=2, queries=3, keys=3)
    x["value"][0, 0, 1, 2] = math.inf
    out = reference.attention(**x, causal=True)
    assert out.isposinf().nonzero().tolist() == [[0, 0, 1, 2], [0, 0, 2, 2]]
    x["key"][0, 0, 2] = math.nan
    assert reference.attention(**x, causal=True)[0, 0].isnan().any(-1).tolist() == [0, 0, 1]


def test_philox_gives_the_published_blocks():
    known = (
        ((0, 0, 0, 0), (0, 0), "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ((2**32 - 1,) * 4, (2**32 - 1,) * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    )
    for counter, key, words in known:
        block = reference.philox_4x32([torch.tensor(c) for c in counter], key)
        assert " ".join(f"{int(word):08x}" for word in block) == words


def test_dropout_keeps_the_stated_share_and_depends_on_place_alone():
    big = reference.dropout_mask((3, 2, 50, 70), 0.3, (1234567890123, 5))
    assert abs(big.double().mean().item() - 0.7) < 0.01
    small = reference.dropout_mask((1, 2, 20, 30), 0.3, (1234567890123, 5), batch_index=2)
    assert torch.equal(small[0], big[2, :, :20, :30])
    assert not reference.dropout_mask((1, 2, 20, 30), 1.0, (1, 2)).any()
    assert reference.dropout_mask((1, 2, 20, 30), 0.0, (1, 2)).all()


def test_packed_sequences_are_attended_one_by_one():
    x = {name: t[0].transpose(0, 1) for name, t in inputs(queries=12, keys=15).items()}
    bias = randn(3, 1, 6, 8, seed=3, dtype=torch.float64)
    cu_q, cu_k = torch.tensor([0, 4, 4, 10]), torch.tensor([0, 3, 6, 13])
    out, lse = reference.attention_varlen(
        **x, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, bias=bias, causal=True, return_lse=True
    )
    last = {n: t[4:10] if n == "query" else t[6:13] for n, t in x.items()}
    want = reference.attention(
        **last, bias=bias[2, :, :, :7], causal=True, layout="bshd", return_lse=True
    )
    torch.testing.assert_close((out[4:10], lse[:, 4:10]), want)
    assert (out[10:] == 0).all() and lse[:, 10:].isneginf().all()


def test_weights_and_column_sums_are_the_softmax():
    x = inputs(kv_heads=4)
    out, lse = reference.attention(**x, causal=True, return_lse=True)
    weights = reference.attention_weights(x["query"], x["key"], lse, causal=True)
    torch.testing.assert_close(weights @ x["value"], out)
    sums = reference.attention_column_sums(x["query"], x["key"], lse, causal=True)
    torch.testing.assert_close(sums, weights.sum(-2))
    part = reference.attention_weights(
        x["query"], x["key"], lse, rows=[4, 1], heads=slice(1, 3), causal=True
    )
    torch.testing.assert_close(part, weights[:, 1:3][:, :, [4, 1]])


def test_merging_the_halves_gives_the_whole():
    x = inputs()
    whole = reference.attention(**x, return_lse=True)
    a, b = (
        reference.attention(x["query"], x["key"][..., s, :], x["value"][..., s, :], return_lse=True)
        for s in (slice(0, 3), slice(3, 7))
    )
    torch.testing.assert_close(reference.merge_attention(*a, *b), whole)
    nothing = (torch.full_like(a[0], math.nan), torch.full_like(a[1], -math.inf))
    torch.testing.assert_close(reference.merge_attention(*a, *nothing), a)
    out, lse = reference.merge_attention(*nothing, *nothing)
    assert (out == 0).all() and lse.isneginf().all()


def test_merging_has_the_gradients_of_finite_differences():
    parts = [randn(1, 2, 3, 4, seed=1), randn(1, 2, 3, seed=2)]
    parts += [randn(1, 2, 3, 4, seed=3), randn(1, 2, 3, seed=4)]
    parts = [x.double() for x in parts]
    parts[1][0, 0], parts[3][0, :, 0] = -math.inf, -math.inf
    parts = [x.requires_grad_() for x in parts]

    def function(*tensors):
        out, lse = reference.merge_attention(*tensors)
        return out, torch.where(lse.isinf(), 0.0, lse)

    finite = [torch.where(x.isinf(), 0.0, x.detach()).requires_grad_() for x in parts]
    hidden = [x.isinf() for x in parts]

    def masked(*tensors):
        pairs = zip(tensors, hidden, strict=True)
        return function(*(torch.where(h, -math.inf, x) for x, h in pairs))

    assert torch.autograd.gradcheck(masked, finite)
    assert all(x.isfinite().all() for x in torch.autograd.grad(function(*parts)[0].sum(), parts))
