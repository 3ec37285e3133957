"""Modules and caches for transformers."""

from fastattn.nn.cache import KVCache, OutOfPages, PagedKVCache, SlidingWindowKVCache

__all__ = ["KVCache", "OutOfPages", "PagedKVCache", "SlidingWindowKVCache"]
