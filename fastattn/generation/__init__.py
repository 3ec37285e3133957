"""Text from a language model, token by token."""

from fastattn.generation.decoding import generate

__all__ = ["generate"]
