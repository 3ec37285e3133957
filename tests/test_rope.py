"""Rotary embedding: accuracy, strides, positions, in place, gradients."""

import itertools

import pytest
import torch
from attention_options import on_cuda, skip_without_kernels
from torch._subclasses.fake_tensor import FakeTensorMode

import fastattn.functional as fa
from fastattn import reference
from fastattn.testing import (
    DTYPES,
    STRIDES,
    assert_accurate,
    covering_sample,
    one_thread,
    randn,
    restride,
)


def tables(rotary_dim, rows=64, dtype=torch.float32):
    return fa.rope_tables(rotary_dim, rows, dtype=dtype)


def check(x, cos, sin, **options):
    """Forward, in place, and backward of x as it lies, against the reference."""
    dout = randn(*x.shape, seed=7, dtype=torch.bfloat16).to(x.dtype)

    def results(function, x, cos, sin, dout):
        leaf = x.detach().requires_grad_()
        out = function(leaf, cos, sin, **options)
        return out.detach(), torch.autograd.grad(out, leaf, dout)[0]

    got = results(fa.apply_rope, x, cos, sin, dout)
    with one_thread():
        eager = results(reference.apply_rope, x, cos, sin, dout)
        exact = (y.double() for y in (x, cos, sin, dout))
        want = results(reference.apply_rope, *exact)
    for name, g, w, e in zip(("out", "dx"), got, want, eager, strict=True):
        assert g.dtype == x.dtype
        assert_accurate(g, w, e, f"{name} {options}")
    # A copy that lies as x does: for a broadcast x there is none.
    if all(stride != 0 or size < 2 for size, stride in zip(x.shape, x.stride(), strict=True)):
        before = x.clone()
        assert fa.apply_rope_(x, cos, sin, **options) is x
        torch.testing.assert_close(x, got[0], rtol=0, atol=0, equal_nan=True)
        x.copy_(before)


AXES = {
    "dtype": (*DTYPES, torch.float64),
    "table": (*DTYPES, torch.float64),
    "head_dim": (2, 7, 16, 20, 40, 64, 128, 130),
    "rotary": (0, 2, 6, 14, 16, 18, 34, 64, 128),
    "length": (0, 1, 3, 17, 40),
    "heads": (0, 1, 3, 8),
    "batch": ((), (1,), (3,), (2, 3), (0,), (2, 1, 2)),
    "layout": ("bhsd", "bshd"),
    "interleaved": (False, True),
    "positions": ("none", "length", "batch", "broadcast", "token table"),
    "offset": ("none", "int", "scalar", "batch"),
    "stride": STRIDES,
    "table_stride": ("contiguous", "strided", "guarded"),
}


def randint(high, shape, generator):
    """On torch's default device, as a generator of the CPU draws them."""
    drawn = torch.randint(high, shape, generator=generator, device="cpu")
    return drawn.to(torch.get_default_device())


def case(point):
    rotary, length, batch = point["rotary"], point["length"], point["batch"]
    sizes = [point["heads"], length]
    if point["layout"] == "bshd":
        sizes.reverse()
    x = randn(*batch, *sizes, point["head_dim"], seed=1, dtype=point["dtype"])
    options = {"layout": point["layout"], "interleaved": point["interleaved"]}
    generator = torch.Generator("cpu").manual_seed(3)
    cos, sin = tables(rotary, 90, point["table"])
    kind = point["positions"]
    if kind == "token table":
        rows = randint(90, (*batch[:-1], 1, length)[-len(batch) - 1 :], generator)
        return x, restride(cos[rows], "contiguous"), sin[rows], options
    shape = {"length": (length,), "batch": (*batch, length), "broadcast": (1,) * len(batch)}.get(
        kind
    )
    if kind == "broadcast":
        shape = (*shape, length)
    if shape is not None:
        options["positions"] = randint(40, shape, generator)
        if kind == "batch":
            options["positions"] = options["positions"].to(torch.int32)
    offsets = {"int": 9, "scalar": torch.tensor(11), "batch": randint(50, batch, generator)}
    if point["offset"] != "none":
        options["offset"] = offsets[point["offset"]]
    if length and rotary:
        cos, sin = restride(cos, point["table_stride"]), restride(sin, point["table_stride"])
    return restride(x, point["stride"]), cos, sin, options


