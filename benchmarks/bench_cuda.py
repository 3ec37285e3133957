"""On the GPU: attention, decoding, and what is done row by row."""

import pytest

import cases


@pytest.mark.parametrize("case", cases.on("cuda"), ids=lambda case: case.id)
def bench_cuda(case, measure):
    measure(case)
