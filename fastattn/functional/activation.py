"""Activations: alone, behind a bias, and gated."""

from __future__ import annotations

from torch import Tensor

from fastattn._ops import activation as _ops
from fastattn.functional import _arguments

__all__ = [
    "bias_gelu",
    "bias_relu",
    "bias_silu",
    "geglu",
    "gelu",
    "reglu",
    "relu",
    "silu",
    "swiglu",
]


def gelu(input: Tensor, approximate: str = "none") -> Tensor:
    r"""The Gaussian error linear unit.

    ::

        approximate="none"      x Phi(x) = x / 2 (1 + erf(x / sqrt(2)))
        approximate="tanh"      x / 2 (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3)))

    The two differ by up to 5e-4, and neither ever stands in for the other. float32 results are
    within 2 units in the last place of the exact ones, far into both tails; 16-bit ones are
    computed in float32 and rounded once.

    Args:
        input: any shape and strides; float32, bfloat16, float16 or, on the CPU, float64.
        approximate: "none" or "tanh", as in torch.

    Returns:
        A tensor of input's shape and dtype, dense, its memory in the order of input's.

    Raises:
        TypeError: for the type or dtype of an argument. ValueError: for its device, shape or value.

    The gradient is computed from input alone, and cannot be differentiated again (that raises).

    Source: Hendrycks and Gimpel, Gaussian Error Linear Units (2016).

    >>> x = torch.randn(3, 5)
    >>> torch.testing.assert_close(gelu(x), x * torch.special.ndtr(x))
    """
    if type(input) is not Tensor:
        _arguments.require_tensors(input=input)
    return _ops.activate(input, None, _gelu_kind(approximate))


def silu(input: Tensor) -> Tensor:
    """The sigmoid linear unit, also called swish: x / (1 + exp(-x)).

    Arguments, accuracy, result and errors are as in :func:`gelu`.

    Source: Elfwing et al., Sigmoid-Weighted Linear Units (2017).

    >>> x = torch.randn(3, 5)
    >>> torch.testing.assert_close(silu(x), x * x.sigmoid())
    """
    if type(input) is not Tensor:
        _arguments.require_tensors(input=input)
    return _ops.activate(input, None, _ops.SILU)


def relu(input: Tensor) -> Tensor:
    """The rectified linear unit: max(x, 0), with the derivative 0 at 0, as in torch.

    Arguments, result and errors are as in :func:`gelu`.

    >>> relu(torch.tensor([-1.0, 0.0, 2.0]))
    tensor([0., 0., 2.])
    """
    if type(input) is not Tensor:
        _arguments.require_tensors(input=input)
    return _ops.activate(input, None, _ops.RELU)


def bias_gelu(input: Tensor, bias: Tensor, approximate: str = "none") -> Tensor:
    r"""gelu(input + bias), in one pass, with no rounding of the sum to 16 bits.

    The gradient of bias is summed in float32, in an order that no threads decide: to the same bits
    in every call.

    Args:
        input: (\*, n), any strides; float32, bfloat16, float16 or, on the CPU, float64.
        bias: (n), any of these four dtypes.
        approximate: "none" or "tanh", as in :func:`gelu`.

    Returns:
        A tensor of input's shape and dtype.

    Raises:
        TypeError, ValueError: as gelu does.

    >>> x, b = torch.randn(3, 5), torch.randn(5)
    >>> torch.testing.assert_close(bias_gelu(x, b), gelu(x + b))
    """
    if not type(input) is type(bias) is Tensor:
        _arguments.require_tensors(input=input, bias=bias)
    return _ops.activate(input, bias, _gelu_kind(approximate))


def bias_silu(input: Tensor, bias: Tensor) -> Tensor:
    """silu(input + bias); see :func:`bias_gelu`.

    >>> x, b = torch.randn(3, 5), torch.randn(5)
    >>> torch.testing.assert_close(bias_silu(x, b), silu(x + b))
    """
    if not type(input) is type(bias) is Tensor:
        _arguments.require_tensors(input=input, bias=bias)
    return _ops.activate(input, bias, _ops.SILU)


def bias_relu(input: Tensor, bias: Tensor) -> Tensor:
    """relu(input + bias); see :func:`bias_gelu`.

    >>> x, b = torch.randn(3, 5), torch.randn(5)
    >>> torch.testing.assert_close(bias_relu(x, b), relu(x + b))
    """
    if not type(input) is type(bias) is Tensor:
        _arguments.require_tensors(input=input, bias=bias)
    return _ops.activate(input, bias, _ops.RELU)


def swiglu(gate: Tensor, up: Tensor | None = None) -> Tensor:
    r"""silu(gate) \* up, the gated unit of Llama and its relatives, in one pass.

    Args:
        gate: any shape and strides (halves of a fused projection are read where they lie);
            float32, bfloat16, float16 or, on the CPU, float64. Without up it is packed: (\*, 2 n),
            with the gate in the first n columns and up in the others; its gradient is packed
            likewise.
        up: the shape and dtype of gate.

    Returns:
        A tensor of the shape of up, in the dtype of gate.

    Raises:
        TypeError, ValueError: as :func:`gelu` does.

    Source: Shazeer, GLU Variants Improve Transformer (2020).

    >>> gate, up = torch.randn(3, 5), torch.randn(3, 5)
    >>> out = swiglu(gate, up)
    >>> torch.testing.assert_close(out, torch.nn.functional.silu(gate) * up)
    >>> torch.equal(out, swiglu(torch.cat((gate, up), dim=-1)))
    True
    """
    _require_gated(gate, up)
    return _ops.activate_gated(gate, up, _ops.SILU)


def geglu(gate: Tensor, up: Tensor | None = None, approximate: str = "none") -> Tensor:
    r"""gelu(gate) \* up; see :func:`swiglu` for gate and up, :func:`gelu` for approximate.

    >>> gate, up = torch.randn(3, 5), torch.randn(3, 5)
    >>> torch.testing.assert_close(geglu(gate, up), torch.nn.functional.gelu(gate) * up)
    """
    _require_gated(gate, up)
    return _ops.activate_gated(gate, up, _gelu_kind(approximate))


def reglu(gate: Tensor, up: Tensor | None = None) -> Tensor:
    r"""relu(gate) \* up; see :func:`swiglu`.

    >>> gate, up = torch.randn(3, 5), torch.randn(3, 5)
    >>> torch.testing.assert_close(reglu(gate, up), torch.relu(gate) * up)
    """
    _require_gated(gate, up)
    return _ops.activate_gated(gate, up, _ops.RELU)


def _gelu_kind(approximate: str) -> int:
    if approximate == "none":
        return _ops.GELU
    if approximate == "tanh":
        return _ops.GELU_TANH
    raise ValueError(f"approximate: expected 'none' or 'tanh', got {approximate!r}")


def _require_gated(gate: Tensor, up: Tensor | None) -> None:
    if type(gate) is not Tensor or (up is not None and type(up) is not Tensor):
        _arguments.require_tensors(gate=gate)
        if up is not None:
            _arguments.require_tensors(up=up)
