"""What attention on CUDA has of its own: where it runs, what it refuses, and that nothing waits.

On an emulated GPU as far as that goes (FASTATTN_CUDA=emulate).
"""

import math
import re

import pytest
import torch
from cuda_cases import captured, emulated, gpu
from torch._subclasses.fake_tensor import FakeTensorMode

import fastattn
import fastattn.functional as fa
from fastattn import _C
from fastattn._ops.errors import user_error
from fastattn.testing import (
    DTYPES,
    attention_inputs,
    attention_results,
    check_attention,
    randn,
)


@emulated
def test_an_emulated_kernel_runs_at_its_level_alone(level):
    before = _C.emulator_launches()
    attention_results(fa.attention, attention_inputs(queries=5), {})
    assert (_C.emulator_launches() > before) == (level in _C.emulated_levels)


def test_what_has_no_kernel_is_refused(cuda):
    wide, long = attention_inputs(queries=3, head_dim=257), attention_inputs(queries=3)
    long["value"] = randn(2, 2, 3, 300, seed=1, dtype=long["query"].dtype)
    for inputs, name in ((wide, "query"), (long, "value")):
        with pytest.raises(ValueError, match=rf"^{name}: expected a head_dim of 1 to 256 on CUDA"):
            fa.attention(**inputs)
    double = attention_inputs(queries=3, dtype=torch.float64)
    expected = r"^query: expected dtype float32, bfloat16 or float16 on CUDA, got dtype .*float64"
    with pytest.raises(TypeError, match=expected):
        fa.attention(**double)


def test_explain_names_the_kernel_and_why_not_the_others(cuda):
    explanation = fastattn.explain(**attention_inputs(queries=300))
    backend, arch, schedule = explanation.kernel.split("/")
    assert backend == ("cuda" if cuda == "cuda" else "emulated")
    assert arch == ("sm90" if cuda == "sm90" else "sm80")
    every = {"cpu", "sm80", "sm90", "tile", "split tile", "decode"}
    assert every - {arch, schedule} == set(explanation.rejected)
    if cuda == "sm80":
        assert explanation.rejected["sm90"] == "the GPU is not of compute capability 9.0"
    assert re.match(r"tiles of \d+ rows x \d+ keys, heads in a tile: \d+", explanation.reasons[-1])


