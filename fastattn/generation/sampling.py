"""Drawing the next token of each request from its logits."""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["candidates", "draw"]

_FIRST_LOOK = 256  # most nuclei are smaller than this; a larger one takes another look


def draw(
    logits: Tensor,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """One token for each row of logits (batch, vocabulary), (batch,) int64; see ``generate``."""
    logits = logits.float()
    if temperature == 0:
        return logits.argmax(-1)
    # Less their maximum first: a small temperature takes no logit to infinity then.
    logits = (logits - logits.amax(-1, keepdim=True)) / temperature
    kept = candidates(logits, top_k, top_p)
    if kept is not None:
        logits = logits.masked_fill(~kept, -math.inf)
    # The token in whose part of the cumulated mass a uniform number falls. It needs one number for
    # each request, where torch.multinomial takes one for each token of the vocabulary.
    mass = logits.double().exp().cumsum(-1)
    total = mass[:, -1:]
    uniform = torch.rand(total.shape, dtype=mass.dtype, device=mass.device, generator=generator)
    point = torch.minimum(uniform * total, total.nextafter(torch.zeros_like(total)))
    return torch.searchsorted(mass, point, right=True).squeeze(-1)


def candidates(logits: Tensor, top_k: int | None, top_p: float | None) -> Tensor | None:
    """Which tokens may be drawn, (batch, vocabulary) boolean; None: all.

    Of equal logits those of the lower tokens come first.
    """
    vocabulary = logits.shape[-1]
    most = vocabulary if top_k is None else min(top_k, vocabulary)
    if top_p is not None and top_p < 1:
        values, count = _nucleus(logits, most, top_p)
        return _first(logits, values.gather(-1, count - 1), count)
    if most == vocabulary:
        return None
    return _first(logits, logits.topk(most).values[:, -1:], most)


def _nucleus(logits: Tensor, most: int, top_p: float) -> tuple[Tensor, Tensor]:
    """The largest logits in order, and how many of them make a mass of top_p, (batch, 1)."""
    vocabulary = logits.shape[-1]
    size = min(_FIRST_LOOK, vocabulary) if most == vocabulary else most
    while True:
        values = logits.topk(size).values
        whole = values if size == most else logits
        total = whole.double().logsumexp(-1, keepdim=True)
        mass = (values.double() - total).exp().cumsum(-1)
        if size == most or bool((mass[:, -1] >= top_p).all()):
            return values, 1 + (mass[:, :-1] < top_p).sum(-1, keepdim=True)
        size = min(8 * size, most)


def _first(logits: Tensor, least: Tensor, count: Tensor | int) -> Tensor:
    """Marks the first ``count`` of each row, of which ``least`` is the last."""
    above, equal = logits > least, logits == least
    room = count - above.sum(-1, keepdim=True)
    return above | (equal & (equal.cumsum(-1) <= room))
