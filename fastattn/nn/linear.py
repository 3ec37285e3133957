"""torch.nn's linear layer over our kernel."""

from __future__ import annotations

import torch
from torch import Tensor

from fastattn import functional

__all__ = ["Linear"]


class Linear(torch.nn.Linear):
    r"""``torch.nn.Linear``, in arguments and meaning; with few rows at the speed of memory.

    See :func:`fastattn.functional.linear` for when: in 16 bits on the CPU, where nothing needs a
    gradient. Else it is torch's.

    Args:
        in_features, out_features: the sizes of the last dimension of input and result.
        bias: whether there is a bias.
        device, dtype: of the parameters.

    >>> layer = Linear(64, 32, dtype=torch.bfloat16).requires_grad_(False)
    >>> x = torch.randn(1, 64).bfloat16()
    >>> want = torch.nn.functional.linear(x, layer.weight, layer.bias)
    >>> torch.testing.assert_close(layer(x), want)
    """

    def forward(self, input: Tensor) -> Tensor:
        return functional.linear(input, self.weight, self.bias)
