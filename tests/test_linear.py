"""Linear layers of few rows: accuracy, layouts, the same bits, gradients, errors."""

import copy
import itertools
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

import fastattn.functional as fa
from fastattn import nn
from fastattn._ops.linear import MOST_ROWS
from fastattn._ops.linear import linear as op
from fastattn.testing import assert_accurate, covering_sample, one_thread, randn, restride

HALVES = (torch.bfloat16, torch.float16)
SIZES = (0, 1, 2, 7, 16, 31, 33, 64, 100, 257, 768)
LAYOUTS = ("rows", "columns", "guarded rows", "guarded columns")
DTYPES = (torch.float32, *HALVES, torch.float64)


def laid_out(weight, layout):
    """The same weight; NaN around it where it is guarded."""
    kind = "guarded" if "guarded" in layout else "contiguous"
    if "columns" in layout:
        return restride(weight.t(), kind).t()
    return restride(weight, kind)


def drawn(rows, out_features, in_features, dtype, bias=None, layout="rows", seed=0):
    x = randn(rows, in_features, seed=seed, dtype=dtype)
    weight = randn(out_features, in_features, seed=seed + 1, dtype=dtype)
    bias = None if bias is None else randn(out_features, seed=seed + 2, dtype=bias)
    return x, laid_out(weight, layout), bias


def check(function, x, weight, bias):
    with torch.no_grad():
        got = function(x, weight, bias)
    exact = [None if each is None else each.double() for each in (x, weight, bias)]
    with one_thread():
        want = F.linear(*exact)
        eager = F.linear(x, weight, None if bias is None else bias.to(x.dtype))
        terms = F.linear(exact[0].square(), exact[1].square())
    magnitude = terms.max().sqrt().item() if terms.numel() else 0.0
    assert got.dtype == x.dtype and got.is_contiguous()
    assert_accurate(got, want, eager, "linear", magnitude=magnitude)
    return got


AXES = {
    "rows": tuple(range(MOST_ROWS + 1)),
    "out_features": SIZES,
    "in_features": SIZES,
    "dtype": HALVES,
    "bias": (None, *DTYPES),
    "layout": LAYOUTS,
}


def test_accuracy(level):
    for point in covering_sample(AXES, 300, 1, lambda p: True):
        check(op, *drawn(**point))


def test_every_number_of_rows_and_every_remainder(level):
    for rows, n, layout in itertools.product(range(1, MOST_ROWS + 1), range(1, 70), LAYOUTS[:2]):
        check(op, *drawn(rows, n, 70 - n, HALVES[n % 2], torch.float32, layout))


def test_many_outputs_and_long_sums(level):
    for layout, rows in itertools.product(LAYOUTS[:2], (1, 5)):
        check(op, *drawn(rows, 6200, 33, torch.bfloat16, torch.bfloat16, layout))
        check(op, *drawn(rows, 33, 6200, torch.float16, torch.float16, layout))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_function_with_any_number_of_rows_and_any_bias(level, dtype):
    for rows, bias in itertools.product((1, MOST_ROWS, MOST_ROWS + 1, 40), (None, *DTYPES)):
        x, weight, bias = drawn(rows, 33, 64, dtype, bias)
        with torch.no_grad():
            got = fa.linear(x, weight, bias)
        want = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
        tolerance = 4 * max(torch.finfo(dtype).eps, 1e-15) * want.abs().max().item()
        assert got.dtype == dtype
        torch.testing.assert_close(got.double(), want, rtol=0, atol=tolerance)


def test_leading_dimensions_and_strides_of_input(level):
    weight, bias = randn(33, 18, seed=1, dtype=torch.float16), randn(33, seed=2)
    for shape in ((18,), (1, 18), (2, 3, 18), (3, 1, 2, 18), (2, 0, 18), (1, 1, 1, 1, 1, 18)):
        check(op, randn(*shape, seed=3, dtype=torch.float16), weight, bias)
    for kind in ("transposed", "fused", "strided", "columns", "guarded"):
        check(op, restride(randn(2, 3, 18, seed=3, dtype=torch.float16), kind), weight, bias)
    check(op, randn(1, 18, seed=3, dtype=torch.float16).expand(5, 18), weight, bias)
    check(op, randn(2, 1, seed=3, dtype=torch.float16).expand(2, 18), weight, bias)
    check(op, randn(2, 18, seed=3, dtype=torch.float16), weight, randn(99, seed=4)[::3])


def test_a_weight_of_one_row_or_column_has_any_stride(level):
    for shape in ((1, 9), (9, 1), (1, 1), (0, 9), (9, 0)):
        weight = randn(shape[0], 3, shape[1], 3, seed=1, dtype=torch.bfloat16)[:, 1, :, 1]
        x = randn(2, shape[1], seed=2, dtype=torch.bfloat16)
        assert torch.equal(fa.linear(x, weight), check(op, x, weight, None))
    x, weight = randn(2, 9, seed=3, dtype=torch.float16), randn(9, seed=4, dtype=torch.float16)
    for broadcast in (weight.expand(7, 9), randn(7, 1, seed=5, dtype=torch.float16).expand(7, 9)):
        assert torch.equal(fa.linear(x, broadcast), check(op, x, broadcast, None))


