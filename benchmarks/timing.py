"""Times the peers of one row against each other, and reports the row.

All peers run in turn inside one process, one call each per round, so that whatever slows the
machine down slows all of them down: pytest-benchmark times fastattn, and the others run in the set-
up of each of its rounds. A ratio is a ratio of medians. One call is one sample (a call takes tens
of microseconds at least; the clock costs less than a tenth).
"""

from __future__ import annotations

import gc
import itertools
import random
import textwrap
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch

import checks
from cases.base import COMPILING, Case, Forward, Inputs, Unavailable, available_memory

MAX_ROUNDS = 200
MAX_SETS = 64  # of inputs
MOST_PROBES = 15  # of the ceiling, in a row
WARM_AGAIN = 0.5  # seconds: a first call that takes longer is as good as a warm one

Step = Callable[[Inputs], tuple[torch.Tensor, ...]]


@dataclass
class Timing:
    """Seconds per call."""

    median: float
    p20: float
    p80: float
    rounds: int

    @classmethod
    def of(cls, samples: list[float]) -> Timing:
        p20, median, p80 = np.percentile(samples, [20, 50, 80]).tolist()
        return cls(median, p20, p80, len(samples))


@dataclass
class Row:
    """What was measured for one case. A peer is in `timings` or, with its reason, in `reasons`."""

    case: Case
    timings: dict[str, Timing] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)
    memory: dict[str, int | str] = field(default_factory=dict)  # bytes above the inputs, or why not
    error_used: float = float("nan")
    ceiling: float | None = None  # median between the calls, FLOP/s or bytes/s
    cold: bool = False
    clocks: tuple[int | None, int | None] | None = None  # MHz of the GPU, before and after

    def ratio(self, peer: str) -> float | None:
        """How many times as long as fastattn the peer takes: above 1 fastattn is faster."""
        if peer not in self.timings or "fastattn" not in self.timings:
            return None
        return self.timings[peer].median / self.timings["fastattn"].median


@dataclass
class Settings:
    """How long and with whom; see `conftest.py` for the options behind it."""

    peers: list[str]
    compile: str  # none, some (the rows marked so) or all
    cap: float  # seconds of samples per peer and row
    patience: float  # seconds; a peer that would take longer for one call is left out, and named
    rounds: int | None  # fixed, or None for as many as fit in `cap`
    cold: bool
    cache_bytes: int
    memory: bool  # whether peak memory is measured


