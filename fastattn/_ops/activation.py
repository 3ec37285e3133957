"""The ops of activations as Python sees them: shapes without data, and autograd."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastattn import _C  # noqa: F401  (registers the ops)
from fastattn._ops.common import is_transformed, register_fake
from fastattn._ops.errors import require_one_device, user_error

activation = torch.ops.fastattn.activation.default
activation_backward = torch.ops.fastattn.activation_backward.default
gated_activation = torch.ops.fastattn.gated_activation.default
gated_activation_backward = torch.ops.fastattn.gated_activation_backward.default

GELU, GELU_TANH, SILU, RELU = range(4)


def _twice(ctx: Any, *_: Any) -> Any:
    raise NotImplementedError(
        "fastattn's activations cannot be differentiated twice; those of fastattn.reference can"
    )


def _nothing_to_save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    pass


class _Gradient(torch.autograd.Function):
    """activation_backward, which itself has no gradient: that of its results raises."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, Tensor]:
        gradients: tuple[Tensor, Tensor] = activation_backward(*inputs)
        return gradients

    setup_context = staticmethod(_nothing_to_save)
    backward = staticmethod(_twice)


class _GatedGradient(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, Tensor]:
        gradients: tuple[Tensor, Tensor] = gated_activation_backward(*inputs)
        return gradients

    setup_context = staticmethod(_nothing_to_save)
    backward = staticmethod(_twice)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    first, second, ctx.kind = inputs
    ctx.save_for_backward(first, second)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dout: Tensor | None) -> tuple[Tensor | None, ...]:
    if dout is None:
        return None, None, None
    need_dinput, need_dbias = ctx.needs_input_grad[:2]
    inputs = (dout, *ctx.saved_tensors, ctx.kind, need_dinput, need_dbias)
    function: Callable[..., Any] = activation_backward
    if torch.is_grad_enabled():  # somebody wants to differentiate the gradients
        function = _Gradient.apply
    dinput, dbias = function(*inputs)
    return dinput if need_dinput else None, dbias if need_dbias else None, None


def _gated_backward(ctx: Any, dout: Tensor | None) -> tuple[Tensor | None, ...]:
    if dout is None:
        return None, None, None
    need_dgate, need_dup = ctx.needs_input_grad[:2]
    inputs = (dout, *ctx.saved_tensors, ctx.kind)
    function: Callable[..., Any] = gated_activation_backward
    if torch.is_grad_enabled():
        function = _GatedGradient.apply
    dgate, dup = function(*inputs)
    return dgate if need_dgate else None, dup if need_dup else None, None


class _Activation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        _save(ctx, inputs, None)
        out: Tensor = activation(*inputs)
        return out

    backward = staticmethod(_backward)


class _GatedActivation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        _save(ctx, inputs, None)
        out: Tensor = gated_activation(*inputs)
        return out

    backward = staticmethod(_gated_backward)


class _TransformedActivation(torch.autograd.Function):
    """The same in the form that the transforms of torch.func ask for, which takes longer."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*inputs: Any) -> Tensor:
        out: Tensor = activation(*inputs)
        return out

    setup_context = staticmethod(_save)
    backward = staticmethod(_backward)


class _TransformedGatedActivation(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(*inputs: Any) -> Tensor:
        out: Tensor = gated_activation(*inputs)
        return out

    setup_context = staticmethod(_save)
    backward = staticmethod(_gated_backward)


def _needs_autograd(first: Tensor, second: Tensor | None) -> bool:
    """Whether something besides the result may be asked for: a gradient, a tangent, or what a
    transform of torch.func wants (whose tensors do not tell whether they require grad)."""
    return (
        (first.requires_grad or (second is not None and second.requires_grad))
        and torch.is_grad_enabled()
    ) or is_transformed()


# Small calls take a few microseconds: so these two do without `checked`, which would take a fifth
# of one.


def activate(input: Tensor, bias: Tensor | None, kind: int) -> Tensor:
    function: Callable[..., Any] = activation
    if _needs_autograd(input, bias):
        transformed = torch._C._are_functorch_transforms_active()
        function = (_TransformedActivation if transformed else _Activation).apply
    try:
        out: Tensor = function(input, bias, kind)
    except RuntimeError as error:
        raise user_error(error, {"input": input, "bias": bias}) from None
    return out


def activate_gated(gate: Tensor, up: Tensor | None, kind: int) -> Tensor:
    function: Callable[..., Any] = gated_activation
    if _needs_autograd(gate, up):
        transformed = torch._C._are_functorch_transforms_active()
        function = (_TransformedGatedActivation if transformed else _GatedActivation).apply
    try:
        out: Tensor = function(gate, up, kind)
    except RuntimeError as error:
        raise user_error(error, {"gate": gate, "up": up}) from None
    return out


@register_fake("fastattn::activation")
def _activation_fake(input: Tensor, bias: Tensor | None, kind: int) -> Tensor:
    require_one_device(input=input, bias=bias)
    return torch.empty_like(input)


@register_fake("fastattn::activation_backward")
def _activation_backward_fake(
    dout: Tensor,
    input: Tensor,
    bias: Tensor | None,
    kind: int,
    need_dinput: bool,
    need_dbias: bool,
) -> tuple[Tensor, Tensor]:
    like_bias = input if bias is None else bias
    return (
        torch.empty_like(input) if need_dinput else input.new_empty(0),
        like_bias.new_empty(like_bias.shape if need_dbias else 0),
    )


@register_fake("fastattn::gated_activation")
def _gated_activation_fake(gate: Tensor, up: Tensor | None, kind: int) -> Tensor:
    require_one_device(gate=gate, up=up)
    return torch.empty_like(gate if up is not None else gate[..., : gate.shape[-1] // 2])


@register_fake("fastattn::gated_activation_backward")
def _gated_activation_backward_fake(
    dout: Tensor, gate: Tensor, up: Tensor | None, kind: int
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(gate), gate.new_empty(0) if up is None else torch.empty_like(up)
