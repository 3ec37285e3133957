"""What stands between two sublayers: dropout, the addition of the residual and a norm."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastattn import functional
from fastattn.nn._linear import is_plain
from fastattn.nn.norm import LayerNorm, RMSNorm

__all__ = ["add_norm"]


def add_norm(
    x: Tensor, residual: Tensor, dropout: nn.Module, norm: nn.Module | None
) -> tuple[Tensor, Tensor]:
    """norm(residual + dropout(x)) and the sum, in one pass where both modules are just that.

    Another norm or dropout, or one with hooks, is called as it is. Without norm, the sum twice.
    """
    if norm is None or not _is_ours(norm):
        summed = residual + dropout(x)
        return summed if norm is None else norm(summed), summed
    dropout_p = 0.0
    if not is_plain(dropout, nn.Dropout):
        x = dropout(x)
    elif dropout.training:
        dropout_p = dropout.p
    if x.dtype != residual.dtype:  # under autocast; the sum has the wider dtype
        dtype = torch.promote_types(x.dtype, residual.dtype)
        x, residual = x.to(dtype), residual.to(dtype)
    if isinstance(norm, LayerNorm):
        return functional.add_layer_norm(
            x, residual, norm.weight, norm.bias, norm.eps, dropout_p=dropout_p
        )
    assert isinstance(norm, RMSNorm)
    eps = norm.eps
    if eps is None:
        eps = torch.finfo(torch.promote_types(x.dtype, torch.float32)).eps
    return functional.add_rms_norm(
        x, residual, norm.weight, eps, dropout_p=dropout_p, casting=norm.casting
    )


def _is_ours(norm: nn.Module) -> bool:
    if is_plain(norm, LayerNorm) or is_plain(norm, RMSNorm):
        return norm.weight is not None  # without it the functions do not see how many dimensions
    return False
