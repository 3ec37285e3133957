"""What this machine can do at best, measured, so that a row can say how much of it it gets.

Arithmetic: the best rate that `torch.mm` reaches on square matrices, per dtype, all threads. It is
the rate of the best matrix product seen, not that of the arithmetic units: a kernel may exceed it,
and the report then shows more than 100 %. A 16-bit row is held to the better of its own rate and
that of float32, which it can always convert to.

Bandwidth: the best rates at which torch, with all threads, reads an array many times larger than
the caches (a sum, a dot product with itself), and copies one (both what is read and what is written
count; the target is there already).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from cases.base import DTYPES, Case, available_memory


@dataclass
class Ceilings:
    flops: dict[str, float]  # dtype -> FLOP/s
    bandwidth: float  # bytes/s, reading
    copy_bandwidth: float  # bytes/s, reading and writing

    def share(self, case: Case, seconds: float) -> float:
        """Fraction of the ceiling that bounds this case."""
        limits = {
            "read": self.bandwidth,
            "copy": self.copy_bandwidth,
            "flops": max(self.flops[case.dtype], self.flops["fp32"]),
        }
        return case.work / seconds / limits[case.bound]

    def describe(self) -> str:
        rates = ", ".join(f"{name} {rate / 1e12:.3g} TFLOP/s" for name, rate in self.flops.items())
        read, copy = self.bandwidth / 1e9, self.copy_bandwidth / 1e9
        return f"{rates}; read {read:.3g} GB/s; copy {copy:.3g} GB/s (in and out)"


def measure(seconds: float, cache_bytes: int) -> Ceilings:
    """All ceilings, `seconds` for each; `cache_bytes` is the size of the last-level cache."""
    flops = {name: _matmul_rate(dtype, seconds) for name, dtype in DTYPES.items()}
    size = max(1 << 28, min(4 * cache_bytes, available_memory() // 8))
    return Ceilings(flops, _read_rate(size, seconds), _copy_rate(size, seconds))


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


def _read_rate(size: int, seconds: float) -> float:
    values = torch.ones(size // 4)
    reads = (values.sum, lambda: values.dot(values))
    return max(size / _best_seconds(read, seconds / 2) for read in reads)


def _copy_rate(size: int, seconds: float) -> float:
    source, target = torch.ones(2, size // 4)
    copies = (lambda: target.copy_(source), lambda: torch.neg(source, out=target))
    return max(2 * size / _best_seconds(copy, seconds / 2) for copy in copies)


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
