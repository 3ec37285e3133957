"""compat.flash_attn's padding, rotary embedding and activations, against their formulas."""

import pytest
import torch
from torch.autograd import gradcheck

from fastattn.compat.flash_attn import bert_padding as padding
from fastattn.compat.flash_attn.layers import rotary
from fastattn.compat.flash_attn.ops import activations
from fastattn.testing import assert_accurate, randn

MASKS = {
    "right": [[1, 1, 1, 0, 0], [1, 0, 0, 0, 0], [1, 1, 1, 1, 1]],
    "left": [[0, 0, 1, 1, 1], [0, 0, 0, 0, 1], [1, 1, 1, 1, 1]],
    "holes": [[1, 0, 1, 0, 1], [0, 0, 0, 0, 0], [0, 1, 1, 1, 0]],
    "nothing": [[0, 0, 0, 0, 0]] * 3,
}


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.int32], ids=str)
@pytest.mark.parametrize("mask", MASKS)
def test_unpadding_and_padding_again(mask, dtype):
    rows = MASKS[mask]
    x = randn(3, 5, 2, 4, seed=0, dtype=torch.float64).requires_grad_()
    found = padding.unpad_input(x, torch.tensor(rows, dtype=dtype))
    packed, indices, bounds, longest, used = found
    flat = [5 * b + i for b in range(3) for i in range(5) if rows[b][i]]
    counts = [sum(row) for row in rows]
    assert indices.tolist() == flat
    assert bounds.dtype == used.dtype == torch.int32
    assert bounds.tolist() == [sum(counts[:b]) for b in range(4)]
    assert used.tolist() == counts
    assert longest == max(counts) and type(longest) is int
    assert torch.equal(packed, x.reshape(15, 2, 4)[flat])
    padded = padding.pad_input(packed, indices, 3, 5)
    kept = torch.tensor(rows).bool()[..., None, None]
    assert torch.equal(padded, torch.where(kept, x, 0.0))
    weights = randn(*padded.shape, seed=1, dtype=torch.float64)
    (gradient,) = torch.autograd.grad((padded * weights).sum(), x)
    assert torch.equal(gradient, torch.where(kept, weights, 0.0))


def test_unused_rows_are_packed_but_not_counted_as_used():
    x = randn(2, 4, 3, seed=0)
    valid, unused = torch.tensor([[1, 1, 0, 0], [1, 0, 0, 0]]), torch.tensor([[0, 0, 1, 0]] * 2)
    packed, indices, bounds, longest, used = padding.unpad_input(x, valid, unused)
    assert indices.tolist() == [0, 1, 2, 4, 6]
    assert bounds.tolist() == [0, 3, 5] and used.tolist() == [2, 1] and longest == 3
    assert torch.equal(packed, x.flatten(0, 1)[indices])


def test_several_sequences_in_each_row():
    lengths = torch.tensor([[2, 3, 0, 0, 0, 0], [3, 2, 0, 0, 0, 0], [6, 0, 0, 0, 0, 0]])
    x = randn(3, 6, 4, seed=0).requires_grad_()
    found = padding.unpad_input_for_concatenated_sequences(x, lengths)
    packed, indices, bounds, longest = found
    assert bounds.tolist() == [0, 2, 5, 8, 10, 16] and bounds.dtype == torch.int32
    assert indices.tolist() == [0, 1, 2, 3, 4, 6, 7, 8, 9, 10, 12, 13, 14, 15, 16, 17]
    assert longest == 6
    assert torch.equal(packed, x.flatten(0, 1)[indices])
    packed.sum().backward()
    assert x.grad.sum() == 16 * 4


