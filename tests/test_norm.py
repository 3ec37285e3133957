"""Norms keep the accuracy contract, and compute what torch and Hugging Face's models compute."""

import pytest
import torch
from attention_options import skip_without_kernels
from norm_cases import ADDED, ALONE, NORMS, call, check_norm, norm_inputs, results

import fastattn.functional as fa
from fastattn import reference
from fastattn.testing import DTYPES, randn, restride

WIDTHS = (1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 33, 64, 65, 127, 128, 257, 768, 1000, 4097)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("norm", NORMS)
def test_every_width(level, dtype, norm):
    for i, width in enumerate(WIDTHS):
        rows = (1, 2, 5, 13, 33, 70)[i % 6] if width < 1000 else 5
        check_norm(norm, norm_inputs(norm, (rows,), width, dtype, seed=i), what=f"{rows}x{width}")


@pytest.mark.parametrize("norm", ["layer", "add gemma"])
def test_very_wide_rows(level, norm):
    check_norm(norm, norm_inputs(norm, (2,), 65536 + 3))


@pytest.mark.parametrize("norm", NORMS)
def test_float64(norm):
    skip_without_kernels(torch.float64)
    for leading, width in (((3,), 1), ((2, 5), 33), ((70,), 129)):
        check_norm(norm, norm_inputs(norm, leading, width, torch.float64))


@pytest.mark.parametrize("norm", NORMS)
def test_leading_shapes_and_rows_of_several_dimensions(level, norm):
    for leading in ((), (1,), (2, 3), (2, 1, 3), (2, 3, 2, 2, 3)):
        for row in (5, (3, 4), (2, 1, 9)):
            check_norm(norm, norm_inputs(norm, leading, row), what=f"{leading} {row}")


@pytest.mark.parametrize("norm", NORMS)
def test_empty_tensors(level, norm):
    for leading, width in (((0,), 5), ((3, 0), 8), ((0, 2), 1), ((3,), 0), ((0,), 0)):
        inputs = norm_inputs(norm, leading, width)
        got = results(fa, norm, inputs)
        for name, x in got.items():
            source = inputs.get(name[1:], inputs["input"])
            assert x.shape == source.shape and (x == 0).all(), name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("norm", NORMS)
def test_weights_of_every_dtype(level, dtype, norm):
    for weight_dtype in (*DTYPES, torch.float64):
        inputs = norm_inputs(norm, (9,), 40, dtype, weight_dtype)
        if weight_dtype == torch.float64 and "llama" in norm:
            with pytest.raises(TypeError, match="weight"):
                call(fa, norm, inputs)
            continue
        check_norm(norm, inputs, what=f"{weight_dtype}")


@pytest.mark.parametrize("norm", NORMS)
def test_without_weight_or_bias(level, norm):
    inputs = norm_inputs(norm, (7,), 21, torch.bfloat16)
    inputs.pop("bias", None)
    check_norm(norm, inputs)
    inputs.pop("weight")
    check_norm(norm, inputs)


@pytest.mark.parametrize("kind", ["transposed", "fused", "strided", "columns", "guarded"])
@pytest.mark.parametrize("norm", NORMS)
def test_any_strides_of_the_inputs(level, norm, kind):
    inputs = norm_inputs(norm, (2, 5, 7), 24, torch.bfloat16)
    dense = results(fa, norm, inputs)
    kinds = {"input": kind, "residual": "guarded" if kind != "guarded" else "transposed"}
    moved = {n: restride(x, kinds[n]) if n in kinds else x for n, x in inputs.items()}
    for name, x in results(fa, norm, moved).items():
        if name == "dweight" or name == "dbias":  # rows are added in the order of memory
            torch.testing.assert_close(x, dense[name], rtol=2e-2, atol=1e-2)
        else:
            assert torch.equal(x, dense[name]), name


def test_results_have_the_memory_order_of_the_input(level):
    x = randn(2, 6, 4, 16, seed=0).transpose(1, 2)  # bhsd view of bshd memory
    out, summed = fa.add_rms_norm(x, x, randn(16, seed=1))
    assert out.stride() == summed.stride() == x.stride()
    sliced = randn(3, 5, 48, seed=0)[..., 16:32]
    assert fa.layer_norm(sliced, 16).is_contiguous()


