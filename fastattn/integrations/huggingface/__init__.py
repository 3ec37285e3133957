"""Hugging Face transformers (>= 5.23) on fastattn: attention by name, and what stands around it."""

from fastattn.integrations.huggingface.attention import attention_forward
from fastattn.integrations.huggingface.cache import GrowingLayer, growing_cache
from fastattn.integrations.huggingface.patching import patch, unpatch
from fastattn.integrations.huggingface.registration import NAME, register

__all__ = [
    "NAME",
    "GrowingLayer",
    "attention_forward",
    "growing_cache",
    "patch",
    "register",
    "unpatch",
]
