"""Attention of a few new tokens against a long key/value cache: bound by reading the cache."""

import pytest

import cases


@pytest.mark.parametrize("case", cases.family("decode"), ids=lambda case: case.id)
def bench_decode(case, measure):
    measure(case)
