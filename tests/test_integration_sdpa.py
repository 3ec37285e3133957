"""The switch from torch's attention function to fastattn and back: what it reaches, and how."""

import doctest
import threading

import pytest
import torch
import torch.nn.functional as F
from test_attention_sdpa import CALLS
from torch import nn
from torch.nn.attention import SDPBackend, bias, sdpa_kernel

from fastattn.integrations import sdpa
from fastattn.testing import assert_accurate, randn

TORCHS_OWN = F.scaled_dot_product_attention


@pytest.fixture(autouse=True)
def torchs_own_afterwards():
    sdpa.calls(reset=True)
    yield
    was_left = F.scaled_dot_product_attention is TORCHS_OWN and not sdpa.is_enabled()
    sdpa.disable()
    F.scaled_dot_product_attention = TORCHS_OWN
    assert was_left


def qkv(*shape, dtype=torch.float32, **options):
    return [randn(*shape, seed=i, dtype=dtype).requires_grad_(**options) for i in range(3)]


def attend(q, k=None, v=None, **options):
    return F.scaled_dot_product_attention(
        q, q if k is None else k, q if v is None else v, **options
    )


def is_routed():
    before = sdpa.calls().fastattn
    attend(torch.zeros(1, 1, 2, 8))
    return sdpa.calls().fastattn > before


def assert_same(call, module, inputs, calls, name):
    """Output and gradients of all parameters, routed, against torch's in float64; ``calls`` of
    attention go to fastattn."""

    def results(module, inputs):
        module.zero_grad()
        out = call(module, *inputs)
        out.backward(randn(*out.shape, seed=99, dtype=torch.bfloat16).to(out.dtype))
        gradients = {n: p.grad.clone() for n, p in module.named_parameters() if p.grad is not None}
        return {"out": out.detach()} | gradients

    eager = results(module, inputs)
    with sdpa.use():
        got = results(module, inputs)
    assert sdpa.calls() == sdpa.Calls(fastattn=calls, torch={})
    double = [x.double() if x.is_floating_point() else x for x in inputs]
    oracle = results(module.double(), double)
    assert got.keys() == oracle.keys()
    # The gradient of key biases is 0 but for rounding; that of its neighbours is the measure.
    largest = max(x.abs().max().item() for x in oracle.values())
    for n, x in got.items():
        assert_accurate(x, oracle[n], eager[n], f"{name}: {n}", magnitude=largest)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("call", CALLS)
def test_results_and_gradients_are_those_of_torch(call, dtype):
    query_shape, key_shape, options = CALLS[call]
    shapes = (query_shape, key_shape, key_shape)
    tensors = [randn(*shape, seed=i, dtype=dtype) for i, shape in enumerate(shapes)]

    def results(convert):
        leaves = [convert(x).detach().requires_grad_() for x in tensors]
        chosen = dict(options)
        mask = options.get("attn_mask")
        if mask is not None and mask.is_floating_point():
            leaves.append(convert(mask.to(dtype)).detach().requires_grad_())
            chosen["attn_mask"] = leaves[-1]
        out = F.scaled_dot_product_attention(*leaves[:3], **chosen)
        dout = randn(*out.shape, seed=9, dtype=torch.bfloat16).to(out.dtype)
        return out, *torch.autograd.grad(out, leaves, dout)

    oracle, eager = results(torch.Tensor.double), results(lambda x: x)
    with sdpa.use():
        got = results(lambda x: x)
    assert sdpa.calls() == sdpa.Calls(fastattn=1, torch={})
    for name, *three in zip(("out", "dq", "dk", "dv", "dmask"), got, oracle, eager):
        assert_accurate(*three, f"{call}: {name}", magnitude=4.0)


@pytest.mark.parametrize("mask", [None, "padding", "causal"])
def test_multihead_attention_reaches_it(mask):
    torch.manual_seed(0)
    options = {
        None: {},
        "padding": {"key_padding_mask": torch.arange(7).expand(2, 7) >= torch.tensor([[7], [4]])},
        "causal": {"attn_mask": torch.ones(7, 7).triu(1).bool(), "is_causal": True},
    }[mask]

    def call(module, x):
        return module(x, x, x, need_weights=False, **options)[0]

    module = nn.MultiheadAttention(16, 4, batch_first=True)
    assert_same(call, module, [randn(2, 7, 16, seed=1)], 1, f"MultiheadAttention, {mask}")


