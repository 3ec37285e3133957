"""Activations of transformers' families, and feed-forward layers whose activation is one pass with
the bias or the gate."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import activations as theirs

from fastattn import functional
from fastattn._replacement import own_class
from fastattn.integrations.huggingface.fused._forms import Fused, derived, known
from fastattn.nn._linear import activate, projected

__all__ = ["rule"]

# The classes behind the names in configurations, by the name of what they compute.
_NAMES: dict[type, str] = {
    theirs.GELUActivation: "gelu",
    theirs.GELUTanh: "gelu_tanh",
    theirs.NewGELUActivation: "gelu_tanh",
    theirs.FastGELUActivation: "gelu_tanh",
    theirs.SiLUActivation: "silu",
    torch.nn.SiLU: "silu",
    torch.nn.ReLU: "relu",
}

_GATED: dict[str, Callable[..., Tensor]] = {
    "gelu": functional.geglu,
    "gelu_tanh": functools.partial(functional.geglu, approximate="tanh"),
    "silu": functional.swiglu,
    "relu": functional.reglu,
}


def _name(activation: Any) -> str | None:
    """What an activation computes, as one of the names above, if it is known."""
    if isinstance(activation, nn.GELU):
        return "gelu" if activation.approximate == "none" else "gelu_tanh"
    return next((_NAMES[cls] for cls in type(activation).__mro__ if cls in _NAMES), None)


class _Activation(Fused):
    """An activation of transformers over our kernel."""

    def forward(self, input: Tensor) -> Tensor:
        return activate(input, _name(self) or "")


class _GatedFeedForward(Fused):
    """down_proj(act(gate_proj(x)) * up_proj(x)), the gate in one pass."""

    gate_proj: nn.Module
    up_proj: nn.Module
    down_proj: nn.Module
    act_fn: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        gated: Tensor = _GATED[_name(self.act_fn) or ""](self.gate_proj(x), self.up_proj(x))
        return self.down_proj(gated)  # type: ignore[no-any-return]


class _PackedGatedFeedForward(Fused):
    """The same, gate and up in one projection."""

    gate_up_proj: nn.Module
    down_proj: nn.Module
    activation_fn: nn.Module

    def forward(self, hidden_states: Tensor) -> Tensor:
        gated = _GATED[_name(self.activation_fn) or ""](self.gate_up_proj(hidden_states))
        return self.down_proj(gated)  # type: ignore[no-any-return]


class _Intermediate(Fused):
    """act(dense(x)), bias and activation in one pass."""

    dense: nn.Module
    intermediate_act_fn: nn.Module

    def forward(self, hidden_states: Tensor) -> Tensor:
        return projected(self.dense, hidden_states, _name(self.intermediate_act_fn) or "")


class _FeedForward(Fused):
    """fc2(act(fc1(x))), bias and activation in one pass."""

    fc1: nn.Module
    fc2: nn.Module
    activation_fn: nn.Module

    def forward(self, hidden_states: Tensor) -> Tensor:
        hidden = projected(self.fc1, hidden_states, _name(self.activation_fn) or "")
        return self.fc2(hidden)  # type: ignore[no-any-return]


# With the attribute that holds the activation.
_KNOWN: dict[str, tuple[type[Fused], str]] = {
    "llama:LlamaMLP": (_GatedFeedForward, "act_fn"),
    "phi3:Phi3MLP": (_PackedGatedFeedForward, "activation_fn"),
    "bert:BertIntermediate": (_Intermediate, "intermediate_act_fn"),
    "clip:CLIPMLP": (_FeedForward, "activation_fn"),
}


def rule(module: nn.Module) -> type[nn.Module] | str | None:
    cls = own_class(module)
    if cls in _NAMES or cls is nn.GELU:
        return derived(cls, _Activation)
    if cls.__module__ == theirs.__name__:
        return "an activation without a kernel"
    form = known(cls, _KNOWN)
    if form is None:
        return None
    mixin, attribute = form
    if _name(getattr(module, attribute)) is None:
        return "a feed-forward layer whose activation has no kernel"
    return derived(cls, mixin)
