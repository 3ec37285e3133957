"""Attention inside of torch: opcheck, compilation, autocast, checkpoints, FLOPs, profiler."""

import shutil

import pytest
import torch
from attention_options import with_features
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import fastattn.functional as fa
from fastattn.testing import attention_inputs, randn


class Recorder(TorchDispatchMode):
    """Keeps every call of an op of ours, with its arguments."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "fastattn":
            self.calls.append((function, args, kwargs or {}))
        return function(*args, **(kwargs or {}))


def dense():
    inputs, options = with_features(
        ["bias", "sink", "mask", "key_lengths", "alibi", "softcap", "causal"],
        attention_inputs(queries=5, keys=7, heads=4, kv_heads=2),
    )
    leaves = {n: x.requires_grad_() for n, x in inputs.items()}
    out, lse = fa.attention(**leaves, **options, dropout_p=0.2, return_lse=True)
    (out.sum() + lse.sum()).backward()


def plain():
    tensors = attention_inputs(queries=5, keys=7, heads=4, kv_heads=2, layout="bshd").values()
    fa.attention(*tensors, causal=True, layout="bshd")


def packed():
    query, key, value = (randn(12, 2, 8, seed=s).requires_grad_() for s in (1, 2, 3))
    bounds = torch.tensor([0, 5, 9], dtype=torch.int32)
    fa.attention_varlen(query, key, value, bounds, bounds, causal=True).sum().backward()


def weights():
    query, key, value = attention_inputs(queries=5, keys=7).values()
    _, lse = fa.attention(query, key, value, return_lse=True)
    fa.attention_weights(query, key, lse, rows=[0, 3])
    fa.attention_column_sums(query, key, lse)


@pytest.mark.parametrize("run", [dense, plain, packed, weights], ids=lambda run: run.__name__)
def test_every_op_passes_opcheck(run):
    with Recorder() as recorder:
        run()
    assert recorder.calls
    for function, args, kwargs in recorder.calls:
        detached = [x.detach() if isinstance(x, torch.Tensor) else x for x in args]
        named = {n: x.detach() if isinstance(x, torch.Tensor) else x for n, x in kwargs.items()}
        torch.library.opcheck(function, tuple(detached), named)


def test_the_recorded_runs_cover_every_op():
    with Recorder() as recorder:
        for run in (dense, plain, packed, weights):
            run()
    names = {str(function) for function, _, _ in recorder.calls}
    ops = {f"fastattn.{name}.default" for name in OPS}
    assert ops <= names


OPS = (
    "attention_plain",
    "attention_forward",
    "attention_backward",
    "attention_weights",
    "attention_column_sums",
)


def training_step(query, key, value, bias, sink):
    out, lse = fa.attention(
        query * 1.5, key, value, bias=bias, sink=sink, causal=True, softcap=9.0, return_lse=True
    )
    return out.relu().square().sum() + lse.sum()


def test_one_graph_serves_all_lengths_and_gives_the_results_of_eager():
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(training_step, backend=counter, fullgraph=True, dynamic=True)
    for length in range(3, 23):
        inputs = attention_inputs(queries=length, keys=length + 4, heads=4, kv_heads=2)
        tensors = [*inputs.values(), randn(4, length, length + 4, seed=5), randn(4, seed=6)]
        grads = []
        for step in (training_step, compiled):
            leaves = [x.detach().requires_grad_() for x in tensors]
            grads.append(torch.autograd.grad(step(*leaves), leaves))
        assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
    assert counter.frame_count <= 2


@pytest.mark.parametrize("name", ["varlen", "sdpa", "weights", "merge", "lengths", "dropout"])
def test_every_function_compiles_to_one_graph(name):
    query, key, value = attention_inputs(batch=(2,), queries=6, heads=2).values()
    bounds = torch.tensor([0, 2, 6], dtype=torch.int32)
    lengths = torch.tensor([6, 3])

    def varlen():
        rows = (x[0].transpose(0, 1) for x in (query, key, value))
        return fa.attention_varlen(*rows, bounds, bounds, causal=True, window=(2, 0))

    def sdpa():
        return fa.scaled_dot_product_attention(query, key, value, query[0, 0, :, :6] > 0)

    def weights():
        _, lse = fa.attention(query, key, value, return_lse=True)
        return fa.attention_weights(query, key, lse, rows=[1, 2]), fa.attention_column_sums(
            query, key, lse
        )

    def merge():
        part = fa.attention(query, key, value, return_lse=True)
        return fa.merge_attention(*part, *part)

    def lengths_and_slopes():
        return fa.attention(
            query, key, value, key_lengths=lengths, query_lengths=lengths, alibi_slopes=slopes
        )

    def dropout():
        torch.manual_seed(1)
        return fa.attention(query, key, value, dropout_p=0.5)

    slopes = torch.tensor([0.5, 0.25])
    functions = (varlen, sdpa, weights, merge, lengths_and_slopes, dropout)
    function = next(f for f in functions if f.__name__.startswith(name))
    torch._dynamo.reset()
    if name == "dropout":
        compiled = torch.compile(
            lambda: fa.attention(query, key, value, dropout_p=0.5),
            backend="aot_eager",
            fullgraph=True,
        )
        assert not torch.equal(compiled(), compiled())
    else:
        compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(), function(), rtol=0, atol=0)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
def test_inductor_gives_the_results_of_eager():
    torch._dynamo.reset()
    inputs = attention_inputs(queries=9, keys=12, heads=4, kv_heads=2)
    tensors = [*inputs.values(), randn(4, 9, 12, seed=5), randn(4, seed=6)]
    grads = []
    for step in (training_step, torch.compile(training_step, fullgraph=True)):
        leaves = [x.detach().requires_grad_() for x in tensors]
        grads.append(torch.autograd.grad(step(*leaves), leaves))
    torch.testing.assert_close(*grads)


def test_autocast_casts_as_it_does_for_sdpa():
    query, key, value = attention_inputs(queries=6).values()
    leaves = [query.requires_grad_(), key.bfloat16().requires_grad_(), value.requires_grad_()]
    with torch.autocast("cpu", torch.bfloat16):
        out, lse = fa.attention(*leaves, sink=torch.zeros(2), return_lse=True)
        rows = [x[0].transpose(0, 1) for x in leaves]
        bounds = torch.tensor([0, 6])
        varlen = fa.attention_varlen(*rows, bounds, bounds)
        sdpa = fa.scaled_dot_product_attention(query, value, value)
        weights = fa.attention_weights(query, leaves[1], lse)
    assert out.dtype == varlen.dtype == sdpa.dtype == torch.bfloat16
    assert lse.dtype == weights.dtype == torch.float32
    low = (x.detach().bfloat16() for x in leaves)
    want = fa.attention(*low, sink=torch.zeros(2), batch_invariant=True)  # as training computes
    assert torch.equal(out, want)
    out.sum().backward()
    assert [x.grad.dtype for x in leaves] == [x.dtype for x in leaves]


def test_mixed_dtypes_are_refused_without_autocast():
    query, key, value = attention_inputs(queries=6).values()
    with pytest.raises(TypeError, match="key"):
        fa.attention(query, key.bfloat16(), value)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoints_give_the_same_gradients(use_reentrant):
    inputs = attention_inputs(queries=12, heads=4, kv_heads=2)
    grads = []
    for wrap in (False, True):
        leaves = [x.detach().requires_grad_() for x in inputs.values()]

        def block(q, k, v):
            return fa.attention(q.tanh(), k, v, causal=True).sin()

        out = checkpoint(block, *leaves, use_reentrant=use_reentrant) if wrap else block(*leaves)
        grads.append(torch.autograd.grad(out.sum(), leaves) if not use_reentrant else None)
        if use_reentrant:
            out.sum().backward()
            grads[-1] = [x.grad for x in leaves]
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_a_selective_checkpoint_can_keep_attention():
    from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

    calls = []

    def policy(_context, function, *args, **kwargs):
        calls.append(str(function))
        ours = function.namespace == "fastattn"
        return CheckpointPolicy.MUST_SAVE if ours else CheckpointPolicy.PREFER_RECOMPUTE

    leaves = [x.requires_grad_() for x in attention_inputs(queries=12).values()]
    out = checkpoint(
        lambda *t: fa.attention(*t, causal=True).sin(),
        *leaves,
        use_reentrant=False,
        context_fn=lambda: create_selective_checkpoint_contexts(policy),
    )
    assert any("fastattn" in call for call in calls)
    with Recorder() as recorder:
        out.sum().backward()
    assert [str(f) for f, _, _ in recorder.calls] == ["fastattn.attention_backward.default"]


def test_the_flop_counter_sees_both_passes():
    shape = {"batch": (2,), "heads": 4, "kv_heads": 2, "queries": 6, "keys": 9}
    leaves = attention_inputs(**shape, head_dim=8, head_dim_v=10).values()
    scores = 2 * 4 * 6 * 9
    with FlopCounterMode(display=False) as counter:
        fa.attention(*leaves)
    assert counter.get_total_flops() == 2 * scores * (8 + 10)
    leaves = [x.requires_grad_() for x in leaves]
    with FlopCounterMode(display=False) as counter:
        fa.attention(*leaves, causal=True, return_lse=True)[0].sum().backward()
    assert counter.get_total_flops() == 2 * scores * (8 + 10) + 2 * scores * (3 * 8 + 2 * 10)


def test_the_flop_counter_agrees_with_that_of_torch_for_sdpa():
    query, key, value = attention_inputs(queries=16, heads=4).values()
    totals = []
    for function in (
        fa.scaled_dot_product_attention,
        torch.nn.functional.scaled_dot_product_attention,
    ):
        with FlopCounterMode(display=False) as counter:
            function(query, key, value)
        totals.append(counter.get_total_flops())
    assert totals[0] == 2 * 2 * 4 * 16 * 16 * (16 + 16)
    assert totals[1] in (0, totals[0])


def test_a_second_derivative_raises():
    leaves = [x.requires_grad_() for x in attention_inputs(queries=4).values()]
    out = fa.attention(*leaves)
    (grad,) = torch.autograd.grad(out.square().sum(), leaves[0], create_graph=True)
    with pytest.raises(RuntimeError, match=r"twice|second derivative"):
        grad.sum().backward()


def test_forward_mode_raises():
    query, key, value = attention_inputs(queries=4).values()
    with pytest.raises((RuntimeError, NotImplementedError)):
        torch.func.jvp(lambda q: fa.attention(q, key, value), (query,), (query,))


def test_the_gradient_transform_gives_the_gradient():
    query, key, value = attention_inputs(queries=4).values()
    got = torch.func.grad(lambda q: fa.attention(q, key, value, causal=True).sum())(query)
    leaf = query.detach().requires_grad_()
    (want,) = torch.autograd.grad(fa.attention(leaf, key, value, causal=True).sum(), leaf)
    torch.testing.assert_close(got, want)


def test_the_profiler_names_the_ops():
    leaves = [x.requires_grad_() for x in attention_inputs(queries=4).values()]
    with torch.profiler.profile() as profile:
        fa.attention(*leaves).sum().backward()
    names = {event.key for event in profile.key_averages()}
    assert {"fastattn::attention_forward", "fastattn::attention_backward"} <= names


def test_no_gradient_is_recorded_where_none_is_needed():
    leaves = [x.requires_grad_() for x in attention_inputs(queries=4).values()]
    with torch.no_grad():
        assert not fa.attention(*leaves).requires_grad
    with torch.inference_mode():
        assert fa.attention(*leaves, return_lse=True)[0].shape == (2, 2, 4, 16)
