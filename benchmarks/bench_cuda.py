"""Attention on the GPU: whole sequences forward and backward, and decoding from a cache."""

import pytest

import cases


@pytest.mark.parametrize("case", cases.on("cuda"), ids=lambda case: case.id)
def bench_cuda(case, measure):
    measure(case)
