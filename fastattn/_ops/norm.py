"""The norm ops as Python sees them: shapes without data, and autograd.

The kernels, and the checks of what they are given, are in the extension (csrc/bind).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastattn import _C  # noqa: F401  (registers the ops)
from fastattn._ops.common import is_transformed, real_dtype, register_fake
from fastattn._ops.errors import checked, user_error

norm_plain = torch.ops.fastattn.norm_plain.default
add_norm_plain = torch.ops.fastattn.add_norm_plain.default
norm_forward = torch.ops.fastattn.norm_forward.default
norm_backward = torch.ops.fastattn.norm_backward.default


# NormKind of csrc/include/fastattn/norm_params.h.
LAYER, RMS, RMS_LLAMA, RMS_GEMMA = range(4)


def _forward(
    input: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    philox: Tensor | None,
    dims: int,
    kind: int,
    eps: float,
    dropout_p: float,
) -> tuple[Tensor, Tensor, Tensor]:
    results: tuple[Tensor, Tensor, Tensor] = norm_forward(
        input, residual, weight, bias, philox, dims, kind, eps, dropout_p
    )
    return results


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    input, residual, weight, bias, philox, dims, kind, _, dropout_p = inputs
    _, summed, statistics = output
    normalised_from = input if residual is None else summed
    ctx.save_for_backward(normalised_from, statistics, weight, bias, philox)
    ctx.numbers = (dims, kind, dropout_p)
    ctx.has_residual = residual is not None
    ctx.out_dtype = output[0].dtype
    ctx.mark_non_differentiable(*((statistics,) if ctx.has_residual else (summed, statistics)))
    ctx.set_materialize_grads(False)


def _backward(
    ctx: Any, dnormalised: Tensor | None, dsummed: Tensor | None, _: Tensor | None
) -> tuple[Tensor | None, ...]:
    input, statistics, weight, bias, philox = ctx.saved_tensors
    if dnormalised is None:
        dnormalised = input.new_zeros((), dtype=ctx.out_dtype).expand_as(input)
    need_dinput, need_dresidual, need_dweight, need_dbias, *_rest = ctx.needs_input_grad
    drops = ctx.numbers[2] > 0.0
    needs = (need_dresidual or (need_dinput and not drops), need_dinput and drops)
    dresidual, dinput, dweight, dbias = _gradients(
        *(dnormalised, dsummed if ctx.has_residual else None, input, statistics),
        *(weight, bias, philox, *ctx.numbers, *needs, need_dweight, need_dbias),
    )
    return (
        (dinput if drops else dresidual) if need_dinput else None,
        dresidual if need_dresidual else None,
        dweight if need_dweight else None,
        dbias if need_dbias else None,
        *(None,) * 5,
    )


def _gradients(*inputs: Any) -> tuple[Tensor, ...]:
    """dresidual, dinput, dweight and dbias."""
    if torch.is_grad_enabled():  # somebody wants to differentiate the gradients
        outputs: tuple[Tensor, ...] = _FirstDerivative.apply(*inputs)  # type: ignore[no-untyped-call]
        return outputs
    return _FirstDerivative.forward(*inputs)


class _FirstDerivative(torch.autograd.Function):
    """norm_backward, which itself has no gradient: that of its results raises."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, ...]:
        gradients: tuple[Tensor, ...] = norm_backward(*inputs)
        return gradients

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *_: Any) -> None:
        raise NotImplementedError(
            "fastattn's norms cannot be differentiated twice; those of fastattn.reference can"
        )


