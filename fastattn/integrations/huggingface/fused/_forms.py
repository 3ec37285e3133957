"""What transformers' classes compute, told from their code.

Most classes of a kind are copies of each other under other names: LlamaRMSNorm is written out some
140 times. A class is known if its code, names of the class and comments aside, is that of one of
those that we have a kernel for; another one is left alone, whatever it is called.
"""

from __future__ import annotations

import ast
import functools
import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from torch import nn

__all__ = ["Fused", "codes", "derived", "known"]

_Module = type[nn.Module]
_Meaning = TypeVar("_Meaning")
_SILENT = ("__init__", "extra_repr")  # methods that change nothing of what a call computes


class Fused(nn.Module):
    """The first base of a class that derived() makes; the other is the class of transformers."""

    @classmethod
    def members(cls, source: _Module) -> dict[str, Any]:
        """What else a class derived from source gets."""
        return {}

    def __reduce__(self) -> Any:
        mixin, source = type(self).__bases__
        return _rebuilt, (source, mixin), self.__dict__


def derived(source: _Module, mixin: type[Fused]) -> _Module:
    """Fused<Name>: mixin before source. The same class for the same two."""
    if (source, mixin) not in _DERIVED:
        members = {"__module__": mixin.__module__, "__doc__": mixin.__doc__}
        members |= mixin.members(source)
        _DERIVED[source, mixin] = type(f"Fused{source.__name__}", (mixin, source), members)
    return _DERIVED[source, mixin]


_DERIVED: dict[tuple[_Module, type[Fused]], _Module] = {}


def _rebuilt(source: _Module, mixin: type[Fused]) -> nn.Module:
    cls = derived(source, mixin)
    return cls.__new__(cls)


def known(cls: type, references: Mapping[str, _Meaning]) -> _Meaning | None:
    """The meaning of the first reference ("module:Class", below transformers.models) whose code is
    that of cls."""
    code = codes(cls.__module__).get(cls.__name__)
    if code is None or not cls.__module__.startswith("transformers."):
        return None
    for reference, meaning in references.items():
        module, name = reference.split(":")
        if codes(f"transformers.models.{module}.modeling_{module}").get(name) == code:
            return meaning
    return None


@functools.cache
def codes(module: str) -> dict[str, str]:
    """The code of each class and function of a module, by name, in a form that compares."""
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None or not spec.origin.endswith(".py"):
        return {}
    tree = ast.parse(Path(spec.origin).read_text(encoding="utf-8"))
    kinds = (ast.ClassDef, ast.FunctionDef)
    return {node.name: _code(node) for node in tree.body if isinstance(node, kinds)}


def _code(node: ast.ClassDef | ast.FunctionDef) -> str:
    if isinstance(node, ast.FunctionDef):
        # Not annotations, which differ among copies.
        names = [argument.arg for argument in node.args.args]
        body = ast.dump(ast.Module(_without_docstring(node.body), []))
        return f"{node.name} {names} {body}"
    methods = (part for part in node.body if isinstance(part, ast.FunctionDef))
    return "\n".join(sorted(_code(method) for method in methods if method.name not in _SILENT))


def _without_docstring(body: list[ast.stmt]) -> list[ast.stmt]:
    first = body[0]
    if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
        return body[1:]
    return body
