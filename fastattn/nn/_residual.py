"""What stands between two sublayers: dropout, the addition of the residual and a norm."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastattn import functional
from fastattn.nn._linear import is_plain
from fastattn.nn.norm import LayerNorm

__all__ = ["add_norm"]


def add_norm(
    x: Tensor, residual: Tensor, dropout: nn.Module, norm: nn.Module
) -> tuple[Tensor, Tensor]:
    """norm(residual + dropout(x)) and the sum, in one pass where both modules are just that.

    Another norm or dropout, or one with hooks, is called as it is.
    """
    if not is_plain(norm, LayerNorm) or norm.weight is None:
        summed = residual + dropout(x)
        return norm(summed), summed
    dropout_p = 0.0
    if not is_plain(dropout, nn.Dropout):
        x = dropout(x)
    elif dropout.training:
        dropout_p = dropout.p
    if x.dtype != residual.dtype:  # under autocast; the sum has the wider dtype
        dtype = torch.promote_types(x.dtype, residual.dtype)
        x, residual = x.to(dtype), residual.to(dtype)
    return functional.add_layer_norm(
        x, residual, norm.weight, norm.bias, norm.eps, dropout_p=dropout_p
    )
