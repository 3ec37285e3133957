"""Any strides are honoured: of inputs, of the gradients that arrive, and beyond 32 bits."""

import pytest
import torch
from attention_options import skip_on_gpu, with_features

import fastattn.functional as fa
from fastattn import reference
from fastattn.testing import (
    DTYPES,
    STRIDES,
    assert_accurate,
    attention_inputs,
    check_attention,
    randn,
    restride,
)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", STRIDES)
def test_inputs_of_any_strides(level, dtype, kind):
    for queries, keys in ((37, 70), (1, 129)):
        for layout in ("bhsd", "bshd"):
            shape = {"queries": queries, "keys": keys, "heads": 4, "kv_heads": 2, "head_dim": 20}
            inputs = attention_inputs(**shape, dtype=dtype, layout=layout)
            names = ["mask", "bias", "causal", "key_lengths"]
            inputs, options = with_features(names, inputs, layout=layout, seed=4)
            inputs = {n: restride(x, kind) if x.dim() > 2 else x for n, x in inputs.items()}
            if options["mask"].dim() > 2:
                options["mask"] = restride(options["mask"], kind)
            check_attention(fa.attention, inputs, **options)


def test_a_mixture_of_strides(level):
    inputs = attention_inputs(queries=40, keys=40, head_dim=24)
    for i in range(len(STRIDES)):
        kinds = [STRIDES[(i + n) % len(STRIDES)] for n in range(3)]
        mixed = {n: restride(x, kind) for (n, x), kind in zip(inputs.items(), kinds, strict=True)}
        check_attention(fa.attention, mixed, causal=True)


def test_a_slice_of_a_fused_projection_in_both_layouts(level):
    fused = randn(2, 33, 3, 4, 16, seed=1)
    names = ("query", "key", "value")
    bshd = dict(zip(names, fused.unbind(2), strict=True))
    check_attention(fa.attention, bshd, layout="bshd", causal=True)
    check_attention(fa.attention, {n: x.transpose(1, 2) for n, x in bshd.items()}, causal=True)


def test_inputs_that_are_broadcast_by_stride_zero(level):
    inputs = attention_inputs(batch=(3,), heads=2, queries=19, keys=23)
    inputs["key"] = inputs["key"][:1, :1].expand(3, 2, 23, 16)
    inputs["value"] = inputs["value"][:, :, :1].expand(3, 2, 23, 16)
    inputs["query"] = inputs["query"][..., :1].expand(3, 2, 19, 16)
    check_attention(fa.attention, inputs, causal=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_that_arrive_with_any_strides(level, dtype):
    inputs = attention_inputs(queries=21, keys=34, head_dim=24, dtype=dtype)
    losses = {
        "stride 0": lambda out, lse: out.sum() + lse.sum(),
        "mean": lambda out, lse: out.float().mean() * 7,
        "one row": lambda out, lse: out[:, :, 3].float().square().sum(),
        "transposed": lambda out, lse: (out.transpose(2, 3) * weight.transpose(2, 3)).sum(),
        "strided": lambda out, lse: (out[..., ::2] * weight[..., ::2]).sum() + lse[..., ::3].sum(),
        "lse": lambda out, lse: (lse.transpose(1, 2) * weight[..., 0].transpose(1, 2)).sum(),
    }
    weight = randn(2, 2, 21, 24, seed=8, dtype=dtype)
    for name, loss in losses.items():
        grads = []
        for function, convert in (
            (fa.attention, lambda x: x),
            (reference.attention, torch.Tensor.double),
            (reference.attention, lambda x: x),
        ):
            leaves = [convert(x).detach().requires_grad_() for x in inputs.values()]
            value = loss(*function(*leaves, causal=True, return_lse=True))
            grads.append(torch.autograd.grad(value, leaves, materialize_grads=True))
        for which, got, want, plain in zip(inputs, *grads, strict=True):
            assert_accurate(got, want, plain, f"{name}: d{which}", magnitude=1.0)


def test_results_are_laid_out_as_the_query(level):
    for layout in ("bhsd", "bshd"):
        inputs = attention_inputs(queries=9, heads=3, layout=layout)
        turned = {n: x.transpose(1, 2).contiguous().transpose(1, 2) for n, x in inputs.items()}
        assert fa.attention(*inputs.values(), layout=layout).is_contiguous()
        assert fa.attention(*turned.values(), layout=layout).transpose(1, 2).is_contiguous()


def test_layouts_agree_to_the_bit(level):
    inputs = attention_inputs(queries=70, keys=90, heads=4, kv_heads=2)
    turned = {n: x.transpose(1, 2).contiguous() for n, x in inputs.items()}
    want, want_lse = fa.attention(**inputs, causal=True, return_lse=True)
    out, lse = fa.attention(**turned, causal=True, layout="bshd", return_lse=True)
    assert torch.equal(out.transpose(1, 2), want) and torch.equal(lse, want_lse)


def test_offsets_beyond_32_bits(level, tmp_path):
    """The second entry lies 2**31 elements behind the first, in a file that is mostly a hole."""
    skip_on_gpu("its memory has no holes")
    far = 2**31 + 64
    shape = {"queries": 5, "keys": 40, "heads": 2, "head_dim": 8}
    inputs = attention_inputs(**shape, dtype=torch.bfloat16)
    apart = {}
    for name, x in inputs.items():
        path = tmp_path / name
        with path.open("wb") as file:
            file.truncate(2 * (far + x.numel()))
        memory = torch.from_file(str(path), shared=True, size=far + x.numel(), dtype=torch.bfloat16)
        strides = (far, *x.stride()[1:])
        apart[name] = memory.as_strided(x.shape, strides).copy_(x)
    want = fa.attention(*inputs.values(), causal=True)
    assert torch.equal(fa.attention(*apart.values(), causal=True), want)
    leaves = [x.detach().requires_grad_() for x in apart.values()]
    near = [x.detach().requires_grad_() for x in inputs.values()]
    for tensors in (leaves, near):
        fa.attention(*tensors, causal=True).sum().backward()
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(leaves, near, strict=True))
