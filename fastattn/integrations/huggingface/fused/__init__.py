"""What stands around attention in transformers' models, on fused kernels: a module for each kind.

A rule says of a module the class that it gets (derived from its own, or holding what it holds), why
it stays though it is of the kind, or None where it is not of the kind.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from fastattn.integrations.huggingface.fused import activations, linear, norms, padding, rotary

__all__ = ["RULES"]

RULES: dict[str, Callable[[nn.Module], type[nn.Module] | str | None]] = {
    "norms": norms.rule,
    "activations": activations.rule,
    "rotary": rotary.rule,
    "linears": linear.rule,
    "unpad": padding.rule,
}
