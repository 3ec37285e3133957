"""A projection and an activation, whose bias and function are one pass over memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeGuard, TypeVar

import torch
from torch import Tensor, nn

from fastattn import functional
from fastattn.nn.activation import GELU
from fastattn.nn.linear import Linear

__all__ = ["ACTIVATIONS", "Activation", "activate", "activation_name", "projected"]

Activation = str | Callable[[Tensor], Tensor]

# By name: of a tensor, and of a tensor and the bias that is added first.
_Pair = tuple[Callable[[Tensor], Tensor], Callable[[Tensor, Tensor], Tensor]]


def _gelu_tanh(x: Tensor) -> Tensor:
    return functional.gelu(x, "tanh")


def _bias_gelu_tanh(x: Tensor, bias: Tensor) -> Tensor:
    return functional.bias_gelu(x, bias, "tanh")


ACTIVATIONS: dict[str, _Pair] = {
    "relu": (functional.relu, functional.bias_relu),
    "gelu": (functional.gelu, functional.bias_gelu),
    "gelu_tanh": (_gelu_tanh, _bias_gelu_tanh),
    "silu": (functional.silu, functional.bias_silu),
}

_FUNCTIONS: dict[Any, str] = {
    nn.functional.relu: "relu",
    torch.relu: "relu",
    functional.relu: "relu",
    nn.functional.gelu: "gelu",
    functional.gelu: "gelu",
    nn.functional.silu: "silu",
    functional.silu: "silu",
}


def activation_name(activation: Activation) -> str | None:
    """The name in ACTIVATIONS of a string, a function or a module; None for another callable.

    Raises:
        ValueError: for a string that is no name.
    """
    if isinstance(activation, str):
        if activation not in ACTIVATIONS:
            known = ", ".join(map(repr, ACTIVATIONS))
            raise ValueError(
                f"activation: expected a callable or one of {known}, got {activation!r}"
            )
        return activation
    if isinstance(activation, nn.Module):
        return None if has_hooks(activation) else _module_name(activation)
    return _FUNCTIONS.get(activation)


def _module_name(module: nn.Module) -> str | None:
    if type(module) in (nn.GELU, GELU):
        return "gelu" if module.approximate == "none" else "gelu_tanh"
    return {nn.ReLU: "relu", nn.SiLU: "silu"}.get(type(module))


def activate(x: Tensor, activation: Activation) -> Tensor:
    """activation(x), by our kernel where it has one."""
    name = activation_name(activation)
    if name is not None:
        return ACTIVATIONS[name][0](x)
    assert callable(activation)
    return activation(x)


def projected(linear: nn.Module, x: Tensor, activation: Activation) -> Tensor:
    """activation(linear(x)); bias and activation in one pass where ``linear`` is just that.

    What wraps the projection is called as it is: LoRA, a quantised layer, whatever has hooks.
    """
    name = activation_name(activation)
    if (
        name is not None
        and (is_plain(linear, Linear) or is_plain(linear, nn.Linear))
        and linear.bias is not None
        and not x.is_nested
    ):
        return ACTIVATIONS[name][1](functional.linear(x, linear.weight), linear.bias)
    return activate(linear(x), activation)


_Module = TypeVar("_Module", bound=nn.Module)


def is_plain(module: nn.Module, kind: type[_Module]) -> TypeGuard[_Module]:
    """Whether calling the module does what the forward of ``kind`` does, and nothing else."""
    return type(module) is kind and not has_hooks(module)


def has_hooks(module: nn.Module) -> bool:
    """Whether calling the module does something besides, or in place of, its class's forward."""
    return bool(
        "forward" in vars(module)  # accelerate puts one there
        or module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )
