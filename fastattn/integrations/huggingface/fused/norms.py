"""LayerNorm and RMSNorm of transformers' families."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastattn import functional
from fastattn import nn as ours
from fastattn._replacement import own_class
from fastattn.integrations.huggingface.fused._forms import Fused, derived, known

__all__ = ["rule"]


class _RMSNorm(Fused):
    """An RMSNorm of transformers over :func:`fastattn.functional.rms_norm`."""

    casting = "fp32"

    def forward(self, hidden_states: Tensor) -> Tensor:
        weight = getattr(self, "weight", None)  # Gemma 4's may have none
        return functional.rms_norm(
            hidden_states, hidden_states.shape[-1:], weight, _eps(self), casting=self.casting
        )


class _LlamaRMSNorm(_RMSNorm):
    __doc__ = _RMSNorm.__doc__
    casting = "llama"


class _GemmaRMSNorm(_RMSNorm):
    __doc__ = _RMSNorm.__doc__
    casting = "gemma"


class _LayerNorm(Fused):
    """A LayerNorm of transformers, without bias, over :func:`fastattn.functional.layer_norm`."""

    weight: Tensor

    def forward(self, hidden_states: Tensor) -> Tensor:
        shape = hidden_states.shape[-1:]
        return functional.layer_norm(hidden_states, shape, self.weight, None, _eps(self))


_KNOWN: dict[str, type[Fused]] = {
    "llama:LlamaRMSNorm": _LlamaRMSNorm,
    "t5:T5LayerNorm": _LlamaRMSNorm,
    "gemma:GemmaRMSNorm": _GemmaRMSNorm,
    "olmo2:Olmo2RMSNorm": _RMSNorm,
    "gemma4:Gemma4RMSNorm": _RMSNorm,
    "cohere:CohereLayerNorm": _LayerNorm,
}


def rule(module: nn.Module) -> type[nn.Module] | str | None:
    cls = own_class(module)
    if cls is torch.nn.LayerNorm:
        return ours.LayerNorm
    if cls is torch.nn.RMSNorm:
        return ours.RMSNorm
    if not cls.__module__.startswith("transformers.") or not cls.__name__.endswith("Norm"):
        return None
    mixin = known(cls, _KNOWN)
    if mixin is None:
        return "a norm whose code is none of those that are known"
    weight = getattr(module, "weight", None)
    if weight is not None and weight.dim() != 1:
        return "a norm with a weight for each head"
    return derived(cls, mixin)


def _eps(norm: nn.Module) -> float:
    eps = vars(norm)["variance_epsilon" if "variance_epsilon" in vars(norm) else "eps"]
    return float(eps)
