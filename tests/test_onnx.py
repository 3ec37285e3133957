"""Models for ONNX: standard nodes, and the numbers of the functions that they stand for.

Two runtimes compute each model, onnxruntime and the evaluator of the onnx package, which is the
standard's own reference. The oracle is fastattn.reference in float64.
"""

import math
from collections import Counter

import pytest
import torch
from nn_modules import MODULES
from torch import nn

import fastattn.functional as fa
import fastattn.nn
from fastattn import reference
from fastattn.testing import assert_accurate, randn

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")

import fastattn.onnx  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")


def by_onnxruntime(proto, feeds):
    onnxruntime = pytest.importorskip("onnxruntime")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(proto.SerializeToString(), options).run(None, feeds)


def by_the_standard(proto, feeds):
    from onnx.reference import ReferenceEvaluator

    return ReferenceEvaluator(proto).run(None, feeds)


RUNTIMES = (by_onnxruntime, by_the_standard)


class Calls(nn.Module):
    """Functions of named tensors, as a module with a result for each."""

    def __init__(self, calls, library):
        super().__init__()
        self.calls, self.library = calls, library

    def forward(self, **tensors):
        return tuple(
            x for call in self.calls.values() for x in results_of(call(self.library, tensors))
        )


def results_of(out):
    return out if isinstance(out, tuple) else (out,)


def nodes(program):
    return Counter(node.op_type for node in program.model_proto.graph.node)


def require_standard(program):
    onnx.checker.check_model(program.model_proto, full_check=True)
    assert {opset.domain for opset in program.model_proto.opset_import} == {""}
    assert not program.model_proto.functions


def run(program, run_with, tensors):
    feeds = {name: x.numpy() for name, x in tensors.items()}
    names = [value.name for value in program.model_proto.graph.input]
    got = run_with(program.model_proto, {name: feeds[name] for name in names})
    return [torch.from_numpy(x) for x in got]


def export_calls(calls, tensors, **options):
    """All of them as one model, of which torch has to make but one."""
    module = Calls(calls, fa).eval()
    program = fastattn.onnx.export(module, kwargs=tensors, verbose=False, **options)
    require_standard(program)
    return program


def check(program, calls, tensors, run_with):
    double = {n: x.double() if x.is_floating_point() else x for n, x in tensors.items()}
    got = iter(run(program, run_with, tensors))
    for name, call in calls.items():
        oracle = results_of(call(reference, double))
        eager = results_of(call(reference, tensors))
        for i, (want, plain) in enumerate(zip(oracle, eager)):
            assert_accurate(
                next(got), want, plain, f"{name}, result {i}", magnitude=2.0, dtype=plain.dtype
            )
    assert next(got, None) is None


TENSORS = {
    "q": randn(2, 4, 5, 8, seed=0),
    "k": randn(2, 2, 7, 8, seed=1),
    "v": randn(2, 2, 7, 6, seed=2),
    "mask": (randn(2, 1, 5, 7, seed=3) < 0.3) & (torch.arange(5) != 2)[:, None],
    "bias": randn(4, 5, 7, seed=4),
    "hiding_bias": torch.where(randn(5, 7, seed=5) < 0.5, 0.5, -math.inf),
    "query_lengths": torch.tensor([3, 5]),
    "key_lengths": torch.tensor([7, 4], dtype=torch.int32),
    "slopes": torch.tensor([0.5, 0.25, 0.125, 1.0]),
    "sink": randn(4, seed=6),
}


def attention(*names, key="k", value="v", **options):
    """A call with the tensors of these names as options."""

    def call(library, t):
        chosen = {{"hiding_bias": "bias", "slopes": "alibi_slopes"}.get(n, n): t[n] for n in names}
        return library.attention(t["q"], t[key], t[value], **chosen, **options)

    return call


def in_layout_bshd(library, t):
    """A projection's memory, and results that are viewed as rows."""
    q, k, v = (t[n].transpose(1, 2).contiguous() for n in "qkv")
    return library.attention(q, k, v, causal=True, layout="bshd").flatten(-2)


