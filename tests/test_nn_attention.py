"""fastattn.nn.Attention against the formula in plain torch operations."""

import copy
import functools
import pickle

import pytest
import torch
from block_cases import check_module, double, eager_attention, randomised
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from fastattn import nn
from fastattn.functional import cu_seqlens_from_lengths
from fastattn.testing import DTYPES, assert_accurate, covering_sample, randn

POSITIONS = ("none", "rope", "partial", "interleaved", "alibi", "t5")
AXES = {
    "dtype": DTYPES,
    "batch": ((2,), (1,), (3, 2), (2, 1, 3), ()),
    "length": (1, 2, 7, 16, 33, 65),
    "context": (None, None, 5, 40),
    "heads": ((4, 4, 8, 8), (4, 2, 16, 16), (4, 1, 40, 24), (2, 2, 80, 80), (8, 4, 8, 16)),
    "causal": (False, True),
    "window": (None, None, (3, 2), (0, None), (None, 4)),
    "positions": POSITIONS,
    "qk_norm": (None, None, "rms", "layer"),
    "qk_norm_over": ("head", "projection"),
    "softcap": (None, 2.0),
    "sinks": (False, True),
    "gate": (False, False, True),
    "scale": (None, 1.0, 0.2),
    "bias": (False, True, (True, False, True)),
    "out_bias": (None, True, False),
    "call": ("plain", "plain", "mask", "bias", "pair", "key_lengths", "both_lengths", "positions"),
}


def fits(case):
    crossing = case["context"] is not None
    rotary = case["positions"] in ("rope", "partial", "interleaved")
    return not (
        (crossing and (rotary or case["causal"] or case["window"] or case["positions"] == "alibi"))
        or (case["call"] == "positions" and not rotary)
        or (case["qk_norm"] is None and case["qk_norm_over"] == "projection")
        or (case["call"].endswith("lengths") and case["batch"] == ())
    )


def make(case, embed_dim=24, **more):
    heads, kv_heads, head_dim, value_head_dim = case["heads"]
    positions = case["positions"]
    rotary_dim = head_dim // 2 if positions == "partial" else head_dim
    rope, relative = None, None
    if positions in ("rope", "partial", "interleaved"):
        rope = nn.RotaryEmbedding(rotary_dim, 128, interleaved=positions == "interleaved")
    if positions == "t5":
        relative = nn.T5RelativeBias(
            heads, num_buckets=8, max_distance=20, bidirectional=not case["causal"]
        )
    names = ("causal", "window", "qk_norm", "qk_norm_over", "softcap", "sinks", "gate", "scale")
    options = {n: case[n] for n in (*names, "bias", "out_bias") if n in case}
    module = nn.Attention(
        *(embed_dim, heads),
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        value_head_dim=value_head_dim,
        context_dim=None if case.get("context") is None else 20,
        rope=rope,
        alibi=positions == "alibi",
        relative_bias=relative,
        **options | more,
    )
    return randomised(module, dtype=case["dtype"])


def lengths(batch, most, seed):
    drawn = randn(*batch, seed=seed).abs() * most
    return drawn.to(torch.int32).clamp(max=most)


def call_inputs(case):
    batch, length, dtype = case["batch"], case["length"], case["dtype"]
    heads = case["heads"][0]
    keys = case["context"] or length
    inputs = {"x": randn(*batch, length, 24, seed=3, dtype=dtype)}
    if case["context"] is not None:
        inputs["context"] = randn(*batch, keys, 20, seed=4, dtype=dtype)
    call = case["call"]
    if call == "mask":
        inputs["mask"] = randn(*batch, 1, length, keys, seed=5) < 0.7
    elif call == "bias":
        inputs["bias"] = randn(heads, length, keys, seed=6, dtype=dtype)
    elif call == "pair":  # one for all but the first of the leading dimensions, as in AlphaFold
        leading = (*batch[:1], *(1 for _ in batch[1:]))
        inputs["bias"] = randn(*leading, heads, length, keys, seed=6, dtype=dtype)
    elif call == "key_lengths":
        inputs["key_lengths"] = lengths(batch, keys, 7)
    elif call == "both_lengths":
        inputs["query_lengths"] = lengths(batch, length, 8)
        inputs["key_lengths"] = lengths(batch, keys, 9)
    elif call == "positions":
        inputs["positions"] = (torch.arange(length) * 3 + 5) % 128
    return inputs