def test_any_combination(level):
    axes = AXES | {"dtype": DTYPES} if on_cuda() else AXES
    points = covering_sample(axes, 150, 5, lambda p: p["rotary"] <= p["head_dim"])
    for point in points:
        x, cos, sin, options = case(point)
        check(x, cos, sin, **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("interleaved", [False, True])
def test_every_width_of_the_rotation(level, dtype, interleaved):
    for half in (1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 33):
        x = randn(2, 2, 3, 2 * half + half % 3, seed=half, dtype=dtype)
        check(x, *tables(2 * half), interleaved=interleaved)


def test_pairs_are_those_of_neox_and_of_gpt_j():
    cos, sin = torch.tensor([[0.0, 1.0]]), torch.tensor([[1.0, 0.0]])  # a quarter turn, no turn
    x = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0]).reshape(1, 1, 5)
    assert fa.apply_rope(x, cos, sin).flatten().tolist() == [-3, 2, 1, 4, 5]
    assert fa.apply_rope(x, cos, sin, interleaved=True).flatten().tolist() == [-2, 1, 3, 4, 5]


@pytest.mark.parametrize("interleaved", [False, True])
def test_nothing_around_the_tensor_is_written_and_no_nan_spreads(level, interleaved):
    cos, sin = tables(24)
    buffer = torch.full((4, 9, 60), torch.nan)
    x = buffer[1:3, 2:7, 11:48]
    x.copy_(randn(2, 5, 37, seed=2))
    x[1, 3, 1] = torch.nan
    want = reference.apply_rope(x.double(), cos.double(), sin.double(), interleaved=interleaved)
    fa.apply_rope_(x, cos, sin, interleaved=interleaved)
    assert_accurate(x, want, want, "x")
    assert x.isnan().sum() == 2
    assert buffer.isnan().sum() == buffer.numel() - x.numel() + 2


def test_columns_behind_the_rotation_are_copied_bit_by_bit(level):
    bits = torch.randint(-(2**15), 2**15, (1, 2, 3, 16), dtype=torch.int16)
    out = fa.apply_rope(bits.view(torch.bfloat16), *tables(4))
    assert torch.equal(out.view(torch.int16)[..., 4:], bits[..., 4:])


@pytest.mark.parametrize("interleaved", [False, True])
def test_query_and_key_in_one_call_are_as_in_two(level, interleaved):
    cos, sin = tables(16)
    options = {"interleaved": interleaved, "offset": torch.tensor([3, 9]), "layout": "bshd"}
    fused = randn(2, 11, 9, 20, seed=3, dtype=torch.bfloat16).requires_grad_()
    query, key = fused[:, :, :6], fused[:, :, 6:8]
    outs = fa.apply_rope_qk(query, key, cos, sin, **options)
    single = [fa.apply_rope(x, cos, sin, **options) for x in (query, key)]
    assert all(torch.equal(a, b) for a, b in zip(outs, single, strict=True))
    grads = [torch.autograd.grad(y[0].sum() + (y[1] * 3).sum(), fused)[0] for y in (outs, single)]
    assert torch.equal(*grads)
    with torch.no_grad():
        written = fused.clone()
        query, key = written[:, :, :6], written[:, :, 6:8]
        result = fa.apply_rope_qk_(query, key, cos, sin, **options)
        assert result[0] is query and result[1] is key
        assert torch.equal(query, outs[0]) and torch.equal(key, outs[1])
        assert torch.equal(written[:, :, 8:], fused[:, :, 8:])


def test_a_key_may_have_its_own_heads_and_head_dim(level):
    cos, sin = tables(8)
    query, key = randn(2, 4, 5, 16, seed=1), randn(2, 1, 5, 12, seed=2)
    for got, x in zip(fa.apply_rope_qk(query, key, cos, sin), (query, key), strict=True):
        assert torch.equal(got, fa.apply_rope(x, cos, sin))


def test_memory_order_is_that_of_torch():
    cos, sin = tables(8)
    base = randn(2, 3, 5, 4, 8, seed=1)
    for x in (base, base.transpose(1, 3), base[:, :, :, 1:3], base[:, 1].transpose(1, 2)):
        assert fa.apply_rope(x, cos, sin).stride() == torch.empty_like(x).stride()
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        x = base[:, :, 1:4].transpose(1, 3)
        assert fa.apply_rope(mode.from_tensor(x), cos, sin).stride() == torch.empty_like(x).stride()


