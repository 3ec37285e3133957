"""LayerNorm and RMSNorm, with and without the addition of a residual: bound by memory."""

import pytest

import cases


@pytest.mark.parametrize("case", cases.family("norm"), ids=lambda case: case.id)
def bench_norm(case, measure):
    measure(case)