@pytest.mark.parametrize("norm", NORMS)
def test_gradients_of_any_strides(level, norm):
    inputs = norm_inputs(norm, (3, 5, 7), 24)
    leaves = [x.requires_grad_() for x in inputs.values()]
    outputs = call(fa, norm, inputs)
    shape = outputs[0].shape
    for arrived in (
        torch.full((), 1.5).expand(shape),
        randn(24, seed=3).expand(shape),
        randn(3, 5, 7, 1, seed=3).expand(shape),
        restride(randn(*shape, seed=3), "columns"),
        restride(randn(*shape, seed=3), "strided"),
    ):
        again = {"retain_graph": True}
        got = torch.autograd.grad(outputs, leaves, [arrived] * len(outputs), **again)
        dense = [arrived.contiguous()] * len(outputs)
        want = torch.autograd.grad(outputs, leaves, dense, **again)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("norm", ADDED)
@pytest.mark.parametrize("seen", [(0,), (1,)])
def test_a_loss_on_one_of_the_two_results(level, norm, seen):
    inputs = norm_inputs(norm, (6,), 40)
    got, want = (results(m, norm, inputs, seen) for m in (fa, reference))
    if seen == (0,):
        check_norm(norm, inputs, seen)
    for name in ("dinput", "dresidual"):
        torch.testing.assert_close(got[name], want[name], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("magnitude", [1e-4, 30.0, 1000.0])
def test_magnitudes(level, dtype, norm, magnitude):
    inputs = norm_inputs(norm, (5,), 100, dtype)
    for name in ("input", "residual"):
        if name in inputs:
            inputs[name] = (inputs[name] * magnitude).to(dtype)
    check_norm(norm, inputs)


@pytest.mark.parametrize("width", [5, 64, 1000, 4096])
@pytest.mark.parametrize("mean", [1e2, 1e4, -1e6])
def test_a_mean_much_larger_than_the_deviations_costs_no_accuracy(level, width, mean):
    x = randn(3, width, seed=1) + mean
    inputs = {"input": x, "weight": randn(width, seed=2), "bias": randn(width, seed=3)}
    check_norm("layer", inputs)
    got = fa.layer_norm(x, width)
    want = reference.layer_norm(x.double(), width)
    # To the rounding of the result, not of the mean.
    assert (got - want).abs().max() < 4 * torch.finfo(torch.float32).eps * want.abs().max()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_constant_row_is_its_bias(level, dtype):
    bias = randn(1003, seed=0, dtype=dtype)
    for value in (0.0, 1.0, -3.1, 1000.0):
        x = torch.full((2, 1003), value, dtype=dtype)
        got, eps = fa.layer_norm(x, 1003, None, bias), torch.finfo(dtype).eps
        torch.testing.assert_close(got, bias.expand(2, -1), rtol=eps, atol=eps)


@pytest.mark.parametrize("norm", ALONE)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_infinity_stay_in_their_row(level, norm, value):
    inputs = norm_inputs(norm, (4,), 37)
    clean = call(fa, norm, inputs)[0]
    inputs["input"][2, 5] = value
    got, want = call(fa, norm, inputs)[0], call(reference, norm, inputs)[0]
    assert torch.equal(got.isnan(), want.isnan())
    assert torch.equal(got[[0, 1, 3]], clean[[0, 1, 3]])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_as_torch(level, dtype):
    for width in (7, 64, 1000):
        x, weight, bias = (randn(*s, seed=i, dtype=dtype) for i, s in enumerate(SHAPES[width]))
        shape = (width,)
        tolerance = {"rtol": 8 * torch.finfo(dtype).eps, "atol": 8 * torch.finfo(dtype).eps}
        functions = torch.nn.functional
        torch.testing.assert_close(
            fa.layer_norm(x, shape, weight, bias),
            functions.layer_norm(x, shape, weight, bias),
            **tolerance,
        )
        for eps in (None, 1e-3):
            for y in (x, x * 1e-3):
                got = fa.rms_norm(y, shape, weight, eps)
                want = functions.rms_norm(y, shape, weight, eps)
                torch.testing.assert_close(got, want, **tolerance)
        assert_bits_agree(got, want, dtype)


SHAPES = {width: ((70, width), (width,), (width,)) for width in (7, 64, 1000)}


def hf_llama(x, weight, eps):
    hidden = x.to(torch.float32)
    hidden = hidden * torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + eps)
    return weight * hidden.to(x.dtype)


def hf_gemma(x, weight, eps):
    hidden = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + eps)
    return (hidden * (1.0 + weight.float())).type_as(x)