CASES = covering_sample(AXES, 120, 0, fits)


@pytest.mark.parametrize("part", range(10))
def test_the_formula_forward_and_backward(level, part):
    for case in CASES[part::10]:
        check_module(make(case), eager_attention, call_inputs(case), what=case)


def feature_module(feature, dtype=torch.float32, **more):
    """A causal module with one feature that a cache must honour."""
    case = {"heads": (4, 2, 16, 24), "positions": "none", "causal": True, "dtype": dtype}
    case |= {"rope": {"positions": "rope"}, "partial": {"positions": "partial"}}.get(feature, {})
    case |= {"alibi": {"positions": "alibi"}, "t5": {"positions": "t5"}}.get(feature, {})
    case |= {"interleaved": {"positions": "interleaved"}}.get(feature, {})
    options = {
        "window": {"window": (5, 0)},
        "sinks": {"sinks": True, "softcap": 3.0, "gate": True},
        "qk_norm": {"qk_norm": "rms"},
    }.get(feature, {})
    return make(case, **options | more).eval()


FEATURES = ("rope", "partial", "interleaved", "alibi", "t5", "window", "sinks", "qk_norm")
OPTIONS = {"num_layers": 2, "batch": 2, "kv_heads": 2, "head_dim": 16, "value_head_dim": 24}
CACHES = {
    "contiguous": lambda **more: nn.KVCache(capacity=32, **OPTIONS | more),
    "bshd": lambda **more: nn.KVCache(capacity=32, layout="bshd", **OPTIONS | more),
    "paged": lambda **more: nn.PagedKVCache(capacity=32, page_size=4, **OPTIONS | more),
    "ring": lambda **more: nn.SlidingWindowKVCache(window=5, max_chunk=4, **OPTIONS | more),
}
SPLITS = {"tokens": (1,) * 13, "chunks": (4, 3, 6), "prefill": (10, 1, 1, 1)}


def assert_accurate_forward(actual, module, inputs):
    with torch.no_grad():
        eager = eager_attention(module, **inputs)
        exact = {n: double(x) for n, x in inputs.items()}
        oracle = eager_attention(copy.deepcopy(module).double(), **exact)
    assert actual.dtype == eager.dtype
    assert_accurate(actual, oracle, eager, "out")


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("kind", CACHES)
@pytest.mark.parametrize("feature", FEATURES)
@torch.no_grad()
def test_any_split_over_a_cache_is_the_whole(level, kind, split, feature):
    if kind == "ring" and feature == "t5":
        return  # refused, see below
    for dtype in (torch.float32, torch.bfloat16):
        module = feature_module(feature, dtype, **{"window": (5, 0)} if kind == "ring" else {})
        x = randn(2, 13, 24, seed=1, dtype=dtype)
        cache, parts = CACHES[kind](dtype=dtype), []
        for part in x.split(SPLITS[split], dim=1):
            parts.append(module(part, cache=cache, layer=1))
            cache.advance(part.shape[1])
        assert_accurate_forward(torch.cat(parts, dim=1), module, {"x": x})


@pytest.mark.parametrize("kind", ["contiguous", "paged"])
@torch.no_grad()
def test_prompts_of_different_lengths_share_a_cache(kind):
    for feature in FEATURES:
        module = feature_module(feature)
        x = randn(2, 13, 24, seed=1)
        lengths = torch.tensor([9, 4])
        cache = CACHES[kind]()
        prompt = module(x[:, :9], cache=cache, layer=0, query_lengths=lengths)
        cache.advance(lengths)
        step = torch.stack((x[0, 9], x[1, 4])).unsqueeze(1)
        out = module(step, cache=cache, layer=0)
        for b, length in enumerate(lengths.tolist()):
            whole = module(x[b : b + 1, : length + 1])[0]
            torch.testing.assert_close(prompt[b, :length], whole[:length])
            torch.testing.assert_close(out[b, 0], whole[length])


