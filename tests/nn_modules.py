"""Every module of fastattn.nn, small, with arguments of any length that it can be called with."""

import torch

from fastattn import nn
from fastattn.testing import randn

WIDTH, HEADS = 16, 4


def rows(length, seed=0, batch=2):
    return randn(batch, length, WIDTH, seed=seed)


def one(length):
    return (rows(length),)


def two(length):
    return rows(length), rows(length + 2, seed=1)


def thrice(length):
    x = rows(length)
    return x, x, x


def tokens(length):
    generator = torch.Generator().manual_seed(length)
    return (torch.randint(50, (2, length), generator=generator),)


def alone(build):
    return build, one


def across(build):
    return build, two


def multihead_attention(p=0.0, **options):
    return nn.MultiheadAttention(WIDTH, HEADS, p, batch_first=True, **options)


def layer(kind, p=0.0, **options):
    return getattr(nn, f"Transformer{kind}Layer")(
        *(WIDTH, HEADS, 24, p, "gelu"), batch_first=True, **options
    )


def attention(p=0.0, **options):
    return nn.Attention(WIDTH, HEADS, num_kv_heads=2, dropout=p, **options)


def modern_block(p=0.0, **options):
    rope = nn.RotaryEmbedding(WIDTH // HEADS, 64)
    return nn.TransformerBlock(
        attention(p, causal=True, rope=rope, qk_norm="rms"),
        nn.GatedFeedForward(WIDTH, 24, dropout=p),
        dropout=p,
        **options,
    )


def decoder_block(p=0.0):
    return nn.TransformerBlock(
        attention(p, causal=True, alibi=True, window=(3, 0), sinks=True),
        nn.FeedForward(WIDTH, 24, dropout=p),
        cross_attention=attention(p, softcap=9.0, gate=True),
        norm=nn.LayerNorm,
        placement="post",
        dropout=p,
    )


# How to build each with a probability of dropout, and its arguments for a length.
MODULES = {
    "LayerNorm": alone(lambda p: nn.LayerNorm(WIDTH)),
    "RMSNorm": alone(lambda p: nn.RMSNorm(WIDTH)),
    "GELU": alone(lambda p: nn.GELU()),
    "MultiheadAttention": (lambda p: multihead_attention(p, add_bias_kv=True), thrice),
    "MultiheadAttention across": (
        lambda p: multihead_attention(p, kdim=WIDTH, add_zero_attn=True),
        lambda length: (*two(length), two(length)[1]),
    ),
    "TransformerEncoderLayer": alone(lambda p: layer("Encoder", p)),
    "TransformerDecoderLayer": across(lambda p: layer("Decoder", p, norm_first=True)),
    "TransformerEncoder": alone(lambda p: nn.TransformerEncoder(layer("Encoder", p), 2)),
    "TransformerDecoder": across(lambda p: nn.TransformerDecoder(layer("Decoder", p), 2)),
    "Transformer": across(
        lambda p: nn.Transformer(WIDTH, HEADS, 1, 1, 24, p, batch_first=True, norm_first=True)
    ),
    "Attention": alone(lambda p: attention(p, causal=True, bias=True, softcap=5.0)),
    "Attention T5": alone(lambda p: attention(p, relative_bias=nn.T5RelativeBias(HEADS))),
    "RelativeBias2d": (
        lambda p: attention(p, relative_bias=nn.RelativeBias2d((2, 3), HEADS)),
        lambda length: one(6),
    ),
    "Attention across": across(lambda p: attention(p, alibi=True, sinks=True)),
    "RelativeAttention": alone(lambda p: nn.RelativeAttention(WIDTH, HEADS, dropout=p)),
    "FeedForward": alone(lambda p: nn.FeedForward(WIDTH, 24, dropout=p)),
    "GatedFeedForward": alone(lambda p: nn.GatedFeedForward(WIDTH, 24, dropout=p)),
    "TransformerBlock": alone(modern_block),
    "TransformerBlock parallel": alone(lambda p: modern_block(p, placement="parallel")),
    "TransformerBlock sandwich": alone(lambda p: modern_block(p, placement="sandwich")),
    "TransformerBlock across": across(decoder_block),
    "SinusoidalPositions": alone(lambda p: nn.SinusoidalPositions(WIDTH, dropout=p)),
    "LearnedPositions": alone(lambda p: nn.LearnedPositions(64, WIDTH, dropout=p)),
    "CausalLM": (lambda p: nn.CausalLM(50, WIDTH, [modern_block(p) for _ in range(2)]), tokens),
}
