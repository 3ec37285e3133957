"""What this GPU can do at best, measured through torch: products of square matrices of 8192 on a
side, and copies from device memory to device memory (both what is read and what is written count).

Medians, as those of the rows: a GPU that computes for longer lowers its clock.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from cases.base import DTYPES, Case

SIDE = 8192
COPIED_BYTES = 2 << 30


@dataclass
class CudaCeilings:
    matmul: dict[str, float]  # dtype -> FLOP/s of torch.mm; float32 without TF32
    copy_bandwidth: float  # bytes/s, reading and writing

    def limit(self, case: Case) -> float:
        """The ceiling that bounds this case, FLOP/s or bytes/s."""
        return self.copy_bandwidth if case.bound == "copy" else self.matmul[case.dtype]

    def describe(self) -> str:
        rates = ", ".join(f"{name} {rate / 1e12:.3g}" for name, rate in self.matmul.items())
        return f"torch.mm {rates} TFLOP/s; copy {self.copy_bandwidth / 1e9:.4g} GB/s (in and out)"


def measure(seconds: float, side: int = SIDE, copied_bytes: int = COPIED_BYTES) -> CudaCeilings:
    """All ceilings, `seconds` for each."""
    matmul = {name: _matmul_rate(side, dtype, seconds) for name, dtype in DTYPES.items()}
    return CudaCeilings(matmul, _copy_rate(copied_bytes, seconds))


def read_rate(seconds: float, size: int = COPIED_BYTES) -> float:
    """Bytes/s of a sum that reads device memory and writes next to nothing."""
    source = torch.zeros(size // 4, device="cuda")
    out = torch.empty((), device="cuda")
    return size / _median_seconds(lambda: torch.sum(source, dim=0, out=out), seconds)


def _matmul_rate(side: int, dtype: torch.dtype, seconds: float) -> float:
    a, b = (torch.randn(side, side, device="cuda").to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    return 2.0 * side**3 / _median_seconds(lambda: torch.mm(a, b, out=out), seconds)


def _copy_rate(size: int, seconds: float) -> float:
    source = torch.randint(256, (size,), dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * size / _median_seconds(lambda: target.copy_(source), seconds)


def _median_seconds(call: Callable[[], object], seconds: float) -> float:
    call()
    torch.cuda.synchronize()
    samples, end = [], time.perf_counter() + seconds
    while len(samples) < 3 or time.perf_counter() < end:
        events = [torch.cuda.Event(enable_timing=True) for _ in range(9)]
        events[0].record()
        for event in events[1:]:
            call()
            event.record()
        torch.cuda.synchronize()
        samples += [1e-3 * a.elapsed_time(b) for a, b in itertools.pairwise(events)]
    return statistics.median(samples)
