"""The attention ops as Python sees them: shapes without data, FLOPs and autograd.

The kernels, and the checks of what they are given, are in the extension (csrc/bind).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from fastattn import _C  # noqa: F401  (registers the ops)
from fastattn._ops.common import is_transformed, real_dtype, register_fake
from fastattn._ops.errors import checked, user_error

attention_plain = torch.ops.fastattn.attention_plain.default
attention_forward = torch.ops.fastattn.attention_forward.default
attention_backward = torch.ops.fastattn.attention_backward.default
attention_weights = torch.ops.fastattn.attention_weights.default
attention_column_sums = torch.ops.fastattn.attention_column_sums.default
attention_schedule = torch.ops.fastattn.attention_schedule.default
attention_backward_schedule = torch.ops.fastattn.attention_backward_schedule.default

Options = dict[str, Any]

# The options of every op that takes them: the last arguments in the schema, with their defaults.
OPTIONS: Options = {a.name: a.default_value for a in attention_forward._schema.arguments[3:]}


def _forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    sink: Tensor | None,
    options: Options,
) -> tuple[Tensor, Tensor]:
    # The schedule whose scores the backward pass computes again in the same way, so that the
    # rounding of a score cancels against that of its lse.
    options = options | {"for_backward": True}
    out, lse = attention_forward(query, key, value, bias=bias, sink=sink, **options)
    return out, lse


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *differentiable, options = inputs
    tensors = {name: x for name, x in options.items() if isinstance(x, Tensor)}
    ctx.save_for_backward(*differentiable, *output, *tensors.values())
    ctx.tensors = tuple(tensors)
    ctx.numbers = {name: x for name, x in options.items() if name not in tensors}
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
    query, key, value, bias, sink, out, lse, *tensors = ctx.saved_tensors
    if dout is None:
        dout = out.new_zeros(()).expand_as(out)
    needs = ctx.needs_input_grad[:5]
    options = dict(zip(ctx.tensors, tensors, strict=True)) | ctx.numbers
    gradients = _gradients(dout, dlse, query, key, value, out, lse, bias, sink, needs, options)
    return (*(g if need else None for g, need in zip(gradients, needs, strict=True)), None)


def _gradients(*inputs: Any) -> tuple[Tensor, ...]:
    """dquery, dkey, dvalue, dbias and dsink."""
    if torch.is_grad_enabled():  # somebody wants to differentiate the gradients
        outputs: tuple[Tensor, ...] = _FirstDerivative.apply(*inputs)  # type: ignore[no-untyped-call]
        return outputs
    return _FirstDerivative.forward(*inputs)


class _FirstDerivative(torch.autograd.Function):
    """attention_backward, which itself has no gradient: that of its results raises."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        dout: Tensor,
        dlse: Tensor | None,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        out: Tensor,
        lse: Tensor,
        bias: Tensor | None,
        sink: Tensor | None,
        needs: tuple[bool, ...],
        options: Options,
    ) -> tuple[Tensor, ...]:
        need_dquery, need_dkey, need_dvalue, need_dbias, need_dsink = needs
        gradients: tuple[Tensor, ...] = attention_backward(
            *(dout, dlse, query, key, value, out, lse),
            *(need_dquery, need_dkey or need_dvalue, need_dbias, need_dsink),
            bias=bias,
            sink=sink,
            **options,
        )
        return gradients

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *_: Any) -> None:
        raise NotImplementedError(
            "fastattn's attention cannot be differentiated twice; fastattn.reference.attention can"
        )


class _Attention(torch.autograd.Function):
    """attention_forward with a gradient for query, key, value, bias and sink."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor]:
        output = _forward(*inputs)
        _save(ctx, inputs, output)
        return output

    backward = staticmethod(_backward)


class _TransformedAttention(torch.autograd.Function):
    """The same under the transforms of torch.func, which ask for this form; it takes 30 us more."""

    generate_vmap_rule = True  # torch runs the op once per entry, and warns that this is slow
    forward = staticmethod(_forward)
    setup_context = staticmethod(_save)
    backward = staticmethod(_backward)


def needs_autograd(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether something besides the results may be asked for: a gradient, a forward-mode tangent,
    or what a transform of torch.func wants (whose tensors do not tell whether they require grad).
    """
    return (
        (query.requires_grad or key.requires_grad or value.requires_grad)
        and torch.is_grad_enabled()
    ) or is_transformed()


