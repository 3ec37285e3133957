"""Fused attention and transformer kernels for PyTorch, on CPUs and NVIDIA GPUs."""

import os

import torch  # noqa: F401  (loads the libraries that the extension is linked to)

from fastattn import _C, functional, nn
from fastattn._version import __version__
from fastattn.convert import convert, revert
from fastattn.generation import generate
from fastattn.info import explain, info

__all__ = ["__version__", "convert", "explain", "functional", "generate", "info", "nn", "revert"]


def _check_environment() -> None:
    level = os.environ.get("FASTATTN_CPU_ISA")
    names = [name for name, _ in _C.cpu_levels()]
    if level and level not in names:
        raise ValueError(f"FASTATTN_CPU_ISA: expected one of {', '.join(names)}, got {level!r}")


_check_environment()
