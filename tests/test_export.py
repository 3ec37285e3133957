"""torch.export of layers and functions: with any sizes, saved, compiled ahead of time; the same."""

import shutil

import pytest
import torch
from nn_modules import MODULES
from torch import nn
from torch.export import Dim

import fastattn.functional as fa
import fastattn.nn
from fastattn.testing import randn

QUICK = ("TransformerEncoderLayer", "Attention across", "TransformerBlock")
NAMES = [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in MODULES]
FIXED_LENGTH = ("RelativeBias2d",)


def build(name):
    torch.manual_seed(0)
    return MODULES[name][0](0.0).eval()


def inputs_of(name, length=6):
    return MODULES[name][1](length)


def any_sizes(name, inputs):
    dims = {0: Dim.DYNAMIC} if name in FIXED_LENGTH else {0: Dim.DYNAMIC, 1: Dim.DYNAMIC}
    return (dims,) * len(inputs)


def lengths(name):
    return (6,) if name in FIXED_LENGTH else (6, 9, 2, 1)


def outputs(module, inputs):
    with torch.no_grad():
        out = module(*inputs)
    return [x for x in (out if isinstance(out, tuple) else (out,)) if x is not None]


def assert_same(program, module, inputs):
    got, want = outputs(program, inputs), outputs(module, inputs)
    assert len(got) == len(want)
    for x, y in zip(got, want):
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no_grad"])
@pytest.mark.parametrize("name", NAMES)
def test_layers_of_any_batch_and_length(name, grad):
    module, inputs = build(name), inputs_of(name)
    with torch.set_grad_enabled(grad):
        exported = torch.export.export(module, inputs, dynamic_shapes=any_sizes(name, inputs))
    program = exported.module()
    for length in lengths(name):
        longer = tuple(torch.cat((x, x[:1])) for x in inputs_of(name, length))
        assert_same(program, module, longer)


@pytest.mark.parametrize("name", ["TransformerBlock", "MultiheadAttention"])
def test_a_decomposed_and_saved_program_computes_the_same(name, tmp_path):
    module, inputs = build(name), inputs_of(name)
    exported = torch.export.export(module, inputs, dynamic_shapes=any_sizes(name, inputs))
    torch.export.save(exported.run_decompositions(), tmp_path / "program.pt2")
    program = torch.export.load(tmp_path / "program.pt2").module()
    for length in lengths(name):
        assert_same(program, module, inputs_of(name, length))


class Call(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *tensors):
        return self.function(*tensors)


def everything(q, k, v, mask, bias, lengths, slopes, sink):
    return fa.attention(
        *(q, k, v),
        causal=True,
        window=(3, None),
        mask=mask,
        bias=bias,
        key_lengths=lengths,
        alibi_slopes=slopes,
        sink=sink,
        softcap=3.0,
        return_lse=True,
    )


def weights(q, k, v):
    _, lse = fa.attention(q, k, v, causal=True, return_lse=True)
    sums = fa.attention_column_sums(q, k, lse, causal=True)
    return fa.attention_weights(q, k, lse, rows=[-1], causal=True), sums


def rotated_in_place(q, k, cos, sin):
    q, k = q.clone(), k.clone()
    fa.apply_rope_qk_(q, k, cos, sin)
    return q, fa.apply_rope_(k, cos, sin)


QKV = (randn(2, 4, 5, 8, seed=0), randn(2, 2, 7, 8, seed=1), randn(2, 2, 7, 6, seed=2))
BOUNDS = torch.tensor([0, 3, 5])
FUNCTIONS = {
    "attention": (
        everything,
        (
            *QKV,
            randn(5, 7, seed=3) < 0.5,
            randn(4, 5, 7, seed=4),
            torch.tensor([7, 4]),
            torch.tensor([0.5, 0.25, 0.125, 1.0]),
            randn(4, seed=5),
        ),
    ),
    "attention_varlen": (
        lambda x, bounds: fa.attention_varlen(x, x, x, bounds, bounds, causal=True),
        (randn(5, 2, 8, seed=0), BOUNDS),
    ),
    "sdpa": (lambda q: fa.scaled_dot_product_attention(q, q, q, is_causal=True), QKV[:1]),
    "weights": (weights, QKV),
    "rope in place": (
        rotated_in_place,
        (QKV[0], QKV[0] + 1.0, *fa.rope_tables(8, 16)),
    ),
    "add_rms_norm": (
        lambda x, weight: fa.add_rms_norm(x, x, weight, casting="llama"),
        (QKV[0], randn(8, seed=3)),
    ),
    "swiglu": (lambda x: fa.swiglu(x), QKV[:1]),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions(name):
    function, inputs = FUNCTIONS[name]
    exported = torch.export.export(Call(function), inputs)
    assert_same(exported.module(), function, inputs)
    assert_same(exported.run_decompositions().module(), function, inputs)


class CachedSteps(nn.Module):
    """A model and its cache, whose tensors are buffers of the program, which writes them."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        attention = fastattn.nn.Attention(
            16, 4, num_kv_heads=2, causal=True, rope=fastattn.nn.RotaryEmbedding(4, 32)
        )
        self.block = fastattn.nn.TransformerBlock(attention, fastattn.nn.GatedFeedForward(16, 24))
        self.cache = fastattn.nn.KVCache(num_layers=1, batch=2, kv_heads=2, capacity=32, head_dim=4)
        self.register_buffer("keys", self.cache.keys[0])
        self.register_buffer("values", self.cache.values[0])
        self.register_buffer("lengths", self.cache.lengths)

    def forward(self, x):
        cache = self.cache
        cache.keys, cache.values, cache.lengths = [self.keys], [self.values], self.lengths
        out = self.block(x, cache=self.cache)
        self.cache.advance(x.shape[1])
        return out


@pytest.mark.parametrize("decomposed", [False, True])
def test_a_cache_is_written_by_the_program(decomposed):
    steps = CachedSteps().eval()
    x = randn(2, 3, 16, seed=0)
    with torch.no_grad():
        exported = torch.export.export(
            CachedSteps().eval(), (x,), dynamic_shapes=({1: Dim("length", max=16)},)
        )
        exported = exported.run_decompositions() if decomposed else exported
    program = exported.module()
    for step, length in enumerate((3, 1, 1, 4)):
        assert_same(program, steps, (randn(2, length, 16, seed=step),))


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
@pytest.mark.parametrize("name", ["TransformerEncoderLayer", "TransformerBlock"])
def test_compiled_ahead_of_time(name, tmp_path):
    module, inputs = build(name), inputs_of(name)
    with torch.no_grad():
        exported = torch.export.export(module, inputs, dynamic_shapes=any_sizes(name, inputs))
    package = torch._inductor.aoti_compile_and_package(
        exported, package_path=str(tmp_path / "model.pt2")
    )
    loaded = torch._inductor.aoti_load_package(package)
    for length in lengths(name):
        assert_same(loaded, module, inputs_of(name, length))
