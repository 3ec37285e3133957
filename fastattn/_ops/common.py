"""What the families of ops share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.graph import increment_version

_Function = TypeVar("_Function", bound=Callable[..., Any])


def register_fake(name: str) -> Callable[[_Function], _Function]:
    """torch.library.register_fake, typed."""
    return torch.library.register_fake(name)  # type: ignore[no-any-return]


def real_dtype(x: Tensor) -> torch.dtype:
    """Of sums and statistics: float32, or float64 for float64."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def written(*tensors: Tensor | None) -> None:
    """Autograd learns that what was saved of these is gone: ops that write through the stable ABI
    do not tell it."""
    if torch.compiler.is_compiling():
        return
    for x in tensors:
        if x is not None and not x.is_inference():
            increment_version(x)


def is_transformed() -> bool:
    """Whether something may be asked for that requires_grad does not tell: a forward-mode tangent,
    or what a transform of torch.func wants."""
    return forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active()