def in_memory_of_a_projection(library, t):
    q, k, v = (t[n].transpose(1, 2).contiguous().transpose(1, 2) for n in "qkv")
    out = library.attention(q, k, v, causal=True).transpose(1, 2)
    out = out.contiguous() if library is reference else out  # ours has the order of query's
    return out.view(2, 5, 4 * 6)


def with_batches(*leading):
    """Of more dimensions, or of none."""

    def call(library, t):
        q, k, v, mask = t["q"], t["k"], t["v"], t["mask"]
        if not leading:
            return library.attention(q[0], k[0], v[0], mask=mask[1, 0])
        q, k, v = (x.expand(*leading, *x.shape) for x in (q, k, v))
        return library.attention(
            *(q, k, v), mask=mask, key_lengths=t["key_lengths"].expand(*leading, 2)
        )

    return call


def weights(function, **chosen):
    def call(library, t):
        options = {"causal": True, "softcap": 2.0, "mask": t["mask"]}
        _, lse = library.attention(t["q"], t["k"], t["v"], **options, return_lse=True)
        return getattr(library, function)(t["q"], t["k"], lse, **options, **chosen)

    return call


ATTENTION = {
    "plain, grouped heads": attention(),
    "bottom-right corner": attention(causal=True),
    "top-left corner": attention(causal="top_left"),
    "square, causal": attention(causal=True, key="q", value="q"),
    "square, bshd": in_layout_bshd,
    "memory of a projection": in_memory_of_a_projection,
    "window": attention(window=(2, 1)),
    "causal window": attention(causal=True, window=(1, None)),
    "mask with a row of nothing": attention("mask"),
    "mask, causal": attention("mask", causal="top_left"),
    "bias": attention("bias"),
    "bias, causal, softcap": attention("bias", causal="top_left", softcap=1.5),
    "bias of -inf": attention("hiding_bias"),
    "bias, mask": attention("bias", "mask"),
    "softcap": attention("mask", softcap=1.5),
    "scale": attention(scale=0.7),
    "negative scale": attention(scale=-0.7),
    "scale 0": attention(scale=0.0),
    "query lengths": attention("query_lengths"),
    "key lengths": attention("key_lengths"),
    "lengths, causal": attention("query_lengths", "key_lengths", causal=True),
    "lengths, top-left": attention("query_lengths", "key_lengths", causal="top_left"),
    "alibi": attention("slopes"),
    "alibi, causal, bias": attention("slopes", "bias", causal=True),
    "sink": attention("sink"),
    "sink, mask, causal": attention("sink", "mask", causal=True),
    "offsets": attention(causal=True, query_offset=1, key_offset=3),
    "lse": attention(causal=True, return_lse=True),
    "lse of hidden rows, sink": attention("mask", "sink", "query_lengths", return_lse=True),
    "batch invariant, deterministic": attention(batch_invariant=True, deterministic=True),
    "no batch": with_batches(),
    "two batch dimensions": with_batches(1),
    "three batch dimensions": with_batches(3, 1),
    "weights": weights("attention_weights", rows=[0, 4, -1], heads=[1, 3]),
    "column sums": weights("attention_column_sums"),
    "sdpa": lambda library, t: library.scaled_dot_product_attention(
        t["q"], t["k"], t["v"], is_causal=True, enable_gqa=True
    ),
    "sdpa, floating mask": lambda library, t: library.scaled_dot_product_attention(
        t["q"], t["k"], t["v"], attn_mask=t["bias"], enable_gqa=True
    ),
}


@pytest.fixture(scope="module")
def attention_program():
    return export_calls(ATTENTION, TENSORS)


@pytest.mark.parametrize("run_with", RUNTIMES)
def test_attention_has_the_numbers_of_the_reference(attention_program, run_with):
    check(attention_program, ATTENTION, TENSORS, run_with)


def test_attention_is_one_node(attention_program):
    found = nodes(attention_program)  # equal calls are one after optimisation
    assert found["Attention"] > 25 and found["Softmax"] == 0


