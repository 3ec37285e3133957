"""A model of transformers on fastattn: its attention, and on request what stands around it."""

from __future__ import annotations

import copy
import importlib
import inspect
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, TypeVar

from torch import nn
from transformers import PreTrainedConfig

from fastattn._replacement import (
    Class,
    Conversion,
    ConversionReport,
    class_name,
    named_modules,
    obstacle,
    own_class,
    replace_classes,
    set_class,
)
from fastattn.integrations.huggingface.adapters import ADAPTERS
from fastattn.integrations.huggingface.fused import RULES
from fastattn.integrations.huggingface.registration import NAME, register
from fastattn.nn import MultiheadAttention

__all__ = ["patch", "unpatch"]

_Model = TypeVar("_Model", bound=nn.Module)

_NO_ADAPTER = "attention outside of transformers' interface, without an adapter"


@dataclass
class _Before:
    """What patch found, by the name of the module in the model."""

    classes: dict[str, Class] = field(default_factory=dict)
    implementations: dict[str, str | None] = field(default_factory=dict)


def patch(
    model: _Model,
    *,
    attention: bool = True,
    norms: bool = False,
    activations: bool = False,
    rotary: bool = False,
    linears: bool = False,
    unpad: bool = False,
    strict: bool = True,
) -> tuple[_Model, ConversionReport]:
    """Puts a model of transformers on fastattn, in place.

    A module is replaced by a change of its class, to one that is derived from it and holds what it
    holds, so that parameters, hooks, wrappers such as PEFT's and isinstance go on as before.

    With attention, the model gets a copy of its config, which all of its parts share: the
    implementation is set there, and other models that are made from the config that it had neither
    get it nor take it away. Later changes belong in ``model.config``.

    Args:
        model: a model of transformers, or a module that holds some.
        attention: layers that go through transformers' interface get the implementation "fastattn",
            the others an adapter.
        norms: LayerNorm and RMSNorm, each family's in its own casting (Llama's and Gemma's differ).
        activations: GELU, SiLU and ReLU, and gated feed-forward layers in one pass.
        rotary: the rotary embedding of query and key in one pass.
        linears: linear layers with few rows in 16 bits on the CPU, as in decoding, at the speed of
            memory; see :func:`fastattn.functional.linear`.
        unpad: encoders of the BERT kind run on packed sequences, without the rows of padding, which
            are 0 in their result. Needs attention.
        strict: raise if there is attention that can be put on fastattn in neither way.

    Returns:
        (model, report). The report lists by class what was replaced, and what was kept and why.

    Raises:
        TypeError: for a model that is no module. ValueError: for attention that would stay as it
            is, unless strict is False, and for unpad without attention. The model is as it was.

    >>> from transformers import BloomConfig, BloomModel
    >>> model = BloomModel(BloomConfig(vocab_size=99, hidden_size=32, n_layer=2, n_head=4))
    >>> model, report = patch(model)
    >>> print(report.replaced[0].source)
    transformers.models.bloom.modeling_bloom.BloomAttention
    >>> report.replaced[0].paths
    ('h.0.self_attention', 'h.1.self_attention')
    >>> model = unpatch(model)
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    if unpad and not attention:
        raise ValueError("unpad: expected attention=True with it (packed rows need it), got False")
    left = list(_uncovered_attention(model)) if attention else []
    if left and strict:
        path, module = left[0]
        raise ValueError(
            "model: expected attention that goes through transformers' interface or has an "
            f"adapter, got {class_name(own_class(module))} ({path}); strict=False keeps it"
        )
    asked = {
        "norms": norms,
        "activations": activations,
        "rotary": rotary,
        "linears": linears,
        "unpad": unpad,
    }
    rules = [RULES[name] for name, wanted in asked.items() if wanted]
    kept = {module for _, module in left}
    record = model.__dict__.setdefault("_fastattn_before", _Before())
    for path, module in model.named_modules():
        record.classes.setdefault(path, own_class(module))

    def verdict(module: nn.Module) -> Class | str | None:
        if module in kept:
            return (
                obstacle(module) or "attention outside of transformers' interface, without adapter"
            )
        if attention and (adapter := _adapter(own_class(module))) is not None:
            return adapter
        verdicts = (rule(module) for rule in rules)
        return next((found for found in verdicts if found is not None), None)

    hooked = _use_interface(model, record) if attention else []
    report = replace_classes(model, verdict)
    return model, ConversionReport((*hooked, *report.replaced), report.kept)


def unpatch(model: _Model) -> _Model:
    """The inverse of :func:`patch`, in place: every class and implementation as patch found them.

    ``model.config`` stays the copy that patch made, with what was changed in it since.

    Raises:
        ValueError: for a model that was not patched.
    """
    record = model.__dict__.pop("_fastattn_before", None)
    if record is None:
        raise ValueError("model: expected one that patch returned, got one that was not patched")
    for path, module in model.named_modules():
        if record.classes.get(path, own_class(module)) is not own_class(module):
            set_class(module, record.classes[path])
        if path in record.implementations:
            module.config._attn_implementation_internal = record.implementations[path]
    return model


def _use_interface(model: nn.Module, record: _Before) -> list[Conversion]:
    """Sets the implementation in every config; the entries of the layers that will read it."""
    register()
    if not record.implementations:
        _own_configs(model)
    configs: dict[str, Any] = {
        path: module.config
        for path, module in model.named_modules()
        if isinstance(getattr(module, "config", None), PreTrainedConfig)
    }
    for path, config in configs.items():
        record.implementations.setdefault(path, config._attn_implementation)
    for config in configs.values():
        # Not through the setter, which goes down into parts that have no model here.
        config._attn_implementation_internal = NAME
    paths: dict[Class, list[str]] = {}
    for path, module in named_modules(model):
        if _reads_interface(own_class(module)):
            paths.setdefault(own_class(module), []).append(path)
    target = f'attention implementation "{NAME}"'
    return [Conversion(tuple(p), class_name(cls), target, None) for cls, p in paths.items()]


def _own_configs(model: nn.Module) -> None:
    """Copies of all configs that the model holds. transformers' models keep the object that they
    are made from, and set their implementation in it."""
    copies: dict[int, Any] = {}  # so that what was one object is one object again
    for module in model.modules():
        for name, held in vars(module).items():
            if isinstance(held, PreTrainedConfig):
                vars(module)[name] = copy.deepcopy(held, copies)


def _uncovered_attention(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Attention of transformers that neither reads the interface nor has an adapter, nor has a part
    that does."""
    for path, module in model.named_modules():
        cls = own_class(module)
        is_attention = "Attention" in cls.__name__ and cls.__module__.startswith("transformers.")
        if is_attention and not any(_is_covered(part) for part in module.modules()):
            yield path, module


def _is_covered(module: nn.Module) -> bool:
    cls = own_class(module)
    if _adapter(cls) is not None:
        return obstacle(module) is None
    return _reads_interface(cls) or _is_adapter(cls)


def _reads_interface(cls: Class) -> bool:
    if cls not in _READS:
        bases = (base for base in cls.__mro__ if base.__module__.startswith("transformers.models."))
        _READS[cls] = any("ALL_ATTENTION_FUNCTIONS" in inspect.getsource(base) for base in bases)
    return _READS[cls]


_READS: dict[Class, bool] = {}


def _adapter(cls: Class) -> Class | None:
    if cls is nn.MultiheadAttention:  # in pooling heads
        return MultiheadAttention
    if cls.__module__ not in ADAPTERS:
        return None
    replacements = importlib.import_module(ADAPTERS[cls.__module__]).REPLACEMENTS
    adapter: Class | None = replacements.get(cls)
    return adapter


def _is_adapter(cls: Class) -> bool:
    return cls is MultiheadAttention or cls.__module__ in ADAPTERS.values()
