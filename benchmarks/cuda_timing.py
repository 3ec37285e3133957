"""Times the peers of one row against each other on the GPU.

Calls are queued one after another, in an order that is shuffled, and nobody waits for any of them
before the last. Before each, a buffer far larger than the second-level cache is overwritten: no
call finds its inputs in the cache, and while the GPU writes, the host has the time to queue what
comes next. So the events around a call enclose the GPU's work and not the host's.

Of a backward pass the gradients alone are timed, again and again after one forward pass.
"""

from __future__ import annotations

import gc
import itertools
import random
import time
from typing import Any

import torch
from torch._functorch import config

import checks
import machine
from cases.base import Case, Forward, Inputs, Unavailable
from timing import Bench, Row, Settings, Step, Timing, rounds_within

FLUSHED_BYTES = 512 << 20  # takes 0.1 ms and more to write: longer than the host needs for a call
MEMORY_SHARE = 0.3  # of the GPU, that the inputs of a row may take


class CudaBench(Bench):
    """Runs rows on the current GPU."""

    def __init__(self, settings: Settings):
        super().__init__(settings)
        # What is compiled must not give up what it keeps: a backward pass is timed many times.
        config.donated_buffer = False
        self.flushed = torch.empty(FLUSHED_BYTES, dtype=torch.uint8, device="cuda")

    def run(self, case: Case, benchmark: Any, cap: float) -> Row:
        torch.cuda.empty_cache()
        _, total = torch.cuda.mem_get_info()
        if case.input_bytes > MEMORY_SHARE * total:
            gib = case.input_bytes / 2**30
            raise Unavailable(f"left out: {gib:.0f} GiB of inputs are too many for this GPU")
        return super().run(case, benchmark, cap)

    def _input_sets(self, case: Case, cold: bool) -> int:
        return 1

    def warmed(
        self, row: Row, name: str, forward: Forward, inputs: Inputs, seconds: float
    ) -> tuple[Step, float]:
        if self.settings.memory:
            row.memory[name] = _peak_memory(forward, inputs)
        step: Step = _Gradients(forward, inputs) if inputs.douts else _Outputs(forward)
        self.timed(step, inputs)
        seconds, _ = self.timed(step, inputs)
        return step, seconds

    @staticmethod
    def timed(step: Step, inputs: Inputs) -> tuple[float, tuple[torch.Tensor, ...]]:
        """By the host's clock: for what is checked, and for estimates."""
        torch.cuda.synchronize()
        start = time.perf_counter()
        results = step(inputs)
        torch.cuda.synchronize()
        return time.perf_counter() - start, results

    def _timed_rounds(
        self,
        row: Row,
        benchmark: Any,
        steps: dict[str, Step],
        estimates: dict[str, float],
        sets: list[Inputs],
        cap: float,
    ) -> None:
        rounds = {
            name: self.settings.rounds or rounds_within(cap, seconds)
            for name, seconds in estimates.items()
        }
        spans: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {n: [] for n in steps}
        shuffle, order = random.Random(row.case.id).shuffle, list(steps)
        collecting = gc.isenabled()
        gc.collect()
        gc.disable()
        clock = machine.gpu_clock()
        try:
            for _ in range(max(rounds.values())):
                shuffle(order)  # nobody is always the one after the slowest
                for name in order:
                    if len(spans[name]) < rounds[name]:
                        spans[name].append(self._queued(steps[name], sets[0]))
            torch.cuda.synchronize()
        finally:
            if collecting:
                gc.enable()
        row.clocks = (clock, machine.gpu_clock())
        samples = {
            name: [1e-3 * start.elapsed_time(end) for start, end in taken]
            for name, taken in spans.items()
        }
        row.timings |= {name: Timing.of(taken) for name, taken in samples.items()}
        _keep(benchmark, samples["fastattn"])

    def _queued(self, step: Step, inputs: Inputs) -> tuple[torch.cuda.Event, torch.cuda.Event]:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.flushed.zero_()
        start.record()
        step(inputs)
        end.record()
        return start, end


class _Outputs:
    """The forward pass."""

    def __init__(self, forward: Forward):
        self.forward = forward

    def __call__(self, inputs: Inputs) -> tuple[torch.Tensor, ...]:
        out = self.forward(inputs)
        return out if isinstance(out, tuple) else (out,)


class _Gradients:
    """The backward pass after a forward pass that was done once."""

    def __init__(self, forward: Forward, inputs: Inputs):
        self.outs = _Outputs(forward)(inputs)

    def __call__(self, inputs: Inputs) -> tuple[torch.Tensor, ...]:
        leaves = tuple(inputs.leaves.values())
        return torch.autograd.grad(self.outs, leaves, inputs.douts, retain_graph=True)


def _peak_memory(forward: Forward, inputs: Inputs) -> int:
    """What the memory in use grows by, at its worst, in a forward pass and the backward pass after
    it: outputs and gradients included."""
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    checks.evaluate(forward, inputs)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def _keep(benchmark: Any, samples: list[float]) -> None:
    """Hands pytest-benchmark the seconds that another clock than its own took."""
    ticks = itertools.chain.from_iterable((0.0, seconds) for seconds in samples)

    def cuda_events() -> float:
        return next(ticks)

    benchmark._timer = cuda_events
    benchmark.pedantic(lambda: None, rounds=len(samples))
