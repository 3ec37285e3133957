"""What the ops raise, as the exceptions that a Python user expects."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastattn import _C


def checked(
    op: Callable[..., Any],
    *arguments: Any,
    names: Sequence[str] = ("query", "key", "value"),
    **options: Any,
) -> Any:
    """The op's results; what it raises about its arguments becomes a ValueError or TypeError.

    ``names`` are those of the first positional arguments.
    """
    try:
        return op(*arguments, **options)
    except RuntimeError as error:
        raise user_error(error, dict(zip(names, arguments, strict=False)) | options) from None


def require_one_device(**tensors: Tensor | None) -> None:
    """What an op checks of its tensors, for those without data, which never reach it."""
    given = {name: x for name, x in tensors.items() if x is not None}
    device = next(iter(given.values())).device
    for name, x in given.items():
        if x.device != device:
            raise ValueError(f"{name}: expected a tensor on {device}, got {x.device}")


def user_error(error: RuntimeError, arguments: dict[str, Any]) -> Exception:
    """The exception to raise for one that an op raised for these arguments."""
    text = str(error).split("\n", 1)[0]
    if text.startswith("fastattn: "):
        message = text.removeprefix("fastattn: ")
        return (TypeError if ": expected dtype " in message else ValueError)(message)
    if isinstance(error, NotImplementedError):
        return _missing_kernel(text, arguments) or error
    if wrong_type := _WRONG_TYPE.search(text):
        expected, name, got = wrong_type.groups()
        if expected == got:  # torch words an overflow so
            return ValueError(f"{name}: expected an integer of 64 bits, got a larger one")
        return TypeError(f"{name}: expected {expected}, got {got}")
    return error


# How torch refuses an argument that does not fit the schema.
_WRONG_TYPE = re.compile(
    r"Expected a value of type '(.+?)' for argument '(\w+)' but instead found type '(.+?)'"
)


# How torch names the op that has no kernel for a device.
_OP = re.compile(r"'fastattn::(\w+)'")


def _missing_kernel(text: str, arguments: dict[str, Any]) -> Exception | None:
    """Why no kernel is registered for these tensors; ``text`` is what torch says."""
    given = {name: x for name, x in arguments.items() if isinstance(x, Tensor)}
    first, like = next(iter(given.items()))
    device = like.device
    for name, x in given.items():
        if x.device != device:
            return ValueError(f"{name}: expected a tensor on {device} like {first}, got {x.device}")
    for name, x in given.items():
        if x.is_nested:
            return TypeError(
                f"{name}: expected a dense tensor, got a nested one: "
                "pass its values() and offsets() to attention_varlen"
            )
        if x.layout != torch.strided:
            return TypeError(f"{name}: expected a dense tensor, got layout {x.layout}")
        if x.is_quantized:
            return TypeError(f"{name}: expected dtype float32 or narrower, got {x.dtype}")
    if device.type == "cpu":
        return None
    op = _OP.search(text)
    why = "the only device this build has kernels for"
    if device.type == "cuda" and not _C.built_with_cuda:
        why += " (FASTATTN_CUDA=1 at build time, with nvcc, adds those for CUDA)"
    elif device.type == "cuda" and op:
        why = f"as {op[1]} has no CUDA kernel in this version"
    return ValueError(f"{first}: expected a tensor on cpu, {why}, got one on {device}")