@pytest.mark.parametrize("kind", ["contiguous", "paged"])
@torch.no_grad()
def test_packed_rows_and_a_cache(kind):
    for feature in FEATURES:
        module = feature_module(feature)
        x = randn(2, 9, 24, seed=1)
        cache = CACHES[kind]()
        rows = torch.cat((x[0, :7], x[1, :3]))
        out = module(rows, cache=cache, layer=0, cu_seqlens=torch.tensor([0, 7, 10]))
        cache.advance(torch.tensor([7, 3]))
        step = torch.cat((x[0, 7:9], x[1, 3:4]))
        more = module(step, cache=cache, layer=0, cu_seqlens=torch.tensor([0, 2, 3]))
        torch.testing.assert_close(torch.cat((out[:7], more[:2])), module(x[:1])[0])
        torch.testing.assert_close(torch.cat((out[7:], more[2:])), module(x[1:, :4])[0])


@torch.no_grad()
def test_prompts_padded_on_the_left():
    for feature in FEATURES:
        module = feature_module(feature)
        x = randn(2, 9, 24, seed=1)
        cache = CACHES["contiguous"]()
        cache.starts = torch.tensor([0, 3])
        out = module(x, cache=cache, layer=0)
        torch.testing.assert_close(out[1, 3:], module(x[1:, 3:])[0])


@torch.no_grad()
def test_positions_that_are_given_go_before_those_of_the_cache():
    module = feature_module("rope")
    x, positions = randn(2, 6, 24, seed=1), torch.tensor([3, 4, 5, 9, 10, 11])
    want = module(x, positions=positions)
    cache = CACHES["contiguous"]()
    first = module(x[:, :4], cache=cache, layer=0, positions=positions[:4])
    cache.advance(4)
    last = module(x[:, 4:], cache=cache, layer=0, positions=positions[4:])
    torch.testing.assert_close(torch.cat((first, last), dim=1), want)


@pytest.mark.parametrize("kind", ["contiguous", "bshd", "paged"])
@torch.no_grad()
def test_a_context_is_projected_once(kind):
    module = make(
        {"heads": (4, 2, 16, 24), "positions": "none", "dtype": torch.float32, "context": 8}
    ).eval()
    x, context = randn(2, 5, 24, seed=1), randn(2, 8, 20, seed=2)
    lengths = torch.tensor([8, 6])
    want = module(x, context, key_lengths=lengths)
    cache = CACHES[kind]()
    first = module(x[:, :2], context, key_lengths=lengths, cache=cache, layer=1)
    cache.advance(lengths)
    later = module(x[:, 2:], cache=cache, layer=1)
    torch.testing.assert_close(torch.cat((first, later), dim=1), want)
    assert cache.lengths.tolist() == [8, 6]


PACKED_AXES = AXES | {
    "dtype": (torch.float32, torch.bfloat16),
    "batch": ((1,),),
    "call": ("plain",),
    "context": (None, None, 5),
}


@pytest.mark.parametrize("nested", [False, True])
def test_packed_rows_are_the_sequences_one_by_one(level, nested):
    counts, context_counts = (5, 0, 9, 1), (3, 2, 7, 4)
    bounds, context_bounds = (
        cu_seqlens_from_lengths(torch.tensor(c)) for c in (counts, context_counts)
    )
    for i, case in enumerate(covering_sample(PACKED_AXES, 16, 1, fits)):
        dtype = case["dtype"]
        inputs = {"x": randn(sum(counts), 24, seed=3, dtype=dtype)}
        if case["context"] is not None:
            inputs["context"] = randn(sum(context_counts), 20, seed=4, dtype=dtype)
        given = {"cu_seqlens": bounds}
        if case["context"] is not None:
            given["context_cu_seqlens"] = context_bounds
        if i % 2:
            given["max_seqlen"] = 9

        def packed(m, given=given, **rows):
            if not nested:
                return m(**rows, **given)
            sizes = {"x": counts, "context": context_counts}
            parts = {
                n: torch.nested.as_nested_tensor(list(x.split(sizes[n])), layout=torch.jagged)
                for n, x in rows.items()
            }
            out = m(**parts)
            assert out.is_nested and out.shape[0] == len(counts)
            return out.values()

        def one_by_one(m, x, context=None):
            contexts = [None] * len(counts)
            if context is not None:
                contexts = [c.unsqueeze(0) for c in context.split(context_counts)]
            parts = x.unsqueeze(0).split(counts, dim=1)
            return torch.cat([eager_attention(m, *p) for p in zip(parts, contexts)], dim=1)[0]

        check_module(make(case), one_by_one, inputs, function=packed, what=case)


