"""Layers of Hugging Face's models, built from our blocks with the same weights."""

import functools
import importlib

import pytest
import torch
from block_cases import double
from torch import Tensor

from fastattn import nn
from fastattn.testing import assert_accurate, randn

transformers = pytest.importorskip("transformers")

LENGTH = 11


def decoder(family, **more):
    """(config, layer, rotary embedding) of a decoder family, small."""
    name = family.lower()
    models = importlib.import_module(f"transformers.models.{name}.modeling_{name}")
    config = getattr(transformers, f"{family}Config")(
        hidden_size=32,
        intermediate_size=48,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_hidden_layers=1,
        vocab_size=50,
        max_position_embeddings=64,
        **more,
    )
    config._attn_implementation = "eager"
    layer = getattr(models, f"{family}DecoderLayer")(config, 0).eval()
    return config, layer, getattr(models, f"{family}RotaryEmbedding")(config)


def randomise(layer):
    for i, parameter in enumerate(layer.parameters()):
        parameter.data = 0.2 * randn(*parameter.shape, seed=i)
    return layer


def results(module, call, x):
    x = x.detach().clone().requires_grad_()
    module.zero_grad()
    out = call(module, x)
    out.backward(randn(*out.shape, seed=5).to(out.dtype))
    gradients = {n: p.grad for n, p in module.named_parameters() if p.grad is not None}
    return {"out": out.detach(), "dx": x.grad} | gradients


def assert_same(ours, theirs, call, names, x=None):
    """Outputs and gradients of ours against theirs in float64 and float32."""
    x = randn(2, LENGTH, 32, seed=9) if x is None else x
    eager = results(theirs, call, x)
    got = results(ours, lambda module, rows: module(rows), x)
    oracle = results(theirs.double(), call, double(x))
    for name, value in got.items():
        name = names(name)
        # Both round differently; the floor is that of the largest gradient.
        magnitude = max(8 * t.abs().max().item() for t in oracle.values())
        assert_accurate(value, oracle[name], eager[name], name, magnitude=magnitude)


def in_decoder(rotary, layer, x):
    positions = torch.arange(LENGTH).unsqueeze(0)
    mask = torch.full((LENGTH, LENGTH), -1e9, dtype=x.dtype).triu(1)[None, None]
    out = layer(
        x,
        attention_mask=mask,
        position_ids=positions,
        position_embeddings=tuple(t.to(x.dtype) for t in rotary(x, positions)),
    )
    return out if isinstance(out, Tensor) else out[0]


ATTENTION = {"embed_dim": 32, "num_heads": 4, "num_kv_heads": 2, "causal": True}
RENAMED = {
    "attention": "self_attn",
    "feed_forward": "mlp",
    "attention_norm": "input_layernorm",
    "feed_forward_norm": "post_attention_layernorm",
}
SANDWICHED = {
    "attention_out_norm": "post_attention_layernorm",
    "feed_forward_norm": "pre_feedforward_layernorm",
    "feed_forward_out_norm": "post_feedforward_layernorm",
}


def llama():
    _, layer, rotary = decoder("Llama", head_dim=8, rope_theta=500.0)
    rope = nn.RotaryEmbedding(8, 64, base=rotary.config.rope_parameters["rope_theta"])
    attention = nn.Attention(**ATTENTION, rope=rope)
    return layer, rotary, nn.TransformerBlock(attention, nn.GatedFeedForward(32, 48)), {}


def qwen2():
    _, layer, rotary = decoder("Qwen2")
    attention = nn.Attention(**ATTENTION, rope=rope_of(rotary), bias=True, out_bias=False)
    return layer, rotary, nn.TransformerBlock(attention, nn.GatedFeedForward(32, 48)), {}


def qwen3():
    _, layer, rotary = decoder("Qwen3", head_dim=16)
    attention = nn.Attention(**ATTENTION, head_dim=16, rope=rope_of(rotary, 16), qk_norm="rms")
    return layer, rotary, nn.TransformerBlock(attention, nn.GatedFeedForward(32, 48)), {}


def olmo2():
    _, layer, rotary = decoder("Olmo2")
    norm = functools.partial(nn.RMSNorm, eps=layer.post_attention_layernorm.variance_epsilon)
    attention = nn.Attention(
        **ATTENTION, rope=rope_of(rotary), qk_norm=norm, qk_norm_over="projection"
    )
    block = nn.TransformerBlock(
        attention, nn.GatedFeedForward(32, 48), norm=norm, placement="inner"
    )
    return layer, rotary, block, SANDWICHED


