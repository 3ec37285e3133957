"""What activations on CUDA have of their own: their tiles, which memory they touch, and that
nothing waits.

On an emulated GPU as far as that goes (FASTATTN_CUDA=emulate).
"""

import pytest
import torch
from attention_options import skip_on_gpu
from cuda_cases import captured, emulated, far_apart, gpu, orders_of_threads
from test_activation import ALL, BIAS, check, results
from test_attention_bounds import fenced

import fastattn.functional as fa
from fastattn import _C
from fastattn.testing import DTYPES, randn


@emulated
@pytest.mark.parametrize("name", ["gelu", "bias_gelu", "swiglu"])
def test_an_emulated_kernel_runs_at_its_level_alone(level, name):
    second = {"gelu": [], "bias_gelu": [randn(7, seed=2)], "swiglu": [randn(3, 7, seed=3)]}[name]
    before = _C.emulator_launches()
    results(fa, name, [randn(3, 7, seed=1), *second], randn(3, 7, seed=4))
    assert (_C.emulator_launches() > before) == (level in _C.emulated_levels)


def test_float64_is_refused(cuda):
    x = randn(3, 8, seed=1, dtype=torch.float64)
    expected = "expected dtype float32, bfloat16 or float16 on CUDA"
    with pytest.raises(TypeError, match=f"^input: {expected}"):
        fa.gelu(x)
    with pytest.raises(TypeError, match=f"^gate: {expected}"):
        fa.swiglu(x, x)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(900, 3), (300, 40), (129, 136), (20, 1100), (3, 2100)], ids=str)
def test_tiles_of_every_shape(cuda, shape, dtype):
    """Rows that fill the lanes of a block or few of them, and several slices of them."""
    for name in ("bias_silu", "swiglu"):
        second = randn(*(shape[-1:] if name in BIAS else shape), seed=2, dtype=dtype)
        check(name, [randn(*shape, seed=1, dtype=dtype), second])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_at_distances_that_differ(cuda, dtype):
    x = randn(7, 5, 9, 24, seed=1, dtype=dtype).permute(2, 0, 1, 3)[:, 1:, ::2]
    check("gelu", [x])
    check("bias_relu", [x, randn(24, seed=2)])
    check("geglu", [x, randn(5, 7, 9, 24, seed=3, dtype=dtype).permute(2, 1, 0, 3)[:, 1:, ::2]])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_gradient_of_a_bias_has_equal_bits_in_any_order_of_threads(cuda, dtype):
    x, bias, dout = (randn(*s, seed=1, dtype=dtype) for s in ((700, 70), (70,), (700, 70)))
    runs = [results(fa, "bias_gelu", [x, bias], dout) for _ in orders_of_threads(cuda)]
    assert all(torch.equal(a, b) for run in runs for a, b in zip(run, runs[0], strict=True))


@pytest.mark.parametrize("rows", [0, 1, 2])
def test_a_bias_of_few_rows_has_a_gradient(cuda, rows):
    check("bias_gelu", [randn(rows, 20, seed=1), randn(20, seed=2)])


@pytest.mark.parametrize("poisoned", ["input", "dout"])
def test_poison_stays_in_its_element(cuda, poisoned):
    x, bias, dout = randn(130, 20, seed=1), randn(20, seed=2), randn(130, 20, seed=3)
    (x if poisoned == "input" else dout)[100, 11] = torch.nan
    _, dx, dbias = results(fa, "bias_gelu", [x, bias], dout)
    assert dx.isnan().nonzero().tolist() == [[100, 11]]
    assert dbias.isnan().nonzero().tolist() == [[11]]


@pytest.mark.parametrize("at_end", [False, True])
@pytest.mark.parametrize("name", ["gelu", "bias_gelu", "swiglu"])
def test_nothing_is_read_outside_of_the_inputs(cuda, name, at_end):
    skip_on_gpu("its memory has no such pages")
    for dtype in DTYPES:
        for shape in ((5, 13), (1, 1), (70, 8)):
            second = randn(*(shape[1:] if name in BIAS else shape), seed=2, dtype=dtype)
            inputs = [randn(*shape, seed=1, dtype=dtype), *([second] if name != "gelu" else [])]
            dout = randn(*shape, seed=3, dtype=dtype)
            results(fa, name, [fenced(x, at_end) for x in inputs], fenced(dout, at_end))


def test_offsets_beyond_32_bits(cuda, tmp_path):
    skip_on_gpu("its memory has no holes")
    x, bias = randn(2, 3, 40, seed=1, dtype=torch.bfloat16), randn(40, seed=2)
    far, dout = far_apart(x, tmp_path, "x"), far_apart(x, tmp_path, "dout")
    want = results(fa, "bias_gelu", [x, bias], x)
    got = results(fa, "bias_gelu", [far, bias], dout)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert torch.equal(fa.swiglu(far, dout), fa.swiglu(x, x))


@gpu
@pytest.mark.parametrize("name", ALL)
def test_a_graph_captures_both_passes_and_repeats_them(cuda, name):
    """So none of them waits for the GPU, reads from it or allocates behind torch's back."""
    x, dout = randn(300, 70, seed=1, dtype=torch.bfloat16), randn(300, 70, seed=2).bfloat16()
    second = [] if name in ("gelu", "gelu tanh", "silu", "relu") else [x[0] if name in BIAS else x]
    got = captured(lambda: results(fa, name, [x, *second], dout))
    want = results(fa, name, [x, *second], dout)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@gpu
def test_tensors_of_two_devices_are_refused_before_they_are_read(cuda):
    x = randn(3, 8, seed=1)
    for call, name in ((fa.bias_gelu, "bias"), (fa.swiglu, "up")):
        for inputs in ((x, x.cpu()), (x.cpu(), x)):
            one = tuple(y[0] for y in inputs[1:]) if name == "bias" else inputs[1:]
            with pytest.raises(ValueError, match=rf"^{name}: expected a tensor on"):
                call(inputs[0], *one)