def test_rows_behind_the_last_sequence_and_their_bias():
    module = feature_module("rope", bias=True)
    rows = randn(7, 24, seed=1)
    out = module(rows, cu_seqlens=torch.tensor([0, 3, 5]))
    torch.testing.assert_close(out[:3], module(rows[None, :3])[0])
    torch.testing.assert_close(out[5:], module.o_proj.bias.expand(2, -1))


def test_empty_inputs():
    for feature in FEATURES:
        module = feature_module(feature)
        for shape in ((0, 5, 24), (2, 0, 24), (0, 24)):
            x = torch.zeros(shape, requires_grad=True)
            out = module(x)
            assert out.shape == shape
            out.sum().backward()
            assert all(p.grad is None or not p.grad.any() for p in module.parameters())


class Copies(TorchDispatchMode):
    """Which ops copied a tensor of at least ``size`` numbers."""

    def __init__(self, size):
        super().__init__()
        self.size, self.found = size, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **kwargs or {})
        name = str(function).split(".")[1]
        copying = ("clone", "copy_", "contiguous", "_to_copy", "cat", "repeat")
        if name in copying and isinstance(out, torch.Tensor) and out.numel() >= self.size:
            self.found.append(name)
        return out


@pytest.mark.parametrize("feature", ["none", *(f for f in FEATURES if f != "t5")])
def test_heads_are_views_of_the_projections(feature):
    module, x = feature_module(feature), randn(2, 32, 24, seed=0)
    with Copies(2 * 32 * 2 * 16) as copies:
        module(x)
        with torch.no_grad():
            module(x)
            cache = CACHES["contiguous"]()
            module(x[:, :16], cache=cache, layer=0)
    assert copies.found == []


class Adapter(torch.nn.Module):
    """As PEFT wraps a projection."""

    def __init__(self, base):
        super().__init__()
        self.base = base
        self.down = torch.nn.Linear(base.in_features, 2, bias=False)
        self.up = torch.nn.Linear(2, base.out_features, bias=False)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


