"""Norms, activations and rotary embedding in ONNX: their ops, one function each."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastattn._ops import activation as _activation
from fastattn._ops import norm as _norm
from fastattn._ops import rope as _rope
from fastattn.onnx._nodes import in_rows_of, in_wide, node, wide_dtype

__all__ = [
    "activation",
    "add_norm_plain",
    "gated_activation",
    "norm_forward",
    "norm_plain",
    "rope",
    "rope_qk",
]


def norm_plain(
    input: Tensor, weight: Tensor | None, bias: Tensor | None, dims: int, kind: int, eps: float
) -> Tensor:
    """LayerNormalization, RMSNormalization: in float32, and rounded where the casting says so."""
    x = input.to(wide_dtype(input))
    out_dtype, factor = input.dtype, None
    if kind == _norm.RMS_LLAMA and weight is not None and input.dtype.itemsize < 4:
        factor, weight = weight, None  # which multiplies what has been rounded
        out_dtype = torch.promote_types(input.dtype, factor.dtype)
    elif kind == _norm.RMS_GEMMA and weight is not None:
        weight = 1.0 + weight.to(x.dtype)
    weight, bias = in_wide(weight, bias, like=x)
    if weight is None:
        weight = torch.ones(input.shape[-dims:], dtype=x.dtype, device=x.device)
    shared: dict[str, Any] = {"axis": -dims, "epsilon": eps}
    if kind == _norm.LAYER:
        out = node("LayerNormalization", (x, weight, bias), x.shape, version=17, **shared)
    else:
        out = node("RMSNormalization", (x, weight), x.shape, version=23, **shared)
    if factor is not None:
        out = out.to(input.dtype) * factor
    return in_rows_of(input, out.to(out_dtype), dims)


def add_norm_plain(
    input: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    dims: int,
    kind: int,
    eps: float,
) -> tuple[Tensor, Tensor]:
    summed = in_rows_of(input, input + residual, dims)
    return norm_plain(summed, weight, bias, dims, kind, eps), summed


def norm_forward(
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
    """The form for training; its statistics are for the backward pass, and nobody reads them."""
    if dropout_p > 0.0:
        raise ValueError(
            f"dropout_p: expected 0 in a model for ONNX, got {dropout_p}: call model.eval() first"
        )
    nothing = input.new_empty(0)
    if residual is None:
        return norm_plain(input, weight, bias, dims, kind, eps), nothing, nothing
    return *add_norm_plain(input, residual, weight, bias, dims, kind, eps), nothing


def activation(input: Tensor, bias: Tensor | None, kind: int, *, swish: bool) -> Tensor:
    """Gelu, Swish or Sigmoid and Mul, Relu."""
    if bias is None:
        return _activated(input, kind, swish)
    return _activated(input.to(wide_dtype(input)) + bias, kind, swish).to(input.dtype)


def gated_activation(gate: Tensor, up: Tensor | None, kind: int, *, swish: bool) -> Tensor:
    if up is None:
        gate, up = gate.chunk(2, dim=-1)
    wide = wide_dtype(gate)
    return (_activated(gate.to(wide), kind, swish) * up.to(wide)).to(gate.dtype)


def _activated(x: Tensor, kind: int, swish: bool) -> Tensor:
    if kind == _activation.SILU:
        return in_rows_of(x, node("Swish", (x,), x.shape, version=24), 0) if swish else F.silu(x)
    if kind == _activation.RELU:
        return F.relu(x)
    return F.gelu(x, approximate="tanh" if kind == _activation.GELU_TANH else "none")


# The options of the ops of rotary embedding, in the order of their schema, with their defaults.
_ROPE_OPTIONS: _rope.Options = {a.name: a.default_value for a in _rope.rope._schema.arguments[3:]}


def rope(x: Tensor, cos: Tensor, sin: Tensor, *given: Any, **named: Any) -> Tensor:
    """RotaryEmbedding of (batch, heads, length, head_dim), in float32 for 16 bits."""
    options = _ROPE_OPTIONS | dict(zip(_ROPE_OPTIONS, given)) | named
    half = cos.shape[-1]
    if half == 0:
        return x.clone()
    heads_first = x.transpose(-3, -2) if options["bshd"] else x
    batch, (heads, length, head_dim) = heads_first.shape[:-3], heads_first.shape[-3:]
    rows = heads_first.reshape(-1, heads, length, head_dim).to(wide_dtype(x))
    cos, sin = cos.to(rows.dtype), sin.to(rows.dtype)
    if options["inverse"]:
        sin = -sin
    positions = None
    if cos.dim() == 2:
        positions = _positions(x, length, options).expand(*batch, length).reshape(-1, length)
    else:  # a row for each token
        cos, sin = (t.expand(*batch, length, half).reshape(-1, length, half) for t in (cos, sin))
    partial = 2 * half < head_dim
    out = node(
        "RotaryEmbedding",
        (rows, cos, sin, positions),
        rows.shape,
        version=23,
        interleaved=int(options["interleaved"]),
        rotary_embedding_dim=2 * half if partial else None,
        num_heads=heads if partial else None,
    )
    out = out.to(x.dtype).reshape(heads_first.shape)
    return in_rows_of(x, out.transpose(-3, -2) if options["bshd"] else out, 0)


def rope_qk(
    query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, *given: Any, **named: Any
) -> tuple[Tensor, Tensor]:
    return rope(query, cos, sin, *given, **named), rope(key, cos, sin, *given, **named)


def _positions(x: Tensor, length: int, options: _rope.Options) -> Tensor:
    """The row of the tables for each token, (length) or (*batch, length)."""
    positions: Tensor | None = options["positions"]
    offsets: Tensor | None = options["offsets"]
    if positions is None:
        positions = torch.arange(length, device=x.device)
    positions = positions.to(torch.int64) + options["offset"]
    return positions if offsets is None else positions + offsets.to(torch.int64).unsqueeze(-1)
