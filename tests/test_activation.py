"""Activations: units in the last place, accuracy of gradients, strides, determinism, errors."""

import pytest
import torch
from attention_options import on_cuda, skip_without_kernels

import fastattn.functional as fa
from fastattn import reference
from fastattn.testing import DTYPES, assert_accurate, covering_sample, one_thread, randn, restride

UNARY = {
    "gelu": {},
    "gelu tanh": {"approximate": "tanh"},
    "silu": {},
    "relu": {},
}
BIAS = {f"bias_{name}": options for name, options in UNARY.items()}
GATED = {"geglu": {}, "geglu tanh": {"approximate": "tanh"}, "swiglu": {}, "reglu": {}}
ALL = UNARY | BIAS | GATED


def results(module, name, inputs, dout):
    """The result, and the gradients of all inputs, which keep their strides."""
    function = getattr(module, name.split()[0])
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = function(*leaves, **ALL[name])
    return [out.detach(), *torch.autograd.grad(out, leaves, dout)]


def check(name, inputs, dout=None):
    """Forward, in inference too, and backward against the reference."""
    shape = list(inputs[0].shape)
    if name in GATED and len(inputs) == 1:
        shape[-1] //= 2
    if dout is None:
        dout = randn(*shape, seed=77, dtype=torch.bfloat16).to(inputs[0].dtype)
    got = results(fa, name, inputs, dout)
    with torch.no_grad():
        inferred = getattr(fa, name.split()[0])(*inputs, **ALL[name])
    assert torch.equal(inferred.nan_to_num(), got[0].nan_to_num())
    with one_thread():
        eager = results(reference, name, inputs, dout)
        want = results(reference, name, [x.double() for x in inputs], dout.double())
    for i, (g, w, e) in enumerate(zip(got, want, eager, strict=True)):
        magnitude = 0.0
        if name in BIAS and i == 2:  # a sum over all rows
            terms = want[1].square().flatten(0, -2).sum(0)
            magnitude = terms.max().sqrt().item() if terms.numel() else 0.0
        label = f"{name} {('out', 'dinput', 'dsecond')[i]}"
        assert_accurate(g, w, e, label, magnitude=magnitude, dtype=inputs[0].dtype)
    return got


def exact(name, x):
    """In float64, without cancellation in either tail."""
    if name == "gelu":
        return x * 0.5 * torch.special.erfc(-x * 0.5**0.5)
    a = x if name == "silu" else 2 * (2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)
    decay = torch.exp(-a.abs())
    return torch.where(x < 0, x * decay, x) / (1 + decay)


