"""Modules of a model that get another class, in place, and the report of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn as torch_nn

from fastattn import nn

__all__ = [
    "Class",
    "Conversion",
    "ConversionReport",
    "class_name",
    "named_modules",
    "obstacle",
    "own_class",
    "replace_classes",
    "set_class",
]

Class = type[torch_nn.Module]


@dataclass(frozen=True)
class Conversion:
    """What became of the modules of one class."""

    paths: tuple[str, ...]  # their names in the model, every one of a shared module; "": itself
    source: str
    target: str | None  # None: they are kept
    reason: str | None  # why they are kept

    def __str__(self) -> str:
        end = f"-> {self.target}" if self.target else f"kept: {self.reason}"
        shown = [path or "(model)" for path in self.paths[:3]]
        more = [f"{len(self.paths) - 3} more"] if len(self.paths) > 3 else []
        return f"{self.source} {end}: {', '.join(shown + more)}"


@dataclass(frozen=True)
class ConversionReport:
    """What was replaced and what was not, and why; prints as a list."""

    replaced: tuple[Conversion, ...]
    kept: tuple[Conversion, ...]

    def __str__(self) -> str:
        return "\n".join(str(entry) for entry in (*self.replaced, *self.kept))


def replace_classes(
    model: torch_nn.Module, verdict: Callable[[torch_nn.Module], Class | str | None]
) -> ConversionReport:
    """verdict: the class that a module gets, why it keeps its own, or None: it is not reported.

    A module whose class is not what a call of it runs keeps it, whatever the verdict.
    """
    found: dict[tuple[Class, Class | str], list[str]] = {}
    verdicts: dict[torch_nn.Module, tuple[Class, Class | str | None]] = {}
    for path, module in named_modules(model):
        if module not in verdicts:
            verdicts[module] = own_class(module), _possible(module, verdict(module))
        source, target = verdicts[module]
        if target is not None:
            found.setdefault((source, target), []).append(path)
    for module, (_, target) in verdicts.items():
        if target is not None and not isinstance(target, str):
            set_class(module, target)
    entries = [
        Conversion(tuple(paths), class_name(source), None, target)
        if isinstance(target, str)
        else Conversion(tuple(paths), class_name(source), class_name(target), None)
        for (source, target), paths in found.items()
    ]
    return ConversionReport(
        tuple(entry for entry in entries if entry.target is not None),
        tuple(entry for entry in entries if entry.target is None),
    )


def obstacle(module: torch_nn.Module) -> str | None:
    """Why another class would not do for a module, whatever its own is."""
    if "forward" in vars(module):  # accelerate puts one there
        return "its forward was replaced on the instance"
    if getattr(module, "qconfig", None) is not None:
        return "prepared for quantisation"
    return None


def _possible(module: torch_nn.Module, target: Class | str | None) -> Class | str | None:
    if target is None or isinstance(target, str):
        return target
    return obstacle(module) or target


def set_class(module: torch_nn.Module, target: Class) -> None:
    """Gives a module another class, wrapped as its own is."""
    module.__class__ = _wrapped_alike(type(module), target)


def own_class(module: torch_nn.Module) -> Class:
    """The class that a module was built from: FSDP2 and DDP's composable form derive one of it."""
    cls = type(module)
    return cls.__bases__[1] if _is_wrapped(cls) else cls


def _is_wrapped(cls: Class) -> bool:
    bases = cls.__bases__
    return len(bases) == 2 and bases[0].__module__.startswith("torch.distributed.")


def _wrapped_alike(cls: Class, target: Class) -> Class:
    """target, wrapped as cls is."""
    if not _is_wrapped(cls):
        return target
    wrapper, source = cls.__bases__
    if (cls, target) not in _WRAPPED:
        derived = type(cls.__name__, (wrapper, target), dict(cls.__dict__))
        _WRAPPED[cls, target], _WRAPPED[derived, source] = derived, cls
    return _WRAPPED[cls, target]


_WRAPPED: dict[tuple[Class, Class], Class] = {}


def class_name(cls: Class) -> str:
    """Where users import it from."""
    for package in (torch_nn, nn):
        if getattr(package, cls.__name__, None) is cls:
            return f"{package.__name__}.{cls.__name__}"
    return f"{cls.__module__}.{cls.__qualname__}"


def named_modules(model: torch_nn.Module) -> list[tuple[str, torch_nn.Module]]:
    """Every module by each of its names, but not what TorchScript holds."""
    named = list(model.named_modules(remove_duplicate=False))
    fixed = tuple(
        f"{path}." if path else "" for path, x in named if isinstance(x, torch.jit.ScriptModule)
    )
    return [(path, x) for path, x in named if not path or not path.startswith(fixed)]
