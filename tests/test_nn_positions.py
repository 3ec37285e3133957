"""Positional modules against formulas that are written out token by token."""

import copy
import itertools
import math
import pickle

import pytest
import torch
from block_cases import attend, check_module, randomised, rounded
from torch.nn.functional import linear

from fastattn import nn
from fastattn.functional import alibi_slopes, rope_tables
from fastattn.testing import DTYPES, randn

SCALINGS = {
    "linear": {"rope_type": "linear", "factor": 4.0},
    "ntk": {"rope_type": "ntk", "factor": 2.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "original_max_position_embeddings": 32,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
    },
}
DYNAMIC = {"rope_type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 16}


def sinusoid(position, column, dim, base=10000.0):
    angle = position / base ** (2 * (column // 2) / dim)
    return math.cos(angle) if column % 2 else math.sin(angle)


def test_sinusoidal_positions_are_the_original_formula():
    for dim in (1, 2, 7, 16):
        want = torch.tensor([[sinusoid(p, c, dim) for c in range(dim)] for p in range(40)])
        encode = nn.SinusoidalPositions(dim, max_length=8)  # grows
        torch.testing.assert_close(encode.rows(40), want)
        for dtype in DTYPES:
            x = randn(2, 40, dim, seed=0, dtype=dtype)
            assert torch.equal(encode(x), x + want.to(dtype)) or torch.allclose(
                encode(x).float(), (x + want.to(dtype)).float(), atol=1e-2
            )


def test_sinusoidal_variants():
    half, length = 8, 20
    # Whisper's: the last wavelength is base, not base^((half - 1) / half).
    steps = torch.exp(-math.log(10000) / (half - 1) * torch.arange(half))
    angles = torch.arange(length).unsqueeze(1) * steps
    base = 10000 ** (half / (half - 1))
    encode = nn.SinusoidalPositions(2 * half, base=base, interleaved=False)
    want = torch.cat((angles.sin(), angles.cos()), dim=1)
    torch.testing.assert_close(encode.rows(length), want, atol=2e-5, rtol=0)
    # Marian's: sines in the first half, cosines in the second, one more of the former if odd.
    table = nn.SinusoidalPositions(7, interleaved=False).rows(5)
    want = [[sinusoid(p, c, 7) for c in (0, 2, 4, 6, 1, 3, 5)] for p in range(5)]
    torch.testing.assert_close(table, torch.tensor(want))


@pytest.mark.parametrize("kind", ["sinusoidal", "learned"])
def test_positions_and_offsets(kind):
    if kind == "sinusoidal":
        encode = nn.SinusoidalPositions(6, max_length=32)
        table = encode.table
    else:
        encode = nn.LearnedPositions(32, 6, shift=2)
        assert encode.weight.shape == (34, 6)
        table = encode.weight[2:]
    x = randn(2, 4, 6, seed=0)
    torch.testing.assert_close(encode(x), x + table[:4])
    torch.testing.assert_close(encode(x[0], offset=3), x[0] + table[3:7])
    offset = torch.tensor([5, 0], dtype=torch.int32)
    torch.testing.assert_close(encode(x, offset=offset), x + torch.stack((table[5:9], table[:4])))
    positions = torch.tensor([[3, 1, 0, 9], [7, 7, 7, 7]])
    torch.testing.assert_close(encode(x, positions=positions), x + table[positions])
    torch.testing.assert_close(
        encode(x, positions=positions[0], offset=2), x + table[positions[0] + 2]
    )
    assert encode(x[:, :0]).shape == (2, 0, 6)
    with pytest.raises(ValueError, match=r"^positions: expected numbers"):
        encode(x, positions=positions, offset=40)
    compiled = torch.compile(encode, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, offset=offset), encode(x, offset=offset))
    with pytest.raises(ValueError, match=r"^x: expected shape"):
        encode(x[..., :5])


def test_learned_positions_learn():
    for dtype in DTYPES:
        encode = nn.LearnedPositions(9, 6, shift=1, dtype=dtype)
        x = randn(2, 4, 6, seed=0, dtype=dtype)
        encode(x).sum().backward()
        want = torch.zeros(10, 6, dtype=dtype)
        want[1:5] = 2
        assert torch.equal(encode.weight.grad, want)
        with pytest.raises(ValueError, match=r"^x: expected at most 9 positions, got 10"):
            encode(randn(1, 4, 6, seed=0), offset=6)


def test_dropout_of_the_sum():
    x = torch.ones(2, 50, 8)
    for encode in (nn.SinusoidalPositions(8, dropout=0.5), nn.LearnedPositions(64, 8, dropout=0.5)):
        torch.manual_seed(2)
        got = encode(x)
        torch.manual_seed(2)
        assert torch.equal(got, torch.nn.functional.dropout(encode.eval()(x), 0.5))
        assert torch.equal(encode(x), encode(x))


@pytest.mark.parametrize("scaling", [None, *SCALINGS])
def test_rotary_tables_are_those_of_the_function_and_grow(scaling):
    options = {"base": 500.0, "scaling": SCALINGS.get(scaling)}
    rope = nn.RotaryEmbedding(8, 12, **options)
    for length in (12, 13, 100, 5):
        cos, sin = rope.tables(length)
        want = rope_tables(8, 128, **options)
        rows = min(len(cos), 128)
        assert len(cos) >= length
        assert torch.equal(cos[:rows], want[0][:rows]) and torch.equal(sin[:rows], want[1][:rows])
    q, k = randn(2, 30, 4, 10, seed=0), randn(2, 30, 2, 10, seed=1)
    for interleaved in (False, True):
        rope.interleaved = interleaved
        out = rope(q, k)
        for got, x in zip(out, (q, k), strict=True):
            a, b = (0, 1) if interleaved else (0, 4)
            turned = x[..., a] * want[0][:30, 0, None] - x[..., b] * want[1][:30, 0, None]
            torch.testing.assert_close(got[..., a], turned)
            assert torch.equal(got[..., 8:], x[..., 8:])


def test_dynamic_scaling_follows_the_length():
    rope = nn.RotaryEmbedding(8, 16, scaling=DYNAMIC)
    for length in (4, 16, 20, 50, 20, 3):
        want = rope_tables(8, max(length, 16), scaling=DYNAMIC)
        assert torch.equal(rope.tables(length)[0], want[0])
    module = nn.Attention(16, 2, causal=True, rope=rope)
    x = randn(1, 40, 16, seed=0)
    out = module(x)
    cache = nn.KVCache(1, 1, kv_heads=2, capacity=40, head_dim=8)
    with torch.no_grad():  # for the capacity, from the first step on
        parts = []
        for part in x.split(8, dim=1):
            parts.append(module(part, cache=cache))
            cache.advance(8)
    torch.testing.assert_close(torch.cat(parts, dim=1), out)


def tables_of(module):
    return {n: b for n, b in module.named_buffers() if b.is_floating_point()}


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.RotaryEmbedding(8, 64),
        lambda: nn.SinusoidalPositions(6, 64),
        lambda: nn.ALiBi(6),
        lambda: nn.Attention(24, 4, rope=nn.RotaryEmbedding(6), alibi=True),
        lambda: nn.RelativeAttention(24, 4),
    ],
    ids=["rope", "sinusoidal", "alibi", "attention", "relative"],
)
def test_tables_stay_float32_in_16_bit_modules_and_out_of_the_state(make):
    module = make()
    want = {n: b.clone() for n, b in tables_of(module).items()}
    assert want and not set(want) & set(module.state_dict())
    for convert in (
        lambda m: m.to(torch.bfloat16),
        lambda m: m.half(),
        lambda m: m.double().float(),
        lambda m: m.to(torch.bfloat16).to(torch.float16),
        lambda m: m.to("meta", torch.bfloat16).to_empty(device="cpu"),
        lambda m: copy.deepcopy(m),
        lambda m: pickle.loads(pickle.dumps(m)),
        lambda m: torch.nn.Sequential(m, m).bfloat16()[0],
    ):
        got = tables_of(convert(copy.deepcopy(module)))
        assert {n: b.dtype for n, b in got.items()} == dict.fromkeys(want, torch.float32)
        assert all(torch.equal(got[n], b) for n, b in want.items())
    wide = tables_of(copy.deepcopy(module).double())
    for name, table in wide.items():
        assert table.dtype == torch.float64
        torch.testing.assert_close(table.float(), want[name])