def attend(query: Tensor, key: Tensor, value: Tensor, options: Options) -> tuple[Tensor, Tensor]:
    """(out, lse) of attention_forward, differentiable where a gradient is needed."""
    if not needs_autograd(query, key, value) and not (
        ("bias" in options or "sink" in options) and _needs_dbias_or_dsink(options)
    ):
        out, lse = checked(attention_forward, query, key, value, **options)
        return out, lse
    transformed = torch._C._are_functorch_transforms_active()
    function = _TransformedAttention if transformed else _Attention
    bias, sink = options.pop("bias", None), options.pop("sink", None)
    out, lse = checked(function.apply, query, key, value, bias, sink, options)
    return out, lse


def _needs_dbias_or_dsink(options: Options) -> bool:
    tensors = (options.get("bias"), options.get("sink"))
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def attend_plain(
    query: Tensor, key: Tensor, value: Tensor, causal: bool, scale: float | None, bshd: bool
) -> Tensor:
    """attention_plain: no options, no gradient, no lse."""
    try:
        out: Tensor = attention_plain(query, key, value, causal, scale, bshd)
    except RuntimeError as error:
        raise user_error(error, {"query": query, "key": key, "value": value}) from None
    return out


def _empty_in_order_of(like: Tensor, columns: int, packed: bool) -> Tensor:
    """A dense tensor of the shape of ``like`` but for its columns, in the same memory order."""
    *batch, outer, inner = like.shape[:-1]
    strides = [inner * columns, columns, 1]
    if not packed and outer > 1 and inner > 1 and like.stride(-2) > like.stride(-3):
        strides = [columns, outer * columns, 1]
    stride = max(outer, 1) * max(inner, 1) * columns
    for size in reversed(batch):
        strides.insert(0, stride)
        stride = stride * max(size, 1)
    return like.new_empty_strided((*batch, outer, inner, columns), strides)


def _lse_shape(query: Tensor, packed: bool, bshd: bool) -> tuple[int, ...]:
    *batch, outer, inner = query.shape[:-1]
    return (*batch, inner, outer) if packed or bshd else (*batch, outer, inner)


def _require_one_device(query: Tensor, **tensors: Any) -> None:
    for name, x in tensors.items():
        if isinstance(x, Tensor) and x.device != query.device:
            raise ValueError(f"{name}: expected a tensor on {query.device}, got {x.device}")


def named_options(given: Sequence[Any], named: Options) -> Options:
    """All options: torch leaves out what is at its default at the end of the arguments."""
    return OPTIONS | dict(zip(OPTIONS, given, strict=False)) | named


@register_fake("fastattn::attention_plain")
def _plain_fake(
    query: Tensor, key: Tensor, value: Tensor, causal: bool, scale: float | None, bshd: bool
) -> Tensor:
    _require_one_device(query, key=key, value=value)
    return _empty_in_order_of(query, value.shape[-1], packed=False)


@register_fake("fastattn::attention_forward")
def attention_forward_fake(
    query: Tensor, key: Tensor, value: Tensor, *given: Any, **named: Any
) -> Any:
    options = named_options(given, named)
    _require_one_device(query, key=key, value=value, **options)
    packed = options["cu_seqlens_q"] is not None
    out = _empty_in_order_of(query, value.shape[-1], packed)
    return out, query.new_empty(_lse_shape(query, packed, options["bshd"]), dtype=real_dtype(query))


@register_fake("fastattn::attention_backward")
def _backward_fake(
    dout: Tensor,
    dlse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    need_dquery: bool,
    need_dkey_dvalue: bool,
    need_dbias: bool,
    need_dsink: bool,
    *given: Any,
    **named: Any,
) -> Any:
    options = named_options(given, named)
    packed = options["cu_seqlens_q"] is not None
    bias, sink = options["bias"], options["sink"]

    def like(x: Tensor, needed: bool) -> Tensor:
        return _empty_in_order_of(x, x.shape[-1], packed) if needed else x.new_empty(0)

    return (
        like(query, need_dquery),
        like(key, need_dkey_dvalue),
        like(value, need_dkey_dvalue),
        bias.new_empty(bias.shape) if need_dbias else query.new_empty(0),
        sink.new_empty(sink.shape) if need_dsink else query.new_empty(0, dtype=real_dtype(query)),
    )


