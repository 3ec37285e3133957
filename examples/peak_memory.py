"""What a call needs in memory: the growth at its peak, on a GPU, or on a CPU with Linux."""

from __future__ import annotations

import ctypes
import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch


def growth(call: Callable[[], Any], device: str) -> int:
    """The bytes by which memory grows, at its worst, while a call runs; its result is included.

    On a CPU it is the process's, whose high-water mark is reset. What earlier calls left in the
    heap would hide what this one needs: measure in a new process.
    """
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        kept = call()
        grown = torch.cuda.max_memory_allocated() - before
    else:
        ctypes.CDLL(None).malloc_trim(0)  # pages that the heap would use again are no free memory
        Path("/proc/self/clear_refs").write_text("5")
        before = _status("VmRSS")
        kept = call()
        grown = _status("VmHWM") - before
    del kept
    return grown


def in_new_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """In a fork of a process that has loaded torch, and run nothing."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["fastattn.functional"])
    with ProcessPoolExecutor(1, mp_context=context) as process:
        return process.submit(function, *arguments).result()


def _status(name: str) -> int:
    """Of this process: VmRSS is resident now, VmHWM was at its highest."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith(name)))
