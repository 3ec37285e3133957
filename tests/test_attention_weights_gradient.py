"""The gradient of recomputed attention weights, alone and together with that of the lse."""

import math

import pytest
import torch
from attention_options import FEATURES, skip_on_gpu, skip_without_kernels, with_features

import fastattn.functional as fa
from fastattn import reference
from fastattn.testing import DTYPES, assert_accurate, attention_inputs, one_thread, randn

SCORES = [name for name in FEATURES if name != "sink"]
CHOSEN = [{}, {"rows": [-1]}, {"heads": [1]}, {"rows": [2, 0, 2], "heads": torch.tensor([3, 3, 0])}]


@pytest.fixture(autouse=True)
def _one_thread():
    with one_thread():
        yield


def problem(names, seed=0, dtype=torch.float64, **shape):
    """(query, key, lse and perhaps bias by name, options) of a forward pass."""
    skip_without_kernels(dtype)
    shape = {"queries": 3, "keys": 5, "heads": 4, "kv_heads": 2, "head_dim": 3} | shape
    inputs = attention_inputs(**shape, dtype=dtype, seed=seed)
    inputs, options = with_features(names, inputs, layout=shape.get("layout", "bhsd"), seed=seed)
    value = inputs.pop("value")
    query, key = inputs.pop("query"), inputs.pop("key")
    _, lse = fa.attention(query, key, value, **inputs, **options, return_lse=True)
    given = {"query": query, "key": key, "lse": lse}
    return given | {n: x.to(dtype) for n, x in inputs.items()}, options


def derivative(options, tensors, check=torch.autograd.gradcheck):
    leaves = {n: x.detach().clone().requires_grad_() for n, x in tensors.items()}

    def weights(*values):
        return fa.attention_weights(**dict(zip(leaves, values, strict=True)), **options)

    return check(weights, tuple(leaves.values()))


@pytest.mark.parametrize("feature", ["nothing", *SCORES, "everything"])
def test_each_feature_against_finite_differences(feature):
    names = {"nothing": [], "everything": SCORES}.get(feature, [feature])
    for seed, chosen in enumerate(CHOSEN):
        tensors, options = problem(names, seed)
        assert derivative(options | chosen, tensors)


@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
def test_the_gradient_has_a_gradient(layout):
    for chosen in CHOSEN:
        tensors, options = problem(["bias", "softcap", "causal"], batch=(1,), layout=layout)
        assert derivative(options | chosen, tensors, torch.autograd.gradgradcheck)


@pytest.mark.parametrize("wrt", ["query", "key", "lse", "bias"])
def test_an_input_may_be_the_only_one_that_needs_a_gradient(wrt):
    tensors, options = problem(["bias"])
    leaves = {n: x.requires_grad_(n == wrt) for n, x in tensors.items()}
    fa.attention_weights(**leaves, **options).square().sum().backward()
    assert {n for n, x in leaves.items() if x.grad is not None} == {wrt}


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_with_the_lse_it_is_the_gradient_of_a_softmax(level, dtype):
    skip_without_kernels(dtype)
    skip_on_gpu("attention_weights has no kernel there")
    inputs = attention_inputs(queries=33, keys=40, heads=4, kv_heads=2, dtype=dtype)
    inputs["bias"] = randn(4, 1, 40, seed=7, dtype=dtype)
    chosen = {"rows": [3, 30], "heads": [0, 3]}
    dweights = randn(2, 2, 2, 40, seed=8)

    def results(module, convert):
        leaves = {n: convert(x).detach().requires_grad_() for n, x in inputs.items()}
        options = {"causal": True, "bias": leaves["bias"]}
        query, key, value = (leaves[n] for n in ("query", "key", "value"))
        _, lse = module.attention(query, key, value, **options, return_lse=True)
        weights = module.attention_weights(query, key, lse, **options, **chosen)
        names = ("query", "key", "bias")
        gradient = dweights.to(weights.dtype)
        return torch.autograd.grad(weights, [leaves[n] for n in names], gradient)

    exact = results(reference, torch.Tensor.double)
    eager = results(reference, lambda x: x)
    got = results(fa, lambda x: x)
    for name, *tensors in zip(("query", "key", "bias"), got, exact, eager, strict=True):
        assert_accurate(*tensors, f"d{name}", magnitude=1.0)


def test_what_hidden_keys_and_their_gradients_hold_leaks_nowhere():
    lengths = torch.tensor([4, 0])
    tensors = [x.clone() for x in attention_inputs(queries=5, keys=9).values()]
    dweights = randn(2, 2, 5, 9, seed=9)

    def gradients():
        query, key, value = (x.detach().requires_grad_() for x in tensors)
        _, lse = fa.attention(query, key, value, key_lengths=lengths, return_lse=True)
        weights = fa.attention_weights(query, key, lse, key_lengths=lengths)
        return torch.autograd.grad(weights, (query, key), dweights)

    want = gradients()
    tensors[1][0, :, 4:] = tensors[1][1] = tensors[0][1] = math.nan
    dweights[0, :, :, 4:] = dweights[1] = math.nan
    for got, expected in zip(gradients(), want, strict=True):
        assert torch.equal(got, expected)
        assert got.isfinite().all()


def test_slopes_that_require_a_gradient_are_refused():
    tensors, _ = problem([])
    slopes = torch.ones(4, requires_grad=True)
    with pytest.raises(ValueError, match=r"^alibi_slopes: expected"):
        fa.attention_weights(**tensors, alibi_slopes=slopes)


def test_compiled_it_gives_the_gradients_of_eager():
    tensors, options = problem(["bias", "causal"], dtype=torch.float32)
    torch._dynamo.reset()
    compiled = torch.compile(fa.attention_weights, backend="aot_eager", fullgraph=True)
    grads = []
    for function in (fa.attention_weights, compiled):
        leaves = {n: x.detach().requires_grad_() for n, x in tensors.items()}
        weights = function(**leaves, **options, rows=[1])
        grads.append(torch.autograd.grad(weights.square().sum(), list(leaves.values())))
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_no_gradient_is_recorded_where_none_is_needed():
    tensors, options = problem([])
    assert not fa.attention_weights(**tensors, **options).requires_grad
    tensors["query"].requires_grad_()
    with torch.no_grad():
        assert not fa.attention_weights(**tensors, **options).requires_grad
