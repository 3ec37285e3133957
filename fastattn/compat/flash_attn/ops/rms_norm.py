"""flash-attn's fused RMS norms.

The functions share these arguments, and their result is a tuple where it has several parts:

    x0                      (*, hidden), the output of a sublayer
    residual                (*, hidden) or None; any floating dtype
    rowscale                (*), a factor of each row of x0
    layerscale              (hidden), a factor of each column, after dropout
    prenorm                 return the sum x too: (z, x)
    residual_in_fp32        x is float32 where there is no residual to say its dtype
    return_dropout_mask     the mask behind the rest, uint8, 1 where kept

::

    x = residual + layerscale * dropout(rowscale * x0)      rounded once, to the dtype of residual
    z = x / sqrt(mean(x * x) + epsilon) * weight + bias

in float32 (float64 for float64); z has the dtype of x0. Differentiable in every tensor. What
``fastattn.functional.add_rms_norm`` can do, it does, in one pass: residual of the dtype of x0
and neither scales nor bias. The rest takes several.
"""

from __future__ import annotations

import torch
from torch import Tensor

import fastattn.functional as fa
from fastattn.compat.flash_attn._arguments import renamed
from fastattn.compat.flash_attn.ops import _dropout_add_norm as _fused
from fastattn.compat.flash_attn.ops._dropout_add_norm import Norm, Result

__all__ = [
    "DropoutAddRMSNorm",
    "RMSNorm",
    "dropout_add_rms_norm",
    "dropout_add_rms_norm_parallel_residual",
    "dropout_add_rms_norm_subset",
    "rms_norm",
]


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """``fastattn.functional.rms_norm`` over the dimensions of weight."""
    with renamed({"input": "x", "eps": "epsilon"}):
        return fa.rms_norm(x, weight.shape, weight, epsilon)


def dropout_add_rms_norm(
    x0: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    dropout_p: float,
    epsilon: float,
    rowscale: Tensor | None = None,
    layerscale: Tensor | None = None,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    return_dropout_mask: bool = False,
) -> Result:
    """z, (z, x), (z, mask) or (z, x, mask); see the top of this module."""
    return _fused.dropout_add_norm(
        x0,
        residual,
        Norm(weight, bias, epsilon, rms=True),
        dropout_p,
        rowscale,
        layerscale,
        prenorm,
        residual_in_fp32,
        return_dropout_mask,
    )


def dropout_add_rms_norm_subset(
    x0: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    dropout_p: float,
    epsilon: float,
    layerscale: Tensor | None = None,
    x0_subset: Tensor | None = None,
    out_subset: Tensor | None = None,
    rowscale_const: float = 1.0,
    out_numrows: int = 0,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    return_dropout_mask: bool = False,
) -> Result:
    """Of rows that come and go, as with stochastic depth.

    Args:
        x0: (rows of x0, hidden).
        x0_subset: for each row of x, which row of x0 is added, from 1; 0 for none.
        out_subset: for each row of x, which row of z it becomes, from 1; 0 for none.
        rowscale_const: a factor of all rows of x0.
        out_numrows: the rows of z; those that no row of x becomes are 0.
    """
    return _fused.subset(
        x0,
        residual,
        Norm(weight, bias, epsilon, rms=True),
        dropout_p,
        layerscale,
        x0_subset,
        out_subset,
        rowscale_const,
        out_numrows,
        prenorm,
        residual_in_fp32,
        return_dropout_mask,
    )


def dropout_add_rms_norm_parallel_residual(
    x0: Tensor,
    x1: Tensor | None,
    residual: Tensor | None,
    weight0: Tensor,
    bias0: Tensor | None,
    weight1: Tensor | None,
    bias1: Tensor | None,
    dropout_p: float,
    epsilon: float,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    return_dropout_mask: bool = False,
) -> tuple[Tensor | None, ...]:
    """Two sublayers beside one another, and two norms: x = residual + dropout(x0) + dropout(x1).

    Returns:
        (z0, z1), with x, and with the masks of x0 and x1 behind; z1 is None without weight1.
    """
    return _fused.parallel(
        x0,
        x1,
        residual,
        Norm(weight0, bias0, epsilon, rms=True),
        None if weight1 is None else Norm(weight1, bias1, epsilon, rms=True),
        dropout_p,
        prenorm,
        residual_in_fp32,
        return_dropout_mask,
    )


class RMSNorm(torch.nn.Module):
    """:func:`rms_norm` with a weight."""

    bias: None

    def __init__(
        self,
        hidden_size: int,
        eps: float = 1e-5,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.empty(hidden_size, device=device, dtype=dtype))
        self.register_parameter("bias", None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        torch.nn.init.ones_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


class DropoutAddRMSNorm(torch.nn.Module):
    """:func:`dropout_add_rms_norm` with a weight; dropout when training alone."""

    bias: None

    def __init__(
        self,
        hidden_size: int,
        prenorm: bool = False,
        p: float = 0.0,
        eps: float = 1e-5,
        residual_in_fp32: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.prenorm = prenorm
        self.p = p
        self.eps = eps
        self.residual_in_fp32 = residual_in_fp32
        self.weight = torch.nn.Parameter(torch.empty(hidden_size, device=device, dtype=dtype))
        self.register_parameter("bias", None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        torch.nn.init.ones_(self.weight)

    def forward(self, x0: Tensor, residual: Tensor | None = None) -> Result:
        return dropout_add_rms_norm(
            x0,
            residual,
            self.weight,
            self.bias,
            self.p if self.training else 0.0,
            self.eps,
            prenorm=self.prenorm,
            residual_in_fp32=self.residual_in_fp32,
        )