ANGLES = 3.0 * randn(12, 4, seed=5)
ROWS = {
    "x": randn(2, 3, 5, 8, seed=0),
    "y": randn(2, 3, 5, 8, seed=1),
    "weight": randn(8, seed=2),
    "weight2": randn(5, 8, seed=3),
    "shift": randn(8, seed=4),
    "positions": torch.tensor([[4, 0, 1, 7, 2], [0, 1, 2, 3, 9]]),
    "offsets": torch.tensor([2, 0], dtype=torch.int32),
    "cos": ANGLES.cos(),
    "sin": ANGLES.sin(),
}


def of(function, *names, **options):
    return lambda library, t: getattr(library, function)(*(t[n] for n in names), **options)


def rms_norm(casting):
    return lambda library, t: library.rms_norm(t["x"], 8, t["weight"], 1e-6, casting=casting)


def rope(*names, columns=4, **options):
    def call(library, t):
        tables = t["cos"][:, :columns], t["sin"][:, :columns]
        chosen = {{"offsets": "offset"}.get(n, n): t[n] for n in names}
        return library.apply_rope(t["x"], *tables, **chosen, **options)

    return call


def rope_with_a_row_for_each_token(library, t):
    return library.apply_rope(t["x"], *(t[n][t["positions"]][:, :5] for n in ("cos", "sin")))


def rope_in_layout_bshd(library, t):
    return library.apply_rope(t["x"].transpose(1, 2), t["cos"], t["sin"], layout="bshd")


def norm_of_transposed_rows(library, t):
    out = library.layer_norm(t["x"].transpose(1, 2), 8, t["weight"]).transpose(1, 2)
    out = out.contiguous() if library is reference else out
    return out.view(2, 15, 8)


def gated(function, **options):
    def call(library, t):
        packed = torch.cat((t["x"], t["y"]), dim=-1)
        function_ = getattr(library, function)
        return function_(t["x"], t["y"], **options) + function_(packed, **options)

    return call


NORMS = {
    "layer_norm": lambda library, t: library.layer_norm(t["x"], 8, t["weight"], t["shift"]),
    "layer_norm, no weight": lambda library, t: library.layer_norm(t["x"], 8, eps=0.1),
    "layer_norm, two dimensions": lambda library, t: library.layer_norm(
        t["x"], (5, 8), t["weight2"]
    ),
    "layer_norm, transposed": norm_of_transposed_rows,
    "rms_norm": rms_norm("fp32"),
    "rms_norm, llama": rms_norm("llama"),
    "rms_norm, gemma": rms_norm("gemma"),
    "rms_norm, no weight": lambda library, t: library.rms_norm(t["x"], 8),
    "add_layer_norm": of("add_layer_norm", "x", "y", "weight", "shift"),
    "add_rms_norm": of("add_rms_norm", "x", "y", "weight", casting="gemma"),
    "qk_rms_norm": of("qk_rms_norm", "x", "y", "weight"),
}
ACTIVATIONS = {
    "gelu": of("gelu", "x"),
    "gelu, tanh": of("gelu", "x", approximate="tanh"),
    "silu": of("silu", "x"),
    "relu": of("relu", "x"),
    "bias_gelu": of("bias_gelu", "x", "shift"),
    "bias_silu": of("bias_silu", "x", "shift"),
    "bias_relu": of("bias_relu", "x", "shift"),
    "swiglu": gated("swiglu"),
    "geglu": gated("geglu", approximate="tanh"),
    "reglu": gated("reglu"),
}
ROPES = {
    "rope": rope(),
    "rope, interleaved": rope(interleaved=True),
    "rope, part of the columns": rope(columns=2),
    "rope, part, interleaved": rope(columns=1, interleaved=True),
    "rope, positions": rope("positions"),
    "rope, offset": rope(offset=3),
    "rope, positions, offsets": rope("positions", "offsets"),
    "rope, tokens": rope_with_a_row_for_each_token,
    "rope, bshd": rope_in_layout_bshd,
    "rope_qk": of("apply_rope_qk", "x", "y", "cos", "sin"),
}
CALLS = NORMS | ACTIVATIONS | ROPES


@pytest.fixture(scope="module")
def rows_program():
    return export_calls(CALLS, ROWS)


