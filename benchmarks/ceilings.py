"""What this machine can do at best, measured, so that a row can say how much of it it gets.

Arithmetic: the best rate that `torch.mm` reaches on square matrices, per dtype, all threads. It is
the rate of the best matrix product seen, not that of the arithmetic units: a kernel may exceed it,
and the report then shows more than 100 %. A 16-bit row is held to the better of its own rate and
that of float32, which it can always convert to.

Bandwidth: the best rate at which torch reads an array many times larger than the caches (a sum, a
dot product with itself), all threads.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from peers import available_memory
from shapes import DTYPES, Case


@dataclass
class Ceilings:
    flops: dict[str, float]  # dtype -> FLOP/s
    bandwidth: float  # bytes/s

    def share(self, case: Case, seconds: float) -> float:
        """Fraction of the ceiling that bounds this case."""
        if case.op == "decode":
            return case.bytes / seconds / self.bandwidth
        return case.flops / seconds / max(self.flops[case.dtype], self.flops["fp32"])

    def describe(self) -> str:
        rates = ", ".join(f"{name} {rate / 1e12:.3g} TFLOP/s" for name, rate in self.flops.items())
        return f"{rates}; read {self.bandwidth / 1e9:.3g} GB/s"


def measure(seconds: float, cache_bytes: int) -> Ceilings:
    """All ceilings, `seconds` for each; `cache_bytes` is the size of the last-level cache."""
    flops = {name: _matmul_rate(dtype, seconds) for name, dtype in DTYPES.items()}
    return Ceilings(flops, _read_rate(seconds, cache_bytes))


def _matmul_rate(dtype: torch.dtype, seconds: float) -> float:
    best = 0.0
    for size in (384, 768, 1536):
        a, b = torch.randn(2, size, size).to(dtype)
        out = torch.empty(size, size, dtype=dtype)
        elapsed = _best_seconds(partial(torch.mm, a, b, out=out), seconds / 3)
        best = max(best, 2.0 * size**3 / elapsed)
        if 8 * elapsed > seconds:
            break  # no fast product for this dtype here: the next one only takes longer
    return best


def _read_rate(seconds: float, cache_bytes: int) -> float:
    size = max(1 << 28, min(4 * cache_bytes, available_memory() // 8))
    values = torch.ones(size // 4)
    reads = (values.sum, lambda: values.dot(values))
    return max(size / _best_seconds(read, seconds / 2) for read in reads)


def _best_seconds(call: Callable[[], object], seconds: float) -> float:
    call()
    best, end = float("inf"), time.perf_counter() + seconds
    while True:
        start = time.perf_counter()
        call()
        now = time.perf_counter()
        best = min(best, now - start)
        if now >= end:
            return best
