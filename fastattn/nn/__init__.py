"""Modules and caches for transformers."""

from fastattn.nn.activation import GELU
from fastattn.nn.cache import KVCache, OutOfPages, PagedKVCache, SlidingWindowKVCache
from fastattn.nn.multihead_attention import MultiheadAttention
from fastattn.nn.norm import LayerNorm, RMSNorm
from fastattn.nn.transformer import Transformer, TransformerDecoder, TransformerEncoder
from fastattn.nn.transformer_layers import TransformerDecoderLayer, TransformerEncoderLayer

__all__ = [
    "GELU",
    "KVCache",
    "LayerNorm",
    "MultiheadAttention",
    "OutOfPages",
    "PagedKVCache",
    "RMSNorm",
    "SlidingWindowKVCache",
    "Transformer",
    "TransformerDecoder",
    "TransformerDecoderLayer",
    "TransformerEncoder",
    "TransformerEncoderLayer",
]