class Bench:
    """Runs rows; remembers how fast each peer was, to foresee a call that would take minutes."""

    def __init__(self, settings: Settings):
        self.settings = settings
        # For a case, what measures the ceiling that bounds it.
        self.probe: Callable[[Case], Callable[[], float]] | None = None
        self.rates: dict[tuple[str, str, str, bool], float] = {}

    def run(self, case: Case, benchmark, cap: float) -> Row:
        """Checks and times one case. Raises AssertionError when fastattn's result is off."""
        cold = self.settings.cold or case.is_cold
        row = Row(case, cold=cold)
        with torch.set_grad_enabled(case.backward):
            first = case.inputs()
            oracle = case.oracle(first)
            sets = [first] + [first.copy() for _ in range(1, self._input_sets(case, cold))]
            steps, estimates = self._first_calls(row, first, oracle, cap)
            self._timed_rounds(row, benchmark, steps, estimates, sets, cap)
        return row

    def _input_sets(self, case: Case, cold: bool) -> int:
        """So many that, used in turn, none is still in the last cache when its turn comes again."""
        if not cold:
            return 1
        fitting = int(0.25 * available_memory() / case.input_bytes)
        return max(1, min(-(-3 * self.settings.cache_bytes // case.input_bytes), MAX_SETS, fitting))

    def _first_calls(self, row: Row, inputs: Inputs, oracle: checks.Oracle, cap: float):
        """Builds, warms up and checks every peer; returns those that can run, and their seconds."""
        case, checked = row.case, oracle.checked
        steps: dict[str, Step] = {}
        estimates: dict[str, float] = {}
        for name in self.settings.peers:
            if name not in case.peers:
                continue
            try:
                self._expect_patience(name, case, cap)
                forward = case.peers[name].build(case)
                seconds, results = self.timed(partial(checks.evaluate, forward), checked)
                if name == "fastattn":
                    row.error_used = oracle.budget_used(results)
                elif obstacle := oracle.peer_obstacle(results):
                    raise Unavailable(obstacle)
                del results
                steps[name], seconds = self.warmed(row, name, forward, inputs, seconds)
            except Exception as error:
                if name == "fastattn":
                    raise
                row.reasons[name] = reason(error)
                continue
            estimates[name] = seconds
            key = self._kind(name, case)
            self.rates[key] = max(self.rates.get(key, 0.0), case.work / seconds)
        return steps, estimates

    def warmed(
        self, row: Row, name: str, forward: Forward, inputs: Inputs, seconds: float
    ) -> tuple[Step, float]:
        """What is timed, and about how long it takes; a first call took `seconds`."""
        step = partial(checks.evaluate, forward)
        if seconds < WARM_AGAIN or name in COMPILING:
            seconds, _ = self.timed(step, inputs)
        return step, seconds

    @staticmethod
    def timed(step: Step, inputs: Inputs) -> tuple[float, tuple[torch.Tensor, ...]]:
        start = time.perf_counter()
        results = step(inputs)
        return time.perf_counter() - start, results

    def _expect_patience(self, name: str, case: Case, cap: float) -> None:
        if name in COMPILING:
            wanted = self.settings.compile == "all" or (
                self.settings.compile == "some" and case.compiled
            )
            if not wanted:
                raise Unavailable("not compiled for this row (--compile=all)")
        patience = self.settings.patience
        if name not in ("fastattn", case.rivals[0]):
            patience = min(patience, 8 * cap)  # a run that is late saves on these first
        rate = self.rates.get(self._kind(name, case))
        if name != "fastattn" and rate and case.work / rate > patience:
            raise Unavailable("left out: a call would take too long")

    @staticmethod
    def _kind(name: str, case: Case) -> tuple[str, str, str, bool]:
        """Rows that a peer runs at about one rate."""
        return name, case.op, case.dtype, case.backward

    def _timed_rounds(self, row, benchmark, steps, estimates, sets, cap: float) -> None:
        ours = steps.pop("fastattn")
        foreign = [name for name in steps if row.case.peers[name].own_threads]
        native = [name for name in steps if name not in foreign]
        samples: dict[str, list[float]] = {name: [] for name in steps}
        # Each call takes the next set: no peer finds what another one left in a cache.
        ring = itertools.cycle(sets)
        shuffle = random.Random(row.case.id).shuffle
        rounds = self.settings.rounds or rounds_within(cap, estimates["fastattn"])
        probe = self.probe(row.case) if self.probe else None
        ceilings: list[float] = []
        turns = itertools.count()

        def others():
            if probe and next(turns) * MOST_PROBES >= len(ceilings) * rounds:
                ceilings.append(probe())
                ours(next(ring))  # what comes next finds caches and clock as after any other call
            shuffle(native)  # nobody is always the one after the slowest
            for name in foreign + native:
                taken = samples[name]
                if len(taken) >= rounds_within(cap, estimates[name]):
                    continue
                if name in foreign:
                    # torch's idle threads stop spinning, and leave the cores to the other pool.
                    time.sleep(0.01)
                taken.append(self.timed(steps[name], next(ring))[0])
                if name in foreign:
                    _wake_pool()
            return (next(ring),), {}

        collecting = gc.isenabled()
        gc.collect()
        gc.disable()
        try:
            benchmark.pedantic(ours, setup=others, rounds=rounds)
        finally:
            if collecting:
                gc.enable()
        row.timings["fastattn"] = Timing.of(benchmark.stats.stats.data)
        row.ceiling = float(np.median(ceilings)) if ceilings else None
        row.timings |= {name: Timing.of(taken) for name, taken in samples.items()}


def rounds_within(cap: float, seconds: float) -> int:
    """As many calls as fit in `cap` seconds, and at least 5; 3 or 2 where these take too long."""
    least = 5 if 2.5 * seconds < cap else 3 if seconds < cap else 2
    return max(least, min(int(cap / seconds), MAX_ROUNDS))


def _wake_pool() -> None:
    torch.ones(1 << 20).sum()


def reason(error: Exception) -> str:
    """What went wrong, in a line; a peer that is not installed says just that."""
    if isinstance(error, ModuleNotFoundError):
        return f"{error.name} is not installed"
    kind = "" if isinstance(error, Unavailable) else f"{type(error).__name__}: "
    return textwrap.shorten(f"{kind}{error}", 200, placeholder=" ...")
