"""The normative semantics of activations. Each is computed in float32 or wider, rounded once."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = [
    "bias_gelu",
    "bias_relu",
    "bias_silu",
    "geglu",
    "gelu",
    "reglu",
    "relu",
    "silu",
    "swiglu",
]


def _real(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _gelu(x: Tensor, approximate: str) -> Tensor:
    return torch.nn.functional.gelu(x, approximate=approximate)


def gelu(input: Tensor, approximate: str = "none") -> Tensor:
    """x Phi(x), or x sigmoid(2 sqrt(2 / pi) (x + 0.044715 x^3)) for approximate="tanh"."""
    return _gelu(_real(input), approximate).to(input.dtype)


def silu(input: Tensor) -> Tensor:
    """x sigmoid(x)"""
    return torch.nn.functional.silu(_real(input)).to(input.dtype)


def relu(input: Tensor) -> Tensor:
    """max(x, 0), with the derivative 0 at 0."""
    return torch.relu(input)


def _with_bias(act: Callable[[Tensor], Tensor], input: Tensor, bias: Tensor) -> Tensor:
    x = _real(input)
    return act(x + bias.to(x.dtype)).to(input.dtype)


def bias_gelu(input: Tensor, bias: Tensor, approximate: str = "none") -> Tensor:
    """gelu(input + bias)"""
    return _with_bias(lambda x: _gelu(x, approximate), input, bias)


def bias_silu(input: Tensor, bias: Tensor) -> Tensor:
    """silu(input + bias)"""
    return _with_bias(torch.nn.functional.silu, input, bias)


def bias_relu(input: Tensor, bias: Tensor) -> Tensor:
    """relu(input + bias)"""
    return _with_bias(torch.relu, input, bias)


def _gated(act: Callable[[Tensor], Tensor], gate: Tensor, up: Tensor | None) -> Tensor:
    if up is None:
        gate, up = gate.chunk(2, dim=-1)
    return (act(_real(gate)) * _real(up)).to(gate.dtype)


def swiglu(gate: Tensor, up: Tensor | None = None) -> Tensor:
    """silu(gate) * up; without up, gate holds both, side by side."""
    return _gated(torch.nn.functional.silu, gate, up)


def geglu(gate: Tensor, up: Tensor | None = None, approximate: str = "none") -> Tensor:
    """gelu(gate) * up"""
    return _gated(lambda x: _gelu(x, approximate), gate, up)


def reglu(gate: Tensor, up: Tensor | None = None) -> Tensor:
    """relu(gate) * up"""
    return _gated(torch.relu, gate, up)
