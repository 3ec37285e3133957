"""The rotary embedding of query and key in transformers' attention layers, in one pass."""

from __future__ import annotations

import inspect
import re
import sys
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastattn._replacement import own_class
from fastattn.functional import apply_rope_qk
from fastattn.integrations.huggingface.fused._forms import Fused, codes, derived

__all__ = ["rule"]

_FUNCTION = "apply_rotary_pos_emb"
_Rotation = Callable[..., tuple[Tensor, Tensor]]


def _rotate_half(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1
) -> tuple[Tensor, Tensor]:
    half = cos.shape[-1] // 2
    return _rotate(q, k, cos[..., :half], sin[..., :half], unsqueeze_dim, interleaved=False)


def _rotate_pairs(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1
) -> tuple[Tensor, Tensor]:
    return _rotate(q, k, cos[..., ::2], sin[..., ::2], unsqueeze_dim, interleaved=True)


def _rotate_pairs_of_halves(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1
) -> tuple[Tensor, Tensor]:
    half = cos.shape[-1] // 2
    return _rotate(q, k, cos[..., :half], sin[..., :half], unsqueeze_dim, interleaved=True)


def _rotate(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int, interleaved: bool
) -> tuple[Tensor, Tensor]:
    """cos, sin: (batch or 1, length, rotary_dim / 2), a row for each position of each sequence."""
    batch, length, _ = cos.shape
    positions = None
    if batch > 1:
        positions = torch.arange(batch * length, device=q.device).view(batch, length)
    return apply_rope_qk(
        q,
        k,
        cos.reshape(batch * length, -1),
        sin.reshape(batch * length, -1),
        interleaved=interleaved,
        positions=positions,
        layout="bhsd" if unsqueeze_dim == 1 else "bshd",
    )


# By a module whose functions rotate so: how the tables hold an angle twice, and what does the same.
_HALVES, _PAIRS = r"torch\.cat\(\((\w+), \1\), dim=-1\)", r"torch\.repeat_interleave\(\w+, 2, dim="
_KNOWN: dict[str, tuple[str, _Rotation]] = {
    "llama": (_HALVES, _rotate_half),
    "olmo": (_HALVES, _rotate_half),
    "gpt_neox": (_HALVES, _rotate_half),
    "phi3": (_HALVES, _rotate_half),
    "modernbert": (_HALVES, _rotate_half),
    "cohere": (_PAIRS, _rotate_pairs),
    "glm": (_HALVES, _rotate_pairs_of_halves),
}


class _Attention(Fused):
    """An attention layer of transformers whose rotary embedding is one pass over query and key."""

    @classmethod
    def members(cls, source: type[nn.Module]) -> dict[str, Any]:
        """forward with another function under the name that it calls."""
        forward = source.forward
        rotation = _rotation(sys.modules[source.__module__])
        assert isinstance(forward, types.FunctionType) and callable(rotation)
        return {"forward": _calling(forward, rotation)}


def _calling(function: types.FunctionType, rotation: _Rotation) -> types.FunctionType:
    """function with rotation under the name that it calls, or that what it decorates does."""
    names, cells = function.__globals__, function.__closure__ or ()
    decorated = getattr(function, "__wrapped__", None)
    if decorated is None:
        names = names | {_FUNCTION: rotation}
    else:
        inner = _calling(decorated, rotation)
        cells = tuple(types.CellType(inner) if x.cell_contents is decorated else x for x in cells)
    replaced = types.FunctionType(
        function.__code__, names, function.__name__, function.__defaults__, cells
    )
    replaced.__kwdefaults__ = function.__kwdefaults__
    return replaced


def rule(module: nn.Module) -> type[nn.Module] | str | None:
    cls = own_class(module)
    if not cls.__module__.startswith("transformers.models.") or "Attention" not in cls.__name__:
        return None
    forward = inspect.unwrap(cls.forward)
    if not isinstance(forward, types.FunctionType) or _FUNCTION not in forward.__code__.co_names:
        return None
    rotation = _rotation(sys.modules[cls.__module__])
    return rotation if isinstance(rotation, str) else derived(cls, _Attention)


def _rotation(module: types.ModuleType) -> _Rotation | str:
    """What does as the rotary embedding of a module, or why nothing does."""
    found = codes(module.__name__)
    for name, (doubled, rotation) in _KNOWN.items():
        like = codes(f"transformers.models.{name}.modeling_{name}")
        if all(found.get(f) == like[f] for f in (_FUNCTION, "rotate_half")):
            if _all_tables(module, doubled):
                return rotation
            return "a rotary embedding whose tables are laid out otherwise"
    return "a rotary embedding whose code is none of those that are known"


def _all_tables(module: types.ModuleType, doubled: str) -> bool:
    """Whether every class of tables of the module holds each angle twice in this way."""
    sources = [
        inspect.getsource(cls)
        for name, cls in vars(module).items()
        if name.endswith("RotaryEmbedding") and isinstance(cls, type)
    ]
    return bool(sources) and all(re.search(doubled, source) for source in sources)