@pytest.mark.parametrize("length", [40, 150])
def test_deterministic_gradients_do_not_depend_on_the_order_of_threads(cuda, length):
    inputs = attention_inputs(queries=length, keys=130, heads=4, kv_heads=2)
    inputs |= {"bias": randn(1, 4, 1, 130, seed=5), "sink": randn(4, seed=6)}
    runs = []
    for seed in (1, 2, 3):
        if cuda in _C.emulated_levels:
            _C.set_emulator_seed(seed)
        options = {"causal": True, "deterministic": True}
        runs.append(attention_results(fa.attention, inputs, options))
    assert all(torch.equal(x, run[name]) for run in runs for name, x in runs[0].items())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_bias_may_be_shared_by_sequences_of_any_lengths(cuda, dtype):
    """The threads of a block leave one sequence for the next together."""
    shape = {"batch": (4,), "queries": 100, "keys": 70, "dtype": dtype}
    inputs = attention_inputs(**shape) | {"bias": randn(70, seed=5, dtype=dtype)}
    check_attention(fa.attention, inputs, query_lengths=torch.tensor([30, 100, 0, 100]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("poisoned", ["query", "dout"])
def test_poison_in_a_query_reaches_no_key_that_it_does_not_see(cuda, dtype, poisoned):
    inputs = attention_inputs(queries=100, keys=100, dtype=dtype)
    dout = randn(2, 2, 100, 16, seed=7, dtype=dtype)
    gradients = []
    for poison in (0.0, math.nan):
        inputs["query"][:, :, 20] = poison if poisoned == "query" else 0.0
        dout[:, :, 20] = poison
        leaves = [x.clone().requires_grad_() for x in inputs.values()]
        out = fa.attention(*leaves, causal=True)
        gradients.append(torch.autograd.grad(out, leaves[1:], dout))
    for clean, got in zip(*gradients, strict=True):
        assert got[:, :, :21].isnan().all()
        torch.testing.assert_close(got[:, :, 21:], clean[:, :, 21:])


def test_shapes_of_cuda_tensors_are_known_without_a_gpu():
    with FakeTensorMode():
        shape = {"dtype": torch.bfloat16, "device": "cuda"}
        query, key = torch.empty(2, 4, 5, 16, **shape), torch.empty(2, 2, 7, 16, **shape)
        out, lse = fa.attention(query, key, key, causal=True, dropout_p=0.5, return_lse=True)
    assert out.shape == query.shape and out.device == query.device
    assert lse.shape == (2, 4, 5) and lse.dtype == torch.float32


def test_an_op_without_a_cuda_kernel_says_so():
    with FakeTensorMode():
        query = torch.empty(2, 4, 5, 16, device="cuda")
    said = "Could not run 'fastattn::attention_weights' with arguments from the 'CUDA' backend."
    error = user_error(NotImplementedError(said), {"query": query})
    assert isinstance(error, ValueError)
    why = "attention_weights has no CUDA kernel" if _C.built_with_cuda else "FASTATTN_CUDA=1"
    assert str(error).startswith("query: expected a tensor on cpu") and why in str(error)


def test_weights_on_cuda_are_refused_by_the_name_that_asks_for_them():
    module = fastattn.nn.MultiheadAttention(32, 4)
    with FakeTensorMode():
        x = torch.empty(5, 2, 32, device="cuda")
    expected = r"^need_weights: expected False on cuda:0, as attention_weights has no CUDA kernel"
    with pytest.raises(ValueError, match=expected):
        module(x, x, x)


@gpu
@pytest.mark.parametrize("name", ["query_lengths", "key_lengths", "mask", "sink", "key"])
def test_tensors_of_two_devices_are_refused_before_they_are_read(cuda, name):
    right = attention_inputs(queries=4) | {
        "query_lengths": torch.tensor([4, 2]),
        "key_lengths": torch.tensor([3, 4]),
        "mask": torch.ones(4, 4, dtype=torch.bool),
        "sink": torch.zeros(2),
    }
    on_cpu = {n: x.cpu() for n, x in right.items()}
    for call in (right | {name: on_cpu[name]}, on_cpu | {name: right[name]}):
        with pytest.raises(ValueError, match=rf"^{name}: expected a tensor on"):
            fa.attention(**call)


@gpu
def test_a_graph_captures_both_passes_and_repeats_them(cuda):
    """So none of them waits for the GPU, reads from it or allocates behind torch's back."""
    leaves = [x.requires_grad_() for x in attention_inputs(queries=70, heads=4).values()]
    bounds = torch.tensor([0, 30, 65])
    dout = randn(2, 4, 70, 16, seed=9)

    def step():
        out = fa.attention(*leaves, causal=True, key_lengths=torch.full((2,), 50), dropout_p=0.1)
        packed = fa.attention_varlen(*(x[0].transpose(0, 1) for x in leaves), bounds, bounds)
        return out, packed, *torch.autograd.grad(out, leaves, dout)

    results = captured(step)
    again = fa.attention_varlen(*(x[0].transpose(0, 1) for x in leaves), bounds, bounds)
    torch.testing.assert_close(results[1], again)
    assert all(x.isfinite().all() for x in results)


@gpu
def test_rows_beyond_max_seqlen_take_no_part():
    """The host cannot refuse a max_seqlen that is too small: the lengths are on the device."""
    query = randn(12, 2, 64, seed=1, dtype=torch.bfloat16).cuda().requires_grad_()
    bounds = torch.tensor([0, 8, 12], dtype=torch.int32, device="cuda")
    out, lse = fa.attention_varlen(
        query, query, query, bounds, bounds, max_seqlen_q=5, max_seqlen_k=5, return_lse=True
    )
    (gradient,) = torch.autograd.grad(out.float().square().sum(), query)
    assert (out[5:8] == 0).all() and (lse[:, 5:8] == -math.inf).all()
    assert (gradient[5:8] == 0).all()
    short = torch.tensor([0, 5, 9], dtype=torch.int32, device="cuda")
    rows = torch.cat([query[:5], query[8:]])
    expected = fa.attention_varlen(rows, rows, rows, short, short, max_seqlen_q=5, max_seqlen_k=5)
    torch.testing.assert_close(torch.cat([out[:5], out[8:]]), expected)
