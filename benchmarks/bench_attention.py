"""Attention over whole sequences: forward, and forward with backward."""

import pytest

import cases


@pytest.mark.parametrize("case", cases.family("attention"), ids=lambda case: case.id)
def bench_attention(case, measure):
    measure(case)
