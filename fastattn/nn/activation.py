"""torch.nn's activations over our kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from fastattn import functional
from fastattn.nn._nested import on_rows

__all__ = ["GELU"]


class GELU(torch.nn.GELU):
    r"""``torch.nn.GELU``, in arguments and meaning; see :func:`fastattn.functional.gelu`.

    Args:
        approximate: "none" or "tanh".

    Takes a dense tensor of any shape and strides, or a jagged nested one.

    >>> x = torch.randn(3, 5)
    >>> torch.testing.assert_close(GELU("tanh")(x), torch.nn.GELU("tanh")(x))
    """

    def forward(self, input: Tensor) -> Tensor:
        return on_rows(input, lambda x: functional.gelu(x, self.approximate))
