"""Modules and caches for transformers."""

from fastattn.nn.activation import GELU
from fastattn.nn.cache import KVCache, OutOfPages, PagedKVCache, SlidingWindowKVCache
from fastattn.nn.norm import LayerNorm, RMSNorm

__all__ = [
    "GELU",
    "KVCache",
    "LayerNorm",
    "OutOfPages",
    "PagedKVCache",
    "RMSNorm",
    "SlidingWindowKVCache",
]
