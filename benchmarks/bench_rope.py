"""Rotary embedding of query and key: bound by memory."""

import pytest

import cases


@pytest.mark.parametrize("case", cases.family("rope"), ids=lambda case: case.id)
def bench_rope(case, measure):
    measure(case)