@pytest.mark.parametrize("run_with", RUNTIMES)
def test_norms_activations_and_rope_have_the_numbers_of_the_reference(rows_program, run_with):
    check(rows_program, CALLS, ROWS, run_with)


def test_norms_activations_and_rope_are_the_nodes_of_the_standard(rows_program):
    found = nodes(rows_program)
    assert found["LayerNormalization"] == 5 and found["RMSNormalization"] >= 4
    assert found["RotaryEmbedding"] >= 9 and found["Gelu"] >= 4
    assert found["ReduceMean"] == found["Erf"] == found["Tanh"] == found["Sin"] == 0


def test_float16_keeps_the_contract():
    def half(tensors):
        return {n: x.half() if x.is_floating_point() else x for n, x in tensors.items()}

    attention_tensors = half({n: TENSORS[n] for n in ("q", "k", "v", "bias", "sink")})
    chosen = ("plain, grouped heads", "bias, causal, softcap", "sink")
    rows = half({n: ROWS[n] for n in ("x", "y", "weight", "shift", "cos", "sin")})
    names = ("rms_norm", "rms_norm, llama", "rms_norm, gemma", "add_layer_norm")
    names += ("bias_gelu", "swiglu", "rope", "rope_qk")
    calls = {n: ATTENTION[n] for n in chosen} | {n: CALLS[n] for n in names}
    tensors = attention_tensors | rows
    check(export_calls(calls, tensors), calls, tensors, by_onnxruntime)


def test_a_wider_bias_and_linear_biases_are_not_rounded_to_the_dtype_of_query():
    tensors = {n: TENSORS[n].half() for n in "qkv"}
    tensors |= {"bias": 64.0 + TENSORS["bias"] / 64.0, "slopes": 8.0 * TENSORS["slopes"]}
    calls = {"bias": attention("bias"), "alibi": attention("slopes", "bias", causal=True)}
    check(export_calls(calls, tensors), calls, tensors, by_onnxruntime)


def models(*names):
    return [pytest.param(n, marks=() if n in names else pytest.mark.slow) for n in MODULES]


def build(name):
    torch.manual_seed(0)
    return MODULES[name][0](0.0).eval()


def assert_same_outputs(program, module, inputs):
    feeds = {value.name: x.numpy() for value, x in zip(program.model_proto.graph.input, inputs)}
    with torch.no_grad():
        want = [x for x in results_of(module(*inputs)) if x is not None]
    got = by_onnxruntime(program.model_proto, feeds)
    assert len(got) == len(want)
    for x, y in zip(got, want):
        torch.testing.assert_close(torch.from_numpy(x), y)


@pytest.mark.parametrize("name", models("TransformerEncoderLayer", "TransformerBlock"))
def test_layers_compute_the_same(name):
    module, inputs = build(name), MODULES[name][1](6)
    program = fastattn.onnx.export(module, inputs, verbose=False)
    require_standard(program)
    assert_same_outputs(program, module, inputs)


@pytest.mark.parametrize(
    "name",
    ["TransformerBlock", pytest.param("CausalLM", marks=pytest.mark.slow)],
)
def test_dynamic_shapes_have_their_names_and_causality_its_attribute(name):
    module, inputs_of = build(name), MODULES[name][1]
    program = fastattn.onnx.export(
        module, inputs_of(6), dynamic_shapes=({0: "batch", 1: "length"},), verbose=False
    )
    require_standard(program)
    dims = program.model_proto.graph.input[0].type.tensor_type.shape.dim
    assert [d.dim_param for d in dims][:2] == ["batch", "length"]
    causal = [
        {a.name: a.i for a in node.attribute}.get("is_causal")
        for node in program.model_proto.graph.node
        if node.op_type == "Attention"
    ]
    assert causal and set(causal) == {1}
    assert nodes(program)["Range"] == 1  # the positions of rope, and no mask
    for length in (6, 9, 1):
        inputs = tuple(torch.cat((x, x[:1])) for x in inputs_of(length))
        assert_same_outputs(program, module, inputs)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["TransformerBlock across", "Transformer", "MultiheadAttention"])
