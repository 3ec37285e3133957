"""One token through the KV caches of all layers: bound by reading the caches."""

import pytest

import cases


@pytest.mark.parametrize("case", cases.family("kv_cache"), ids=lambda case: case.id)
def bench_kv_cache(case, measure):
    measure(case)
