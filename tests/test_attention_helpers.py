"""Slopes, windows and the bounds of packed sequences."""

import math

import pytest
import torch

import fastattn.functional as fa
from fastattn import reference
from fastattn.testing import randn


def test_every_public_function_is_documented_by_an_example():
    for name in fa.__all__:
        assert ">>> " in getattr(fa, name).__doc__, name


@pytest.mark.parametrize("heads", [1, 2, 3, 6, 8, 12, 20, 40, 64])
def test_alibi_slopes_are_geometric_and_interleave_for_other_numbers_of_heads(heads):
    slopes = fa.alibi_slopes(heads)
    assert slopes.shape == (heads,) and slopes.dtype == torch.float32
    power = 2 ** int(math.log2(heads))
    first = torch.tensor([2.0 ** (-8 * (h + 1) / power) for h in range(power)])
    torch.testing.assert_close(slopes[:power], first)
    between = torch.tensor([2.0 ** (-4 * (2 * h + 1) / power) for h in range(heads - power)])
    torch.testing.assert_close(slopes[power:], between)


def test_a_hugging_face_window_counts_the_diagonal():
    relative = reference.relative_positions(6, 6)
    for width in (1, 2, 4, 6, 9):
        ours = reference.visibility(relative, causal=True, window=fa.window_from_hf(width))
        theirs = (relative <= 0) & (relative > -width)
        assert torch.equal(ours, theirs)
    assert fa.window_from_hf(None) is None
    with pytest.raises(ValueError, match="sliding_window"):
        fa.window_from_hf(0)


def test_bounds_from_lengths_positions_and_documents_agree():
    bounds = fa.cu_seqlens_from_lengths(torch.tensor([3, 1, 2]))
    assert bounds.tolist() == [0, 3, 4, 6] and bounds.dtype == torch.int32
    positions = torch.tensor([0, 1, 2, 0, 0, 1])
    documents = torch.tensor([5, 5, 5, 1, 2, 2])
    for ids in (positions, positions[None], positions.int()):
        assert torch.equal(fa.cu_seqlens_from_position_ids(ids), bounds)
    assert torch.equal(fa.cu_seqlens_from_document_ids(documents), bounds)
    empty = torch.zeros(0, dtype=torch.int64)
    assert fa.cu_seqlens_from_lengths(empty).tolist() == [0]
    assert fa.cu_seqlens_from_document_ids(empty).tolist() == [0]


@pytest.mark.parametrize(
    "function",
    [
        fa.cu_seqlens_from_lengths,
        fa.cu_seqlens_from_position_ids,
        fa.cu_seqlens_from_document_ids,
    ],
)
def test_bounds_of_something_else_are_refused(function):
    for wrong in ([0, 1], torch.tensor([0.0, 1.0]), torch.tensor([True])):
        with pytest.raises(TypeError):
            function(wrong)
    with pytest.raises(ValueError, match="dimension"):
        function(torch.zeros(2, 3, dtype=torch.int64))


def test_packing_by_documents_is_masking_by_documents(level):
    documents = torch.tensor([0, 0, 0, 4, 4, 1, 1, 1, 1])
    query, key, value = (randn(9, 2, 16, seed=s) for s in (1, 2, 3))
    bounds = fa.cu_seqlens_from_document_ids(documents)
    packed = fa.attention_varlen(query, key, value, bounds, bounds, causal=True)
    dense = fa.attention(
        *(x[None] for x in (query, key, value)),
        mask=documents[:, None] == documents[None, :],
        causal=True,
        layout="bshd",
    )
    torch.testing.assert_close(packed, dense[0])
