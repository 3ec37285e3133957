"""The normative semantics of norms."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastattn.reference.philox import dropout_mask

__all__ = ["add_layer_norm", "add_rms_norm", "layer_norm", "qk_rms_norm", "rms_norm"]


def layer_norm(
    input: Tensor,
    normalized_shape: int | Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """(x - mean) / sqrt(variance + eps) * weight + bias, in float32 or wider, rounded once."""
    dims = _trailing(normalized_shape)
    x = _wide(input)
    centred = x - x.mean(dims, keepdim=True)
    out = centred * torch.rsqrt(centred.square().mean(dims, keepdim=True) + eps)
    if weight is not None:
        out = out * weight.to(x.dtype)
    if bias is not None:
        out = out + bias.to(x.dtype)
    return out.to(input.dtype)


def rms_norm(
    input: Tensor,
    normalized_shape: int | Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
    *,
    casting: str = "fp32",
) -> Tensor:
    """n = x / sqrt(mean(x^2) + eps) in float32 or wider; then the weight.

    casting="fp32":  (n * weight).to(dtype of input)
    casting="llama": n.to(dtype of input) * weight, in the promoted dtype
    casting="gemma": (n * (1 + weight)).to(dtype of input)

    eps=None is the eps of the dtype that is computed in.
    """
    x = _wide(input)
    if eps is None:
        eps = torch.finfo(x.dtype).eps
    n = x * torch.rsqrt(x.square().mean(_trailing(normalized_shape), keepdim=True) + eps)
    if casting == "llama":
        n = n.to(input.dtype)
        return n if weight is None else n * weight
    if weight is not None:
        n = n * (1.0 + weight.to(x.dtype) if casting == "gemma" else weight.to(x.dtype))
    return n.to(input.dtype)


def add_layer_norm(
    input: Tensor,
    residual: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    dropout_p: float = 0.0,
    philox: tuple[int, int] | None = None,
) -> tuple[Tensor, Tensor]:
    """(layer_norm(summed), summed) with summed = residual + dropout(input), rounded as it goes.

    The norm is over the dimensions of weight, or the last one. ``philox`` is the (seed, offset) of
    the mask.
    """
    shape = _shape(input, weight)
    summed = residual + _dropout(input, shape, dropout_p, philox)
    return layer_norm(summed, shape, weight, bias, eps), summed


def add_rms_norm(
    input: Tensor,
    residual: Tensor,
    weight: Tensor | None = None,
    eps: float = 1e-6,
    *,
    dropout_p: float = 0.0,
    casting: str = "fp32",
    philox: tuple[int, int] | None = None,
) -> tuple[Tensor, Tensor]:
    """(rms_norm(summed), summed) with summed as in ``add_layer_norm``."""
    shape = _shape(input, weight)
    summed = residual + _dropout(input, shape, dropout_p, philox)
    return rms_norm(summed, shape, weight, eps, casting=casting), summed


def qk_rms_norm(
    query: Tensor,
    key: Tensor,
    query_weight: Tensor | None = None,
    key_weight: Tensor | None = None,
    eps: float = 1e-6,
    *,
    casting: str = "fp32",
) -> tuple[Tensor, Tensor]:
    """rms_norm of each over its last dimension."""
    pairs = ((query, query_weight), (key, key_weight))
    query, key = (rms_norm(x, x.shape[-1], weight, eps, casting=casting) for x, weight in pairs)
    return query, key


def _dropout(
    input: Tensor, shape: Sequence[int], dropout_p: float, philox: tuple[int, int] | None
) -> Tensor:
    """input * keep / (1 - dropout_p), the word of (row, column) being that of dropout_mask for
    batch and head row >> 32, query row and key column."""
    if dropout_p == 0.0:
        return input
    if philox is None:
        raise ValueError("philox: dropout needs a (seed, offset) pair")
    width = torch.Size(shape).numel()
    rows = input.numel() // max(width, 1)
    keep = dropout_mask((1, 1, rows, width), dropout_p, philox).reshape(input.shape)
    factor = keep.to(_wide(input)) / (1.0 - dropout_p if dropout_p < 1.0 else 1.0)
    return (input * factor.to(input.device)).to(input.dtype)


def _shape(input: Tensor, weight: Tensor | None) -> Sequence[int]:
    return input.shape[-1:] if weight is None else weight.shape


def _trailing(normalized_shape: int | Sequence[int]) -> list[int]:
    dims = 1 if isinstance(normalized_shape, int) else len(normalized_shape)
    return list(range(-dims, 0))


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
