"""The probabilities of attention with their gradient, which lives on the chosen part alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastattn._ops.attention import Options, attention_weights
from fastattn._ops.common import is_transformed
from fastattn._ops.errors import checked

__all__ = ["weights"]


def weights(
    query: Tensor,
    key: Tensor,
    lse: Tensor,
    rows: Tensor | None,
    heads: Tensor | None,
    options: Options,
) -> Tensor:
    """attention_weights, differentiable where a gradient is needed; None chooses everything."""
    bias = options.pop("bias", None)
    function: Any = _forward
    if _needs_autograd(query, key, lse, bias):
        function = _Weights.apply
    names = ("query", "key", "lse", "bias")
    result: Tensor = checked(function, query, key, lse, bias, rows, heads, options, names=names)
    return result


def _needs_autograd(*tensors: Tensor | None) -> bool:
    requires_grad = any(x is not None and x.requires_grad for x in tensors)
    return (requires_grad and torch.is_grad_enabled()) or is_transformed()


def _forward(
    query: Tensor,
    key: Tensor,
    lse: Tensor,
    bias: Tensor | None,
    rows: Tensor | None,
    heads: Tensor | None,
    options: Options,
) -> Tensor:
    row_dim, head_dim = (-3, -2) if options.get("bshd") else (-2, -3)
    if rows is None:
        rows = torch.arange(query.shape[row_dim], device=query.device)
    if heads is None:
        heads = torch.arange(query.shape[head_dim], device=query.device)
    result: Tensor = attention_weights(query, key, lse, rows, heads, bias=bias, **options)
    return result


class _Weights(torch.autograd.Function):
    """w = exp(s - lse):    ds = w dw,    dlse_i = -sum_j ds_ij,    dbias = ds

    and with a softcap, s = c tanh(x / c):    dx = (1 - tanh(x / c) ** 2) ds

    The backward pass is made of torch's ops, so that it can be differentiated in its turn.
    """

    generate_vmap_rule = True
    forward = staticmethod(_forward)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        query, key, _, bias, rows, heads, options = inputs
        ctx.save_for_backward(query, key, output, rows, heads)
        ctx.bias = None if bias is None else (bias.shape, bias.dtype)
        ctx.options = {name: options.get(name) for name in ("bshd", "scale", "softcap")}

    @staticmethod
    def backward(ctx: Any, dweights: Tensor) -> tuple[Tensor | None, ...]:
        query, key, weights, rows, heads = ctx.saved_tensors
        need_dquery, need_dkey, need_dlse, need_dbias = ctx.needs_input_grad[:4]
        scale, softcap = ctx.options["scale"], ctx.options["softcap"]
        if ctx.options["bshd"]:
            query, key = query.transpose(-3, -2), key.transpose(-3, -2)
        num_heads, queries, head_dim = query.shape[-3:]
        group = num_heads // key.shape[-3] if key.shape[-3] else 1
        kv_heads = heads
        if group > 1:
            every = torch.arange(num_heads, device=query.device)
            kv_heads = (every if heads is None else heads) // group
        scale = head_dim**-0.5 if scale is None else scale

        # A hidden key has weight 0, whatever it holds and whatever gradient arrives at it.
        dscores = (weights * dweights).masked_fill(weights == 0.0, 0.0)
        dquery = dkey = dlse = dbias = None
        if need_dlse:
            dlse = -_placed(_placed(dscores.sum(-1), -1, rows, queries), -2, heads, num_heads)
        if need_dbias:
            dbias = _reduced(dscores, rows, heads, *ctx.bias)
        if need_dquery or need_dkey:
            chosen = _chosen(_chosen(_finite(query, dscores), -3, heads), -2, rows)
            keys = _chosen(_finite(key, dscores), -3, kv_heads)
            if softcap is not None:
                products = (chosen @ keys.mT) * (scale / softcap)
                dscores = dscores * (1.0 - products.tanh().square())
            dscores = dscores * scale
            if need_dquery:
                dquery = _placed(dscores @ keys, -2, rows, queries)
                dquery = _placed(dquery, -3, heads, num_heads).to(query.dtype)
            if need_dkey:
                dkey = _placed(dscores.mT @ chosen, -3, kv_heads, key.shape[-3]).to(key.dtype)
        if ctx.options["bshd"]:
            dquery, dkey = (x if x is None else x.transpose(-3, -2) for x in (dquery, dkey))
        return dquery, dkey, dlse, dbias, None, None, None


def _finite(x: Tensor, like: Tensor) -> Tensor:
    """x in the dtype of sums, without what would turn a weight of zero into NaN."""
    return x.to(like.dtype).nan_to_num(0.0, 0.0, 0.0)


def _chosen(x: Tensor, dim: int, indices: Tensor | None) -> Tensor:
    return x if indices is None else x.index_select(dim, indices)


def _placed(x: Tensor, dim: int, indices: Tensor | None, size: int) -> Tensor:
    """The transpose of _chosen: each slice where it came from, equal indices added up."""
    if indices is None:
        return x
    shape = list(x.shape)
    shape[dim] = size
    return x.new_zeros(shape).index_add(dim, indices, x)


def _reduced(
    dscores: Tensor,
    rows: Tensor | None,
    heads: Tensor | None,
    shape: torch.Size,
    dtype: torch.dtype,
) -> Tensor:
    """The gradient of a bias that was broadcast."""
    full = (1,) * (dscores.dim() - len(shape)) + tuple(shape)
    for dim, indices in ((-3, heads), (-2, rows)):
        if full[dim] == 1:
            dscores = dscores.sum(dim, keepdim=True)
        else:
            dscores = _placed(dscores, dim, indices, full[dim])
    return dscores.sum_to_size(full).reshape(shape).to(dtype)
