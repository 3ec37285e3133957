"""Modules and caches for transformers."""

from fastattn.nn.activation import GELU
from fastattn.nn.cache import KVCache, OutOfPages, PagedKVCache, SlidingWindowKVCache
from fastattn.nn.multihead_attention import MultiheadAttention
from fastattn.nn.norm import LayerNorm, RMSNorm

__all__ = [
    "GELU",
    "KVCache",
    "LayerNorm",
    "MultiheadAttention",
    "OutOfPages",
    "PagedKVCache",
    "RMSNorm",
    "SlidingWindowKVCache",
]
