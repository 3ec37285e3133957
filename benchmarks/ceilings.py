"""What this machine can do at best, measured, so that a row can say how much of it it gets.

Arithmetic: the products that attention of a dtype is made of at the level in use (AMX tiles, dot
instructions or FMA), on registers, with no memory in their way, on all threads. A 16-bit row is
held to the better of its own rate and that of float32, which it can always convert to. A processor
may lower its clock once real data come through the caches; so next to it stands the best rate of
`torch.mm` on square matrices, what a tuned matrix product makes of it. And exponentials: the other
half of softmax.

Bandwidth: the best rates at which torch, with all threads, reads an array many times larger than
the caches (a sum, a dot product with itself), and copies one (both what is read and what is written
count; the target is there already).

These are the best of a run. What a shared machine, or one that lowers its clock under load, gives
while a row is timed is less, so rows are held to what `probe` measures between their calls.
"""

from __future__ import annotations

import functools
import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from fastattn._C import cpu_peak

from cases.base import DTYPES, Case, available_memory

PROBE_SECONDS = 3e-3
PROBE_BYTES = 1 << 26


@dataclass
class Ceilings:
    flops: dict[str, float]  # dtype -> FLOP/s on registers
    matmul: dict[str, float]  # dtype -> FLOP/s of torch.mm
    exponentials: float  # per second, float32
    bandwidth: float  # bytes/s, reading
    copy_bandwidth: float  # bytes/s, reading and writing
    memory_bytes: int  # of the arrays that bandwidth is measured on

    def limit(self, case: Case) -> float:
        """The ceiling that bounds this case, FLOP/s or bytes/s."""
        limits = {
            "read": self.bandwidth,
            "copy": self.copy_bandwidth,
            "flops": self.flops[self._products(case)],
        }
        return limits[case.bound]

    def _products(self, case: Case) -> str:
        return max((case.dtype, "fp32"), key=lambda dtype: self.flops[dtype])

    def probe(self, case: Case) -> Callable[[], float]:
        """A function that measures the ceiling that bounds this case once, in milliseconds."""
        if case.bound == "flops":
            what = self._products(case)
            rounds = max(1, int(PROBE_SECONDS * self.flops[what] / cpu_peak(what, 1)))
            return partial(_peak_once, what, rounds)
        parts = itertools.cycle(_array(self.memory_bytes).split(PROBE_BYTES // 4)[:-1])
        if case.bound == "read":
            calls: list[Callable] = [torch.sum, lambda values: values.dot(values)]
            return lambda: max(_rate(partial(call, next(parts)), PROBE_BYTES) for call in calls)
        calls = [torch.Tensor.copy_, lambda target, values: torch.neg(values, out=target)]
        return lambda: max(
            _rate(partial(call, next(parts), next(parts)), 2 * PROBE_BYTES) for call in calls
        )

    def describe(self) -> str:
        rates = ", ".join(
            f"{name} {rate / 1e12:.3g} TFLOP/s (torch.mm {self.matmul[name] / 1e12:.3g})"
            for name, rate in self.flops.items()
        )
        exponentials = f"{self.exponentials / 1e9:.3g} G exponentials/s"
        read, copy = self.bandwidth / 1e9, self.copy_bandwidth / 1e9
        return f"{rates}; {exponentials}; read {read:.3g} GB/s; copy {copy:.3g} GB/s (in and out)"


def measure(seconds: float, cache_bytes: int) -> Ceilings:
    """All ceilings, `seconds` for each; `cache_bytes` is the size of the last-level cache."""
    early = {name: _peak(name, seconds / 2) for name in DTYPES}
    matmul = {name: _matmul_rate(dtype, seconds) for name, dtype in DTYPES.items()}
    # Again: what a run starts with may still hold one of the cores.
    flops = {name: max(rate, _peak(name, seconds / 2)) for name, rate in early.items()}
    size = max(1 << 28, min(4 * cache_bytes, available_memory() // 8))
    return Ceilings(
        flops,
        matmul,
        _peak("exp", seconds),
        _read_rate(size, seconds),
        _copy_rate(size, seconds),
        size,
    )


@functools.lru_cache(maxsize=1)
def _array(size: int) -> torch.Tensor:
    return torch.ones(size // 4)


def _peak_once(what: str, rounds: int) -> float:
    start = time.perf_counter()
    done = cpu_peak(what, rounds)
    return done / (time.perf_counter() - start)


def _rate(call: Callable[[], object], work: float) -> float:
    start = time.perf_counter()
    call()
    return work / (time.perf_counter() - start)


def _peak(what: str, seconds: float) -> float:
    """The best of calls of some milliseconds."""
    rounds, best, end = 1000, 0.0, time.perf_counter() + seconds
    while best == 0 or time.perf_counter() < end:
        start = time.perf_counter()
        done = cpu_peak(what, rounds)
        elapsed = time.perf_counter() - start
        if elapsed < 2e-3:
            rounds *= 2
        else:
            best = max(best, done / elapsed)
    return best


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
    values = _array(size)
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