def every_exponent(count):
    """Floats spread evenly over all bit patterns, and over where results are not trivial."""
    bits = torch.arange(0, 0x7F800000, 0x7F800000 // count).to(torch.int32).view(torch.float32)
    near = torch.linspace(-30, 30, count)
    return torch.cat((bits, -bits, near, torch.linspace(-110, -80, count // 4)))


@pytest.mark.parametrize("name", ["gelu", "gelu tanh", "silu"])
def test_float32_is_within_two_units_in_the_last_place(level, name):
    x = every_exponent(1_000_000 if level in ("avx2", "scalar") else 100_000)
    got = getattr(fa, name.split()[0])(x, **UNARY[name]).double()
    want = exact(name, x.double().clamp(min=-1000))
    exponent = torch.frexp(want)[1].clamp(min=-125)
    error = torch.ldexp((got - want).abs(), 24 - exponent)
    worst = error.argmax()
    assert error[worst] <= 2, (x[worst], got[worst], want[worst])


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("name", UNARY)
def test_special_values(level, name, dtype):
    skip_without_kernels(dtype)
    special = [-torch.inf, torch.inf, torch.nan, -0.0, 0.0, -6e4, 6e4, -20.0]
    for among in (0, 1, 30):  # alone, and beside numbers that take the common path
        x = torch.cat((torch.tensor(special), torch.ones(among))).to(dtype)
        got = getattr(fa, name.split()[0])(x, **UNARY[name])[: len(special)].double().tolist()
        assert got[1] == torch.inf and got[2] != got[2]
        assert got[0] == 0 if name == "relu" else got[0] != got[0]
        assert got[3] == got[4] == 0 and str(got[4]) == "0.0"
        assert name == "relu" or str(got[3]) == "-0.0"
        assert got[5] == 0 and got[6] == x[6].double()
        assert abs(got[7]) < 1e-7


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("name", ALL)
def test_accuracy_of_results_and_gradients(level, name, dtype):
    skip_without_kernels(dtype)
    for rows, columns in ((3, 1), (5, 7), (2, 8), (70, 33), (1, 600), (67, 130)):
        x = randn(rows, columns, seed=1, dtype=torch.float64) * 3
        second = randn(*((columns,) if name in BIAS else (rows, columns)), seed=2)
        check(name, [x.to(dtype)] + ([] if name in UNARY else [second.to(dtype)]))
        if name in GATED:
            check(name, [randn(rows, 2 * columns, seed=3, dtype=dtype)])


AXES = {
    "name": tuple(ALL),
    "dtype": DTYPES,
    "shape": ((2, 3, 18), (1, 5, 64), (4, 1, 1030), (0, 3, 8), (2, 3, 0), (2, 0, 4), (7, 2, 2)),
    "kinds": (
        ("contiguous", "fused"),
        ("transposed", "contiguous"),
        ("fused", "fused"),
        ("strided", "columns"),
        ("columns", "columns"),
        ("guarded", "transposed"),
    ),
    "dout": ("contiguous", "transposed", "strided", "zero", "row"),
    "packed": (False, True),
}


def test_any_strides(level):
    for point in covering_sample(AXES, 90, 3, lambda p: True):
        name, dtype, shape = point["name"], point["dtype"], point["shape"]
        packed = point["packed"] and name in GATED
        given = (*shape[:-1], 2 * shape[-1]) if packed else shape
        inputs = [restride(randn(*given, seed=1, dtype=dtype), point["kinds"][0])]
        if name in BIAS:
            bias_dtype = DTYPES[(len(shape) + shape[-1]) % 3]
            inputs.append(randn(2 * shape[-1], seed=2, dtype=bias_dtype)[::2])
        elif name in GATED and not packed:
            inputs.append(restride(randn(*shape, seed=2, dtype=dtype), point["kinds"][1]))
        if point["dout"] == "zero":
            dout = torch.full((), 1.5, dtype=dtype).expand(shape)
        elif point["dout"] == "row":
            dout = randn(shape[-1], seed=5, dtype=dtype).expand(shape)
        else:
            dout = restride(randn(*shape, seed=5, dtype=torch.bfloat16).to(dtype), point["dout"])
        check(name, inputs, dout)


def test_any_number_of_dimensions(level):
    for shape in ((), (1,), (5,), (1, 1, 1), (2, 1, 3, 2, 1, 2, 3), (2, 1) * 6):
        check("gelu", [randn(*shape, seed=1)])
        check("swiglu", [randn(*shape, seed=1), randn(*shape, seed=2)])
    x = randn(3, 3, 3, 3, 3, 3, 3, 3, seed=1)[..., ::2]
    check("silu", [x.permute(7, 0, 6, 1, 5, 2, 4, 3)[:, :, :, ::2]])
    with pytest.raises(ValueError, match="input: expected strides that merge into at most 9"):
        fa.silu(randn(*(3,) * 10, seed=1)[(slice(None, None, 2),) * 10])
    check("gelu", [randn(1, 4, seed=1).expand(3, 4)])


def test_a_bias_of_any_dtype(level):
    for dtype in DTYPES if on_cuda() else (*DTYPES, torch.float64):
        for bias_dtype in (*DTYPES, torch.float64):
            x, bias = randn(9, 37, seed=1, dtype=dtype), randn(37, seed=2, dtype=bias_dtype)
            got = check("bias_gelu", [x, bias])
            assert got[0].dtype == got[1].dtype == dtype and got[2].dtype == bias_dtype


def test_memory_order_is_that_of_torch():
    base = randn(2, 3, 5, 8, seed=1)
    for x in (base, base.transpose(1, 3), base[:, :, 1:3], base[..., 2:6].transpose(0, 2)):
        want = torch.nn.functional.silu(x).stride()
        assert fa.silu(x).stride() == torch.empty_like(x).stride() == want
    assert fa.swiglu(base).stride() == fa.silu(base[..., :4]).stride()


def test_nothing_outside_of_the_result_is_written(level):
    for name in ("gelu", "silu"):
        for n in (1, 7, 8, 9, 33):
            x = torch.full((n + 32,), torch.nan)
            x[16:-16] = randn(n, seed=n)
            assert not getattr(fa, name)(x[16:-16]).isnan().any()


@pytest.mark.parametrize("name", ["bias_gelu", "swiglu", "gelu"])
def test_bits_do_not_depend_on_threads(level, threads, name):
    x = randn(333, 700, seed=1, dtype=torch.bfloat16)
    second = {"bias_gelu": [randn(700, seed=2)], "swiglu": [x.flip(0)], "gelu": []}[name]
    everything = []
    for count in (1, 2, 3):
        threads(count)
        everything.append(results(fa, name, [x, *second], x.flip(1)))
    for other in everything[1:]:
        assert all(torch.equal(a, b) for a, b in zip(everything[0], other, strict=True))


def test_the_derivative_of_relu_is_zero_at_zero(level):
    x = torch.tensor([-1.0, -0.0, 0.0, 1e-45, 2.0]).requires_grad_()
    (gradient,) = torch.autograd.grad(fa.relu(x).sum(), x)
    assert gradient.tolist() == [0, 0, 0, 1, 1]


@pytest.mark.parametrize("name", ALL)
def test_gradcheck(name):
    skip_without_kernels(torch.float64)
    function = getattr(fa, name.split()[0])
    x = randn(3, 4, seed=1, dtype=torch.float64).requires_grad_()
    second = randn(*((4,) if name in BIAS else (3, 4)), seed=2, dtype=torch.float64)
    inputs = (x,) if name in UNARY else (x, second.requires_grad_())
    assert torch.autograd.gradcheck(lambda *args: function(*args, **ALL[name]), inputs)
    if name in GATED:
        assert torch.autograd.gradcheck(lambda x: function(x, **ALL[name]), (x,))


def test_only_what_needs_a_gradient_gets_one():
    x, bias = randn(3, 4, seed=1).requires_grad_(), randn(4, seed=2).requires_grad_()
    expected = torch.autograd.grad(torch.nn.functional.gelu(x + bias).sum(), (x, bias))
    for inputs, wanted in (((x.detach(), bias), bias), ((x, bias.detach()), x)):
        got = torch.autograd.grad(fa.bias_gelu(*inputs).sum(), wanted)[0]
        torch.testing.assert_close(got, expected[0] if wanted is x else expected[1])
    x = x.detach()
    gate = x.clone().requires_grad_()
    (dgate,) = torch.autograd.grad(fa.swiglu(gate, x).sum(), gate)
    assert dgate.shape == gate.shape


def test_second_derivatives_and_forward_mode_raise():
    x, y = (randn(3, 4, seed=s).requires_grad_() for s in (1, 2))
    for out in (fa.gelu(x), fa.swiglu(x, y)):
        (gradient,) = torch.autograd.grad(out.sum(), x, create_graph=True)
        with pytest.raises(NotImplementedError, match="cannot be differentiated twice"):
            gradient.sum().backward()
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x.detach(), y.detach())
        with pytest.raises(RuntimeError, match="jvp"):
            fa.gelu(dual)


def test_transforms_of_torch_func():
    x, b = randn(3, 5, 4, seed=1), randn(4, seed=2)
    for function in (lambda x: fa.bias_gelu(x, b), lambda x: fa.swiglu(x)):
        gradient = torch.func.grad(lambda x, f=function: f(x).sum())
        alone = torch.stack([gradient(y) for y in x])
        torch.testing.assert_close(torch.func.vmap(gradient)(x), alone)


def test_opcheck():
    x, b = randn(3, 4, 6, seed=1).transpose(0, 1), randn(6, seed=2, dtype=torch.bfloat16)
    ops = torch.ops.fastattn
    for function, arguments in (
        (ops.activation, (x, None, 0)),
        (ops.activation, (x, b, 1)),
        (ops.activation_backward, (x, x, b, 2, True, True)),
        (ops.activation_backward, (x, x, b, 2, False, True)),
        (ops.activation_backward, (x, x, None, 3, True, False)),
        (ops.gated_activation, (x, None, 2)),
        (ops.gated_activation, (x, x * 2, 2)),
        (ops.gated_activation_backward, (x[..., :3], x, None, 2)),
        (ops.gated_activation_backward, (x, x, x * 2, 2)),
    ):
        torch.library.opcheck(function.default, arguments)


def test_everything_compiles_to_one_graph():
    torch._dynamo.reset()

    def step(x, b):
        y = fa.bias_gelu(x, b, "tanh") + fa.gelu(x) + fa.silu(x) + fa.bias_silu(x, b)
        y = y + fa.relu(x) + fa.bias_relu(x, b)
        return fa.geglu(y) + fa.reglu(fa.swiglu(x, y))

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows in (2, 3, 5):
        x, b = randn(rows, 8, seed=1).requires_grad_(), randn(8, seed=2).requires_grad_()
        both = []
        for function in (step, compiled):
            out = function(x, b)
            both.append([out, *torch.autograd.grad(out.sum(), (x, b))])
        assert all(torch.equal(*pair) for pair in zip(*both, strict=True))


X = torch.ones(2, 4)
BAD = [
    (lambda: fa.gelu([1.0]), TypeError, "input: expected a tensor, got list"),
    (lambda: fa.gelu(X.int()), TypeError, "input: expected dtype float32"),
    (lambda: fa.gelu(X, "exact"), ValueError, "approximate: expected 'none' or 'tanh'"),
    (lambda: fa.silu(X.to_sparse()), TypeError, "input: expected a dense tensor"),
    (lambda: fa.bias_gelu(X, torch.ones(3)), ValueError, r"bias: expected shape \(4,\)"),
    (lambda: fa.bias_gelu(X, torch.ones(1, 4)), ValueError, r"bias: expected shape \(4,\)"),
    (lambda: fa.bias_silu(X, X[0].int()), TypeError, "bias: expected dtype float32"),
    (lambda: fa.bias_relu(X, None), TypeError, "bias: expected a tensor"),
    (lambda: fa.bias_relu(torch.ones(()), X[0]), ValueError, "input: expected at least 1 dim"),
    (lambda: fa.bias_relu(X, torch.ones(4, device="meta")), ValueError, "bias: expected a tensor"),
    (lambda: fa.swiglu(X, X[:1]), ValueError, r"up: expected shape \(2, 4\)"),
    (lambda: fa.swiglu(X, X.double()), TypeError, "up: expected dtype of gate"),
    (lambda: fa.swiglu(X[:, :3]), ValueError, r"gate: expected shape \(..., 2 n\)"),
    (lambda: fa.swiglu(torch.ones(())), ValueError, r"gate: expected shape \(..., 2 n\)"),
    (lambda: fa.geglu(X, 3), TypeError, "up: expected a tensor, got int"),
    (lambda: fa.geglu(None, X), TypeError, "gate: expected a tensor, got NoneType"),
    (lambda: fa.reglu(X.long()), TypeError, "gate: expected dtype float32"),
]


@pytest.mark.parametrize("index", range(len(BAD)))
def test_bad_arguments_are_named(index):
    call, error, message = BAD[index]
    with pytest.raises(error, match=message):
        call()