def test_a_weight_of_any_strides_goes_to_torch(level):
    x, weight, _ = drawn(2, 16, 18, torch.bfloat16)
    strided = restride(weight, "strided")
    assert torch.equal(fa.linear(x, strided), F.linear(x, strided))
    with pytest.raises(RuntimeError, match="weight: expected contiguous rows or columns, got str"):
        op(x, strided)


def test_special_values_stay_where_they_are(level):
    for layout, dtype, k in itertools.product(LAYOUTS[:2], HALVES, (1, 31, 64, 70)):
        for value in (torch.nan, torch.inf, -torch.inf):
            x, weight, bias = drawn(3, 37, k, dtype, dtype, layout)
            weight[5, k - 1] = value
            x[1, k // 2] = value
            bias[7] = value
            check(op, x, weight, bias)


def test_subnormal_numbers_are_not_lost(level):
    for layout, dtype in itertools.product(LAYOUTS[:2], HALVES):
        tiny = torch.finfo(dtype).smallest_normal / 8
        x = torch.ones(2, 40, dtype=dtype)
        weight = laid_out(torch.full((5, 40), tiny, dtype=dtype), layout)
        assert torch.equal(op(x, weight), torch.full((2, 5), 40 * tiny, dtype=dtype))


@pytest.mark.parametrize("layout", LAYOUTS[:2])
def test_bits_depend_neither_on_threads_nor_on_other_rows(level, threads, layout):
    for dtype, n, k in ((torch.bfloat16, 1000, 333), (torch.float16, 67, 2100)):
        x, weight, bias = drawn(MOST_ROWS, n, k, dtype, torch.float32, layout)
        threads(1)
        want = op(x, weight, bias)
        for count, rows in itertools.product((1, 2, 3), range(1, MOST_ROWS + 1)):
            threads(count)
            assert torch.equal(op(x[-rows:], weight, bias), want[-rows:])


def test_rows_that_torch_gets(level):
    x, weight, bias = drawn(MOST_ROWS + 1, 257, 768, torch.bfloat16, torch.bfloat16)
    assert torch.equal(fa.linear(x, weight, bias), F.linear(x, weight, bias))
    few = x[:-1]
    assert torch.equal(fa.linear(few, weight, bias), op(few, weight, bias))
    wide = few.float(), weight.float(), bias.float()
    assert torch.equal(fa.linear(*wide), F.linear(*wide))


@pytest.mark.parametrize("layout", LAYOUTS[:2])
def test_gradients_are_those_of_torch(layout):
    for bias in (torch.bfloat16, torch.float32):
        given = drawn(2, 33, 64, torch.bfloat16, bias, layout)
        both = []
        for function in (fa.linear, lambda x, w, b: F.linear(x, w, b.to(x.dtype))):
            leaves = [x.detach().clone().requires_grad_() for x in given]
            both.append(torch.autograd.grad(function(*leaves).float().sum(), leaves))
        for ours, theirs in zip(*both, strict=True):
            torch.testing.assert_close(ours, theirs)


def test_autocast_is_that_of_torch():
    x, weight, bias = drawn(2, 33, 64, torch.float32, torch.float32)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        for given in ((x, weight, bias), (x.bfloat16(), weight, bias)):
            assert torch.equal(fa.linear(*given), F.linear(*given))


def test_transforms_of_torch_func():
    x, weight, _ = drawn(6, 5, 8, torch.bfloat16)
    batched = torch.func.vmap(fa.linear, in_dims=(0, None))(x.reshape(3, 2, 8), weight)
    torch.testing.assert_close(batched.reshape(6, 5), F.linear(x, weight))


def test_nested_and_subclassed_tensors_are_torchs():
    _, weight, _ = drawn(2, 5, 8, torch.bfloat16)
    parts = [randn(n, 8, seed=n, dtype=torch.bfloat16) for n in (1, 3)]
    nested = torch.nested.nested_tensor(parts, layout=torch.jagged)
    got = fa.linear(nested, weight)
    assert got.is_nested and torch.equal(got.values(), F.linear(nested, weight).values())


def test_opcheck():
    for layout, bias in itertools.product(LAYOUTS[:2], (None, torch.float64)):
        x, weight, bias = drawn(6, 9, 8, torch.bfloat16, bias, layout)
        torch.library.opcheck(op, (x.reshape(2, 3, 8), weight, bias))


def test_compiled():
    torch._dynamo.reset()
    compiled = torch.compile(fa.linear, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch.no_grad():
        for rows in (2, 3, MOST_ROWS, MOST_ROWS + 1, 20):
            given = drawn(rows, 33, 64, torch.bfloat16, torch.bfloat16)
            assert torch.equal(compiled(*given), fa.linear(*given))
    given = [x.requires_grad_() for x in drawn(2, 33, 64, torch.bfloat16, torch.bfloat16)]
    assert torch.equal(compiled(*given), F.linear(*given))


def test_exported_with_a_dynamic_number_of_rows():
    layer = nn.Linear(8, 5, dtype=torch.bfloat16).requires_grad_(False)
    shapes = {"input": {0: torch.export.Dim("rows", min=1, max=100)}}
    given = randn(2, 8, seed=0, dtype=torch.bfloat16)
    program = torch.export.export(layer, (given,), dynamic_shapes=shapes)
    assert "fastattn" not in program.graph_module.code
    for rows in (1, 50):
        x = randn(rows, 8, seed=1, dtype=torch.bfloat16)
        torch.testing.assert_close(program.module()(x), layer(x))


def test_flops_are_counted():
    x, weight, bias = drawn(2, 9, 8, torch.bfloat16, torch.bfloat16)
    counted = []
    for function in (op, F.linear):
        with FlopCounterMode(display=False) as counter:
            function(x, weight, bias)
        counted.append(counter.get_total_flops())
    assert counted[0] == counted[1] == 2 * 2 * 9 * 8


def test_the_module_is_torchs_in_all_but_speed():
    theirs = torch.nn.Linear(64, 33, dtype=torch.bfloat16)
    ours = nn.Linear(64, 33, dtype=torch.bfloat16)
    ours.load_state_dict(theirs.state_dict())
    assert isinstance(ours, torch.nn.Linear) and str(ours) == str(theirs)
    x = randn(2, 64, seed=0, dtype=torch.bfloat16)
    assert torch.equal(ours(x), theirs(x))
    with torch.no_grad():
        want = op(x, ours.weight, ours.bias)
        for same in (ours, copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
            assert torch.equal(same(x), want)


@pytest.mark.parametrize("tied", [False, True])
def test_models_decode_over_it(tied):
    """Every product of a token is one of ours."""
    torch.manual_seed(0)
    block = nn.TransformerBlock(
        nn.Attention(64, 4, causal=True, gate=True), nn.GatedFeedForward(64, 96)
    )
    plain = nn.TransformerBlock(nn.Attention(64, 4, causal=True), nn.FeedForward(64, 96))
    model = nn.CausalLM(50, 64, [block, plain], tied=tied).bfloat16().eval()
    tokens = torch.randint(50, (2, 1))
    with torch.no_grad(), torch.profiler.profile() as profile:
        logits = model(tokens)
    names = {event.key: event.count for event in profile.key_averages()}
    assert names["fastattn::linear"] == 5 + 3 + 4 + 2 + 1
    assert not {"aten::linear", "aten::mm", "aten::addmm"} & set(names)
    want = model.double()(tokens).detach()
    torch.testing.assert_close(logits.double(), want, rtol=0, atol=0.03 * want.abs().max().item())


X, W = torch.ones(2, 4, dtype=torch.bfloat16), torch.ones(3, 4, dtype=torch.bfloat16)
BAD = [
    (lambda: fa.linear([1.0], W), TypeError, "input: expected a tensor, got list"),
    (lambda: fa.linear(X, None), TypeError, "weight: expected a tensor, got NoneType"),
    (lambda: fa.linear(X, W, 1.0), TypeError, "bias: expected a tensor, got float"),
    (lambda: fa.linear(X, W.half()), TypeError, "weight: expected dtype of input, got dtype"),
    (lambda: fa.linear(X, W.t()), ValueError, r"weight: expected shape \(out_features, 4\)"),
    (lambda: fa.linear(X, W[0]), ValueError, r"weight: expected shape \(out_features, 4\)"),
    (lambda: fa.linear(X, W, W[:, 0].int()), TypeError, "bias: expected dtype float32"),
    (lambda: fa.linear(X, W, W[0]), ValueError, r"bias: expected shape \(3,\), got shape \(4,\)"),
    (lambda: fa.linear(X, W, W[:1, :3]), ValueError, r"bias: expected shape \(3,\)"),
    (lambda: fa.linear(X, W.to("meta")), ValueError, "weight: expected a tensor on"),
    (lambda: op(X.float(), W), RuntimeError, "input: expected dtype bfloat16 or float16"),
    (lambda: op(X[0, 0], W), RuntimeError, "input: expected at least 1 dimension"),
    (lambda: op(X.repeat(4, 1), W), RuntimeError, "input: expected at most 6 rows"),
]


@pytest.mark.parametrize("index", range(len(BAD)))
def test_bad_arguments_are_named(index):
    call, error, message = BAD[index]
    with pytest.raises(error, match=message):
        call()
