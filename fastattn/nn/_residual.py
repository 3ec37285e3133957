"""The end of one sublayer and the begin of the next: dropout, residual addition and norm."""

from __future__ import annotations

from torch import Tensor, nn

__all__ = ["add_and_normalise"]


def add_and_normalise(
    norm: nn.Module | None, x: Tensor, residual: Tensor, dropout_p: float
) -> tuple[Tensor, Tensor]:
    """(norm(summed), summed) with summed = residual + dropout(x); without norm, summed twice."""
    summed = residual + nn.functional.dropout(x, dropout_p)
    return summed if norm is None else norm(summed), summed
