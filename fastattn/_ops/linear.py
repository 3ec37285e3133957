"""The op of linear layers with few rows as Python sees it: shapes without data."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from fastattn import _C  # noqa: F401  (registers the op)
from fastattn._ops.common import register_fake
from fastattn._ops.errors import require_one_device

linear = torch.ops.fastattn.linear.default

MOST_ROWS = 6  # csrc/include/fastattn/linear_params.h


@register_fake("fastattn::linear")
def _linear_fake(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    require_one_device(input=input, weight=weight, bias=bias)
    return input.new_empty((*input.shape[:-1], weight.shape[0]))


@register_flop_formula(torch.ops.fastattn.linear, get_raw=True)
def _linear_flops(input: Tensor, weight: Tensor, *_: Any, **__: Any) -> int:
    return 2 * input.numel() * weight.shape[0]
