"""The end of one sublayer and the begin of the next: dropout, residual addition and norm."""

from __future__ import annotations

from torch import Tensor, nn

from fastattn import functional
from fastattn.nn._linear import has_hooks
from fastattn.nn.norm import LayerNorm, RMSNorm

__all__ = ["add_and_normalise"]


def add_and_normalise(
    norm: nn.Module | None, x: Tensor, residual: Tensor, dropout_p: float
) -> tuple[Tensor, Tensor]:
    """(norm(summed), summed) with summed = residual + dropout(x); without norm, summed twice.

    One pass over memory where norm is ours, and calling it would do no more than its forward. (In
    autocast x and residual may differ in dtype, and their sum is neither's.)
    """
    if norm is not None and x.dtype == residual.dtype and not has_hooks(norm):
        if type(norm) is LayerNorm and len(norm.normalized_shape) == 1:
            return functional.add_layer_norm(
                x, residual, norm.weight, norm.bias, norm.eps, dropout_p=dropout_p
            )
        if type(norm) is RMSNorm and len(norm.normalized_shape) == 1 and norm.eps is not None:
            return functional.add_rms_norm(
                *(x, residual, norm.weight, norm.eps), dropout_p=dropout_p, casting=norm.casting
            )
    summed = residual + nn.functional.dropout(x, dropout_p)
    return summed if norm is None else norm(summed), summed
