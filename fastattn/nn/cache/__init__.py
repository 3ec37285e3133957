"""Caches of keys and values for generation: contiguous, sliding-window and paged.

All three are used alike::

    cache = KVCache(num_layers, batch, kv_heads, capacity, head_dim)
    for each step:
        for each layer:
            out = cache.attend(layer, query, key, value)     # writes key and value, then attends
        cache.advance(new_rows)                              # once, behind the last layer

Their memory and their lengths are static tensors: between two calls nothing moves, and a compiled
step sees new lengths without being compiled again.
"""

from fastattn.nn.cache.contiguous import KVCache, SlidingWindowKVCache
from fastattn.nn.cache.paged import OutOfPages, PagedKVCache

__all__ = ["KVCache", "OutOfPages", "PagedKVCache", "SlidingWindowKVCache"]