def gemma2():
    config, layer, rotary = decoder("Gemma2", head_dim=16, query_pre_attn_scalar=10)
    attention = nn.Attention(
        **ATTENTION,
        head_dim=16,
        rope=rope_of(rotary, 16),
        scale=10**-0.5,
        softcap=config.attn_logit_softcapping,
    )
    feed_forward = nn.GatedFeedForward(32, 48, activation="gelu_tanh")
    norm = functools.partial(nn.RMSNorm, eps=config.rms_norm_eps, casting="gemma")
    block = nn.TransformerBlock(attention, feed_forward, norm=norm, placement="sandwich")
    return layer, rotary, block, SANDWICHED


def cohere():
    config, layer, rotary = decoder("Cohere")
    rope = rope_of(rotary)
    rope.interleaved = True
    norm = functools.partial(nn.LayerNorm, eps=config.layer_norm_eps, bias=False)
    attention = nn.Attention(**ATTENTION, rope=rope)
    block = nn.TransformerBlock(
        attention, nn.GatedFeedForward(32, 48), norm=norm, placement="parallel"
    )
    return layer, rotary, block, {}


def stablelm():
    _, layer, rotary = decoder("StableLm", partial_rotary_factor=0.5)
    attention = nn.Attention(**ATTENTION, rope=rope_of(rotary, 4))
    block = nn.TransformerBlock(attention, nn.GatedFeedForward(32, 48), norm=nn.LayerNorm)
    return layer, rotary, block, {}


def rope_of(rotary, rotary_dim=8):
    return nn.RotaryEmbedding(rotary_dim, 64, base=rotary.config.rope_parameters["rope_theta"])


@pytest.mark.parametrize("family", [llama, qwen2, qwen3, olmo2, gemma2, cohere, stablelm])
def test_a_decoder_layer(family):
    layer, rotary, block, more = family()
    renamed = RENAMED | more

    def name_of(ours):
        first, _, rest = ours.partition(".")
        return f"{renamed.get(first, first)}.{rest}" if rest else ours

    randomise(layer)
    theirs = layer.state_dict()
    block.load_state_dict({n: theirs[name_of(n)] for n in block.state_dict()})
    assert len(block.state_dict()) == len(theirs)
    assert_same(block, layer, functools.partial(in_decoder, rotary), name_of)


@pytest.mark.parametrize("is_decoder", [False, True])
def test_t5_attention(is_decoder):
    from transformers.models.t5.modeling_t5 import T5Attention

    config = transformers.T5Config(
        d_model=32, d_kv=8, num_heads=4, is_decoder=is_decoder, dropout_rate=0.0
    )
    config._attn_implementation = "eager"
    layer = randomise(T5Attention(config, has_relative_attention_bias=True, layer_idx=0)).eval()
    bias = nn.T5RelativeBias(4, bidirectional=not is_decoder)
    module = nn.Attention(32, 4, scale=1.0, relative_bias=bias, causal=is_decoder)
    names = {"q_proj": "q", "k_proj": "k", "v_proj": "v", "o_proj": "o"}

    def name_of(ours):
        first, _, rest = ours.partition(".")
        if first == "relative_bias":
            return rest
        return f"{names[first]}.{rest}" if rest else ours

    theirs = layer.state_dict()
    module.load_state_dict({n: theirs[name_of(n)] for n in module.state_dict()})
    for query, key in ((200, 200), (5, 300)):
        want = layer.compute_bias(query, key, past_seen_tokens=key - query)
        assert torch.equal(bias(query, key, query_offset=key - query), want)

    def call(layer, x):
        mask = torch.full((LENGTH, LENGTH), -1e9, dtype=x.dtype).triu(1)[None, None]
        return layer(x, mask=mask if is_decoder else None)[0]

    assert_same(module, layer, call, name_of)


def test_swin_and_beit_relative_bias():
    beit = pytest.importorskip("transformers.models.beit.modeling_beit")
    swin = pytest.importorskip("transformers.models.swin.modeling_swin")
    theirs = randomise(swin.SwinRelativePositionBias(4, (3, 5)))
    ours = nn.RelativeBias2d((3, 5), 4)
    ours.load_state_dict(theirs.state_dict())
    assert torch.equal(ours(), theirs())
    config = transformers.BeitConfig(num_attention_heads=4, image_size=80, patch_size=16)
    theirs = randomise(beit.BeitRelativePositionBias(config))
    ours = nn.RelativeBias2d((5, 5), 4, class_token=True)
    ours.load_state_dict(theirs.state_dict())
    torch.testing.assert_close(ours(), theirs((5, 5)))