def _score_sizes(query: Tensor, key: Tensor, bshd: bool) -> tuple[list[int], int, int, int]:
    """batch, heads, queries, keys"""
    *batch, heads, queries = _lse_shape(query, False, bshd)
    return batch, heads, queries, key.shape[-3 if bshd else -2]


@register_fake("fastattn::attention_weights")
def _weights_fake(
    query: Tensor, key: Tensor, lse: Tensor, rows: Tensor, heads: Tensor, *given: Any, **named: Any
) -> Tensor:
    batch, _, _, keys = _score_sizes(query, key, named_options(given, named)["bshd"])
    return query.new_empty((*batch, heads.shape[0], rows.shape[0], keys), dtype=real_dtype(query))


@register_fake("fastattn::attention_column_sums")
def _column_sums_fake(query: Tensor, key: Tensor, lse: Tensor, *given: Any, **named: Any) -> Tensor:
    batch, heads, _, keys = _score_sizes(query, key, named_options(given, named)["bshd"])
    return query.new_empty((*batch, heads, keys), dtype=real_dtype(query))


# FLOPs: two for each multiply-add of the matrix products, and nothing off for causality, masks or
# lengths, as torch counts its own attention.


def _num_scores(query: Tensor, key: Tensor, options: Options) -> int:
    """Elements of the score matrix, over all batches and heads."""
    cu_seqlens_q, cu_seqlens_k = options["cu_seqlens_q"], options["cu_seqlens_k"]
    if cu_seqlens_q is None:
        batch, heads, queries, keys = _score_sizes(query, key, options["bshd"])
        return math.prod(batch) * heads * queries * keys
    try:
        pairs = int((cu_seqlens_q.diff() * cu_seqlens_k.diff()).sum().item())
    except RuntimeError:  # without data: as if all sequences were as long as each other
        pairs = query.shape[0] * key.shape[0] // max(cu_seqlens_q.shape[0] - 1, 1)
    return query.shape[1] * pairs


@register_flop_formula(torch.ops.fastattn.attention_plain, get_raw=True)
def _plain_flops(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    causal: bool,
    scale: float | None,
    bshd: bool,
    **_: Any,
) -> int:
    scores = _num_scores(query, key, OPTIONS | {"bshd": bshd})
    return 2 * scores * (query.shape[-1] + value.shape[-1])


@register_flop_formula(torch.ops.fastattn.attention_forward, get_raw=True)
def _forward_flops(query: Tensor, key: Tensor, value: Tensor, *given: Any, **named: Any) -> int:
    scores = _num_scores(query, key, named_options(given, named))
    return 2 * scores * (query.shape[-1] + value.shape[-1])


@register_flop_formula(torch.ops.fastattn.attention_backward, get_raw=True)
def _backward_flops(
    dout: Tensor,
    dlse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *rest: Any,
    **named: Any,
) -> int:
    out_lse_and_needs = 6
    scores = _num_scores(query, key, named_options(rest[out_lse_and_needs:], named))
    return 2 * scores * (3 * query.shape[-1] + 2 * value.shape[-1])


@register_flop_formula(torch.ops.fastattn.attention_weights, get_raw=True)
def _weights_flops(
    query: Tensor, key: Tensor, lse: Tensor, rows: Tensor, heads: Tensor, *given: Any, **named: Any
) -> int:
    batch, _, _, keys = _score_sizes(query, key, named_options(given, named)["bshd"])
    return 2 * math.prod(batch) * heads.numel() * rows.numel() * keys * query.shape[-1]


@register_flop_formula(torch.ops.fastattn.attention_column_sums, get_raw=True)
def _column_sums_flops(query: Tensor, key: Tensor, lse: Tensor, *given: Any, **named: Any) -> int:
    return 2 * _num_scores(query, key, named_options(given, named)) * query.shape[-1]
