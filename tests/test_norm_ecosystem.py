"""Norms inside of torch: dropout, gradcheck, opcheck, compilation, autocast, what is refused."""

import math

import pytest
import torch
from attention_options import skip_without_kernels
from norm_cases import ADDED, NORMS, call, check_norm, cotangents, norm_inputs, results
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import fastattn.functional as fa
from fastattn import reference
from fastattn.testing import DTYPES, one_thread, randn


def drawn(seed=5):
    """The (seed, offset) that the next call draws after torch.manual_seed(seed)."""
    torch.manual_seed(seed)
    philox = tuple(torch.randint(2**63 - 1, (2,)).tolist())
    torch.manual_seed(seed)
    return philox


def kept(shape, dropout_p, dims=1):
    """Which elements the kernel kept; the mask of the reference for the same seed."""
    philox = drawn()
    ones, weight = torch.ones(shape), torch.ones(shape[len(shape) - dims :])
    _, summed = fa.add_rms_norm(ones, torch.zeros(shape), weight, dropout_p=dropout_p)
    rows, width = math.prod(shape[: len(shape) - dims]), weight.numel()
    want = reference.dropout_mask((1, 1, rows, width), dropout_p, philox).reshape(shape)
    return summed > 0, want


@pytest.mark.parametrize("dropout_p", [0.001, 0.1, 0.5, 0.9])
def test_the_mask_is_that_of_the_reference_to_the_bit(level, dropout_p):
    for shape, dims in (
        ((70, 131), 1),
        ((1, 500), 1),
        ((2, 3, 64), 1),
        ((4, 5, 6), 2),
        ((9, 1), 1),
    ):
        got, want = kept(shape, dropout_p, dims)
        assert torch.equal(got, want), shape


@pytest.mark.parametrize("norm", ADDED)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dropout_keeps_the_accuracy_contract(level, norm, dtype):
    for leading, width in (((40,), 70), ((3, 5), 129)):
        inputs = norm_inputs(norm, leading, width, dtype)
        for dropout_p in (0.3, 1.0):
            philox = drawn()
            got = results(fa, norm, inputs, dropout_p=dropout_p)
            options = {"dropout_p": dropout_p, "philox": philox}
            check_norm(norm, inputs, given=got, **options)


def test_the_mask_does_not_depend_on_strides(level):
    x = randn(4, 5, 6, 24, seed=0)
    drawn()
    _, want = fa.add_layer_norm(x, x, dropout_p=0.4)
    view = x.transpose(0, 2).contiguous().transpose(0, 2)
    drawn()
    _, got = fa.add_layer_norm(view, x, dropout_p=0.4)
    assert torch.equal(got, want)


def test_each_call_draws_a_fresh_mask_and_no_dropout_draws_none(level):
    x = randn(6, 40, seed=0)
    torch.manual_seed(5)
    first, second = (fa.add_layer_norm(x, x, dropout_p=0.5)[1] for _ in range(2))
    torch.manual_seed(5)
    assert torch.equal(fa.add_layer_norm(x, x, dropout_p=0.5)[1], first)
    assert not torch.equal(first, second)
    state = torch.get_rng_state()
    fa.add_layer_norm(x, x)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_recomputing_a_checkpoint_repeats_the_mask(use_reentrant):
    tensors = [randn(6, 40, seed=s) for s in range(2)]

    def block(x, residual):
        return fa.add_rms_norm(x, residual, dropout_p=0.5)[0]

    grads = []
    for run in (block, lambda *t: checkpoint(block, *t, use_reentrant=use_reentrant)):
        torch.manual_seed(11)
        leaves = [x.detach().requires_grad_() for x in tensors]
        run(*leaves).backward(randn(6, 40, seed=2))
        grads.append([x.grad for x in leaves])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize("norm", NORMS)
def test_gradients_against_finite_differences(norm):
    skip_without_kernels(torch.float64)
    inputs = norm_inputs(norm, (2, 3), 5, torch.float64)
    leaves = {n: x.requires_grad_() for n, x in inputs.items()}

    def outputs(*tensors):
        drawn()
        more = {"dropout_p": 0.4} if "residual" in leaves else {}
        return call(fa, norm, dict(zip(leaves, tensors, strict=True)), **more)

    with one_thread():
        assert torch.autograd.gradcheck(outputs, tuple(leaves.values()))


@pytest.mark.parametrize("norm", NORMS)
def test_only_what_requires_a_gradient_gets_one(level, norm):
    inputs = norm_inputs(norm, (6,), 20)
    want = results(fa, norm, inputs)
    for name in inputs:
        leaves = {n: x.detach().requires_grad_(n == name) for n, x in inputs.items()}
        outputs = call(fa, norm, leaves)
        (got,) = torch.autograd.grad(outputs, [leaves[name]], cotangents(outputs))
        assert torch.equal(got, want[f"d{name}"])