def test_bits_do_not_depend_on_threads_or_on_the_batch(threads):
    x = randn(3, 5, 300, 64, seed=1)
    positions = torch.randint(64, (3, 300))
    results = []
    for count in (1, 2, 3):
        threads(count)
        results.append(fa.apply_rope(x, *tables(64), positions=positions))
    assert all(torch.equal(results[0], y) for y in results)
    alone = fa.apply_rope(x[1:2, :, 7:8], *tables(64), positions=positions[1:2, 7:8])
    assert torch.equal(alone, results[0][1:2, :, 7:8])


@pytest.mark.parametrize("interleaved", [False, True])
def test_gradcheck(interleaved):
    skip_without_kernels(torch.float64)
    cos, sin = tables(6, dtype=torch.float64)
    x = randn(2, 2, 3, 7, seed=1, dtype=torch.float64).requires_grad_()
    y = randn(2, 1, 3, 6, seed=2, dtype=torch.float64).requires_grad_()
    options = {"interleaved": interleaved, "positions": torch.tensor([4, 0, 9]), "offset": 2}
    functions = (
        lambda x, y: fa.apply_rope(x, cos, sin, **options),
        lambda x, y: fa.apply_rope_(x * 1, cos, sin, **options),
        lambda x, y: fa.apply_rope_qk(x, y, cos, sin, **options),
        lambda x, y: fa.apply_rope_qk_(x * 1, y * 1, cos, sin, **options),
    )
    for function in functions:
        assert torch.autograd.gradcheck(function, (x, y))
        assert torch.autograd.gradgradcheck(function, (x, y))


def test_only_one_of_query_and_key_needs_a_gradient():
    cos, sin = tables(8)
    query, key = randn(1, 2, 3, 8, seed=1), randn(1, 1, 3, 8, seed=2).requires_grad_()
    outs = fa.apply_rope_qk(query, key, cos, sin)
    expected = torch.autograd.grad(fa.apply_rope(key, cos, sin).sum(), key)[0]
    assert torch.equal(torch.autograd.grad(outs[1].sum(), key, retain_graph=True)[0], expected)
    grads = torch.autograd.grad(outs[0].sum(), key, allow_unused=True)
    assert grads[0] is None or not grads[0].any()


def test_in_place_is_known_to_autograd():
    cos, sin = tables(8)
    leaf = randn(1, 2, 3, 8, seed=1).requires_grad_()
    saved = leaf * 1
    squares = saved.square()
    with torch.no_grad():
        fa.apply_rope_(saved, cos, sin)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        squares.sum().backward()
    before = leaf.detach().clone()
    for x in (leaf, leaf[:, :1]):
        with pytest.raises(ValueError, match="x: expected a tensor that may be written in place"):
            fa.apply_rope_(x, cos, sin)
        with pytest.raises(ValueError, match="key: expected a tensor that may be written"):
            fa.apply_rope_qk_(leaf * 1, x, cos, sin)
    assert torch.equal(leaf.detach(), before)


def test_slices_of_a_projection_that_needs_a_gradient_are_rotated_in_place():
    cos, sin = tables(8)
    leaf = randn(2, 5, 3, 2, 8, seed=1).requires_grad_()

    def query_and_key(rotate, fused):
        return rotate(fused[:, :, 0], fused[:, :, 1], cos, sin, layout="bshd")

    fused = leaf * 1
    query_and_key(fa.apply_rope_qk_, fused)
    want = query_and_key(fa.apply_rope_qk, leaf)
    assert torch.equal(fused[:, :, 0], want[0]) and torch.equal(fused[:, :, 1], want[1])
    assert torch.equal(fused[:, :, 2], leaf[:, :, 2])
    weights = randn(2, 5, 3, 2, 8, seed=2)
    got = torch.autograd.grad((fused * weights).sum(), leaf)[0]
    rotated = (want[0] * weights[:, :, 0]).sum() + (want[1] * weights[:, :, 1]).sum()
    expected = torch.autograd.grad(rotated + (leaf * weights)[:, :, 2].sum(), leaf)[0]
    torch.testing.assert_close(got, expected)


