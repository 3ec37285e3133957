"""Gradients in float64 against finite differences, for every differentiable input.

float64 always runs on the scalar kernels of the CPU, so these tests need no level.
"""

import pytest
import torch
from attention_options import BROADCASTS, FEATURES, Place, skip_without_kernels, with_features

import fastattn.functional as fa
from fastattn.testing import attention_inputs, one_thread, randn


@pytest.fixture(autouse=True)
def _one_thread():
    """For thousands of calls of a few microseconds."""
    skip_without_kernels(torch.float64)
    with one_thread():
        yield


def small(**shape):
    defaults = {"batch": (2,), "heads": 2, "kv_heads": 1, "queries": 3, "keys": 4, "head_dim": 3}
    return attention_inputs(**(defaults | {"head_dim_v": 2} | shape), dtype=torch.float64)


def gradients_are_right(inputs, options, function=fa.attention, wrt=None):
    leaves = {n: x.double().detach().clone() for n, x in inputs.items()}
    for name in wrt or leaves:
        leaves[name].requires_grad_()

    def outputs(*tensors):
        named = dict(zip(leaves, tensors, strict=True))
        positional = [named.pop(n) for n in ("query", "key", "value")]
        out, lse = function(*positional, **named, **options, return_lse=True)
        return out, torch.where(lse.isinf(), 0.0, lse)

    return torch.autograd.gradcheck(outputs, tuple(leaves.values()))


@pytest.mark.parametrize("feature", ["nothing", *FEATURES, "everything"])
def test_each_feature_has_the_right_gradients(feature):
    names = {"nothing": [], "everything": list(FEATURES)}.get(feature, [feature])
    for seed in (1, 2):
        assert gradients_are_right(*with_features(names, small(), seed=seed))


@pytest.mark.parametrize("pattern", BROADCASTS)
def test_a_bias_of_any_broadcast_shape_has_the_right_gradient(pattern):
    inputs = small()
    place = Place(inputs)
    place.random.choice = lambda _: pattern
    bias = randn(*place.broadcast_shape(), seed=9, dtype=torch.float64)
    assert gradients_are_right(inputs | {"bias": bias}, {"causal": True})


def test_a_five_dimensional_bias_is_reduced_over_the_rows_it_is_shared_by():
    inputs = small(batch=(1, 3))
    bias = randn(1, 1, 2, 3, 4, seed=9, dtype=torch.float64)
    assert gradients_are_right(inputs | {"bias": bias}, {})


@pytest.mark.parametrize("wrt", ["query", "key", "value", "bias", "sink"])
def test_an_input_may_be_the_only_one_that_needs_a_gradient(wrt):
    inputs, options = with_features(["bias", "sink", "causal"], small())
    assert gradients_are_right(inputs, options, wrt=[wrt])


@pytest.mark.parametrize("only", ["out", "lse"])
def test_the_loss_may_be_of_one_result_alone(only):
    inputs, options = with_features(["bias", "sink"], small())
    leaves = {n: x.double().requires_grad_() for n, x in inputs.items()}

    def function(*tensors):
        named = dict(zip(leaves, tensors, strict=True))
        out, lse = fa.attention(**named, **options, return_lse=True)
        return out if only == "out" else lse

    assert torch.autograd.gradcheck(function, tuple(leaves.values()))


@pytest.mark.parametrize("shape", [{"queries": 1}, {"keys": 1}, {"queries": 9, "keys": 2}])
def test_single_rows_and_more_queries_than_keys(shape):
    assert gradients_are_right(small(**shape), {"causal": True})
    assert gradients_are_right(small(**shape), {"causal": "top_left"})


@pytest.mark.parametrize("group", [1, 3])
def test_shared_heads_and_both_layouts(group):
    for layout in ("bhsd", "bshd"):
        inputs = small(heads=2 * group, kv_heads=2, layout=layout)
        assert gradients_are_right(inputs, {"layout": layout})


def test_packed_sequences():
    inputs = {n: x[0].transpose(0, 1).contiguous() for n, x in small(queries=7, keys=9).items()}
    inputs["bias"] = randn(3, 2, 3, 4, seed=9, dtype=torch.float64)
    inputs["sink"] = randn(2, seed=10, dtype=torch.float64)
    cu_q, cu_k = torch.tensor([0, 3, 3, 5]), torch.tensor([0, 4, 6, 8])

    def function(query, key, value, **options):
        return fa.attention_varlen(query, key, value, cu_q, cu_k, 3, 4, **options)

    assert gradients_are_right(inputs, {"causal": True}, function)


def test_dropout_has_the_gradient_of_the_mask_it_drew():
    def function(query, key, value, **options):
        torch.manual_seed(3)
        return fa.attention(query, key, value, dropout_p=0.4, **options)

    assert gradients_are_right(small(), {}, function)


def test_merging():
    parts = [randn(1, 2, 3, 4, seed=1), randn(1, 2, 3, seed=2)]
    parts += [randn(1, 2, 3, 4, seed=3), randn(1, 2, 3, seed=4)]
    leaves = tuple(x.double().requires_grad_() for x in parts)
    assert torch.autograd.gradcheck(fa.merge_attention, leaves)