def test_rows_by_index_are_differentiable():
    x = randn(5, 2, 3, seed=0, dtype=torch.float64).requires_grad_()
    y = randn(3, 2, 3, seed=1, dtype=torch.float64).requires_grad_()
    twice, distinct = torch.tensor([4, 0, 4]), torch.tensor([3, 0, 4])
    assert torch.equal(padding.index_first_axis(x, twice), x[twice])
    assert gradcheck(lambda x: padding.index_first_axis(x, twice), x)
    placed = padding.index_put_first_axis(y, distinct, 6)
    assert placed.shape == (6, 2, 3) and torch.equal(placed[distinct], y)
    assert not placed[[1, 2, 5]].any()
    assert gradcheck(lambda y: padding.index_put_first_axis(y, distinct, 6), y)
    rows, whole = padding.index_first_axis_residual(x, distinct)
    assert torch.equal(rows, x[distinct]) and torch.equal(whole, x)
    assert gradcheck(lambda x: padding.index_first_axis_residual(x, distinct), x)


def test_a_mask_of_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"^attention_mask: expected .* \(2, 4\)"):
        padding.unpad_input(torch.zeros(2, 4, 3), torch.ones(2, 5))


def tables(positions, rotary_dim, dtype=torch.float32, seed=0):
    angles = randn(positions, rotary_dim // 2, seed=seed, dtype=torch.float64)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotated(x, cos, sin, interleaved, positions):
    """The formula: x (..., seqlen, heads, head_dim) at positions (..., seqlen), in x's dtype."""
    half = cos.shape[1]
    n = torch.arange(half)
    a, b = (2 * n, 2 * n + 1) if interleaved else (n, n + half)
    cos, sin = (t.to(x.dtype)[positions].unsqueeze(-2) for t in (cos, sin))
    out = x.clone()
    out[..., a] = x[..., a] * cos - x[..., b] * sin
    out[..., b] = x[..., b] * cos + x[..., a] * sin
    return out


def positions_of(offsets, batch=2, length=5):
    """(batch, length)"""
    first = torch.as_tensor(offsets).expand(batch)
    return first.unsqueeze(1) + torch.arange(length)


OFFSETS = [0, 3, torch.tensor([0, 6]), torch.tensor([4, 1], dtype=torch.int32)]


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("offsets", OFFSETS, ids=str)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_rotation_and_its_gradient(dtype, interleaved, offsets, inplace):
    x = randn(2, 5, 3, 16, seed=1, dtype=dtype)
    cos, sin = tables(12, 12, dtype)
    where = positions_of(offsets)
    results = {}
    for name, kind in (("oracle", torch.float64), ("eager", dtype), ("got", dtype)):
        leaf = x.to(kind).requires_grad_()
        if name == "got":
            y = leaf.clone()
            out = rotary.apply_rotary_emb(y, cos, sin, interleaved, inplace, offsets)
            assert (out is y) == inplace
        else:
            out = rotated(leaf, cos, sin, interleaved, where)
        gradient = randn(*x.shape, seed=2, dtype=torch.bfloat16).to(kind)
        results[name] = out, torch.autograd.grad(out, leaf, gradient)[0]
    for got, want, eager in zip(results["got"], results["oracle"], results["eager"]):
        assert_accurate(got, want, eager, "rotary")


@pytest.mark.parametrize("interleaved", [False, True])
def test_the_formula_in_torch(interleaved):
    x = randn(2, 5, 3, 16, seed=1, dtype=torch.float64)
    cos, sin = tables(5, 12, torch.float64)
    want = rotated(x, cos, sin, interleaved, torch.arange(5))
    torch.testing.assert_close(rotary.apply_rotary_emb_torch(x, cos, sin, interleaved), want)
    batched = [t.expand(2, 5, 6) for t in (cos, sin)]
    torch.testing.assert_close(rotary.apply_rotary_emb_torch(x, *batched, interleaved), want)
    half = rotary.rotate_half(torch.arange(4.0), interleaved).tolist()
    assert half == ([-1.0, 0.0, -3.0, 2.0] if interleaved else [-2.0, -3.0, 0.0, 1.0])


@pytest.mark.parametrize("offsets", [0, 2, torch.tensor([1, 0, 5, 2])], ids=str)
@pytest.mark.parametrize("index", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("inplace", [False, True])
def test_packed_rows_are_rotated_in_their_sequences(inplace, index, offsets):
    bounds = torch.tensor([0, 3, 3, 8, 9], dtype=index)
    x = randn(11, 2, 8, seed=1, dtype=torch.float64).requires_grad_()
    cos, sin = tables(12, 8, torch.float64)
    first = torch.as_tensor(offsets).expand(4).tolist()
    places = [first[n] + i for n, length in enumerate((3, 0, 5, 1)) for i in range(length)]
    want = rotated(x, cos, sin, False, torch.tensor([*places, 0, 0]))
    out = rotary.apply_rotary_emb(
        *(x.clone(), cos, sin),
        False,
        inplace,
        seqlen_offsets=offsets,
        cu_seqlens=bounds,
        max_seqlen=5,
    )
    torch.testing.assert_close(out, want)
    dout = randn(*x.shape, seed=2, dtype=torch.float64)
    got, expected = (torch.autograd.grad(y, x, dout)[0] for y in (out, want))
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("own_tables", [False, True])
@pytest.mark.parametrize("form", ["3", "grouped", "strided"])
@pytest.mark.parametrize("interleaved", [False, True])
def test_fused_projections_are_rotated_in_place(form, interleaved, own_tables):
    shape, heads_q = ((2, 5, 3, 4, 8), None) if form != "grouped" else ((2, 5, 4 + 2 + 2, 8), 4)
    leaf = randn(*shape, seed=1, dtype=torch.float64).requires_grad_()
    cos, sin = tables(9, 8, torch.float64)
    cos_k, sin_k = tables(9, 8, torch.float64, seed=3) if own_tables else (None, None)
    qkv = leaf * 1.0
    if form == "strided":
        qkv = torch.stack((qkv, qkv), dim=-1)[..., 0]
    out = rotary.apply_rotary_emb_qkv_(
        qkv, cos, sin, cos_k, sin_k, interleaved, torch.tensor([1, 4]), num_heads_q=heads_q
    )
    assert out is qkv
    where = positions_of(torch.tensor([1, 4]))
    q, k, v = leaf.unbind(2) if heads_q is None else leaf.split((4, 2, 2), dim=2)
    key_tables = (cos_k, sin_k) if own_tables else (cos, sin)
    parts = rotated(q, cos, sin, interleaved, where), rotated(k, *key_tables, interleaved, where), v
    want = torch.stack(parts, dim=2) if heads_q is None else torch.cat(parts, dim=2)
    torch.testing.assert_close(out, want)
    dout = randn(*want.shape, seed=2, dtype=torch.float64)
    got, expected = (torch.autograd.grad(y, leaf, dout)[0] for y in (out, want))
    torch.testing.assert_close(got, expected)


def test_keys_and_values_are_rotated_in_place():
    leaf = randn(2, 5, 2, 3, 8, seed=1, dtype=torch.float64).requires_grad_()
    cos, sin = tables(9, 6, torch.float64)
    kv = leaf * 1.0
    assert rotary.apply_rotary_emb_kv_(kv, cos, sin, True, 4) is kv
    k, v = leaf.unbind(2)
    want = torch.stack((rotated(k, cos, sin, True, positions_of(4)), v), dim=2)
    torch.testing.assert_close(kv, want)
    dout = randn(*want.shape, seed=2, dtype=torch.float64)
    got, expected = (torch.autograd.grad(y, leaf, dout)[0] for y in (kv, want))
    torch.testing.assert_close(got, expected)


def embedding_tables(dim, length, base, scale_base, dtype=torch.float64):
    """((cos, sin) of q, (cos, sin) of k), from the formulas."""
    n = torch.arange(0, dim, 2, dtype=torch.float64)
    p = torch.arange(length, dtype=torch.float64).unsqueeze(1)
    angles = p * (1.0 / base ** (n / dim)).float().double()
    cos, sin = angles.cos(), angles.sin()
    if scale_base is None:
        return (cos, sin), (cos, sin)
    scale = ((n + 0.4 * dim) / (1.4 * dim)) ** ((p - length // 2) / scale_base)
    return (cos * scale, sin * scale), (cos / scale, sin / scale)


@pytest.mark.parametrize("scale_base", [None, 512.0])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("form", ["qkv", "grouped", "q and kv"])
@pytest.mark.parametrize("offset", [0, 4, torch.tensor([2, 0])], ids=str)
def test_the_module(offset, form, interleaved, scale_base):
    module = rotary.RotaryEmbedding(8, 1000.0, interleaved, scale_base)
    assert not module.state_dict()
    given = {"seqlen_offset": offset}
    length = 5 + (offset if isinstance(offset, int) else 2)
    if not isinstance(offset, int):
        given["max_seqlen"] = length
    of_q, of_k = embedding_tables(8, length, 1000.0, scale_base)
    q, k, v = (randn(2, 5, 3, 16, seed=i) for i in range(3))
    where = positions_of(offset)
    want_q, want_k = (
        rotated(x.double(), *t, interleaved, where) for x, t in ((q, of_q), (k, of_k))
    )
    if form == "qkv":
        got = module(torch.stack((q, k, v), dim=2), **given).unbind(2)
    elif form == "grouped":
        got = module(torch.cat((q, k, v), dim=2), num_heads_q=3, **given).chunk(3, dim=2)
    else:
        got_q, kv = module(q.clone(), torch.stack((k, v), dim=2), **given)
        got = (got_q, *kv.unbind(2))
    for x, want in zip(got, (want_q, want_k, v.double())):
        torch.testing.assert_close(x.double(), want, rtol=2e-6, atol=2e-6)


def test_the_tables_of_the_module_grow_and_follow_its_inputs():
    module = rotary.RotaryEmbedding(8)
    with pytest.raises(ValueError, match=r"^max_seqlen: "):
        module(torch.zeros(1, 2, 3, 1, 8), seqlen_offset=torch.tensor([3]))
    module(torch.zeros(1, 2, 3, 1, 8))
    first = module._cos_cached
    assert first.shape == (2, 4)
    module(torch.zeros(1, 1, 3, 1, 8))
    assert module._cos_cached is first
    module(torch.zeros(1, 2, 3, 1, 8, dtype=torch.bfloat16), seqlen_offset=5)
    assert module._cos_cached.shape == (7, 4) and module._cos_cached.dtype == torch.float32
    module(torch.zeros(1, 2, 3, 1, 8, dtype=torch.float64))
    assert module._cos_cached.dtype == torch.float64
    with torch.inference_mode():
        module(torch.zeros(1, 9, 3, 1, 8, dtype=torch.float64))
    x = torch.ones(1, 9, 3, 1, 8, dtype=torch.float64, requires_grad=True)
    module(x * 1.0).sum().backward()
    assert torch.isfinite(x.grad).all()
    wide = module.inv_freq.clone()
    assert module.to(torch.bfloat16).inv_freq.dtype == torch.bfloat16
    module._update_cos_sin_cache(40, dtype=torch.float32)
    want = torch.outer(torch.arange(40.0), wide).cos()
    torch.testing.assert_close(module._cos_cached, want, rtol=1e-5, atol=1e-5)


def test_a_changed_frequency_is_used():
    module = rotary.RotaryEmbedding(8)
    module.inv_freq /= 4.0
    q = randn(1, 5, 2, 8, seed=0)
    out, _ = module(q.clone(), torch.zeros(1, 5, 2, 2, 8))
    n = torch.arange(0, 8, 2) / 8
    angles = torch.outer(torch.arange(5.0), 10000.0**-n / 4.0).double()
    want = rotated(q.double(), angles.cos(), angles.sin(), False, torch.arange(5))
    torch.testing.assert_close(out.double(), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("message", "call"),
    [
        ("x: expected shape", lambda x, c, s: rotary.apply_rotary_emb(x[0], c, s)),
        ("x: expected shape", lambda x, c, s: rotary.apply_rotary_emb(x, c, s, cu_seqlens=BOUNDS)),
        ("seqlen_offsets: ", lambda x, c, s: rotary.apply_rotary_emb(x, c, s, seqlen_offsets=4)),
        (
            "seqlen_offsets: ",
            lambda x, c, s: rotary.apply_rotary_emb(
                x[0], c, s, cu_seqlens=BOUNDS, seqlen_offsets=9
            ),
        ),
        ("cos: ", lambda x, c, s: rotary.apply_rotary_emb_torch(x[..., :4], c, s)),
        ("qkv: expected shape", lambda x, c, s: rotary.apply_rotary_emb_qkv_(x[None], c, s)),
        ("num_heads_q: ", lambda x, c, s: rotary.apply_rotary_emb_qkv_(x, c, s)),
        ("num_heads_q: ", lambda x, c, s: rotary.apply_rotary_emb_qkv_(x, c, s, num_heads_q=1)),
        ("kv: expected shape", lambda x, c, s: rotary.apply_rotary_emb_kv_(x, c, s)),
        ("dim: ", lambda x, c, s: rotary.RotaryEmbedding(7)),
        (
            "seqlen_offset: ",
            lambda x, c, s: rotary.RotaryEmbedding(8)(x.new_zeros(1, 5, 3, 4, 8), seqlen_offset=-9),
        ),
    ],
)
def test_errors_of_rotary_name_the_argument(message, call):
    cos, sin = tables(6, 8)
    with pytest.raises(ValueError, match=f"^{message}"):
        call(torch.zeros(1, 5, 4, 8), cos, sin)


BOUNDS = torch.tensor([0, 5])

ACTIVATIONS = {
    "swiglu": (activations.swiglu, lambda x, y: torch.nn.functional.silu(x) * y, 2),
    "swiglu_fwd": (activations.swiglu_fwd, lambda x, y: torch.nn.functional.silu(x) * y, 2),
    "gelu_fwd": (
        activations.gelu_fwd,
        lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
        1,
    ),
    "fast_gelu_impl": (
        activations.fast_gelu_impl,
        lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
        1,
    ),
    "sqrelu_fwd": (activations.sqrelu_fwd, lambda x: torch.relu(x).square(), 1),
}
GELU_TANH = ACTIVATIONS["gelu_fwd"][1]


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_and_their_gradients(name):
    function, formula, count = ACTIVATIONS[name]
    inputs = [randn(4, 6, seed=i, dtype=torch.float64).requires_grad_() for i in range(count)]
    out, want = function(*inputs), formula(*inputs)
    torch.testing.assert_close(out, want)
    dout = randn(4, 6, seed=9, dtype=torch.float64)
    for got, expected in zip(
        torch.autograd.grad(out, inputs, dout), torch.autograd.grad(want, inputs, dout)
    ):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("function", [activations.bias_gelu, activations.bias_gelu_impl])
def test_gelu_behind_a_bias(function):
    y = randn(4, 6, seed=0, dtype=torch.float64).requires_grad_()
    bias = randn(6, seed=1, dtype=torch.float64).requires_grad_()
    dout = randn(4, 6, seed=2, dtype=torch.float64)
    want = GELU_TANH(y + bias)
    torch.testing.assert_close(function(y, bias), want)
    expected = torch.autograd.grad(want, (y, bias), dout)
    got = torch.autograd.grad(function(y, bias), (y, bias), dout)
    for a, b, c in zip(got, expected, activations.bias_gelu_back(dout, y, bias)):
        torch.testing.assert_close(a, b)
        torch.testing.assert_close(c, b)


def test_the_backward_halves():
    x, y, g = (randn(4, 6, seed=i, dtype=torch.float64).requires_grad_() for i in range(3))
    x.data[0, 0] = 0.0

    def gradients(out, *inputs):
        return torch.autograd.grad(out, inputs, g)

    formula = torch.nn.functional.silu(x) * y
    for got, want in zip(activations.swiglu_bwd(x, y, g), gradients(formula, x, y)):
        torch.testing.assert_close(got, want)
    torch.testing.assert_close(activations.gelu_bwd(g, x), gradients(GELU_TANH(x), x)[0])
    squared = torch.relu(x).square()
    torch.testing.assert_close(activations.sqrelu_bwd(g, x), gradients(squared, x)[0])
    relu = torch.where(x == 0, g, gradients(torch.relu(x), x)[0])
    torch.testing.assert_close(activations.relu_bwd(g, x), relu)