def test_transforms_of_torch_func():
    cos, sin = tables(8)
    x = randn(3, 2, 2, 5, 8, seed=1)

    def loss(x):
        return fa.apply_rope(x, cos, sin).pow(3).sum()

    together = torch.func.vmap(torch.func.grad(loss))(x)
    alone = torch.stack([torch.func.grad(loss)(y) for y in x])
    torch.testing.assert_close(together, alone)


def test_forward_mode_raises_rather_than_forget_the_tangent():
    x, cos, sin = randn(1, 1, 2, 8, seed=1), *tables(8)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, x)
        with pytest.raises(RuntimeError, match="jvp"):
            fa.apply_rope(dual, cos, sin)


@pytest.mark.parametrize("op", ["rope", "rope_", "rope_qk", "rope_qk_"])
def test_opcheck(op):
    cos, sin = tables(8)
    function = getattr(torch.ops.fastattn, op).default
    x = randn(2, 3, 4, 5, 8, seed=1)[:, 1].transpose(1, 2)
    inputs = (x, x[:, :2].clone()) if "qk" in op else (x,)
    options = {"positions": torch.arange(4), "offsets": torch.tensor([2, 5]), "interleaved": True}
    torch.library.opcheck(function, (*inputs, cos, sin), options)
    torch.library.opcheck(function, (*inputs, cos, sin), {"offset": 3, "inverse": True})


@pytest.mark.parametrize("grad", [False, True])
def test_one_graph_compiles_everything(grad):
    torch._dynamo.reset()
    cos, sin = tables(8, 200)

    def step(x, y, positions, offset):
        x = fa.apply_rope(x * 2, cos, sin, positions=positions)
        x = fa.apply_rope_(x, cos, sin, offset=offset, interleaved=True)
        x, y = fa.apply_rope_qk(x, y, cos, sin, offset=positions[0])
        fa.apply_rope_qk_(x, y, cos, sin, offset=offset)
        return x, y

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    for length in (3, 4, 9):
        x, y = randn(2, 4, length, 8, seed=1), randn(2, 1, length, 8, seed=2)
        positions = torch.randint(0, 90, (length,))
        results = []
        for function in (step, compiled):
            leaves = [t.clone().requires_grad_(grad) for t in (x, y)]
            outs = function(leaves[0] * 1, leaves[1] * 1, positions, length)
            results.append([t.detach() for t in outs])
            if grad:
                results[-1] += torch.autograd.grad(outs[0].sum() + outs[1].sum(), leaves)
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_inductor_keeps_what_is_in_place():
    torch._dynamo.reset()
    cos, sin = tables(8)

    def step(x):
        y = x + 1
        fa.apply_rope_(x, cos, sin)
        return y * x

    a, b = randn(1, 2, 3, 8, seed=1), randn(1, 2, 3, 8, seed=1)
    torch.testing.assert_close(torch.compile(step, fullgraph=True)(a), step(b))
    assert torch.equal(a, b)