def test_encoder_layers_reach_it_in_training():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 4, 24, dropout=0.0, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 2)
    assert_same(lambda m, x: m(x), encoder, [randn(2, 7, 16, seed=1)], 2, "TransformerEncoder")


def test_the_fast_path_of_torch_does_not_reach_it_and_can_be_turned_off():
    layer = nn.TransformerEncoderLayer(16, 4, 24, batch_first=True).eval()
    x = randn(2, 7, 16, seed=1)
    with sdpa.use(), torch.no_grad():
        layer(x)
        assert sdpa.calls().fastattn == 0
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            layer(x)
        finally:
            torch.backends.mha.set_fastpath_enabled(True)
        assert sdpa.calls().fastattn == 1


def test_bert_reaches_it():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        vocab_size=60,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        attn_implementation="sdpa",
    )
    model = transformers.BertModel(config, add_pooling_layer=False)
    tokens = torch.randint(60, (2, 9), generator=torch.Generator().manual_seed(1))
    padding = (torch.arange(9) < torch.tensor([[9], [6]])).long()

    def call(module, tokens, padding):
        out = module(input_ids=tokens, attention_mask=padding).last_hidden_state
        return out * padding.unsqueeze(-1)

    assert_same(call, model, [tokens, padding], 2, "BERT")


def test_enable_and_disable_are_idempotent():
    sdpa.disable()
    assert not is_routed()
    sdpa.enable()
    sdpa.enable()
    assert sdpa.is_enabled() and is_routed()
    sdpa.disable()
    sdpa.disable()
    assert F.scaled_dot_product_attention is TORCHS_OWN and not is_routed()


def test_blocks_nest_and_the_innermost_holds():
    wide = torch.zeros(1, 1, 2, 600)
    with sdpa.use("torch"):
        with (
            sdpa.use("error"),
            pytest.raises(ValueError, match="head_dim of 1 to 512 on cpu, got 600"),
        ):
            attend(wide)
        assert attend(wide).shape == wide.shape
        assert is_routed()
    assert not is_routed()


def test_a_block_inside_enable_leaves_it_enabled():
    wide = torch.zeros(1, 1, 2, 600)
    sdpa.enable()
    with sdpa.use("torch"):
        attend(wide)
        sdpa.enable()  # a block goes before
        attend(wide)
    with pytest.raises(ValueError, match="head_dim"):
        attend(wide)
    assert is_routed()
    with sdpa.use():
        sdpa.disable()
        assert is_routed()
    assert not is_routed()


def test_an_exception_ends_a_block():
    with pytest.raises(ZeroDivisionError), sdpa.use():
        raise ZeroDivisionError
    assert not is_routed()


def test_as_a_decorator_it_covers_a_function():
    @sdpa.use()
    def function():
        return is_routed()

    assert function() and function() and not is_routed()


