"""Other packages' names for this library.

``fastattn.compat.flash_attn`` is flash-attn 2.8's public interface; ``install()`` lets code that
imports ``flash_attn`` find it.
"""

from __future__ import annotations

import importlib
import pkgutil
import sys
from types import ModuleType

__all__ = ["install", "uninstall"]

_NAME = "flash_attn"
_displaced: dict[str, ModuleType] | None = None


def install() -> None:
    """From now on ``import flash_attn``, in this process, gives ``fastattn.compat.flash_attn``.

    Submodules too, as in ``from flash_attn.bert_padding import unpad_input``; one that is not there
    raises ModuleNotFoundError. A flash-attn package that is installed is hidden, and its modules
    that were imported are put aside, until :func:`uninstall`; names that other modules imported
    from it before stay theirs. Call it before them. A second call changes nothing.

    No metadata of a distribution is made up: ``importlib.metadata`` finds no "flash-attn", and
    transformers, which asks for it, refuses ``attn_implementation="flash_attention_2"``. There,
    use ``fastattn.integrations.huggingface``.

    >>> install()
    >>> from flash_attn import flash_attn_func
    >>> flash_attn_func.__module__
    'fastattn.compat.flash_attn.flash_attn_interface'
    >>> uninstall()
    """
    global _displaced
    if _displaced is not None:
        return
    package = importlib.import_module(f"{__name__}.{_NAME}")
    found = [info.name for info in pkgutil.walk_packages(package.__path__, f"{package.__name__}.")]
    modules = {name: importlib.import_module(name) for name in (package.__name__, *found)}
    _displaced = _take_away()
    sys.modules.update({name.removeprefix(f"{__name__}."): x for name, x in modules.items()})


def uninstall() -> None:
    """Undoes :func:`install`, if it was called; what was imported meanwhile stays imported."""
    global _displaced
    if _displaced is None:
        return
    _take_away()
    sys.modules.update(_displaced)
    _displaced = None


def _take_away() -> dict[str, ModuleType]:
    names = [name for name in sys.modules if name == _NAME or name.startswith(f"{_NAME}.")]
    return {name: sys.modules.pop(name) for name in names}