BAD = [
    ({"x": [1.0]}, TypeError, "x: expected a tensor, got list"),
    ({"cos": None}, TypeError, "cos: expected a tensor"),
    ({"x": torch.zeros(4, 8)}, ValueError, "x: expected 3 to 9 dimensions"),
    ({"x": torch.zeros(1, 1, 4, 8, dtype=torch.int32)}, TypeError, "x: expected dtype"),
    ({"cos": torch.zeros(9, 4, dtype=torch.int32)}, TypeError, "cos: expected dtype"),
    ({"sin": torch.zeros(9, 4, dtype=torch.float64)}, TypeError, "sin: expected dtype of cos"),
    ({"sin": torch.zeros(9, 3)}, ValueError, r"sin: expected shape \(9, 4\), got shape \(9, 3\)"),
    ({"cos": torch.zeros(9)}, ValueError, r"sin: expected shape \(9,\)"),
    ({"cos": torch.zeros(9, 5), "sin": torch.zeros(9, 5)}, ValueError, "cos: expected at most 4"),
    ({"offset": 6}, ValueError, "offset: expected offset >= 0 and offset . length <= 9"),
    ({"offset": -1}, ValueError, "offset: expected offset >= 0"),
    ({"offset": torch.tensor([0, 6])}, ValueError, "offset: expected offset >= 0"),
    ({"offset": 1.5}, TypeError, "offset: expected an integer or a tensor, got float"),
    ({"offset": True}, TypeError, "offset: expected an integer"),
    ({"offset": torch.tensor(1.5)}, TypeError, "offset: expected dtype torch.int32"),
    ({"offset": torch.zeros(3, dtype=torch.int64)}, ValueError, "offset: expected shape"),
    ({"positions": [0, 1, 2, 3]}, TypeError, "positions: expected a tensor"),
    ({"positions": torch.tensor([0, 1, 2, 9])}, ValueError, "positions: expected 0 <= positions"),
    ({"positions": torch.tensor([0, -1, 2, 3])}, ValueError, "got -1 with offset 0"),
    ({"positions": torch.tensor([0, 1, 2, 8]), "offset": 1}, ValueError, "got 8 with offset 1"),
    ({"positions": torch.arange(4), "offset": 2**63 - 1}, ValueError, "positions: expected"),
    ({"positions": torch.arange(5)}, ValueError, "positions: expected shape"),
    ({"positions": torch.zeros(3, 4, dtype=torch.int64)}, ValueError, "positions: expected shape"),
    ({"positions": torch.zeros(4)}, TypeError, "positions: expected dtype torch.int32"),
    ({"layout": "bsd"}, ValueError, "layout: expected 'bhsd' or 'bshd', got 'bsd'"),
    ({"cos": torch.zeros(9, 4).requires_grad_()}, ValueError, "cos: expected a tensor that requir"),
    ({"sin": torch.zeros(9, 4).requires_grad_()}, ValueError, "sin: expected a tensor that requir"),
    ({"cos": torch.zeros(9, 4, device="meta")}, ValueError, "cos: expected a tensor on cpu"),
    (
        {"cos": torch.zeros(2, 5, 4), "sin": torch.zeros(2, 5, 4)},
        ValueError,
        r"cos: expected shape .* with length 4, got shape \(2, 5, 4\)",
    ),
    (
        {"cos": torch.zeros(2, 4, 4), "sin": torch.zeros(2, 4, 4), "positions": torch.arange(4)},
        ValueError,
        "positions: expected None beside a cos with a row for each token",
    ),
    (
        {"cos": torch.zeros(2, 4, 4), "sin": torch.zeros(2, 4, 4), "offset": 1},
        ValueError,
        "offset: expected 0 beside a cos with a row for each token",
    ),
]


@pytest.mark.parametrize("index", range(len(BAD)))
def test_bad_arguments_are_named_and_nothing_is_written(index):
    changed, error, message = BAD[index]
    arguments = {"x": torch.ones(2, 1, 4, 8), "cos": torch.zeros(9, 4), "sin": torch.zeros(9, 4)}
    arguments |= changed
    for function in (fa.apply_rope, fa.apply_rope_):
        with pytest.raises(error, match=message):
            function(**arguments)
    if isinstance(arguments["x"], torch.Tensor) and "x" not in changed:
        assert arguments["x"].eq(1).all()


def test_bad_keys_are_named():
    cos, sin = tables(8)
    query = torch.ones(2, 2, 3, 8)
    for key, error, message in (
        (torch.ones(2, 2, 4, 8), ValueError, "key: expected the leading dimensions and the length"),
        (torch.ones(1, 2, 3, 8), ValueError, "key: expected the leading dimensions and the length"),
        (torch.ones(2, 3, 8), ValueError, "key: expected the leading dimensions and the length"),
        (torch.ones(2, 2, 3, 8).bfloat16(), TypeError, "key: expected dtype of query"),
        (torch.ones(2, 2, 3, 6), ValueError, "cos: expected at most 3 columns"),
        (torch.ones(1, 2, 3, 8).expand(2, 2, 3, 8), ValueError, "key: expected a tensor whose"),
        ("key", TypeError, "key: expected a tensor, got str"),
    ):
        with pytest.raises(error, match=message):
            fa.apply_rope_qk_(query, key, cos, sin)
    assert query.eq(1).all()


def test_every_dtype_of_tables_is_read_as_it_is(level):
    x = randn(1, 2, 5, 16, seed=1)
    for dtype, layout in itertools.product((*DTYPES, torch.float64), ("bhsd", "bshd")):
        cos, sin = tables(16, dtype=dtype)
        got = fa.apply_rope(x, cos, sin, layout=layout)
        assert torch.equal(got, fa.apply_rope(x, cos.float(), sin.float(), layout=layout))
