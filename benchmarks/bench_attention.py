"""Attention over whole sequences: forward, and forward with backward."""

import pytest

import shapes


@pytest.mark.parametrize("case", shapes.cases("attention"), ids=lambda case: case.id)
def bench_attention(case, measure):
    measure(case)
