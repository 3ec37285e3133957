"""Modules and caches for transformers."""

from fastattn.nn.activation import GELU
from fastattn.nn.attention import Attention
from fastattn.nn.block import TransformerBlock
from fastattn.nn.cache import KVCache, OutOfPages, PagedKVCache, SlidingWindowKVCache
from fastattn.nn.feed_forward import FeedForward, GatedFeedForward
from fastattn.nn.language_model import CausalLM
from fastattn.nn.linear import Linear
from fastattn.nn.multihead_attention import MultiheadAttention
from fastattn.nn.norm import LayerNorm, RMSNorm
from fastattn.nn.positions import ALiBi, LearnedPositions, RotaryEmbedding, SinusoidalPositions
from fastattn.nn.relative_attention import RelativeAttention
from fastattn.nn.relative_bias import RelativeBias2d, T5RelativeBias
from fastattn.nn.transformer import Transformer, TransformerDecoder, TransformerEncoder
from fastattn.nn.transformer_layers import TransformerDecoderLayer, TransformerEncoderLayer

__all__ = [
    "GELU",
    "ALiBi",
    "Attention",
    "CausalLM",
    "FeedForward",
    "GatedFeedForward",
    "KVCache",
    "LayerNorm",
    "LearnedPositions",
    "Linear",
    "MultiheadAttention",
    "OutOfPages",
    "PagedKVCache",
    "RMSNorm",
    "RelativeAttention",
    "RelativeBias2d",
    "RotaryEmbedding",
    "SinusoidalPositions",
    "SlidingWindowKVCache",
    "T5RelativeBias",
    "Transformer",
    "TransformerBlock",
    "TransformerDecoder",
    "TransformerDecoderLayer",
    "TransformerEncoder",
    "TransformerEncoderLayer",
]