def test_float64_tables_are_not_rounded_ones():
    rope = nn.RotaryEmbedding(8, 64).double()
    assert torch.equal(rope.cos, rope_tables(8, 64, dtype=torch.float64)[0])
    assert not torch.equal(rope.cos, rope.cos.float().double())


def test_alibi_of_any_number_of_heads():
    for heads in (1, 2, 3, 6, 8, 12, 16):
        assert torch.equal(nn.ALiBi(heads)(), alibi_slopes(heads))
    assert nn.ALiBi(6).half()().dtype == torch.float32


def bucket_of(distance, buckets, max_distance, bidirectional):
    """T5's, one distance at a time."""
    offset = 0
    if bidirectional:
        buckets //= 2
        offset = buckets if distance > 0 else 0
        distance = abs(distance)
    else:
        distance = max(-distance, 0)
    exact = buckets // 2
    if distance < exact:
        return offset + distance
    ratio = torch.log(torch.tensor(distance / exact)) / math.log(max_distance / exact)
    return offset + min(exact + int(ratio * (buckets - exact)), buckets - 1)


@pytest.mark.parametrize("bidirectional", [False, True])
def test_t5_relative_bias(bidirectional):
    for (buckets, most), heads in itertools.product(((32, 128), (8, 20)), (1, 3)):
        module = nn.T5RelativeBias(
            heads, num_buckets=buckets, max_distance=most, bidirectional=bidirectional
        )
        weight = module.relative_attention_bias.weight
        for queries, keys, offset in ((1, 1, 0), (5, 7, 0), (40, 40, 0), (2, 150, 148), (3, 4, -9)):
            index = torch.tensor(
                [
                    [bucket_of(j - i - offset, buckets, most, bidirectional) for j in range(keys)]
                    for i in range(queries)
                ]
            )
            want = weight[index].permute(2, 0, 1).unsqueeze(0)
            got = module(queries, keys, query_offset=offset)
            assert torch.equal(got, want)
            cotangent = randn(*want.shape, seed=0)
            (g,) = torch.autograd.grad(got, weight, cotangent)
            (w,) = torch.autograd.grad(want, weight, cotangent)
            torch.testing.assert_close(g, w, atol=1e-4, rtol=1e-5)
        offsets = torch.tensor([0, 9], dtype=torch.int32)
        both = module(4, 16, query_offset=offsets)
        assert torch.equal(both, torch.cat([module(4, 16, query_offset=o) for o in (0, 9)]))
    assert module(0, 5).shape == (1, 3, 0, 5) and module(5, 0).shape == (1, 3, 5, 0)
    assert set(module.state_dict()) == {"relative_attention_bias.weight"}