class Recorder(TorchDispatchMode):
    """Keeps every call of an op of ours, with its arguments."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "fastattn":
            self.calls.append((function, args))
        return function(*args, **(kwargs or {}))


def test_every_op_passes_opcheck():
    with Recorder() as recorder:
        for norm in ("layer", "add llama"):
            inputs = norm_inputs(norm, (2, 3, 4), 8, torch.bfloat16, torch.float32)
            inputs["input"] = inputs["input"].transpose(0, 1)
            if "residual" in inputs:
                inputs["residual"] = inputs["residual"].transpose(0, 1)
            with torch.no_grad():
                call(fa, norm, inputs)
            more = {"dropout_p": 0.2} if "residual" in inputs else {}
            leaves = {n: x.requires_grad_() for n, x in inputs.items()}
            sum(x.sum() for x in call(fa, norm, leaves, **more)).backward()
    names = {str(function) for function, _ in recorder.calls}
    ops = ("norm_plain", "add_norm_plain", "norm_forward", "norm_backward")
    assert names == {f"fastattn.{name}.default" for name in ops}
    for function, args in recorder.calls:
        detached = [x.detach() if isinstance(x, torch.Tensor) else x for x in args]
        torch.library.opcheck(function, tuple(detached))


def block(x, residual, weight, bias):
    y, residual = fa.add_layer_norm(x * 1.5, residual, weight, bias)
    y, residual = fa.add_rms_norm(y.tanh(), residual, weight, casting="llama")
    query, key = fa.qk_rms_norm(y.unflatten(-1, (2, -1)).transpose(-3, -2), residual)
    return fa.layer_norm(query, query.shape[-1]).sin().sum() + key.square().sum()


def test_one_graph_serves_all_lengths_and_gives_the_results_of_eager():
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(block, backend=counter, fullgraph=True, dynamic=True)
    for length in range(3, 15):
        tensors = [
            *(randn(2, length, 24, seed=s) for s in (0, 1)),
            *(randn(24, seed=s) for s in (2, 3)),
        ]
        values = []
        for step in (block, compiled):
            leaves = [x.detach().requires_grad_() for x in tensors]
            values.append(torch.autograd.grad(step(*leaves), leaves))
        assert all(torch.equal(a, b) for a, b in zip(*values, strict=True))
    assert counter.frame_count <= 2


def test_inference_and_dropout_compile_to_one_graph():
    torch._dynamo.reset()
    x, weight = randn(3, 4, 16, seed=0), randn(16, seed=1)
    plain = torch.compile(
        lambda x: fa.rms_norm(x, 16, weight, 1e-6), backend="aot_eager", fullgraph=True
    )
    assert torch.equal(plain(x), fa.rms_norm(x, 16, weight, 1e-6))
    dropping = torch.compile(
        lambda x: fa.add_layer_norm(x, x, weight, dropout_p=0.5)[1],
        backend="aot_eager",
        fullgraph=True,
    )
    assert not torch.equal(dropping(x), dropping(x))


def test_autocast_leaves_the_dtype_as_torch_does_on_the_cpu():
    for dtype in (torch.float32, torch.bfloat16):
        x, weight = randn(3, 16, seed=0, dtype=dtype), randn(16, seed=1, dtype=dtype)
        with torch.autocast("cpu", torch.bfloat16):
            for name in ("layer_norm", "rms_norm"):
                got = getattr(fa, name)(x, (16,), weight)
                want = getattr(torch.nn.functional, name)(x, (16,), weight)
                assert got.dtype == want.dtype == dtype
            assert all(y.dtype == dtype for y in fa.add_layer_norm(x, x, weight))


def test_torch_func():
    x, weight = randn(3, 5, 16, seed=0), randn(16, seed=1)
    got = torch.func.vmap(lambda row: fa.rms_norm(row, 16, weight, 1e-6))(x)
    torch.testing.assert_close(got, fa.rms_norm(x, 16, weight, 1e-6))
    got = torch.func.grad(lambda w: fa.layer_norm(x, 16, w).square().sum())(weight)
    leaf = weight.detach().requires_grad_()
    (want,) = torch.autograd.grad(fa.layer_norm(x, 16, leaf).square().sum(), leaf)
    torch.testing.assert_close(got, want)


def test_a_second_derivative_and_a_forward_one_raise():
    x = randn(3, 16, seed=0).requires_grad_()
    (grad,) = torch.autograd.grad(fa.layer_norm(x, 16).square().sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="twice"):
        grad.sum().backward()
    with pytest.raises(NotImplementedError):
        torch.func.jvp(lambda x: fa.layer_norm(x, 16), (x.detach(),), (x.detach(),))


def test_no_gradient_is_recorded_where_none_is_needed():
    x = randn(3, 16, seed=0).requires_grad_()
    with torch.no_grad():
        assert not fa.layer_norm(x, 16).requires_grad
    with torch.inference_mode():
        assert fa.add_rms_norm(x, x)[0].shape == (3, 16)
    normalised, summed = fa.add_rms_norm(x, x)
    assert normalised.requires_grad and summed.requires_grad


X = randn(3, 16, seed=0)
REFUSED = [
    (lambda: fa.layer_norm(X, 15), ValueError, "normalized_shape"),
    (lambda: fa.layer_norm(X, ()), ValueError, "normalized_shape"),
    (lambda: fa.layer_norm(X, (1, 3, 16)), ValueError, "normalized_shape"),
    (lambda: fa.layer_norm(X, "16"), TypeError, "normalized_shape"),
    (lambda: fa.layer_norm(X, 2.5), TypeError, "normalized_shape"),
    (lambda: fa.layer_norm([1.0], 1), TypeError, "input"),
    (lambda: fa.layer_norm(X.int(), 16), TypeError, "input"),
    (lambda: fa.layer_norm(X.to(torch.complex64), 16), TypeError, "input"),
    (lambda: fa.layer_norm(X, 16, X), ValueError, "weight"),
    (lambda: fa.layer_norm(X, 16, 1.0), TypeError, "weight"),
    (lambda: fa.layer_norm(X, 16, X[0].int()), TypeError, "weight"),
    (lambda: fa.layer_norm(X, 16, X[0], X[0, :15]), ValueError, "bias"),
    (lambda: fa.layer_norm(X, 16, X[0], [0.0]), TypeError, "bias"),
    (lambda: fa.layer_norm(X, 16, X[0].to("meta")), ValueError, "weight"),
    (lambda: fa.layer_norm(X, 16, eps="small"), TypeError, "eps"),
    (lambda: fa.rms_norm(X, 16, X[:, 0]), ValueError, "weight"),
    (lambda: fa.rms_norm(X, 16, casting="hf"), ValueError, "casting"),
    (lambda: fa.rms_norm(X, 16, casting=None), TypeError, "casting"),
    (lambda: fa.add_layer_norm(X, X[:2]), ValueError, "residual"),
    (lambda: fa.add_layer_norm(X, X.bfloat16()), TypeError, "residual"),
    (lambda: fa.add_layer_norm(X, None), TypeError, "residual"),
    (lambda: fa.add_layer_norm(X, X, dropout_p=1.5), ValueError, "dropout_p"),
    (lambda: fa.add_layer_norm(X, X, dropout_p=math.nan), ValueError, "dropout_p"),
    (lambda: fa.add_rms_norm(X, X, X.new_ones(2, 3, 16)), ValueError, "input"),
    (lambda: fa.add_rms_norm(X, X, X.new_ones(())), ValueError, "weight"),
    (lambda: fa.qk_rms_norm(X, "key"), TypeError, "key"),
    (lambda: fa.qk_rms_norm(X, X, X[0], X[0, :3]), ValueError, "key_weight"),
    (lambda: fa.qk_rms_norm(X, X.int()), TypeError, "key"),
]


@pytest.mark.parametrize("case", range(len(REFUSED)))
def test_bad_input_is_refused_by_name(case):
    function, error, name = REFUSED[case]
    with pytest.raises(error, match=rf"^{name}: expected"):
        function()


def test_bad_input_is_refused_where_a_gradient_is_needed():
    x = X.detach().requires_grad_()
    with pytest.raises(ValueError, match=r"^weight: expected"):
        fa.layer_norm(x, 16, X)
    with pytest.raises(TypeError, match=r"^residual: expected"):
        fa.add_layer_norm(x, X.half())


def test_many_dimensions_of_any_strides_are_refused_only_where_they_do_not_merge():
    x = randn(*[2] * 11, seed=0)
    assert torch.equal(fa.layer_norm(x, 2), fa.layer_norm(x.view(-1, 2), 2).view(x.shape))
    gaps = randn(*[3] * 9, 2, seed=0)[(slice(0, 2),) * 9]
    with pytest.raises(ValueError, match=r"^input: expected strides"):
        fa.layer_norm(gaps, 2)
    assert fa.layer_norm(gaps[0], 2).shape == gaps[0].shape
