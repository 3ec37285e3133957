"""Families whose attention does not go through transformers' interface: one module for each.

A module has REPLACEMENTS, from the class of transformers to ours, which is derived from it, holds
what it holds, and differs in ``forward`` alone.
"""

# From the module of transformers that has the attention to ours; neither is imported before a model
# has it.
ADAPTERS: dict[str, str] = {}
