"""The drop-in means exactly what torch.nn.functional.scaled_dot_product_attention means."""

import inspect

import pytest
import torch
import torch.nn.functional as F
from attention_options import here, skip_without_kernels

import fastattn.functional as fa
from fastattn.testing import assert_accurate, randn

BOOLEAN = randn(5, 7, seed=20) < 0.6
FLOATING = randn(1, 3, 5, 7, seed=21)
CALLS = {
    "plain": ((2, 3, 5, 8), (2, 3, 7, 8), {}),
    "top-left causal": ((2, 3, 5, 8), (2, 3, 7, 8), {"is_causal": True}),
    "causal, more queries": ((2, 3, 9, 8), (2, 3, 7, 8), {"is_causal": True}),
    "boolean mask": ((2, 3, 5, 8), (2, 3, 7, 8), {"attn_mask": BOOLEAN}),
    "boolean mask per batch": ((2, 3, 5, 8), (2, 3, 7, 8), {"attn_mask": BOOLEAN[:2, None, None]}),
    "nothing is visible": ((2, 3, 5, 8), (2, 3, 7, 8), {"attn_mask": torch.zeros(5, 7).bool()}),
    "floating mask": ((2, 3, 5, 8), (2, 3, 7, 8), {"attn_mask": FLOATING}),
    "mask of -inf": ((2, 3, 5, 8), (2, 3, 7, 8), {"attn_mask": torch.full((5, 7), -torch.inf)}),
    "scale": ((2, 3, 5, 8), (2, 3, 7, 8), {"scale": 0.3}),
    "shared heads": ((2, 6, 5, 8), (2, 3, 7, 8), {"enable_gqa": True}),
    "shared heads, causal": ((2, 6, 5, 8), (2, 2, 7, 8), {"enable_gqa": True, "is_causal": True}),
    "one query": ((2, 3, 1, 8), (2, 3, 7, 8), {}),
    "three dimensions": ((3, 5, 8), (3, 7, 8), {"is_causal": True}),
    "two dimensions": ((5, 8), (7, 8), {"is_causal": True}),
    "five dimensions": ((2, 2, 3, 5, 8), (2, 2, 3, 7, 8), {"attn_mask": BOOLEAN}),
    "six dimensions": ((2, 1, 2, 3, 5, 8), (2, 1, 2, 3, 7, 8), {"attn_mask": FLOATING}),
    "broadcast batch": ((2, 3, 5, 8), (1, 3, 7, 8), {}),
    "broadcast query": ((1, 3, 5, 8), (2, 3, 7, 8), {"attn_mask": BOOLEAN}),
    "broadcast heads": ((2, 3, 5, 8), (2, 1, 7, 8), {}),
    "missing dimensions": ((2, 3, 5, 8), (3, 7, 8), {}),
    "no keys": ((2, 3, 5, 8), (2, 3, 0, 8), {}),
}


def test_the_signature_is_that_of_torch():
    ours = inspect.signature(fa.scaled_dot_product_attention).parameters
    documented = "query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa"
    assert list(ours) == documented.split(", ")
    assert [p.default for p in ours.values()][3:] == [None, 0.0, False, None, False]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("call", CALLS)
def test_results_and_gradients_are_those_of_torch(level, dtype, call):
    skip_without_kernels(dtype)
    query_shape, key_shape, options = CALLS[call]
    options = here(options)
    shapes = (query_shape, key_shape, (*key_shape[:-1], 8))
    tensors = [randn(*shape, seed=i, dtype=dtype) for i, shape in enumerate(shapes)]
    results = []
    for function, convert in (
        (fa.scaled_dot_product_attention, lambda x: x),
        (F.scaled_dot_product_attention, torch.Tensor.double),
        (F.scaled_dot_product_attention, lambda x: x),
    ):
        leaves = [convert(x).detach().requires_grad_() for x in tensors]
        mask = options.get("attn_mask")
        chosen = dict(options)
        if mask is not None and mask.is_floating_point():
            leaves.append(convert(mask.to(dtype)).detach().requires_grad_())
            chosen["attn_mask"] = leaves[-1]
        out = function(*leaves[:3], **chosen)
        dout = randn(*out.shape, seed=9, dtype=torch.bfloat16).to(out.dtype)
        results.append((out, *torch.autograd.grad(out, leaves, dout)))
    for name, got, want, plain in zip(("out", "dq", "dk", "dv", "dmask"), *results, strict=False):
        # A recomputed weight is off by the rounding of its lse, of about 2 here.
        assert_accurate(got, want, plain, f"{call}: {name}", magnitude=4.0)


def test_dropout_keeps_the_stated_share_and_scales_the_rest(level):
    query, key = torch.zeros(1, 4, 200, 8), torch.zeros(1, 4, 100, 8)
    torch.manual_seed(0)
    out = fa.scaled_dot_product_attention(query, key, torch.ones(1, 4, 100, 8), dropout_p=0.25)
    assert abs(out.mean().item() - 1.0) < 0.02 and out.std() > 0.01
    everything = fa.scaled_dot_product_attention(query, key, key + 1, dropout_p=1.0)
    assert (everything == 0).all()


@pytest.mark.parametrize(
    "change",
    [
        {"attn_mask": torch.zeros(5, 6)},
        {"attn_mask": torch.zeros(5, 7, dtype=torch.int32)},
        {"attn_mask": torch.zeros(1, 2, 3, 5, 7)},
        {"dropout_p": 1.5},
        {"dropout_p": -0.1},
        {"query": torch.zeros(8)},
        {"query": torch.zeros(2, 3, 5, 9)},
        {"query": torch.zeros(2, 3, 5, 8, dtype=torch.float64)},
        {"key": torch.zeros(2, 2, 7, 8)},
        {"key": torch.zeros(3, 3, 7, 8)},
    ],
    ids=lambda change: " ".join(f"{n} {getattr(x, 'shape', x)}" for n, x in change.items()),
)
def test_what_torch_refuses_is_refused(change):
    call = {
        "query": torch.zeros(2, 3, 5, 8),
        "key": torch.zeros(2, 3, 7, 8),
        "value": torch.zeros(2, 3, 7, 8),
    } | change
    with pytest.raises((RuntimeError, ValueError, TypeError)):
        F.scaled_dot_product_attention(**call)
    name = next(iter(change))
    with pytest.raises((ValueError, TypeError), match=name if name != "query" else "query|key"):
        fa.scaled_dot_product_attention(**call)
