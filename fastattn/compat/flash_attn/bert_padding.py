"""From padded batches to packed rows and back; differentiable, as often as you like."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = [
    "index_first_axis",
    "index_first_axis_residual",
    "index_put_first_axis",
    "pad_input",
    "unpad_input",
    "unpad_input_for_concatenated_sequences",
]


def index_first_axis(input: Tensor, indices: Tensor) -> Tensor:
    """input[indices] along the first dimension. A row that is taken twice gets both gradients."""
    return input.index_select(0, indices)


def index_put_first_axis(values: Tensor, indices: Tensor, first_axis_dim: int) -> Tensor:
    """Zeros of first_axis_dim rows, but for rows ``indices``, which are those of values."""
    zeros = values.new_zeros((first_axis_dim, *values.shape[1:]))
    return zeros.index_copy(0, indices, values)


def index_first_axis_residual(input: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    """(input[indices], input): both parts of a block that works on some rows alone."""
    return index_first_axis(input, indices), input


def unpad_input(
    hidden_states: Tensor, attention_mask: Tensor, unused_mask: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, int, Tensor]:
    """Packs the rows of a batch that a mask selects.

    Args:
        hidden_states: (batch, seqlen, ...).
        attention_mask: (batch, seqlen), bool or integer, nonzero for what is valid; on either side.
        unused_mask: (batch, seqlen), nonzero for rows that are packed too, but not used.

    Returns:
        (packed rows (total, ...), their indices in the flattened batch (total), cu_seqlens
        (batch + 1) int32, the longest length, the number of used rows of each sequence (batch)
        int32).

    The number of rows depends on the mask: on CUDA this waits for the GPU.
    """
    _require_mask("attention_mask", attention_mask, hidden_states)
    used = attention_mask != 0
    packed = used
    if unused_mask is not None:
        _require_mask("unused_mask", unused_mask, hidden_states)
        packed = used | (unused_mask != 0)
    lengths = packed.sum(-1, dtype=torch.int32)
    rows, indices = _packed(hidden_states, packed)
    return rows, indices, _bounds(lengths), _longest(lengths), used.sum(-1, dtype=torch.int32)


def unpad_input_for_concatenated_sequences(
    hidden_states: Tensor, attention_mask_in_length: Tensor
) -> tuple[Tensor, Tensor, Tensor, int]:
    """Packs a batch whose rows hold several sequences each, one behind the other.

    Args:
        hidden_states: (batch, seqlen, ...).
        attention_mask_in_length: (batch, seqlen), integer: the lengths of the sequences of a row,
            in order, and 0 in all other places, for instance [2, 3, 0, 0, 0, 0].

    Returns:
        (packed rows (total, ...), their indices in the flattened batch (total), cu_seqlens
        (sequences + 1) int32, the longest length).
    """
    _require_mask("attention_mask_in_length", attention_mask_in_length, hidden_states)
    places = torch.arange(attention_mask_in_length.shape[1], device=hidden_states.device)
    valid = places < attention_mask_in_length.sum(-1, keepdim=True)
    lengths = attention_mask_in_length[attention_mask_in_length != 0]
    rows, indices = _packed(hidden_states, valid)
    return rows, indices, _bounds(lengths), _longest(lengths)


def pad_input(hidden_states: Tensor, indices: Tensor, batch: int, seqlen: int) -> Tensor:
    """Puts packed rows (total, ...) back: (batch, seqlen, ...), 0 in the padding."""
    padded = index_put_first_axis(hidden_states, indices, batch * seqlen)
    return padded.reshape(batch, seqlen, *hidden_states.shape[1:])


def _packed(hidden_states: Tensor, selected: Tensor) -> tuple[Tensor, Tensor]:
    indices = selected.flatten().nonzero().squeeze(1)
    return index_first_axis(hidden_states.flatten(0, 1), indices), indices


def _bounds(lengths: Tensor) -> Tensor:
    return F.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))


def _longest(lengths: Tensor) -> int:
    return int(lengths.max()) if lengths.numel() > 0 else 0


def _require_mask(name: str, mask: Tensor, hidden_states: Tensor) -> None:
    if mask.shape != hidden_states.shape[:2]:
        raise ValueError(
            f"{name}: expected the first two dimensions of hidden_states, "
            f"{tuple(hidden_states.shape[:2])}, got shape {tuple(mask.shape)}"
        )
