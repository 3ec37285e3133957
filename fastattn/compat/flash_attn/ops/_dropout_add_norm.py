"""What flash-attn's fused norms have in common: dropout, scales, residual, then one norm or two.

::

    x = residual + layerscale * dropout(rowscale * x0)         in float32, rounded once
    z = norm(x) * weight + bias                                in the dtype of x0

x has the dtype of residual; without one, that of x0, or float32 with residual_in_fp32. Where
``fastattn.functional`` has all that is asked for in one pass over memory, it is that pass; the rest
is the same formula in several.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

import fastattn.functional as fa
from fastattn.compat.flash_attn._arguments import renamed

Result = Tensor | tuple[Tensor, ...]

_NAMES = {"input": "x0", "eps": "epsilon"}


class Norm(NamedTuple):
    """A norm over the last dimension: of x itself with ``rms``, of its deviations without."""

    weight: Tensor
    bias: Tensor | None
    epsilon: float
    rms: bool

    def __call__(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        width = self.weight.shape
        if not self.rms:
            return fa.layer_norm(x, width, self.weight, self.bias, self.epsilon).to(dtype)
        if self.bias is None:
            return fa.rms_norm(x, width, self.weight, self.epsilon).to(dtype)
        wide = x.to(_wide(x))
        return (fa.rms_norm(wide, width, self.weight, self.epsilon) + self.bias).to(dtype)

    def added(self, x0: Tensor, residual: Tensor, dropout_p: float) -> tuple[Tensor, Tensor]:
        """(z, x), in one pass."""
        weight, epsilon = self.weight, self.epsilon
        if self.rms:
            return fa.add_rms_norm(x0, residual, weight, epsilon, dropout_p=dropout_p)
        return fa.add_layer_norm(x0, residual, weight, self.bias, epsilon, dropout_p=dropout_p)


def dropout_add_norm(
    x0: Tensor,
    residual: Tensor | None,
    norm: Norm,
    dropout_p: float,
    rowscale: Tensor | None,
    layerscale: Tensor | None,
    prenorm: bool,
    residual_in_fp32: bool,
    return_dropout_mask: bool,
) -> Result:
    """z, with prenorm (z, x), and with return_dropout_mask its mask behind them."""
    _require_probability(dropout_p)
    with renamed(_NAMES):
        if (
            residual is not None
            and residual.dtype == x0.dtype
            and rowscale is None
            and layerscale is None
            and not (norm.rms and norm.bias is not None)
            and not (return_dropout_mask and dropout_p > 0.0)
        ):
            z, x = norm.added(x0, residual, dropout_p)
            mask = torch.ones_like(x0, dtype=torch.uint8) if return_dropout_mask else None
        else:
            branch, mask = _branch(x0, dropout_p, rowscale, layerscale)
            x = _add(branch, residual, x0.dtype, residual_in_fp32)
            z = norm(x, x0.dtype)
    outputs = (z, x) if prenorm else (z,)
    if return_dropout_mask and mask is not None:
        return (*outputs, mask)
    return outputs if prenorm else z


def parallel(
    x0: Tensor,
    x1: Tensor | None,
    residual: Tensor | None,
    norm0: Norm,
    norm1: Norm | None,
    dropout_p: float,
    prenorm: bool,
    residual_in_fp32: bool,
    return_dropout_mask: bool,
) -> tuple[Tensor | None, ...]:
    """x = residual + dropout(x0) + dropout(x1); (norm0(x), norm1(x)), x and the masks behind."""
    _require_probability(dropout_p)
    branch, mask0 = _branch(x0, dropout_p, None, None)
    mask1 = torch.ones_like(mask0)
    if x1 is not None:
        branch1, mask1 = _branch(x1, dropout_p, None, None)
        branch = branch + branch1
    x = _add(branch, residual, x0.dtype, residual_in_fp32)
    with renamed(_NAMES):
        z0 = norm0(x, x0.dtype)
        z1 = None if norm1 is None else norm1(x, x0.dtype)
    outputs = (z0, z1, x) if prenorm else (z0, z1)
    return (*outputs, mask0, mask1) if return_dropout_mask else outputs


def subset(
    x0: Tensor,
    residual: Tensor | None,
    norm: Norm,
    dropout_p: float,
    layerscale: Tensor | None,
    x0_subset: Tensor | None,
    out_subset: Tensor | None,
    rowscale_const: float,
    out_numrows: int,
    prenorm: bool,
    residual_in_fp32: bool,
    return_dropout_mask: bool,
) -> Result:
    """Row r of x takes row x0_subset[r] - 1 of x0, or none for 0; z likewise, with out_subset."""
    _require_probability(dropout_p)
    if x0_subset is None or out_subset is None:
        missing = "x0_subset" if x0_subset is None else "out_subset"
        raise ValueError(
            f"{missing}: expected both subsets (else call the function without), got None"
        )
    width = x0.shape[-1]
    branch, mask = _branch(x0, dropout_p, rowscale_const, layerscale)
    # A row of zeros before the others is the one that 0 means.
    rows = torch.nn.functional.pad(branch.reshape(-1, width), (0, 0, 1, 0))
    flat = None if residual is None else residual.reshape(-1, width)
    x = _add(rows.index_select(0, x0_subset.flatten()), flat, x0.dtype, residual_in_fp32)
    taken = out_subset.flatten().nonzero().squeeze(1)
    with renamed(_NAMES):
        normed = norm(x.index_select(0, taken), x0.dtype)
    places = out_subset.flatten().index_select(0, taken).to(torch.int64) - 1
    z = normed.new_zeros((out_numrows, width)).index_copy(0, places, normed)
    z, x = (y.reshape(-1, *x0.shape[1:]) for y in (z, x))
    outputs = (z, x) if prenorm else (z,)
    if return_dropout_mask:
        return (*outputs, mask)
    return outputs if prenorm else z


def _branch(
    x0: Tensor, dropout_p: float, rowscale: Tensor | float | None, layerscale: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(layerscale * dropout(rowscale * x0) in float32 or wider, the mask: 1 where kept)."""
    x = x0.to(_wide(x0))
    if isinstance(rowscale, Tensor):
        x = x * rowscale.reshape(x0.shape[:-1]).unsqueeze(-1)
    elif rowscale is not None:
        x = x * rowscale
    keep = torch.ones_like(x0, dtype=torch.bool)
    if dropout_p > 0.0:
        keep = torch.rand(x0.shape, device=x0.device) >= dropout_p
        x = torch.where(keep, x / (1.0 - dropout_p), 0.0)
    return x if layerscale is None else x * layerscale, keep.to(torch.uint8)


def _add(
    branch: Tensor, residual: Tensor | None, dtype: torch.dtype, residual_in_fp32: bool
) -> Tensor:
    if residual is None:
        return branch.to(torch.promote_types(dtype, torch.float32) if residual_in_fp32 else dtype)
    if residual.shape != branch.shape:
        raise ValueError(
            f"residual: expected shape {tuple(branch.shape)}, got {tuple(residual.shape)}"
        )
    return (residual + branch).to(residual.dtype)


def _require_probability(dropout_p: float) -> None:
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"dropout_p: expected a probability in [0, 1), got {dropout_p}")


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
