"""The ops of rotary embedding as Python sees them: shapes without data, and autograd."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastattn import _C  # noqa: F401  (registers the ops)
from fastattn._ops.common import is_transformed, register_fake, written
from fastattn._ops.errors import checked, require_one_device

rope = torch.ops.fastattn.rope.default
rope_ = torch.ops.fastattn.rope_.default
rope_qk = torch.ops.fastattn.rope_qk.default
rope_qk_ = torch.ops.fastattn.rope_qk_.default

Options = dict[str, Any]


def _inverse(options: Options) -> Options:
    return options | {"inverse": not options.get("inverse", False)}


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    cos, sin, options = inputs[-3:]
    tensors = {name: x for name, x in options.items() if isinstance(x, Tensor)}
    ctx.save_for_backward(cos, sin, *tensors.values())
    ctx.tensors = tuple(tensors)
    ctx.numbers = {name: x for name, x in options.items() if name not in tensors}
    ctx.set_materialize_grads(False)


def _saved(ctx: Any) -> tuple[Tensor, Tensor, Options]:
    """cos, sin and the options of the inverse rotation."""
    cos, sin, *tensors = ctx.saved_tensors
    options = dict(zip(ctx.tensors, tensors, strict=True)) | ctx.numbers
    return cos, sin, _inverse(options)


# A rotation is linear, and its transpose is its inverse: the gradient is rotated back, by a
# function that is differentiable in turn.


def _backward(ctx: Any, dout: Tensor | None) -> tuple[Tensor | None, ...]:
    dx = None if dout is None else rotate(dout, *_saved(ctx))
    return dx, None, None, None


def _backward_qk(ctx: Any, dquery: Tensor | None, dkey: Tensor | None) -> tuple[Tensor | None, ...]:
    need_dquery, need_dkey = ctx.needs_input_grad[:2]
    dquery, dkey = dquery if need_dquery else None, dkey if need_dkey else None
    if dquery is not None and dkey is not None:
        dquery, dkey = rotate_qk(dquery, dkey, *_saved(ctx))
    elif dquery is not None:
        dquery = rotate(dquery, *_saved(ctx))
    elif dkey is not None:
        dkey = rotate(dkey, *_saved(ctx))
    return dquery, dkey, None, None, None


def _forward(x: Tensor, cos: Tensor, sin: Tensor, options: Options) -> Tensor:
    out: Tensor = rope(x, cos, sin, **options)
    return out


def _forward_qk(
    query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, options: Options
) -> tuple[Tensor, Tensor]:
    outs: tuple[Tensor, Tensor] = rope_qk(query, key, cos, sin, **options)
    return outs


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        _save(ctx, inputs, None)
        return _forward(*inputs)

    backward = staticmethod(_backward)


class _RopeQK(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor]:
        _save(ctx, inputs, None)
        return _forward_qk(*inputs)

    backward = staticmethod(_backward_qk)


class _TransformedRope(torch.autograd.Function):
    """The same in the form that the transforms of torch.func ask for, which takes longer."""

    generate_vmap_rule = True
    forward = staticmethod(_forward)
    setup_context = staticmethod(_save)
    backward = staticmethod(_backward)


class _TransformedRopeQK(torch.autograd.Function):
    generate_vmap_rule = True
    forward = staticmethod(_forward_qk)
    setup_context = staticmethod(_save)
    backward = staticmethod(_backward_qk)


class _RopeInPlace(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, options: Options) -> Tensor:
        _save(ctx, (x, cos, sin, options), None)
        ctx.mark_dirty(x)
        rope_(x, cos, sin, **options)
        return x

    backward = staticmethod(_backward)


class _RopeQKInPlace(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, options: Options
    ) -> tuple[Tensor, Tensor]:
        _save(ctx, (query, key, cos, sin, options), None)
        ctx.mark_dirty(query, key)
        rope_qk_(query, key, cos, sin, **options)
        return query, key

    backward = staticmethod(_backward_qk)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, options: Options) -> Tensor:
    names = ("x", "cos", "sin")
    if not is_transformed() and not (x.requires_grad and torch.is_grad_enabled()):
        out: Tensor = checked(rope, x, cos, sin, names=names, **options)
    else:
        function = _TransformedRope if torch._C._are_functorch_transforms_active() else _Rope
        out = checked(function.apply, x, cos, sin, options, names=names)
    return out


def rotate_qk(
    query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, options: Options
) -> tuple[Tensor, Tensor]:
    names = ("query", "key", "cos", "sin")
    outs: tuple[Tensor, Tensor]
    needs_grad = (query.requires_grad or key.requires_grad) and torch.is_grad_enabled()
    if not needs_grad and not is_transformed():
        outs = checked(rope_qk, query, key, cos, sin, names=names, **options)
    else:
        function = _TransformedRopeQK if torch._C._are_functorch_transforms_active() else _RopeQK
        outs = checked(function.apply, query, key, cos, sin, options, names=names)
    return outs


def _check_writable(name: str, x: Tensor) -> None:
    """What torch says of its own in-place ops, but before anything is written."""
    base = x._base if x._is_view() else x
    if base is not None and base.is_leaf and base.requires_grad:
        raise ValueError(
            f"{name}: expected a tensor that may be written in place, got a leaf that requires "
            "grad, or a view of one"
        )


def rotate_in_place(x: Tensor, cos: Tensor, sin: Tensor, options: Options) -> Tensor:
    names = ("x", "cos", "sin")
    if torch.compiler.is_compiling():
        if x.requires_grad and torch.is_grad_enabled():  # the compiler makes it in place again
            return x.copy_(rotate(x, cos, sin, options))
    elif is_transformed() or (x.requires_grad and torch.is_grad_enabled()):
        _check_writable("x", x)
        checked(_RopeInPlace.apply, x, cos, sin, options, names=names)
        return x
    checked(rope_, x, cos, sin, names=names, **options)
    written(x)
    return x


def rotate_qk_in_place(
    query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, options: Options
) -> tuple[Tensor, Tensor]:
    names = ("query", "key", "cos", "sin")
    needs_grad = (query.requires_grad or key.requires_grad) and torch.is_grad_enabled()
    if torch.compiler.is_compiling():
        if needs_grad:
            outs = rotate_qk(query, key, cos, sin, options)
            return query.copy_(outs[0]), key.copy_(outs[1])
    elif is_transformed() or needs_grad:
        _check_writable("query", query)
        _check_writable("key", key)
        if query._is_view() or key._is_view():  # autograd takes one written view from a function
            outs = rotate_qk(query, key, cos, sin, options)
            return query.copy_(outs[0]), key.copy_(outs[1])
        checked(_RopeQKInPlace.apply, query, key, cos, sin, options, names=names)
        return query, key
    checked(rope_qk_, query, key, cos, sin, names=names, **options)
    written(query, key)
    return query, key


@register_fake("fastattn::rope")
def _rope_fake(x: Tensor, cos: Tensor, sin: Tensor, *_: Any, **__: Any) -> Tensor:
    require_one_device(x=x, cos=cos, sin=sin)
    return torch.empty_like(x)


@register_fake("fastattn::rope_")
def _rope_in_place_fake(x: Tensor, cos: Tensor, sin: Tensor, *_: Any, **__: Any) -> None:
    require_one_device(x=x, cos=cos, sin=sin)


@register_fake("fastattn::rope_qk")
def _rope_qk_fake(
    query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, *_: Any, **__: Any
) -> tuple[Tensor, Tensor]:
    require_one_device(query=query, key=key, cos=cos, sin=sin)
    return torch.empty_like(query), torch.empty_like(key)


@register_fake("fastattn::rope_qk_")
def _rope_qk_in_place_fake(
    query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, *_: Any, **__: Any
) -> None:
    require_one_device(query=query, key=key, cos=cos, sin=sin)