@pytest.mark.parametrize("class_token", [False, True])
def test_two_dimensional_relative_bias(class_token):
    for height, width in ((1, 1), (2, 3), (7, 7)):
        module = nn.RelativeBias2d((height, width), 3, class_token=class_token)
        table = module.relative_position_bias_table
        rows = (2 * height - 1) * (2 * width - 1)
        assert table.shape == (rows + 3 * class_token, 3)
        places = [divmod(n, width) for n in range(height * width)]

        def row(a, b, height=height, width=width):
            dy, dx = a[0] - b[0] + height - 1, a[1] - b[1] + width - 1
            return dy * (2 * width - 1) + dx

        index = [[row(a, b) for b in places] for a in places]
        if class_token:
            index = [[rows + 2] + [rows] * len(places), *([rows + 1, *r] for r in index)]
        want = table[torch.tensor(index)].permute(2, 0, 1).unsqueeze(0)
        got = module(len(index), len(index))
        assert torch.equal(got, want) and module.length == len(index)
        cotangent = randn(*want.shape, seed=0)
        (g,) = torch.autograd.grad(got, table, cotangent)
        (w,) = torch.autograd.grad(want, table, cotangent)
        torch.testing.assert_close(g, w)
        assert set(module.state_dict()) == {"relative_position_bias_table"}
        again = module.to("meta").to_empty(device="cpu")
        assert torch.equal(again.relative_position_index, torch.tensor(index))
    with pytest.raises(ValueError, match=r"^query_length: expected"):
        module(5, 50)
    with pytest.raises(ValueError, match=r"^query_offset: expected 0"):
        module(query_offset=1)


