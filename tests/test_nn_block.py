"""TransformerBlock and the feed-forward sublayers against the formulas in plain operations."""

import copy
import functools
import pickle

import pytest
import torch
from block_cases import check_module, eager_attention, eager_norm, randomised, rounded
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.functional import dropout, gelu, linear, relu, silu
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from fastattn import nn
from fastattn.functional import cu_seqlens_from_lengths
from fastattn.testing import DTYPES, covering_sample, randn

ACTIVATIONS = {
    "relu": relu,
    "gelu": gelu,
    "gelu_tanh": functools.partial(gelu, approximate="tanh"),
    "silu": silu,
}


def eager_feed_forward(m, x):
    act = ACTIVATIONS.get(m.activation, m.activation) if isinstance(m.activation, str) else None
    act = m.activation if act is None else act

    def project(projection, rows):
        return rounded(linear(rows, projection.weight, projection.bias))

    hidden = project(m.up_proj, x)
    if isinstance(m, nn.GatedFeedForward):
        return project(m.down_proj, rounded(act(project(m.gate_proj, x))) * hidden)
    return project(m.down_proj, act(hidden))


def eager_block(m, x, context=None, context_mask=None, context_lengths=None, **own):
    def cross(rows):
        options = {"mask": context_mask, "key_lengths": context_lengths}
        return eager_attention(m.cross_attention, rows, context, **options)

    steps = [("attention", lambda rows: eager_attention(m.attention, rows, **own))]
    if m.cross_attention is not None:
        steps.append(("cross_attention", cross))
    steps.append(("feed_forward", lambda rows: eager_feed_forward(m.feed_forward, rows)))
    if m.placement == "parallel":
        n = eager_norm(m.attention_norm, x)
        return x + steps[0][1](n) + steps[1][1](n)
    for name, sublayer in steps:
        before, behind = getattr(m, f"{name}_norm"), getattr(m, f"{name}_out_norm")
        if m.placement == "post":
            x = eager_norm(before, rounded(x + sublayer(x)))
        else:
            x = rounded(x + eager_norm(behind, sublayer(eager_norm(before, x))))
    return x


NORMS = {
    "default": None,
    "layer": nn.LayerNorm,
    "gemma": functools.partial(nn.RMSNorm, eps=1e-6, casting="gemma"),
    "torch": torch.nn.LayerNorm,
}
AXES = {
    "dtype": DTYPES,
    "placement": ("pre", "post", "sandwich", "inner", "parallel"),
    "norm": tuple(NORMS),
    "cross": (None, "plain", "mask", "lengths"),
    "feed_forward": ("plain", "gated"),
    "activation": tuple(ACTIVATIONS),
    "bias": (False, True),
    "length": (1, 6, 33),
}


def make(case, **more):
    case = {"cross": None, "norm": "default", "bias": False, "dtype": torch.float32} | case
    feed_forward = nn.GatedFeedForward if case.get("feed_forward") == "gated" else nn.FeedForward
    cross = None
    if case["cross"] is not None:
        cross = nn.Attention(24, 2, context_dim=20, bias=case["bias"])
    block = nn.TransformerBlock(
        nn.Attention(24, 4, num_kv_heads=2, causal=True, rope=nn.RotaryEmbedding(6, 64)),
        feed_forward(24, 40, activation=case.get("activation", "silu"), bias=case["bias"]),
        cross_attention=cross,
        norm=NORMS[case["norm"]],
        placement=case.get("placement", "pre"),
        **more,
    )
    return randomised(block, dtype=case["dtype"])


def fits(case):
    return case["placement"] != "parallel" or case["cross"] is None


def block_inputs(case):
    inputs = {"x": randn(2, case["length"], 24, seed=1, dtype=case["dtype"])}
    if case["cross"] is not None:
        inputs["context"] = randn(2, 7, 20, seed=2, dtype=case["dtype"])
    if case["cross"] == "mask":
        inputs["context_mask"] = randn(2, 1, case["length"], 7, seed=3) < 0.7
    if case["cross"] == "lengths":
        inputs["context_lengths"] = torch.tensor([7, 4])
    return inputs


@pytest.mark.parametrize("part", range(6))
def test_every_placement_forward_and_backward(level, part):
    for case in covering_sample(AXES, 60, 0, fits)[part::6]:
        check_module(make(case), eager_block, block_inputs(case), what=case)


def test_feed_forward_activations(level):
    callables = (torch.nn.SiLU(), torch.nn.GELU("tanh"), relu, torch.tanh, torch.nn.Mish())
    for kind in (nn.FeedForward, nn.GatedFeedForward):
        for activation in (*ACTIVATIONS, *callables):
            for dtype in DTYPES:
                for bias in (False, True):
                    module = kind(24, 40, activation=activation, bias=bias)
                    inputs = {"x": randn(3, 5, 24, seed=1, dtype=dtype)}
                    module = randomised(module, dtype=dtype)
                    check_module(module, eager_feed_forward, inputs, what=(kind, activation))


