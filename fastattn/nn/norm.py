"""torch.nn's norms over our kernels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastattn import functional
from fastattn.nn._nested import is_nested, on_rows

__all__ = ["LayerNorm", "RMSNorm"]

_CASTINGS = ("fp32", "llama", "gemma")


class LayerNorm(torch.nn.LayerNorm):
    r"""``torch.nn.LayerNorm``, in arguments and meaning.

    See :func:`fastattn.functional.layer_norm` for the formula.

    Args:
        normalized_shape: an integer, or the sizes of the trailing dimensions.
        eps: added to the variance.
        elementwise_affine: whether there is a weight (and a bias).
        bias: whether there is a bias.
        device, dtype: of the parameters.

    Takes a dense tensor of any strides, or a jagged nested one whose regular trailing dimensions
    are normalised. Raises TypeError and ValueError as the function does.

    >>> x = torch.randn(2, 5, 16)
    >>> torch.testing.assert_close(LayerNorm(16)(x), torch.nn.LayerNorm(16)(x))
    """

    def forward(self, input: Tensor) -> Tensor:
        _require_regular(input, self.normalized_shape)
        return on_rows(
            input,
            lambda x: functional.layer_norm(
                x, self.normalized_shape, self.weight, self.bias, self.eps
            ),
        )


class RMSNorm(torch.nn.RMSNorm):
    r"""``torch.nn.RMSNorm``, and the rounding of the models that define their own.

    Args:
        normalized_shape: an integer, or the sizes of the trailing dimensions.
        eps: added to the mean of squares; None is the eps of the dtype that is computed in.
        elementwise_affine: whether there is a weight.
        device, dtype: of the weight.
        casting: "fp32", "llama" or "gemma", as in :func:`fastattn.functional.rms_norm`. The factor
            of "gemma" is 1 + weight, so that its weight begins at 0.

    Takes a dense tensor of any strides, or a jagged nested one whose regular trailing dimensions
    are normalised.

    Raises:
        ValueError: for another casting. In forward TypeError and ValueError as the function does.

    >>> x = torch.randn(2, 5, 16)
    >>> torch.testing.assert_close(RMSNorm(16)(x), torch.nn.RMSNorm(16)(x))
    >>> RMSNorm(16, casting="gemma")
    RMSNorm((16,), eps=None, elementwise_affine=True, casting='gemma')
    """

    casting = "fp32"

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        eps: float | None = None,
        elementwise_affine: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        casting: str = "fp32",
    ) -> None:
        if casting not in _CASTINGS:
            known = ", ".join(map(repr, _CASTINGS))
            raise ValueError(f"casting: expected one of {known}, got {casting!r}")
        super().__init__(normalized_shape, eps, elementwise_affine, device, dtype)
        if casting != "fp32":
            self.casting = casting
            self.reset_parameters()

    def reset_parameters(self) -> None:
        super().reset_parameters()
        if self.casting == "gemma" and self.elementwise_affine:
            nn.init.zeros_(self.weight)

    def forward(self, input: Tensor) -> Tensor:
        _require_regular(input, self.normalized_shape)
        return on_rows(
            input,
            lambda x: functional.rms_norm(
                x, self.normalized_shape, self.weight, self.eps, casting=self.casting
            ),
        )

    def extra_repr(self) -> str:
        casting = "" if self.casting == "fp32" else f", casting={self.casting!r}"
        return super().extra_repr() + casting


def _require_regular(input: Tensor, normalized_shape: Sequence[int]) -> None:
    if is_nested("input", input) and len(normalized_shape) > input.dim() - 2:
        raise ValueError(
            "normalized_shape: expected dimensions behind the ragged one of input, "
            f"{tuple(input.shape)}, got {tuple(normalized_shape)}"
        )
