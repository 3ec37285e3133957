"""Linear layers of transformers' families, which in decoding have few rows."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fastattn import functional
from fastattn import nn as ours
from fastattn._replacement import own_class
from fastattn.integrations.huggingface.fused._forms import Fused, derived

__all__ = ["rule"]


class _Conv1D(Fused):
    """GPT-2's linear layer, whose weight is (in_features, out_features)."""

    weight: Tensor
    bias: Tensor

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.weight.t(), self.bias)


def rule(module: nn.Module) -> type[nn.Module] | str | None:
    cls = own_class(module)
    if cls is torch.nn.Linear:
        return ours.Linear
    return derived(cls, _Conv1D) if cls is Conv1D else None
