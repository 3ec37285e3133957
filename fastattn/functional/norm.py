"""Layer and RMS norms, alone and fused with dropout and the addition of a residual."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastattn._ops import norm as _ops
from fastattn.functional import _arguments

__all__ = ["add_layer_norm", "add_rms_norm", "layer_norm", "qk_rms_norm", "rms_norm"]

_CASTINGS = {"fp32": _ops.RMS, "llama": _ops.RMS_LLAMA, "gemma": _ops.RMS_GEMMA}


def layer_norm(
    input: Tensor,
    normalized_shape: int | Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    r"""``torch.nn.functional.layer_norm``, in signature and meaning.

    ::

        out = (x - mean(x)) / sqrt(variance(x) + eps) * weight + bias

    over the trailing dimensions of normalized_shape, with the variance divided by their number.
    Computed in float32 (float64 for float64) and rounded once. The variance is that of the
    deviations from the mean, so that a mean much larger than them costs no accuracy.

    Args:
        input: (\*leading, \*normalized_shape), any strides, any width; float32, bfloat16, float16
            or float64 (which runs on the CPU's scalar kernels, and raises on CUDA). Only a row of
            several dimensions that are not in one another's order in memory is copied first.
        normalized_shape: an integer, or the sizes of the trailing dimensions.
        weight, bias: normalized_shape; any of the four dtypes, each its own.
        eps: added to the variance.

    Returns:
        The shape and dtype of input, dense, its leading dimensions in the memory order of input's.

    Raises:
        TypeError: for the type or dtype of an argument. ValueError: for its device, shape or value.
            Both name the argument.

    A row's result depends on nothing but that row, weight and bias. Differentiable in all three
    tensors; the gradients of weight and bias are summed in float32 or wider, in an order that the
    shape fixes (on CUDA the shape and the GPU). A second derivative or a forward-mode one raises.
    Autocast leaves the dtype of input; torch does so on the CPU.

    Source: Ba, Kiros and Hinton, Layer Normalization (2016).

    >>> x, weight, bias = torch.randn(2, 5, 16), torch.randn(16), torch.randn(16)
    >>> torch.testing.assert_close(
    ...     layer_norm(x, 16, weight, bias),
    ...     torch.nn.functional.layer_norm(x, (16,), weight, bias),
    ... )
    """
    dims = _require_shape(input, normalized_shape)
    _require_optional(weight, bias)
    return _ops.norm(input, weight, bias, dims, _ops.LAYER, eps)


def rms_norm(
    input: Tensor,
    normalized_shape: int | Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
    *,
    casting: str = "fp32",
) -> Tensor:
    r"""``torch.nn.functional.rms_norm``, and the rounding of the models that define their own.

    ::

        n = x / sqrt(mean(x * x) + eps)                 in float32 (float64 for float64)

        casting="fp32"     out = (n * weight).to(dtype of input)            as torch
        casting="llama"    out = n.to(dtype of input) * weight              as Hugging Face's Llama
        casting="gemma"    out = (n * (1 + weight)).to(dtype of input)      as Gemma

    "llama" gives the promoted dtype of input and weight: a float32 weight makes a bfloat16 input
    float32. weight is read in float32 otherwise.

    Args:
        input: (\*leading, \*normalized_shape), as for :func:`layer_norm`.
        normalized_shape: an integer, or the sizes of the trailing dimensions.
        weight: normalized_shape; any of the four dtypes ("llama": not float64 with a narrower
            input). None: no factor, in each casting.
        eps: added to the mean of squares. None means what it does in torch: the eps of the dtype
            that is computed in, 1.19e-7 for float32, bfloat16 and float16.
        casting: "fp32", "llama" or "gemma".

    Returns:
        The shape of input, dense, its leading dimensions in the memory order of input's.

    Raises:
        TypeError, ValueError: as layer_norm does.

    Gradients, batch invariance and autocast are those of layer_norm.

    Source: Zhang and Sennrich, Root Mean Square Layer Normalization (2019).

    >>> x, weight = torch.randn(2, 5, 16), torch.randn(16)
    >>> torch.testing.assert_close(
    ...     rms_norm(x, 16, weight), torch.nn.functional.rms_norm(x, (16,), weight)
    ... )
    >>> rms_norm(x.bfloat16(), 16, weight, casting="llama").dtype
    torch.float32
    """
    dims = _require_shape(input, normalized_shape)
    _require_optional(weight, None)
    if eps is None:
        eps = torch.finfo(torch.promote_types(input.dtype, torch.float32)).eps
    return _ops.norm(input, weight, None, dims, _kind(casting), eps)


def add_layer_norm(
    input: Tensor,
    residual: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    dropout_p: float = 0.0,
) -> tuple[Tensor, Tensor]:
    r"""Dropout, residual addition and layer norm in one pass over memory.

    ::

        summed     = residual + dropout(input)
        normalised = layer_norm(summed)                 over the dimensions of weight

    summed is rounded to its dtype, and the norm reads it so, as the two steps do in eager mode.
    A pre-norm block goes on with both, a post-norm block (as in BERT) with the first alone::

        pre-norm     normalised, hidden = add_layer_norm(attention_out, hidden, weight, bias)
                     normalised, hidden = add_layer_norm(mlp(normalised), hidden, ...)
        post-norm    hidden, _ = add_layer_norm(attention_out, hidden, weight, bias)

    Args:
        input: (\*leading, \*shape), the output of a sublayer.
        residual: as input, in shape and dtype; its own strides.
        weight, bias: (\*shape), as for :func:`layer_norm`. Without weight, shape is the last
            dimension.
        eps: added to the variance.
        dropout_p: the probability to drop an element of input, in [0, 1], also when a module is in
            eval mode. The others are divided by 1 - dropout_p. The mask depends on the place in
            input alone, and on a seed from torch's default generator: torch.manual_seed repeats it.

    Returns:
        (normalised, summed), each of input's shape and dtype, dense, the leading dimensions in the
        memory order of input's.

    Raises:
        TypeError, ValueError: as layer_norm does.

    Differentiable in all four tensors, from either result or both. The rest is as for layer_norm.

    >>> x, residual, weight = torch.randn(2, 5, 16), torch.randn(2, 5, 16), torch.randn(16)
    >>> normalised, summed = add_layer_norm(x, residual, weight)
    >>> torch.testing.assert_close(summed, x + residual)
    >>> torch.testing.assert_close(normalised, layer_norm(summed, 16, weight))
    """
    dims = _require_pair(input, residual, weight, bias)
    dropout = _arguments.dropout(dropout_p, input) if dropout_p != 0.0 else {}
    return _ops.add_norm(input, residual, weight, bias, dims, _ops.LAYER, eps, dropout)


def add_rms_norm(
    input: Tensor,
    residual: Tensor,
    weight: Tensor | None = None,
    eps: float = 1e-6,
    *,
    dropout_p: float = 0.0,
    casting: str = "fp32",
) -> tuple[Tensor, Tensor]:
    """Dropout, residual addition and RMS norm in one pass over memory.

    ::

        summed     = residual + dropout(input)
        normalised = rms_norm(summed, casting=casting)  over the dimensions of weight

    Args:
        input, residual, dropout_p: as for :func:`add_layer_norm`, which also shows the use in
            pre-norm and post-norm blocks.
        weight, casting: as for :func:`rms_norm`.
        eps: added to the mean of squares.

    Returns:
        (normalised, summed), of input's shape; normalised in the dtype that rms_norm gives.

    Raises:
        TypeError, ValueError: as layer_norm does.

    >>> x, residual, weight = torch.randn(2, 5, 16), torch.randn(2, 5, 16), torch.randn(16)
    >>> normalised, summed = add_rms_norm(x, residual, weight)
    >>> torch.testing.assert_close(summed, x + residual)
    >>> torch.testing.assert_close(normalised, rms_norm(summed, 16, weight, 1e-6))
    """
    dims = _require_pair(input, residual, weight, None)
    kind = _kind(casting)
    dropout = _arguments.dropout(dropout_p, input) if dropout_p != 0.0 else {}
    return _ops.add_norm(input, residual, weight, None, dims, kind, eps, dropout)


def qk_rms_norm(
    query: Tensor,
    key: Tensor,
    query_weight: Tensor | None = None,
    key_weight: Tensor | None = None,
    eps: float = 1e-6,
    *,
    casting: str = "fp32",
) -> tuple[Tensor, Tensor]:
    r""":func:`rms_norm` of query and key, each over its last dimension, head_dim.

    As Qwen3, Gemma 3 and others have it between projection and rotary embedding. Both may be views
    of any strides, of the layouts bhsd and bshd or slices of one fused projection: none is copied,
    and each result has the memory order of its argument, so that ``transpose`` may come before or
    after. OLMo 2 normalises all heads of a token jointly: that is rms_norm on the projection before
    it is split into heads.

    Args:
        query: (\*leading, head_dim).
        key: (\*leading of its own, head_dim); another dtype or head_dim is allowed.
        query_weight, key_weight: (head_dim), shared by all heads.
        eps, casting: as for rms_norm.

    Returns:
        (query, key), normalised.

    Raises:
        TypeError, ValueError: as rms_norm does, with the names of these arguments.

    >>> q, k = torch.randn(2, 8, 5, 16), torch.randn(2, 2, 5, 16)
    >>> weight = torch.randn(16)
    >>> normalised_q, normalised_k = qk_rms_norm(q, k, weight, weight)
    >>> torch.testing.assert_close(normalised_k, rms_norm(k, 16, weight, 1e-6))
    """
    kind = _kind(casting)
    return (
        _head_norm("query", query, query_weight, kind, eps),
        _head_norm("key", key, key_weight, kind, eps),
    )


def _head_norm(name: str, x: Tensor, weight: Tensor | None, kind: int, eps: float) -> Tensor:
    if not isinstance(x, Tensor):
        _arguments.require_tensors(**{name: x})
    if weight is not None and not isinstance(weight, Tensor):
        _arguments.require_tensors(**{f"{name}_weight": weight})
    if x.dim() < 1:
        raise ValueError(f"{name}: expected at least 1 dimension, got shape ()")
    try:
        return _ops.norm(x, weight, None, 1, kind, eps)
    except (TypeError, ValueError) as error:
        argument, colon, rest = str(error).partition(":")
        renamed = {"input": name, "weight": f"{name}_weight"}.get(argument)
        if colon and renamed:
            raise type(error)(f"{renamed}:{rest}") from None
        raise


def _kind(casting: str) -> int:
    kind = _CASTINGS.get(casting) if isinstance(casting, str) else None
    if kind is None:
        error = ValueError if isinstance(casting, str) else TypeError
        raise error(f"casting: expected 'fp32', 'llama' or 'gemma', got {casting!r}")
    return kind


def _require_shape(input: Tensor, normalized_shape: int | Sequence[int]) -> int:
    """How many dimensions are normalised."""
    if not isinstance(input, Tensor):
        _arguments.require_tensors(input=input)
    if isinstance(normalized_shape, int | torch.SymInt):
        if input.dim() > 0 and input.shape[-1] == normalized_shape:
            return 1
        shape = [normalized_shape]
    elif isinstance(normalized_shape, Sequence) and not isinstance(normalized_shape, str):
        shape = list(normalized_shape)
    else:
        raise TypeError(
            "normalized_shape: expected an integer or a sequence of them, "
            f"got {type(normalized_shape).__name__}"
        )
    dims = len(shape)
    if dims == 0 or dims > input.dim() or list(input.shape[-dims:]) != shape:
        raise ValueError(
            f"normalized_shape: expected the trailing dimensions of input, {tuple(input.shape)}, "
            f"got {tuple(shape)}"
        )
    return dims


def _require_optional(weight: Tensor | None, bias: Tensor | None) -> None:
    if weight is not None and not isinstance(weight, Tensor):
        _arguments.require_tensors(weight=weight)
    if bias is not None and not isinstance(bias, Tensor):
        _arguments.require_tensors(bias=bias)


def _require_pair(
    input: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None
) -> int:
    """How many dimensions are normalised."""
    if not (isinstance(input, Tensor) and isinstance(residual, Tensor)):
        _arguments.require_tensors(input=input, residual=residual)
    _require_optional(weight, bias)
    dims = 1 if weight is None else weight.dim()
    if dims == 0:
        raise ValueError("weight: expected at least 1 dimension, got shape ()")
    if input.dim() < dims:
        raise ValueError(
            f"input: expected at least {dims} dimensions, got shape {tuple(input.shape)}"
        )
    return dims
