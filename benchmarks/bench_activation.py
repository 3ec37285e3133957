"""GELU, SiLU and gated activations: bound by memory."""

import pytest

import cases


@pytest.mark.parametrize("case", cases.family("activation"), ids=lambda case: case.id)
def bench_activation(case, measure):
    measure(case)
