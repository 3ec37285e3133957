"""What rotary embedding on CUDA has of its own: positions that the host does not know, which memory
it touches, and that nothing waits.

On an emulated GPU as far as that goes (FASTATTN_CUDA=emulate).
"""

import pytest
import torch
from attention_options import skip_on_gpu
from cuda_cases import captured, emulated, far_apart, gpu
from test_attention_bounds import fenced
from test_rope import check, tables

import fastattn.functional as fa
from fastattn import _C
from fastattn.testing import DTYPES, randn


@emulated
def test_an_emulated_kernel_runs_at_its_level_alone(level):
    before = _C.emulator_launches()
    fa.apply_rope(randn(1, 2, 3, 8, seed=1), *tables(8))
    assert (_C.emulator_launches() > before) == (level in _C.emulated_levels)


def test_query_and_key_are_rotated_by_one_launch(cuda):
    query, key = randn(2, 5, 9, 32, seed=1), randn(2, 2, 9, 16, seed=2)
    outs = fa.apply_rope_qk(query, key, *tables(16))
    for out, x in zip(outs, (query, key), strict=True):
        assert torch.equal(out, fa.apply_rope(x, *tables(16)))
    if cuda in _C.emulated_levels:
        before = _C.emulator_launches()
        fa.apply_rope_qk_(query, key, *tables(16))
        assert _C.emulator_launches() == before + 1


def test_float64_is_refused(cuda):
    x = randn(1, 2, 3, 8, seed=1, dtype=torch.float64)
    expected = "expected dtype float32, bfloat16 or float16 on CUDA"
    with pytest.raises(TypeError, match=f"^x: {expected}"):
        fa.apply_rope(x, *tables(8))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("interleaved", [False, True])
def test_heads_are_cut_into_groups(cuda, dtype, interleaved):
    """As many as there are, into groups of odd sizes, whose last one has fewer."""
    for heads, length in ((1, 70), (7, 1), (11, 90), (40, 2)):
        check(
            randn(2, heads, length, 72, seed=heads, dtype=dtype),
            *tables(64, 100),
            interleaved=interleaved,
            positions=torch.arange(length),
        )


@gpu
@pytest.mark.parametrize("interleaved", [False, True])
def test_a_token_outside_of_the_tables_becomes_nan(cuda, interleaved):
    """What lies on the GPU is not checked: that would wait for it."""
    x, cos_sin = randn(1, 2, 5, 12, seed=1), tables(8, 10)
    options = {"interleaved": interleaved, "positions": torch.tensor([0, 10, -1, 9, 2**40])}
    want = fa.apply_rope(x, *cos_sin, **options | {"positions": torch.tensor([0, 0, 0, 9, 0])})
    want[:, :, [1, 2, 4], :8] = torch.nan
    torch.testing.assert_close(fa.apply_rope(x, *cos_sin, **options), want, equal_nan=True)
    offset = torch.tensor([6])
    hidden = fa.apply_rope(x, *cos_sin, offset=offset).isnan().any(-1)
    assert hidden.any((0, 1)).tolist() == [False, False, False, False, True]
    with pytest.raises(
        ValueError, match=r"offset: expected offset >= 0 and offset \+ length <= 10"
    ):
        fa.apply_rope(x, *cos_sin, offset=6)


@pytest.mark.parametrize("at_end", [False, True])
@pytest.mark.parametrize("interleaved", [False, True])
def test_nothing_is_read_outside_of_the_inputs(cuda, interleaved, at_end):
    skip_on_gpu("its memory has no such pages")
    for dtype in DTYPES:
        for rotary, head_dim in ((6, 13), (16, 16), (32, 40)):
            x = fenced(randn(1, 2, 5, head_dim, seed=1, dtype=dtype), at_end)
            cos, sin = (fenced(t, at_end) for t in tables(rotary, 7))
            positions = fenced(torch.tensor([6, 0, 3, 6, 1]), at_end)
            check(x, cos, sin, interleaved=interleaved, positions=positions)


def test_offsets_beyond_32_bits(cuda, tmp_path):
    skip_on_gpu("its memory has no holes")
    x = randn(2, 3, 5, 16, seed=1, dtype=torch.bfloat16)
    far = far_apart(x, tmp_path, "x")
    want = fa.apply_rope(x, *tables(16))
    assert torch.equal(fa.apply_rope(far, *tables(16)), want)
    fa.apply_rope_(far, *tables(16))
    assert torch.equal(far, want)


@gpu
def test_a_graph_captures_it_and_reads_positions_as_they_are_then(cuda):
    query, key = randn(2, 4, 1, 64, seed=1).bfloat16(), randn(2, 2, 1, 64, seed=2).bfloat16()
    lengths, cos_sin = torch.tensor([3, 9]), tables(64)
    outs = captured(lambda: fa.apply_rope_qk(query, key, *cos_sin, offset=lengths))
    want = fa.apply_rope_qk(query, key, *cos_sin, offset=lengths)
    assert all(torch.equal(a, b) for a, b in zip(outs, want, strict=True))


@gpu
@pytest.mark.parametrize("name", ["cos", "sin", "positions", "offset"])
def test_tensors_of_two_devices_are_refused_before_they_are_read(cuda, name):
    cos, sin = tables(8)
    right = {"x": randn(1, 2, 3, 8, seed=1), "cos": cos, "sin": sin}
    right |= {"positions": torch.arange(3), "offset": torch.tensor(2)}
    with pytest.raises(ValueError, match=rf"^{name}: expected a tensor on"):
        fa.apply_rope(**right | {name: right[name].cpu()})
