"""Small things that attention is called with: ALiBi slopes, windows, the bounds of packed rows."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = [
    "alibi_slopes",
    "cu_seqlens_from_document_ids",
    "cu_seqlens_from_lengths",
    "cu_seqlens_from_position_ids",
    "window_from_hf",
]


def alibi_slopes(num_heads: int, *, device: torch.device | str | None = None) -> Tensor:
    """The slopes of ALiBi for any number of heads: (num_heads), float32.

        slope_h = 2 ** (-8 * h / n)    h = 1 ... n,    n a power of two

    For another number, those of the largest power of two below it, and then every second one of
    twice that power. Source: Press et al., Train Short, Test Long (2022).

    >>> alibi_slopes(8)[:3].tolist()
    [0.5, 0.25, 0.125]
    >>> alibi_slopes(6).tolist()
    [0.25, 0.0625, 0.015625, 0.00390625, 0.5, 0.125]
    """
    if num_heads < 1:
        raise ValueError(f"num_heads: expected at least 1, got {num_heads}")
    power = 1 << (num_heads.bit_length() - 1)
    exponents = [8 * h / power for h in range(1, power + 1)]
    exponents += [8 * h / (2 * power) for h in range(1, 2 * (num_heads - power), 2)]
    return torch.tensor([2.0**-e for e in exponents], dtype=torch.float32, device=device)


def window_from_hf(sliding_window: int | None) -> tuple[int | None, int | None] | None:
    """The window of a Hugging Face config's ``sliding_window``, which counts the diagonal as well.

    A query there sees ``sliding_window`` keys: itself and those before it.

    >>> window_from_hf(4096)
    (4095, 0)
    >>> window_from_hf(None) is None
    True
    """
    if sliding_window is None:
        return None
    if sliding_window < 1:
        raise ValueError(f"sliding_window: expected at least 1, or None, got {sliding_window}")
    return sliding_window - 1, 0


def cu_seqlens_from_lengths(lengths: Tensor) -> Tensor:
    """(0, l_0, l_0 + l_1, ...): where each sequence begins, and where the last one ends; int32.

    lengths: (sequences), any integer dtype.

    >>> cu_seqlens_from_lengths(torch.tensor([3, 0, 2]))
    tensor([0, 3, 3, 5], dtype=torch.int32)
    """
    _require_rows("lengths", lengths)
    start = torch.zeros(1, dtype=torch.int32, device=lengths.device)
    return torch.cat((start, lengths.cumsum(0).to(torch.int32)))


def cu_seqlens_from_position_ids(position_ids: Tensor) -> Tensor:
    """The bounds of packed sequences whose positions each count from 0; int32.

    position_ids: (rows) or (1, rows), as Hugging Face's padding-free collators make them. Its
    output's size depends on the data, so do this once per batch, outside of compiled code.

    >>> cu_seqlens_from_position_ids(torch.tensor([0, 1, 2, 0, 1]))
    tensor([0, 3, 5], dtype=torch.int32)
    """
    position_ids = _without_batch("position_ids", position_ids)
    return _bounds(position_ids == 0)


def cu_seqlens_from_document_ids(document_ids: Tensor) -> Tensor:
    """The bounds of packed documents, one wherever the id changes; int32.

    document_ids: (rows) or (1, rows), any integer dtype. Its output's size depends on the data, so
    do this once per batch, outside of compiled code.

    >>> cu_seqlens_from_document_ids(torch.tensor([7, 7, 7, 2, 2]))
    tensor([0, 3, 5], dtype=torch.int32)
    """
    document_ids = _without_batch("document_ids", document_ids)
    changes = torch.ones_like(document_ids, dtype=torch.bool)
    changes[1:] = document_ids[1:] != document_ids[:-1]
    return _bounds(changes)


def _bounds(starts: Tensor) -> Tensor:
    if starts.numel() > 0 and not starts[0]:
        raise ValueError("position_ids: expected 0 as the first position")
    rows = torch.tensor([starts.numel()], device=starts.device)
    return torch.cat((starts.nonzero().squeeze(1), rows)).to(torch.int32)


def _without_batch(name: str, ids: Tensor) -> Tensor:
    if isinstance(ids, Tensor) and ids.dim() == 2 and ids.shape[0] == 1:
        ids = ids[0]
    _require_rows(name, ids)
    return ids


def _require_rows(name: str, x: Tensor) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(x).__name__}")
    if x.is_floating_point() or x.is_complex() or x.dtype == torch.bool:
        raise TypeError(f"{name}: expected an integer dtype, got {x.dtype}")
    if x.dim() != 1:
        raise ValueError(f"{name}: expected one dimension, got shape {tuple(x.shape)}")