class Ops(TorchDispatchMode):
    """How often each op ran."""

    def __init__(self):
        super().__init__()
        self.counts = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = str(function).split(".")[1]
        self.counts[name] = self.counts.get(name, 0) + 1
        return function(*args, **kwargs or {})


def watch(modules):
    """A list that grows with each call of one of the modules."""
    seen = []
    for module in modules:
        module.register_forward_hook(lambda *_: seen.append(1))
    return seen


@pytest.mark.parametrize("placement, adds", [("pre", 1), ("post", 0), ("sandwich", 1)])
def test_residual_addition_and_the_next_norm_are_one_pass(placement, adds):
    x, context = randn(2, 5, 24, seed=0), randn(2, 7, 20, seed=1)
    for norm in ("default", "layer", "gemma"):
        block = make({"placement": placement, "cross": "plain", "norm": norm})
        with Ops() as ops, torch.no_grad():
            block(x, context)
        assert ops.counts.get("add", 0) == adds, norm
        want = block(x, context)
        norms = [m for m in block.modules() if isinstance(m, torch.nn.RMSNorm | torch.nn.LayerNorm)]
        seen = watch(norms)  # whoever watches a norm sees it called
        torch.testing.assert_close(block(x, context), want)
        assert len(seen) == len(norms) == (6 if placement == "sandwich" else 3)


def test_the_feed_forwards_call_what_wraps_their_projections():
    x = randn(2, 5, 24, seed=0)
    for kind in (nn.FeedForward, nn.GatedFeedForward):
        module = randomised(kind(24, 40, bias=True))
        want = module(x)
        seen = watch([module.up_proj, module.down_proj])
        torch.testing.assert_close(module(x), want)
        assert len(seen) == 2
        module.up_proj.register_forward_hook(lambda *arguments: arguments[2] * 0)
        torch.testing.assert_close(module(x[:, :0]), want[:, :0])
        assert not torch.allclose(module(x), want)


def test_dropout_of_each_sublayer():
    x, context = randn(2, 5, 24, seed=0), randn(2, 7, 20, seed=1)
    for placement in ("pre", "post", "sandwich", "inner", "parallel"):
        cross = None if placement == "parallel" else "plain"
        block = make({"placement": placement, "cross": cross}, dropout=1.0)
        given = (x,) if cross is None else (x, context)
        want = x
        if placement == "post":
            for norm in (block.attention_norm, block.cross_attention_norm, block.feed_forward_norm):
                want = norm(want)
        torch.testing.assert_close(block.train()(*given), want)
        block.dropout.p = 0.3
        outs = []
        for run in (block, functools.partial(checkpoint, block, use_reentrant=False)):
            torch.manual_seed(4)
            outs.append(run(*given))
        assert torch.equal(*outs) and not torch.equal(block(*given), outs[0])
        block.eval()
        assert torch.equal(block(*given), block(*given))


def test_dropout_between_the_projections():
    x = torch.ones(400, 8)
    for kind in (nn.FeedForward, nn.GatedFeedForward):
        module = kind(8, 64, dropout=0.5, bias=False)
        torch.manual_seed(1)
        got = module(x)
        hidden = module.eval()._hidden(x)
        torch.manual_seed(1)
        torch.testing.assert_close(got, module.down_proj(dropout(hidden, 0.5)))


def test_nested_and_packed_rows_are_the_sequences_one_by_one():
    counts, context_counts = (5, 1, 9), (3, 2, 7)
    x, context = randn(15, 24, seed=0), randn(12, 20, seed=1)
    parts = list(zip(x.split(counts), context.split(context_counts), strict=True))
    bounds = cu_seqlens_from_lengths(torch.tensor(counts))
    context_bounds = cu_seqlens_from_lengths(torch.tensor(context_counts))
    for placement in ("pre", "post", "sandwich", "inner", "parallel"):
        cross = None if placement == "parallel" else "plain"
        block = make({"placement": placement, "cross": cross})
        want = torch.cat([block(a[None], b[None] if cross else None)[0] for a, b in parts])
        nested, nested_context = (
            torch.nested.as_nested_tensor(list(p), layout=torch.jagged) for p in zip(*parts)
        )
        out = block(nested, nested_context if cross else None)
        assert out.is_nested and out.layout == torch.jagged
        torch.testing.assert_close(out.values(), want)
        more = {"context_cu_seqlens": context_bounds} if cross else {}
        out = block(x, context if cross else None, cu_seqlens=bounds, **more)
        torch.testing.assert_close(out, want)


