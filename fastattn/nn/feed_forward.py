"""The position-wise sublayers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastattn import functional
from fastattn.nn._linear import Activation, activate, activation_name, projected
from fastattn.nn._nested import is_nested, on_rows
from fastattn.nn.cache.base import require_sizes
from fastattn.nn.linear import Linear

__all__ = ["FeedForward", "GatedFeedForward"]


def _geglu_tanh(gate: Tensor, up: Tensor) -> Tensor:
    return functional.geglu(gate, up, "tanh")


_GATED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "silu": functional.swiglu,
    "gelu": functional.geglu,
    "gelu_tanh": _geglu_tanh,
    "relu": functional.reglu,
}


class _FeedForward(nn.Module):
    """What the two have in common."""

    down_proj: nn.Module

    def __init__(
        self, embed_dim: int, hidden_dim: int, *, activation: Activation, dropout: float
    ) -> None:
        super().__init__()
        require_sizes(embed_dim=embed_dim, hidden_dim=hidden_dim)
        activation_name(activation)  # raises for a string that is no name
        self.embed_dim = embed_dim
        self.hidden_dim = hidden_dim
        self.activation = activation
        self.dropout = nn.Dropout(dropout)

    def _hidden(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        if is_nested("x", x):
            return on_rows(x, self)
        if x.dim() < 1 or x.shape[-1] != self.embed_dim:
            raise ValueError(f"x: expected shape (*, {self.embed_dim}), got {tuple(x.shape)}")
        out: Tensor = self.down_proj(self.dropout(self._hidden(x)))
        return out

    def extra_repr(self) -> str:
        if isinstance(self.activation, nn.Module):
            return ""
        return f"activation={self.activation!r}"


class FeedForward(_FeedForward):
    r"""Two projections with an activation between them.

    ::

        out = down_proj(dropout(activation(up_proj(x))))

    The bias of up_proj and the activation are one pass over memory, unless something wraps up_proj.

    Args:
        embed_dim, hidden_dim: up_proj is Linear(embed_dim, hidden_dim), down_proj the reverse.
        activation: "relu", "gelu", "gelu_tanh", "silu", or a callable, for instance a module.
        bias: of both projections.
        dropout: of what down_proj reads, in training.

    Shapes: x (\*, embed_dim), or jagged nested -> the same.

    Source: Vaswani et al., Attention Is All You Need (2017), section 3.3.

    >>> feed_forward = FeedForward(8, 32, activation="relu")
    >>> x = torch.randn(2, 5, 8)
    >>> want = feed_forward.down_proj(feed_forward.up_proj(x).relu())
    >>> torch.testing.assert_close(feed_forward(x), want)
    """

    def __init__(
        self,
        embed_dim: int,
        hidden_dim: int,
        *,
        activation: Activation = "gelu",
        bias: bool = True,
        dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(embed_dim, hidden_dim, activation=activation, dropout=dropout)
        factory: dict[str, Any] = {"bias": bias, "device": device, "dtype": dtype}
        self.up_proj = Linear(embed_dim, hidden_dim, **factory)
        self.down_proj = Linear(hidden_dim, embed_dim, **factory)

    def _hidden(self, x: Tensor) -> Tensor:
        return projected(self.up_proj, x, self.activation)


class GatedFeedForward(_FeedForward):
    r"""The gated variant: SwiGLU with the default activation.

    ::

        out = down_proj(dropout(activation(gate_proj(x)) * up_proj(x)))

    Activation and product are one pass over memory.

    Args:
        embed_dim, hidden_dim: gate_proj and up_proj are Linear(embed_dim, hidden_dim), down_proj
            the reverse.
        activation: "silu" (SwiGLU: Llama), "gelu", "gelu_tanh" (GEGLU: T5 v1.1 and Gemma, with the
            latter), "relu" (ReGLU), or a callable.
        bias: of all projections.
        dropout: of what down_proj reads, in training.

    Shapes: x (\*, embed_dim), or jagged nested -> the same.

    Source: Shazeer, GLU Variants Improve Transformer (2020).

    >>> feed_forward = GatedFeedForward(8, 32)
    >>> x = torch.randn(2, 5, 8)
    >>> hidden = torch.nn.functional.silu(feed_forward.gate_proj(x)) * feed_forward.up_proj(x)
    >>> torch.testing.assert_close(feed_forward(x), feed_forward.down_proj(hidden))
    """

    def __init__(
        self,
        embed_dim: int,
        hidden_dim: int,
        *,
        activation: Activation = "silu",
        bias: bool = False,
        dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(embed_dim, hidden_dim, activation=activation, dropout=dropout)
        factory: dict[str, Any] = {"bias": bias, "device": device, "dtype": dtype}
        self.gate_proj = Linear(embed_dim, hidden_dim, **factory)
        self.up_proj = Linear(embed_dim, hidden_dim, **factory)
        self.down_proj = Linear(hidden_dim, embed_dim, **factory)

    def _hidden(self, x: Tensor) -> Tensor:
        gate, up = self.gate_proj(x), self.up_proj(x)
        name = activation_name(self.activation)
        return activate(gate, self.activation) * up if name is None else _GATED[name](gate, up)