class _Norm(torch.autograd.Function):
    """norm_forward with a gradient for input, residual, weight and bias."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
        output = _forward(*inputs)
        _save(ctx, inputs, output)
        return output

    backward = staticmethod(_backward)


class _TransformedNorm(torch.autograd.Function):
    """The same under the transforms of torch.func, which ask for this slower form."""

    generate_vmap_rule = True
    forward = staticmethod(_forward)
    setup_context = staticmethod(_save)
    backward = staticmethod(_backward)


def _needs_autograd(
    input: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None = None
) -> bool:
    """Whether something besides the results may be asked for: a gradient, a forward-mode tangent,
    or what a transform of torch.func wants (whose tensors do not tell whether they require grad).
    """
    return (
        (
            input.requires_grad
            or (weight is not None and weight.requires_grad)
            or (bias is not None and bias.requires_grad)
            or (residual is not None and residual.requires_grad)
        )
        and torch.is_grad_enabled()
    ) or is_transformed()


_NAMES = ("input", "residual", "weight", "bias", "philox")


def norm(
    input: Tensor, weight: Tensor | None, bias: Tensor | None, dims: int, kind: int, eps: float
) -> Tensor:
    """norm_plain, differentiable where a gradient is needed."""
    if _needs_autograd(input, weight, bias):
        return _differentiable(input, None, weight, bias, None, dims, kind, eps, 0.0)[0]
    try:
        out: Tensor = norm_plain(input, weight, bias, dims, kind, eps)
    except RuntimeError as error:
        raise user_error(error, {"input": input, "weight": weight, "bias": bias}) from None
    return out


def add_norm(
    input: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    dims: int,
    kind: int,
    eps: float,
    dropout: dict[str, Any],
) -> tuple[Tensor, Tensor]:
    """(normalised, summed), differentiable where a gradient is needed."""
    tensors = (input, residual, weight, bias)
    if _needs_autograd(input, weight, bias, residual):
        philox, dropout_p = dropout.get("philox"), dropout.get("dropout_p", 0.0)
        return _differentiable(*tensors, philox, dims, kind, eps, dropout_p)[:2]
    if dropout:
        philox, dropout_p = dropout["philox"], dropout["dropout_p"]
        normalised, summed, _ = checked(
            norm_forward, *tensors, philox, dims, kind, eps, dropout_p, names=_NAMES
        )
        return normalised, summed
    try:
        normalised, summed = add_norm_plain(*tensors, dims, kind, eps)
    except RuntimeError as error:
        raise user_error(error, dict(zip(_NAMES, tensors, strict=False))) from None
    return normalised, summed


def _differentiable(*inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
    *tensors, dims, kind, eps, dropout_p = inputs
    if isinstance(eps, int | float):
        # torch.compile(dynamic=True) makes a symbol of a default argument, and fails when a second
        # autograd.Function takes the same one.
        eps = float(eps)
    transformed = torch._C._are_functorch_transforms_active()
    function = _TransformedNorm if transformed else _Norm
    results: tuple[Tensor, Tensor, Tensor] = checked(
        function.apply, *tensors, dims, kind, eps, dropout_p, names=_NAMES
    )
    return results


def _rows_in_order_of(
    like: Tensor, dims: int, row: tuple[int, ...], dtype: torch.dtype | None = None
) -> Tensor:
    """A dense tensor with the leading dimensions of ``like``, in their memory order, and rows."""
    order: list[int] = []
    for d in range(like.dim() - dims):
        at = len(order)
        while at > 0 and like.stride(order[at - 1]) < like.stride(d):
            at -= 1
        order.insert(at, d)
    sizes = (*like.shape[: like.dim() - dims], *row)
    strides, stride = [0] * len(sizes), 1
    for d in (*reversed(range(len(order), len(sizes))), *reversed(order)):
        strides[d] = stride
        stride = stride * max(sizes[d], 1)
    return like.new_empty_strided(sizes, strides, dtype=dtype or like.dtype)


def _out_dtype(input: Tensor, weight: Tensor | None, kind: int) -> torch.dtype:
    if kind == RMS_LLAMA and weight is not None:
        return torch.promote_types(input.dtype, weight.dtype)
    return input.dtype


def _require_one_device(input: Tensor, **tensors: Tensor | None) -> None:
    for name, x in tensors.items():
        if x is not None and x.device != input.device:
            raise ValueError(f"{name}: expected a tensor on {input.device}, got {x.device}")


@register_fake("fastattn::norm_plain")
def _plain_fake(
    input: Tensor, weight: Tensor | None, bias: Tensor | None, dims: int, kind: int, eps: float
) -> Tensor:
    _require_one_device(input, weight=weight, bias=bias)
    row = tuple(input.shape[input.dim() - dims :])
    return _rows_in_order_of(input, dims, row, _out_dtype(input, weight, kind))


@register_fake("fastattn::add_norm_plain")
def _add_plain_fake(
    input: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    dims: int,
    kind: int,
    eps: float,
) -> Any:
    _require_one_device(input, residual=residual)
    row = tuple(input.shape[input.dim() - dims :])
    return _plain_fake(input, weight, bias, dims, kind, eps), _rows_in_order_of(input, dims, row)


@register_fake("fastattn::norm_forward")
def _forward_fake(
    input: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    philox: Tensor | None,
    dims: int,
    kind: int,
    eps: float,
    dropout_p: float,
) -> Any:
    _require_one_device(input, residual=residual, philox=philox)
    row = tuple(input.shape[input.dim() - dims :])
    normalised = _plain_fake(input, weight, bias, dims, kind, eps)
    summed = input.new_empty(0) if residual is None else _rows_in_order_of(input, dims, row)
    kept = (3,) if kind == LAYER else (1,)
    return normalised, summed, _rows_in_order_of(input, dims, kept, real_dtype(input))


@register_fake("fastattn::norm_backward")
def _backward_fake(
    dnormalised: Tensor,
    dsummed: Tensor | None,
    input: Tensor,
    statistics: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    philox: Tensor | None,
    dims: int,
    kind: int,
    dropout_p: float,
    need_dresidual: bool,
    need_dinput: bool,
    need_dweight: bool,
    need_dbias: bool,
) -> Any:
    row = tuple(input.shape[input.dim() - dims :])

    def rows(needed: bool) -> Tensor:
        return _rows_in_order_of(input, dims, row) if needed else input.new_empty(0)

    def sums(needed: bool, like: Tensor | None) -> Tensor:
        wanted = like if needed else None
        return input.new_empty(0) if wanted is None else wanted.new_empty(row)

    return (
        rows(need_dresidual),
        rows(need_dinput),
        sums(need_dweight, weight),
        sums(need_dbias, bias),
    )
