"""The random numbers of dropout: they depend on a seed and a place, and on nothing else."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["dropout_mask", "philox_4x32"]

_WORD = 0xFFFFFFFF


def dropout_mask(
    shape: Sequence[int], dropout_p: float, philox: tuple[int, int], batch_index: int = 0
) -> Tensor:
    """True where a weight of (*batch, heads, queries, keys) is kept: word >= floor(p * 2**32).

    The word of (b, h, i, j) is number j % 4 of the Philox4x32-10 block with the counter (j // 4, i,
    b * heads + h, offset) and the key (seed, seed >> 32), each modulo 2**32; b numbers the
    flattened batch, from ``batch_index``. So it depends on seed, offset and place alone.
    """
    *batch, heads, queries, keys = shape
    seed, offset = philox
    first = batch_index * heads
    counter = (
        torch.arange((keys + 3) // 4),
        torch.arange(queries).unsqueeze(-1),
        torch.arange(first, first + math.prod(batch) * heads).view(-1, 1, 1),
        torch.tensor(offset & _WORD),
    )
    words = philox_4x32(counter, (seed & _WORD, seed >> 32 & _WORD))
    word = torch.stack(words, dim=-1).flatten(-2)[..., :keys].reshape(tuple(shape))
    return word >= math.floor(dropout_p * 2**32)


def philox_4x32(counter: Sequence[Tensor], key: tuple[int, int]) -> tuple[Tensor, ...]:
    """Ten rounds of Philox on four counter words: int64 tensors that hold unsigned 32-bit values.

    Source: Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3" (2011).
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        # A product wraps modulo 2**64, which keeps its bits; the mask undoes the signed shift.
        product0, product1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1 = (product1 >> 32 & _WORD) ^ c1 ^ k0, product1 & _WORD
        c2, c3 = (product0 >> 32 & _WORD) ^ c3 ^ k1, product0 & _WORD
        k0, k1 = (k0 + 0x9E3779B9) & _WORD, (k1 + 0xBB67AE85) & _WORD
    return c0, c1, c2, c3