def test_dynamic_shapes_of_several_inputs(name):
    module, inputs_of = build(name), MODULES[name][1]
    inputs = inputs_of(6)
    dynamic = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    program = fastattn.onnx.export(
        module, inputs, dynamic_shapes=(dynamic,) * len(inputs), verbose=False
    )
    for length in (6, 9, 2):
        assert_same_outputs(program, module, inputs_of(length))


@pytest.mark.parametrize("strict", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_what_torch_exported_with_gradients(strict):
    module, inputs = build("TransformerEncoderLayer"), MODULES["TransformerEncoderLayer"][1](6)
    exported = torch.export.export(module, inputs, strict=strict)
    program = torch.onnx.export(fastattn.onnx.decompose(exported), opset_version=23, verbose=False)
    require_standard(program)
    assert nodes(program)["Attention"] == 1 and nodes(program)["LayerNormalization"] == 2
    assert_same_outputs(program, module, inputs)


@pytest.mark.parametrize("opset, found", [(23, ["Sigmoid", "Mul"]), (24, ["Swish"])])
def test_silu_is_swish_where_the_opset_has_it(opset, found):
    calls, tensors = {"silu": ACTIVATIONS["silu"]}, {"x": ROWS["x"]}
    program = export_calls(calls, tensors, opset_version=opset)
    assert list(nodes(program)) == found
    check(program, calls, tensors, by_onnxruntime)


def test_it_is_written_to_a_file(tmp_path):
    module, x = fastattn.nn.LayerNorm(8), randn(2, 8, seed=0)
    program = fastattn.onnx.export(module, (x,), tmp_path / "model.onnx", verbose=False)
    written = onnx.load(tmp_path / "model.onnx")
    assert [n.op_type for n in written.graph.node] == list(nodes(program)) == ["LayerNormalization"]


def cached(library, t):
    return library.attention_with_cache(t["q"], t["q"], t["q"], cache_lengths=5)


def cached_and_written(library, t):
    cache = t["q"].clone()
    return library.attention_with_cache(
        t["q"][:, :, :1],
        cache,
        cache,
        cache_lengths=2,
        key=t["q"][:, :, :1],
        value=t["q"][:, :, :1],
    )


def updated(library, t):
    cache = t["q"].clone()
    library.kv_cache_update(cache, cache, t["q"][:, :, :1], t["q"][:, :, :1], 0)
    return cache


def packed(library, t):
    rows, bounds = t["q"][0], torch.tensor([0, 1, 4])
    return library.attention_varlen(rows, rows, rows, bounds, bounds)


REFUSED = {
    "dropout_p: expected 0 .* got 0.25": attention(dropout_p=0.25),
    "dropout_p: expected 0 .* got 0.5": of("add_layer_norm", "q", "q", dropout_p=0.5),
    "cu_seqlens_q: expected None": packed,
    "attention_with_cache: expected": cached,
    "attention_with_cache: expected a function": cached_and_written,
    "kv_cache_update: expected": updated,
    "apply_rope_: expected": lambda library, t: library.apply_rope_(
        t["q"].clone(), torch.ones(5, 2), torch.ones(5, 2)
    ),
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_has_no_form_is_named(message):
    tensors = {n: TENSORS[n] for n in "qkv"}
    with pytest.raises(ValueError, match=f"^{message}"):
        fastattn.onnx.export(Calls({"": REFUSED[message]}, fa).eval(), kwargs=tensors)


@pytest.mark.parametrize(
    "options", [{"opset_version": 22}, {"verify": True}, {"dynamo": False}], ids=str
)
def test_options_that_cannot_be_honoured_are_named(options):
    name = next(iter(options))
    with pytest.raises(ValueError, match=f"^{name}: expected"):
        fastattn.onnx.export(nn.Identity(), (torch.zeros(2),), **options)


def test_a_model_in_training_says_that_it_drops():
    layer = fastattn.nn.TransformerEncoderLayer(16, 4, 24, dropout=0.1, batch_first=True)
    with pytest.raises(ValueError, match=r"dropout_p: .*call model.eval\(\)"):
        fastattn.onnx.export(layer, (randn(2, 5, 16, seed=0),))