@torch.no_grad()
def test_a_decoder_with_both_caches_is_the_whole():
    x, context = randn(2, 9, 24, seed=0), randn(2, 7, 20, seed=1)
    lengths = torch.tensor([7, 4])
    for placement in ("pre", "post", "sandwich"):
        block = make({"placement": placement, "cross": "plain"}).eval()
        want = block(x, context, context_lengths=lengths)
        cache = nn.KVCache(3, 2, kv_heads=2, capacity=16, head_dim=6)
        crossed = nn.PagedKVCache(3, 2, kv_heads=2, capacity=16, head_dim=12)
        options = {"cache": cache, "cross_cache": crossed, "layer": 2}
        out = [block(x[:, :4], context, context_lengths=lengths, **options)]
        crossed.advance(lengths)
        cache.advance(4)
        for t in range(4, 9):
            out.append(block(x[:, t : t + 1], **options))
            cache.advance(1)
        torch.testing.assert_close(torch.cat(out, dim=1), want)


def test_compiled_in_one_graph():
    torch._dynamo.reset()
    x, context = randn(2, 5, 24, seed=0), randn(2, 7, 20, seed=1)
    for placement in ("pre", "parallel"):
        cross = None if placement == "parallel" else "plain"
        block = make({"placement": placement, "cross": cross})
        given = (x,) if cross is None else (x, context)
        counter = CompileCounterWithBackend("aot_eager")
        compiled = torch.compile(block, backend=counter, fullgraph=True)
        torch.testing.assert_close(compiled(*given), block(*given))
        compiled(*given).sum().backward()
        assert counter.frame_count == 1


def test_autocast_adds_in_the_dtype_of_the_residual():
    x, context = randn(2, 5, 24, seed=0), randn(2, 7, 20, seed=1)
    for placement in ("pre", "post", "sandwich"):
        block = make({"placement": placement, "cross": "plain"})
        with torch.autocast("cpu", torch.bfloat16):
            out = block(x, context)
        assert out.dtype == torch.float32
        torch.testing.assert_close(out, block(x, context), atol=0.1, rtol=0.1)


def test_copies_pickles_state_and_meta():
    x = randn(2, 5, 24, seed=0)
    block = make({"placement": "sandwich"})
    assert torch.equal(copy.deepcopy(block)(x), block(x))
    assert torch.equal(pickle.loads(pickle.dumps(block))(x), block(x))
    with torch.device("meta"):
        empty = make({"placement": "sandwich"}).to("meta")
    assert all(p.is_meta for p in empty.parameters())
    filled = empty.to_empty(device="cpu")
    filled.load_state_dict(block.state_dict())
    assert torch.equal(filled(x), block(x))


def test_any_module_with_an_embed_dim_may_attend():
    block = nn.TransformerBlock(nn.RelativeAttention(24, 4), nn.FeedForward(24, 40))
    x = randn(2, 5, 24, seed=0)
    n = block.attention_norm(x)
    want = x + block.attention(n)
    want = want + block.feed_forward(block.feed_forward_norm(want))
    torch.testing.assert_close(block(x), want)


def test_repr():
    assert make({}).extra_repr() == "placement='pre'"
    assert nn.FeedForward(4, 8, activation="relu").extra_repr() == "activation='relu'"


def test_bad_input_is_refused_by_name():
    x = randn(2, 5, 24, seed=0)
    attention, feed_forward = nn.Attention(24, 4), nn.FeedForward(24, 40)
    nested = torch.nested.as_nested_tensor([x[0], x[1, :2]], layout=torch.jagged)
    strided = torch.nested.nested_tensor([x[0], x[1, :2]], layout=torch.strided)
    block, crossing = make({}), make({"cross": "plain"})
    for name, error, function in (
        ("placement", ValueError, lambda: nn.TransformerBlock(attention, None, placement="side")),
        (
            "cross_attention",
            ValueError,
            lambda: nn.TransformerBlock(
                attention, feed_forward, cross_attention=attention, placement="parallel"
            ),
        ),
        ("context", ValueError, lambda: crossing(x)),
        ("context", ValueError, lambda: block(x, x)),
        ("mask", ValueError, lambda: block(nested, mask=x > 0)),
        ("context", ValueError, lambda: crossing(nested, x)),
        (
            "cross_cache",
            ValueError,
            lambda: crossing(nested, cross_cache=nn.KVCache(1, 2, 2, 8, 12)),
        ),
        ("context_mask", ValueError, lambda: crossing(nested, nested, context_mask=x > 0)),
        ("x", TypeError, lambda: block(strided)),
        ("x", ValueError, lambda: feed_forward(x[..., :3])),
        ("hidden_dim", ValueError, lambda: nn.FeedForward(24, 0)),
        ("activation", ValueError, lambda: nn.FeedForward(24, 40, activation="swish")),
        ("activation", ValueError, lambda: nn.GatedFeedForward(24, 40, activation="swish")),
    ):
        with pytest.raises(error, match=rf"^{name}: expected"):
            function()
