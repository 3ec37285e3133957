"""torch.nn's modules in a model become ours, and back."""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import MethodType
from typing import TypeVar

import torch
from torch import Tensor
from torch import nn as torch_nn
from torch.nn.utils.parametrize import is_parametrized

from fastattn import nn
from fastattn._replacement import (
    Class,
    Conversion,
    ConversionReport,
    class_name,
    own_class,
    replace_classes,
)

__all__ = ["Conversion", "ConversionReport", "convert", "revert"]

_Model = TypeVar("_Model", bound=torch_nn.Module)

# Of each pair, an instance holds what an instance of the other holds: its class is all that tells
# them apart, and all that changes.
_OURS: dict[Class, Class] = {
    torch_nn.GELU: nn.GELU,
    torch_nn.LayerNorm: nn.LayerNorm,
    torch_nn.MultiheadAttention: nn.MultiheadAttention,
    torch_nn.RMSNorm: nn.RMSNorm,
    torch_nn.Transformer: nn.Transformer,
    torch_nn.TransformerDecoder: nn.TransformerDecoder,
    torch_nn.TransformerDecoderLayer: nn.TransformerDecoderLayer,
    torch_nn.TransformerEncoder: nn.TransformerEncoder,
    torch_nn.TransformerEncoderLayer: nn.TransformerEncoderLayer,
}
_MAX_HEAD_DIM = 512
_TORCHS = {ours: torchs for torchs, ours in _OURS.items()} | {nn.Linear: torch_nn.Linear}


def convert(model: _Model, *, inplace: bool = False) -> tuple[_Model, ConversionReport]:
    """A model whose torch.nn modules are fastattn's where there is a counterpart.

    These are GELU, LayerNorm, RMSNorm, MultiheadAttention and the five classes of transformers.
    A module is replaced by a change of its class, so that all it holds stays: parameters, buffers,
    hooks, flags, and its place in whatever refers to it.

    Args:
        model: any module; the outermost may be one to replace. It may hold what wraps modules, such
            as PEFT's LoRA, DDP and FSDP2, which go on as they did.
        inplace: False: the result is a copy that shares the parameters and buffers of model, which
            stays as it is. True: the result is model.

    Returns:
        (model, report). The report has an entry for each class, with the names of its modules, and
        for those that were not replaced why: no counterpart, a subclass of a class that has one
        (its forward may differ), parametrised or quantised, a forward put on the instance.

    Raises:
        TypeError: for a model that is no module, or that cannot be copied (in place it converts).

    What was compiled before compiles again at its next call.

    >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.LayerNorm(8))
    >>> converted, report = convert(model)
    >>> print(report)
    torch.nn.LayerNorm -> fastattn.nn.LayerNorm: 1
    torch.nn.Sequential kept: no counterpart in fastattn.nn: (model)
    torch.nn.Linear kept: other tools look for this class (fastattn.nn.Linear is for decoding): 0
    >>> converted[1].weight is model[1].weight
    True
    """
    return _changed(model, inplace, _for_ours)


def revert(model: _Model, *, inplace: bool = False) -> tuple[_Model, ConversionReport]:
    """The inverse of :func:`convert`: torch.nn's modules in place of fastattn's.

    Also for models that were built from fastattn.nn. What torch.nn cannot hold is kept: classes
    that it does not have, their subclasses, an RMSNorm of another casting than torch's.

    Args, returns and errors are those of convert.

    >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.LayerNorm(8))
    >>> reverted, report = revert(convert(model)[0])
    >>> type(reverted[1]) is torch.nn.LayerNorm
    True
    """
    return _changed(model, inplace, _for_torchs)


def _changed(
    model: _Model, inplace: bool, verdict: Callable[[torch_nn.Module], Class | str]
) -> tuple[_Model, ConversionReport]:
    if not isinstance(model, torch_nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    if not inplace:
        model = _copied(model)
    return model, replace_classes(model, verdict)


def _for_ours(module: torch_nn.Module) -> Class | str:
    cls = own_class(module)
    if isinstance(module, torch.jit.ScriptModule):
        return "TorchScript, whose code is fixed"
    if isinstance(module, torch_nn.MultiheadAttention) and module.head_dim > _MAX_HEAD_DIM:
        return f"fastattn has heads up to {_MAX_HEAD_DIM}"
    if cls in _OURS:
        return _OURS[cls]
    if _is_ours(cls):
        return "already of fastattn"
    if cls is torch_nn.Linear:
        return "other tools look for this class (fastattn.nn.Linear is for decoding)"
    base = next((base for base in cls.__mro__ if base in _OURS or _is_ours(base)), None)
    if base is None:
        return "no counterpart in fastattn.nn"
    return _why_derived(module, base)


def _for_torchs(module: torch_nn.Module) -> Class | str:
    cls = own_class(module)
    base = next((base for base in cls.__mro__ if _is_ours(base)), None)
    if base is None:
        return "not of fastattn"
    if base not in _TORCHS:
        return "no counterpart in torch.nn"
    if base is not cls:
        return _why_derived(module, base)
    if isinstance(module, nn.RMSNorm) and module.casting != "fp32":
        return f"torch.nn.RMSNorm has no casting {module.casting!r}"
    return _TORCHS[cls]


def _why_derived(module: torch_nn.Module, base: Class) -> str:
    if is_parametrized(module):
        return f"a parametrised {class_name(base)}"
    if type(module).__module__.startswith("torch.ao."):
        return f"a quantised {class_name(base)}"
    return f"a subclass of {class_name(base)}, whose forward may differ"


def _is_ours(cls: type) -> bool:
    return cls.__module__.partition(".")[0] == "fastattn"


def _copied(model: _Model) -> _Model:
    """A copy of all modules and what they hold; tensors are shared, and what stands outside but is
    called by a hook."""
    shared: dict[int, object] = {}
    modules = set(model.modules())
    for module in modules:
        if isinstance(module, torch.jit.ScriptModule):
            shared[id(module)] = module
            continue
        held = [*module._parameters.values(), *module._buffers.values(), *vars(module).values()]
        shared |= {id(x): x for x in held if isinstance(x, Tensor)}
        hooks = [hook for x in held if isinstance(x, dict) for hook in x.values()]
        owners = [hook.__self__ for hook in hooks if isinstance(hook, MethodType)]
        shared |= {
            id(x): x for x in owners if not (isinstance(x, torch_nn.Module) and x in modules)
        }
    try:
        copied = copy.deepcopy(model, shared)
    except Exception as error:
        raise TypeError(
            f"model: expected one that can be copied, or inplace=True; copying raised {error!r}"
        ) from error
    for old, new in zip(model.modules(), copied.modules(), strict=True):
        # Copying torch's layer puts ReLU in place of an activation that is a module.
        if isinstance(new, torch_nn.TransformerDecoderLayer) and "activation" not in vars(old):
            vars(new).pop("activation", None)
    return copied
