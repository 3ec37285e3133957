"""Linear layers, which in decoding have few rows."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import Parameter

from fastattn._ops import linear as _ops
from fastattn._ops.common import is_transformed
from fastattn._ops.errors import user_error
from fastattn.functional import _arguments

__all__ = ["linear"]

_PLAIN = (Tensor, Parameter)
_DTYPES = (torch.bfloat16, torch.float16)


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    r"""``torch.nn.functional.linear``, as fast as memory gives the weights where rows are few.

    ::

        y_mn = sum_k x_mk W_nk + b_n

    Our kernel computes it for at most 6 rows in bfloat16 or float16 on the CPU, as in decoding,
    where nothing needs a gradient: under ``torch.no_grad`` or ``torch.inference_mode``, or with
    parameters that require none. Sums and bias are in float32, and rounded once. The bits of a row
    depend neither on how many others there are, up to 6, nor on threads.

    Everything else is torch's function: more rows, wider dtypes, other devices, gradients,
    autocast, transforms of torch.func, torch.export, subclasses of Tensor, and weights of which
    neither rows nor columns are contiguous.

    Args:
        input: (\*, in_features), any strides.
        weight: (out_features, in_features). The transpose of a contiguous (in_features,
            out_features), as Hugging Face's Conv1D keeps it, is read where it lies.
        bias: (out_features), in the dtype of input or any other of float32, bfloat16, float16 and
            float64.

    Returns:
        (\*, out_features) in the dtype of input.

    Raises:
        TypeError: for the type or dtype of an argument. ValueError: for its shape or device. What
            goes to torch's function raises torch's errors.

    >>> x, weight, bias = (torch.randn(s).bfloat16() for s in ((1, 64), (32, 64), (32,)))
    >>> torch.testing.assert_close(
    ...     linear(x, weight, bias), torch.nn.functional.linear(x, weight, bias)
    ... )
    """
    if type(input) not in _PLAIN or type(weight) not in _PLAIN:
        _arguments.require_tensors(input=input, weight=weight)
    if bias is not None and not isinstance(bias, Tensor):
        _arguments.require_tensors(bias=bias)
    if _is_for_our_kernel(input, weight, bias):
        try:  # not by `checked`, which would take a tenth of a small call
            out: Tensor = _ops.linear(input, weight, bias)
        except RuntimeError as error:
            named = {"input": input, "weight": weight, "bias": bias}
            raise user_error(error, named) from None
        return out
    autocast = torch.is_autocast_enabled("cuda" if input.is_cuda else "cpu")
    if bias is None or bias.dtype == input.dtype or autocast:
        return torch.nn.functional.linear(input, weight, bias)
    product = torch.nn.functional.linear(input, weight)
    return (product + bias).to(product.dtype)


def _is_for_our_kernel(input: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    return (
        input.dtype in _DTYPES
        and type(input) in _PLAIN
        and type(weight) in _PLAIN
        and (bias is None or type(bias) in _PLAIN)
        and input.device.type == "cpu"
        and not input.is_nested
        and input.layout == weight.layout == torch.strided
        and input.dim() >= 1
        and math.prod(input.shape[:-1]) <= _ops.MOST_ROWS
        and _has_contiguous_rows_or_columns(weight)
        and not _needs_autograd(input, weight, bias)
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_exporting()
    )


def _has_contiguous_rows_or_columns(weight: Tensor) -> bool:
    # A matrix of one row or column is always one of the two; what is no matrix the op refuses.
    return 1 in weight.stride() or weight.dim() != 2 or min(weight.shape) <= 1


def _needs_autograd(input: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    if torch.is_grad_enabled() and (
        input.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
    ):
        return True
    return is_transformed()