def test_tables_that_layers_share_survive_to_empty():
    with torch.device("meta"):
        rope = nn.RotaryEmbedding(8, max_length=16)
        layers = torch.nn.ModuleList(nn.Attention(32, 4, causal=True, rope=rope) for _ in range(3))
    layers.to_empty(device="cpu")
    expected = nn.RotaryEmbedding(8, max_length=16)
    torch.testing.assert_close(rope.cos, expected.cos, rtol=0, atol=0)
    torch.testing.assert_close(rope.sin, expected.sin, rtol=0, atol=0)


def test_shifted_windows_of_swin():
    """Windows are a batch dimension, and each one has its mask."""
    bias = nn.RelativeBias2d((2, 3), 2)
    module = randomised(nn.Attention(8, 2, relative_bias=bias, bias=True))
    x, mask = randn(3, 4, 6, 8, seed=0), randn(4, 1, 6, 6, seed=1) < 0.8
    out = module(x, mask=mask)
    for image, window in itertools.product(range(3), range(4)):
        want = module(x[image, window], mask=mask[window])
        torch.testing.assert_close(out[image, window], want)


def eager_relative_attention(m, x, memory=None, mask=None, key_lengths=None):
    """Transformer-XL, with a row of r for every pair of query and key."""
    source = x if memory is None else torch.cat((memory, x), dim=-2)
    queries, keys, dim = x.shape[-2], source.shape[-2], m.embed_dim

    def heads(projection, rows):
        return rounded(linear(rows, projection.weight, projection.bias)).unflatten(
            -1, (m.num_heads, m.head_dim)
        )

    distance = keys - queries + torch.arange(queries).unsqueeze(-1) - torch.arange(keys)
    steps = 10000.0 ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    angles = distance.unsqueeze(-1) * steps
    r = heads(m.r_proj, torch.cat((angles.sin(), angles.cos()), dim=-1)[..., :dim].to(x.dtype))
    q, k, v = heads(m.q_proj, x), heads(m.k_proj, source), heads(m.v_proj, source)
    content = torch.einsum("...ihd,...jhd->...hij", rounded(q + m.content_bias), k)
    position = torch.einsum("...ihd,ijhd->...hij", rounded(q + m.position_bias), r)
    scores = rounded(content * m.scale) + rounded(position * m.scale)
    visible = distance >= 0 if m.causal else torch.ones_like(distance, dtype=torch.bool)
    if mask is not None:
        visible = visible & mask
    if key_lengths is not None:
        visible = visible & (torch.arange(keys) < key_lengths.view(-1, 1, 1, 1))
    scores = scores.masked_fill(~visible, torch.finfo(scores.dtype).min)
    out = rounded(attend(scores, v.transpose(-3, -2), visible)).transpose(-3, -2)
    return linear(out.flatten(-2), m.o_proj.weight, m.o_proj.bias)