def test_blocks_of_threads_may_overlap_in_any_order():
    first_is_in, second_is_in, first_is_out = (threading.Event() for _ in range(3))
    routed = {}

    def first():
        with sdpa.use():
            first_is_in.set()
            assert second_is_in.wait(10)
        first_is_out.set()

    def second():
        assert first_is_in.wait(10)
        routed["by the block of another thread"] = is_routed()
        with sdpa.use():
            second_is_in.set()
            assert first_is_out.wait(10)
            routed["after the first block has ended"] = is_routed()

    threads = [threading.Thread(target=t) for t in (first, second)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert list(routed.values()) == [True, True] and len(routed) == 2
    assert not is_routed()


def test_many_threads_leave_it_as_it_was_and_lose_no_count():
    q = torch.zeros(1, 1, 2, 8)

    def work():
        for _ in range(50):
            with sdpa.use():
                attend(q)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sdpa.calls().fastattn == 200


def test_the_name_imported_before_is_torchs_and_after_follows_the_switch():
    with sdpa.use():
        from torch.nn.functional import scaled_dot_product_attention as imported
    q = torch.zeros(1, 1, 2, 8)
    with sdpa.use():
        TORCHS_OWN(q, q, q)
        assert sdpa.calls().fastattn == 0
        imported(q, q, q)
        assert sdpa.calls().fastattn == 1
    imported(q, q, q)
    assert sdpa.calls().fastattn == 1


def test_who_replaces_the_function_meanwhile_keeps_theirs():
    sdpa.enable()
    ours = F.scaled_dot_product_attention

    def theirs(*args, **kwargs):
        return ours(*args, **kwargs)

    F.scaled_dot_product_attention = theirs
    assert is_routed()
    sdpa.disable()
    assert F.scaled_dot_product_attention is theirs and not is_routed()
    with sdpa.use("torch"):  # theirs is set aside
        assert attend(torch.zeros(1, 1, 2, 600)).shape[-1] == 600
        assert is_routed()
    assert F.scaled_dot_product_attention is theirs
    F.scaled_dot_product_attention = TORCHS_OWN


def nested():
    return torch.nested.nested_tensor(
        [randn(2, n, 8, seed=n) for n in (3, 5)], layout=torch.strided
    )


OUTSIDE = {
    "nested": (nested, "dense tensor, got a nested one"),
    "wide heads": (lambda: randn(1, 1, 2, 513, seed=0), "head_dim of 1 to 512 on cpu, got 513"),
    "no width": (lambda: randn(1, 1, 2, 0, seed=0), "head_dim of 1 to 512 on cpu, got 0"),
    "complex": (lambda: randn(1, 1, 2, 8, seed=0).to(torch.complex64), "dtype float32.*complex64"),
    "integers": (lambda: torch.ones(1, 1, 2, 8, dtype=torch.int64), "dtype float32.*int64"),
    "sparse": (lambda: randn(4, 8, seed=0).to_sparse(), "dense tensor, got layout torch.sparse"),
    "mkldnn": (lambda: randn(4, 8, seed=0).to_mkldnn(), "dense tensor, got layout torch._mkldnn"),
}


@pytest.mark.parametrize("case", OUTSIDE)
def test_what_has_no_kernel_raises_or_goes_to_torch_with_a_reason(case):
    make, message = OUTSIDE[case]
    x = make()
    with sdpa.use(), pytest.raises((TypeError, ValueError), match=f"query.*{message}.*fallback"):
        attend(x)
    assert sdpa.calls() == sdpa.Calls(fastattn=0, torch={})

    def outcome():
        try:
            out = attend(x)
            return out.unbind()[0] if out.is_nested else out
        except (RuntimeError, NotImplementedError) as error:
            return str(error).split("\n")[0]

    want = outcome()
    with sdpa.use("torch"):
        got = outcome()
    ((reason, count),) = sdpa.calls().torch.items()
    assert count == 1 and reason.startswith("query") and f"1: {reason}" in str(sdpa.calls())
    assert torch.equal(got, want) if isinstance(want, torch.Tensor) else got == want


def test_what_a_device_lacks_is_told_from_tensors_without_data():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(allow_non_fake_inputs=True):
        elsewhere = torch.empty(1, 1, 2, 8, device="xpu")
        on_cuda = torch.empty(1, 1, 2, 8, device="cuda")
    assert "on the CPU or CUDA, got one on xpu" in sdpa._obstacle(*(elsewhere,) * 3)
    if not sdpa._C.built_with_cuda:
        assert "on the CPU, for which alone this build" in sdpa._obstacle(*(on_cuda,) * 3)


def test_meta_tensors_give_shapes():
    q = torch.empty(2, 3, 5, 8, device="meta")
    with sdpa.use():
        assert attend(q, is_causal=True).shape == q.shape
    assert sdpa.calls().fastattn == 1


def test_forward_mode_goes_to_torch():
    q, tangent = randn(1, 2, 5, 8, seed=0), randn(1, 2, 5, 8, seed=1)

    def jvp():
        with sdpa_kernel(SDPBackend.MATH):
            return torch.func.jvp(attend, (q,), (tangent,))[1]

    want = jvp()
    with sdpa.use("torch"):
        assert torch.equal(jvp(), want)
    assert list(sdpa.calls().torch) == [
        "query: expected a tensor without forward-mode tangent, got one with it"
    ]
    with sdpa.use(), pytest.raises(ValueError, match="forward-mode"):
        jvp()


def test_wrong_arguments_raise_with_either_fallback():
    q = torch.zeros(1, 2, 5, 8)
    for fallback in ("error", "torch"):
        with sdpa.use(fallback):
            with pytest.raises(ValueError, match="attn_mask: expected None when is_causal"):
                attend(q, attn_mask=torch.zeros(5, 5), is_causal=True)
            with pytest.raises(TypeError, match="query: expected a tensor, got list"):
                attend([1.0])
            with pytest.raises(TypeError, match="key"):
                attend(q, q.double())
    assert not sdpa.calls().torch


def test_a_tensor_subclass_is_asked():
    asked = []

    class Asked(torch.Tensor):
        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            asked.append(func)
            return super().__torch_function__(func, types, args, kwargs or {})

    q = randn(1, 2, 5, 8, seed=0)
    with sdpa.use():
        out = attend(q.as_subclass(Asked))
        assert F.scaled_dot_product_attention in asked
        assert type(out) is Asked and sdpa.calls().fastattn == 1
        assert torch.equal(out.as_subclass(torch.Tensor), attend(q))


@pytest.mark.parametrize("make", [bias.causal_upper_left, bias.causal_lower_right])
def test_causal_biases_of_torch_mean_the_same(make):
    q, k = randn(1, 2, 5, 8, seed=0), randn(1, 2, 7, 8, seed=1)
    want = attend(q, k, k, attn_mask=make(5, 7))
    with sdpa.use():
        torch.testing.assert_close(attend(q, k, k, attn_mask=make(5, 7)), want)


def test_a_default_device_does_not_keep_calls_from_it():
    with sdpa.use(), torch.device("meta"):
        assert attend(torch.zeros(1, 1, 2, 8, device="cpu")).device.type == "cpu"
    assert sdpa.calls().fastattn == 1


def test_compiled_code_has_our_op_and_follows_the_switch():
    graphs = []

    def backend(graph, _):
        graphs.append([str(n.target) for n in graph.graph.nodes])
        return graph

    def function(q):
        return attend(q, is_causal=True)

    torch._dynamo.reset()
    compiled = torch.compile(function, backend=backend, fullgraph=True)
    q = randn(1, 2, 5, 8, seed=0)
    want = compiled(q)
    assert not any("fastattn" in target for target in graphs[-1])
    with sdpa.use():
        for _ in range(3):
            torch.testing.assert_close(compiled(q), want)
        assert any("fastattn" in target for target in graphs[-1])
        assert len(graphs) == 2  # counting recompiles nothing
        assert sdpa.calls().fastattn == 1
    compiled(q)
    assert len(graphs) == 2


def test_compiled_code_tells_what_went_to_torch():
    torch._dynamo.reset()
    compiled = torch.compile(attend, backend="eager", fullgraph=True)
    with sdpa.use("torch"):
        compiled(randn(1, 1, 2, 600, seed=0))
    (reason,) = sdpa.calls().torch
    assert "got 600" in reason


def test_compiled_gradients_are_those_of_eager():
    torch._dynamo.reset()
    layer = nn.TransformerEncoderLayer(16, 4, 24, dropout=0.0, batch_first=True)
    x = randn(2, 7, 16, seed=0)

    def gradients(call):
        layer.zero_grad()
        call(x).square().sum().backward()
        return [p.grad.clone() for p in layer.parameters()]

    with sdpa.use():
        want = gradients(layer)
        got = gradients(torch.compile(layer, backend="aot_eager", fullgraph=True))
    assert sdpa.calls().fastattn >= 2  # tracing may start over
    torch.testing.assert_close(got, want)


def test_exported_programs_have_our_op():
    module = nn.TransformerEncoderLayer(16, 4, 24, dropout=0.0, batch_first=True)
    x = randn(2, 7, 16, seed=0)
    with sdpa.use():
        program = torch.export.export(module, (x,))
    graphs = (m for m in program.graph_module.modules() if isinstance(m, torch.fx.GraphModule))
    assert any("fastattn.attention" in str(n.target) for g in graphs for n in g.graph.nodes)
    torch.testing.assert_close(program.module()(x), module(x))


def test_traced_functions_have_our_op():
    q = randn(1, 2, 5, 8, seed=0)
    with sdpa.use(), pytest.warns(torch.jit.TracerWarning):
        traced = torch.jit.trace(attend, (q,))
    assert "fastattn::attention" in str(traced.graph)
    torch.testing.assert_close(traced(q), attend(q))


def test_the_fallback_is_checked():
    for wrong, error in (("math", ValueError), (None, TypeError)):
        with pytest.raises(error, match="fallback: expected 'error' or 'torch'"):
            sdpa.enable(wrong)
        with pytest.raises(error, match="fallback"), sdpa.use(wrong):
            pass
    assert not is_routed()


def test_counts_begin_anew_after_a_reset():
    with sdpa.use():
        is_routed()
    assert sdpa.calls(reset=True) == sdpa.Calls(fastattn=1, torch={})
    assert str(sdpa.calls()) == "0 to fastattn\n0 to torch"


def test_the_examples_of_the_docstrings_run():
    results = doctest.testmod(sdpa, extraglobs={"torch": torch})
    assert results.attempted > 0 and results.failed == 0
