"""flash-attn's activations: gelu is its tanh form here, and x silu(gate) is called swiglu.

The ``_fwd`` and ``_bwd`` halves have no gradient of their own in flash-attn; the forward ones have
it here.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

import fastattn.functional as fa

__all__ = [
    "bias_gelu",
    "bias_gelu_back",
    "bias_gelu_impl",
    "fast_gelu_impl",
    "gelu_bwd",
    "gelu_fwd",
    "relu_bwd",
    "sqrelu_bwd",
    "sqrelu_fwd",
    "swiglu",
    "swiglu_bwd",
    "swiglu_fwd",
]


def swiglu(x: Tensor, y: Tensor) -> Tensor:
    """silu(x) * y; differentiable."""
    return fa.swiglu(x, y)


swiglu_fwd = swiglu


def swiglu_bwd(x: Tensor, y: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of x and y in :func:`swiglu`, from g, that of its result."""
    dx, dy = _gradients(swiglu, (x, y), g)
    return dx, dy


def bias_gelu(y: Tensor, bias: Tensor) -> Tensor:
    """gelu(y + bias), in its tanh form; differentiable."""
    return fa.bias_gelu(y, bias, "tanh")


def bias_gelu_impl(input: Tensor, bias: Tensor) -> Tensor:
    """:func:`bias_gelu`."""
    return bias_gelu(input, bias)


def bias_gelu_back(g: Tensor, y: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of y and bias in :func:`bias_gelu`, from g, that of its result."""
    dy, dbias = _gradients(bias_gelu, (y, bias), g)
    return dy, dbias


def gelu_fwd(x: Tensor) -> Tensor:
    """gelu(x), in its tanh form; differentiable."""
    return fa.gelu(x, "tanh")


def fast_gelu_impl(input: Tensor) -> Tensor:
    """:func:`gelu_fwd`."""
    return gelu_fwd(input)


def gelu_bwd(g: Tensor, x: Tensor) -> Tensor:
    """The gradient of x in :func:`gelu_fwd`, from g, that of its result."""
    return _gradients(gelu_fwd, (x,), g)[0]


def relu_bwd(g: Tensor, x: Tensor) -> Tensor:
    """g where x >= 0, else 0. (At 0 the gradient is g, as in flash-attn; in torch it is 0.)"""
    return torch.where(x >= 0, g, 0.0).to(x.dtype)


def sqrelu_fwd(x: Tensor) -> Tensor:
    """max(x, 0)^2; differentiable."""
    return fa.relu(x).square()


def sqrelu_bwd(g: Tensor, x: Tensor) -> Tensor:
    """2 g max(x, 0), the gradient of x in :func:`sqrelu_fwd`."""
    return (2.0 * g * fa.relu(x)).to(x.dtype)


def _gradients(
    function: Callable[..., Tensor], inputs: tuple[Tensor, ...], gradient: Tensor
) -> tuple[Tensor, ...]:
    with torch.enable_grad():
        leaves = [x.detach().requires_grad_() for x in inputs]
        return torch.autograd.grad(function(*leaves), leaves, gradient)