@pytest.mark.parametrize("causal", [True, False])
def test_transformer_xl(level, causal):
    options = ({}, {"bias": True, "head_dim": 10}, {"scale": 0.3})
    for dtype, (i, more) in itertools.product(DTYPES, enumerate(options)):
        module = randomised(nn.RelativeAttention(15 + i, 4 - i or 1, **{"head_dim": 8} | more))
        module.causal = causal
        module = module.to(dtype)
        for queries, past in ((1, 0), (5, 0), (1, 6), (7, 4), (33, 20)):
            inputs = {"x": randn(2, queries, 15 + i, seed=1, dtype=dtype)}
            if past:
                inputs["memory"] = randn(2, past, 15 + i, seed=2, dtype=dtype)
            if queries == 7:
                inputs["mask"] = randn(2, 1, 7, 11, seed=3) < 0.8
            check_module(module, eager_relative_attention, inputs, what=(more, queries, past))


def test_transformer_xl_materialises_no_more_than_the_scores():
    module, x = nn.RelativeAttention(16, 2), randn(1, 64, 16, seed=0)
    memory = randn(1, 64, 16, seed=1)
    largest = []

    class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **kwargs or {})
            if isinstance(out, torch.Tensor):
                largest.append(out.untyped_storage().nbytes() // 4)
            return out

    with Sizes(), torch.no_grad():
        module(x, memory)
    assert max(largest) <= max(2 * 64 * 129, module.encoding.table.numel())


def test_transformer_xl_in_5_dimensions_compiled_and_refused():
    module = randomised(nn.RelativeAttention(16, 2))
    x = randn(2, 3, 5, 16, seed=0)
    out = module(x)
    torch.testing.assert_close(out[1, 2], module(x[1, 2]))
    compiled = torch.compile(module, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), out)
    assert module(x[:, :, :0]).shape == (2, 3, 0, 16)
    with pytest.raises(ValueError, match=r"^memory: expected the shape of x"):
        module(x, x[0])
    with pytest.raises(ValueError, match=r"^x: expected shape"):
        module(x[..., :3])
    with pytest.raises(ValueError, match=r"^num_heads: expected"):
        nn.RelativeAttention(16, 3)


def test_bad_arguments_are_refused_by_name():
    for name, error, function in (
        ("rotary_dim", ValueError, lambda: nn.RotaryEmbedding(7)),
        ("rotary_dim", TypeError, lambda: nn.RotaryEmbedding(8.0)),
        ("max_length", ValueError, lambda: nn.RotaryEmbedding(8, 0)),
        ("scaling", ValueError, lambda: nn.RotaryEmbedding(8, scaling={"rope_type": "x"})),
        (
            "scaling",
            ValueError,
            lambda: nn.RotaryEmbedding(8, scaling={"type": "dynamic", "factor": 1}),
        ),
        ("base", ValueError, lambda: nn.RotaryEmbedding(8, base=-1.0)),
        ("embed_dim", ValueError, lambda: nn.SinusoidalPositions(0)),
        ("shift", ValueError, lambda: nn.LearnedPositions(4, 4, shift=-1)),
        ("num_heads", ValueError, lambda: nn.ALiBi(0)),
        ("num_buckets", ValueError, lambda: nn.T5RelativeBias(2, num_buckets=6)),
        ("max_distance", ValueError, lambda: nn.T5RelativeBias(2, max_distance=8)),
        ("window", ValueError, lambda: nn.RelativeBias2d((0, 2), 2)),
    ):
        with pytest.raises(error, match=rf"^{name}: (expected|'dynamic' needs)"):
            function()


def test_repr():
    assert repr(nn.RotaryEmbedding(8, 16)) == "RotaryEmbedding(8, max_length=16, base=10000.0)"
    assert repr(nn.ALiBi(3)) == "ALiBi(3)"
    assert repr(nn.RelativeBias2d((2, 3), 4)) == "RelativeBias2d((2, 3), 4)"
    assert nn.T5RelativeBias(2).extra_repr() == "2, num_buckets=32, max_distance=128"