@pytest.mark.parametrize("name", ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj"])
def test_what_wraps_a_projection_takes_effect(name):
    module, x = feature_module("sinks"), randn(2, 5, 24, seed=0)
    merged = copy.deepcopy(module)
    setattr(module, name, Adapter(getattr(module, name)))
    adapter = getattr(module, name)
    getattr(merged, name).weight.data += adapter.up.weight.data @ adapter.down.weight.data
    torch.testing.assert_close(module(x), merged(x))
    module(x).sum().backward()
    assert adapter.down.weight.grad.abs().sum() > 0
    seen = []
    getattr(merged, name).register_forward_hook(lambda *_: seen.append(name))
    merged(x)
    assert seen == [name]


def test_train_eval_and_no_grad_are_the_same():
    for feature in FEATURES:
        module, x = feature_module(feature), randn(2, 5, 24, seed=0)
        want = module.train()(x)
        torch.testing.assert_close(module.eval()(x), want)
        with torch.no_grad():
            torch.testing.assert_close(module(x), want)
        with torch.inference_mode():
            torch.testing.assert_close(module(x), want)


def test_dropout_is_of_the_weights_and_only_in_training():
    module = feature_module("none", dropout=0.5)
    x = randn(2, 40, 24, seed=0)
    assert torch.equal(module(x), module(x))
    module.train()
    torch.manual_seed(3)
    first, other = module(x), module(x)
    assert not torch.equal(first, other)
    torch.manual_seed(3)
    assert torch.equal(module(x), first)
    torch.manual_seed(3)
    assert torch.equal(checkpoint(module, x, use_reentrant=False), first)
    mean = torch.stack([module(x) for _ in range(200)]).mean(0)
    module.eval()
    assert (mean - module(x)).square().mean() < 0.05 * (first - module(x)).square().mean()


def test_autocast_computes_in_its_dtype():
    for feature in FEATURES:
        module, x = feature_module(feature), randn(2, 5, 24, seed=0)
        with torch.autocast("cpu", torch.bfloat16):
            out = module(x)
        assert out.dtype == torch.bfloat16
        torch.testing.assert_close(out.float(), module(x), atol=0.06, rtol=0.06)


@pytest.mark.parametrize("feature", ["rope", "t5"])
def test_one_graph_for_all_lengths(feature):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    module = feature_module(feature)
    compiled = torch.compile(module, backend=counter, fullgraph=True, dynamic=True)
    for length in (3, 4, 7, 11, 14):
        x = randn(2, length, 24, seed=length)
        torch.testing.assert_close(compiled(x), module(x))
        compiled(x).sum().backward()
    assert counter.frame_count <= 2


@pytest.mark.parametrize(
    "kind, feature",
    [("contiguous", "rope"), ("contiguous", "t5"), ("paged", "rope"), ("ring", "alibi")],
)
@torch.no_grad()
def test_one_graph_for_all_steps_with_a_cache(kind, feature):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    module = feature_module(feature, **{"window": (5, 0)} if kind == "ring" else {})
    compiled = torch.compile(module, backend=counter, fullgraph=True)
    cache, eager = CACHES[kind](), CACHES[kind]()
    for step in range(20):
        x = randn(2, 1, 24, seed=step)
        if kind == "paged":
            cache.reserve(1)
        assert torch.equal(compiled(x, cache=cache, layer=0), module(x, cache=eager, layer=0))
        cache.advance(1)
        eager.advance(1)
    assert counter.frame_count <= 2


@torch.no_grad()
def test_export():
    for feature in ("rope", "t5"):
        module, x = feature_module(feature), randn(2, 5, 24, seed=0)
        exported = torch.export.export(module, (x,), strict=False)
        torch.testing.assert_close(exported.module()(x), module(x))


def test_copies_pickles_and_state():
    for feature in FEATURES:
        module, x = feature_module(feature), randn(2, 5, 24, seed=0)
        want = module(x)
        assert torch.equal(copy.deepcopy(module)(x), want)
        assert torch.equal(pickle.loads(pickle.dumps(module))(x), want)
        fresh = randomised(feature_module(feature), seed=9).eval()
        fresh.load_state_dict(module.state_dict())
        assert torch.equal(fresh(x), want)
    names = set(feature_module("sinks", qk_norm="rms", bias=(True, False, True)).state_dict())
    assert names == {
        *("q_proj.weight", "k_proj.weight", "v_proj.weight", "o_proj.weight", "gate_proj.weight"),
        *("q_proj.bias", "v_proj.bias", "o_proj.bias", "gate_proj.bias"),
        *("q_norm.weight", "k_norm.weight", "sinks"),
    }


def test_a_module_made_on_the_meta_device_gets_its_tables_with_its_memory():
    x = randn(2, 5, 24, seed=0)
    for more in (
        {"rope": lambda: nn.RotaryEmbedding(16, 128), "sinks": lambda: True},
        {"alibi": lambda: True},
        {"relative_bias": lambda: nn.T5RelativeBias(4), "qk_norm": lambda: "rms"},
    ):

        def build(more=more):
            options = {n: function() for n, function in more.items()}
            return nn.Attention(24, 4, head_dim=16, causal=True, **options)

        module = randomised(build())
        with torch.device("meta"):
            empty = build()
        assert all(t.is_meta for t in (*empty.parameters(), *empty.buffers()))
        filled = empty.to_empty(device="cpu")
        filled.load_state_dict(module.state_dict())
        assert torch.equal(filled(x), module(x))


def test_norms_of_query_and_key_by_a_function():
    gemma = functools.partial(nn.RMSNorm, eps=1e-5, casting="gemma")
    for dtype in DTYPES:
        module = feature_module("rope", dtype, qk_norm=gemma)
        check_module(module, eager_attention, {"x": randn(2, 5, 24, seed=0, dtype=dtype)})


def test_repr_says_what_is_not_by_default():
    assert nn.Attention(24, 4).extra_repr() == "24, 4"
    module = nn.Attention(24, 4, num_kv_heads=2, causal=True, window=(3, 0), sinks=True)
    assert module.extra_repr() == "24, 4, num_kv_heads=2, causal=True, window=(3, 0), sinks=True"


X = randn(2, 5, 24, seed=0)
LENGTHS = torch.tensor([5, 3])
BOUNDS = torch.tensor([0, 2])


def call(feature="none", *args, **options):
    more = options.pop("more", {})
    with torch.no_grad():
        return feature_module(feature, **more)(*(args or (X,)), **options)


REFUSED = {
    "num_heads": (lambda: nn.Attention(24, 5), ValueError),
    "num_kv_heads": (lambda: nn.Attention(24, 4, num_kv_heads=3), ValueError),
    "head_dim": (lambda: nn.Attention(24, 4, head_dim=0), ValueError),
    "embed_dim": (lambda: nn.Attention(24.0, 4), TypeError),
    "causal": (lambda: nn.Attention(24, 4, causal="top_left"), TypeError),
    "dropout": (lambda: nn.Attention(24, 4, dropout=1.5), ValueError),
    "rope": (lambda: nn.Attention(24, 4, rope=nn.RotaryEmbedding(8)), ValueError),
    "qk_norm": (lambda: nn.Attention(24, 4, qk_norm="batch"), ValueError),
    "qk_norm_over": (lambda: nn.Attention(24, 4, qk_norm_over="row"), ValueError),
    "window": (lambda: call(more={"window": 3}), TypeError),
    "x": (lambda: call("none", X[..., :23]), ValueError),
    "x of rank 1": (lambda: call("none", X[0, 0]), ValueError),
    "x of no tensor": (lambda: call("none", [1.0]), TypeError),
    "x packed": (lambda: call(cu_seqlens=BOUNDS), ValueError),
    "context": (lambda: call("none", X, X[..., :20]), ValueError),
    "context with rope": (lambda: call("rope", X, X), ValueError),
    "context_cu_seqlens": (lambda: call("none", X[0], X[1], cu_seqlens=BOUNDS), ValueError),
    "mask": (lambda: call(mask=torch.ones(5, 4, dtype=torch.bool)), ValueError),
    "key_lengths": (lambda: call("none", X[0], key_lengths=LENGTHS, cu_seqlens=BOUNDS), ValueError),
    "key_lengths and a cache": (
        lambda: call(key_lengths=LENGTHS, cache=CACHES["paged"](), layer=0),
        ValueError,
    ),
    "layer": (lambda: call(cache=CACHES["paged"]()), ValueError),
    "layer 2": (lambda: call(cache=CACHES["paged"](), layer=2), ValueError),
    "cache of another window": (lambda: call(cache=CACHES["ring"](), layer=0), ValueError),
    "cache and rope": (
        lambda: call("rope", more={"causal": False}, cache=CACHES["paged"](), layer=0),
        ValueError,
    ),
    "bias": (
        lambda: call("t5", more={"window": (5, 0)}, cache=CACHES["ring"](), layer=0),
        ValueError,
    ),
    "max_length": (
        lambda: torch.compile(feature_module("rope"), backend="eager", fullgraph=True)(
            randn(1, 200, 24, seed=0)
        ),
        Exception,
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_is_refused_by_name(case):
    torch._dynamo.reset()
    function, error = REFUSED[case]
    with pytest.raises(error, match=rf"{case.split()[0]}: expected"):
        function()


def test_a_cache_is_refused_in_training_with_dropout():
    module = feature_module("none", dropout=0.1).train()
    with pytest.raises(ValueError, match=r"^cache: expected None in training"):
        module(X, cache=CACHES["contiguous"](), layer=0)


def test_nested_sequences_refuse_what_does_not_fit_them():
    module = feature_module("none")
    x = torch.nested.as_nested_tensor([X[0], X[1, :2]], layout=torch.jagged)
    for name, given in (("mask", X[0] > 0), ("key_lengths", LENGTHS), ("cache", CACHES["bshd"]())):
        with pytest.raises(ValueError, match=rf"^{name}: expected None with nested"):
            module(x, **{name: given})
    with pytest.raises(ValueError, match=r"^context: expected nested"):
        module(x, X)