def assert_bits_agree(got, want, dtype):
    """Rounded at the same places, results differ only where the order of the sum of squares shows:
    in float32 by its last bit; in 16 bits that is seen by one result in some thousand."""
    assert got.dtype == want.dtype
    if dtype == torch.float32:
        # Two roundings of the sum, halved by the root, one each of mean, eps, root and quotient.
        torch.testing.assert_close(got, want, rtol=4 * torch.finfo(torch.float32).eps, atol=0.0)
    else:
        assert (got != want).double().mean() < 2e-3


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("casting", ["llama", "gemma"])
def test_the_castings_round_where_hugging_face_does(level, dtype, casting):
    formula = {"llama": hf_llama, "gemma": hf_gemma}[casting]
    for weight_dtype in {dtype, torch.float32, torch.bfloat16}:
        for width in (64, 256, 1000, 4096):
            x = randn(30, width, seed=width, dtype=dtype) * 3
            weight = randn(width, seed=1, dtype=weight_dtype)
            got = fa.rms_norm(x, width, weight, 1e-6, casting=casting)
            assert_bits_agree(got, formula(x, weight, 1e-6), dtype)


def test_the_castings_differ_from_each_other(level):
    """So that a test of one cannot pass with another."""
    x, weight = randn(8, 64, seed=0, dtype=torch.bfloat16), randn(64, seed=1).bfloat16()
    fp32, llama, gemma = (fa.rms_norm(x, 64, weight, casting=c) for c in ("fp32", "llama", "gemma"))
    assert 0.05 < (fp32 != llama).double().mean() < 0.5
    assert (fp32 != gemma).double().mean() > 0.9


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_row_does_not_depend_on_the_others(level, threads, norm, dtype):
    inputs = norm_inputs(norm, (300,), 129, dtype)
    whole = call(fa, norm, inputs)
    for rows in (slice(0, 1), slice(7, 8), slice(100, 250)):
        part = {n: x[rows] if x.dim() == 2 else x for n, x in inputs.items()}
        for x, y in zip(whole, call(fa, norm, part), strict=True):
            assert torch.equal(x[rows], y)
    padded = {n: torch.cat([x * 0, x]) if x.dim() == 2 else x for n, x in inputs.items()}
    for x, y in zip(whole, call(fa, norm, padded), strict=True):
        assert torch.equal(y[300:], x)


@pytest.mark.parametrize("norm", NORMS)
def test_any_number_of_threads_gives_the_same_bits(level, threads, norm):
    inputs = norm_inputs(norm, (1030,), 129)
    runs = []
    for count in (1, 2, 3, 7):
        threads(count)
        runs.append(results(fa, norm, inputs))
    for run in runs[1:]:
        assert all(torch.equal(run[n], x) for n, x in runs[0].items())


def test_many_rows(level):
    """Several slices of the sums over rows, each of many blocks."""
    check_norm("add layer", norm_inputs("add layer", (9000,), 72))


def test_results_past_the_cache_are_those_within(level):
    """Rows of whole lines and rows that are not take other stores."""
    for width in (1024, 1020):
        x, residual = randn(4200, width, seed=0), randn(4200, width, seed=1)
        normalised, summed = fa.add_rms_norm(x, residual)
        for first in range(0, 4200, 1400):
            rows = slice(first, first + 1400)
            part = fa.add_rms_norm(x[rows], residual[rows])
            assert torch.equal(part[0], normalised[rows]) and torch.equal(part[1], summed[rows])


def test_query_and_key(level):
    """As rms_norm does, from slices of one projection, each in its own memory order."""
    fused = randn(2, 9, 12, 32, seed=0, dtype=torch.bfloat16)
    weights = randn(2, 32, seed=1)
    for layout in ("bshd", "bhsd"):
        query, key = fused[:, :, :8], fused[:, :, 8:10]
        if layout == "bhsd":
            query, key = query.transpose(1, 2), key.transpose(1, 2)
        for casting in ("fp32", "llama", "gemma"):
            got = fa.qk_rms_norm(query, key, *weights, casting=casting)
            want = reference.qk_rms_norm(query, key, *weights, casting=casting)
            for x, y, source in zip(got, want, (query, key), strict=True):
                torch.testing.assert_close(x, y)
                assert (x.stride(1) > x.stride(2)) == (source.stride(1) > source.stride(2))
    query, key = (x.detach().requires_grad_() for x in (query, key))
    leaves = [query, key, *(w.detach().requires_grad_() for w in weights)]
    outs = fa.qk_rms_norm(*leaves)
    wants = reference.qk_rms_norm(*leaves)
    arrived = [randn(*x.shape, seed=5, dtype=x.dtype) for x in outs]
    grads = (torch.autograd.grad(o, leaves, arrived) for o in (outs, wants))
    for x, y in zip(*grads, strict=True):
        torch.testing.assert_close(x, y, rtol=2e-2, atol=2e-2)
