"""Runs tests on mutants, each in a process that is forked once everything is imported."""

from __future__ import annotations

import json
import mmap
import os
import re
import signal
import sys
import time
import traceback
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from mutants import Mutant

SEEDS = (1, 2)
MUTATED, REACHED = b"mr"  # a switch, see cuda/mutated.h


@dataclass
class Verdict:
    mutant: Mutant
    caught: bool
    seconds: float
    why: str


@dataclass
class Run:
    """Tests in one order of threads; `mutant`: None for the kernels as they are."""

    mutant: Mutant | None
    seed: int
    tests: list[str]
    most_seconds: float
    pid: int = 0
    started: float = 0.0

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.started


@dataclass
class Outcome:
    passed: bool
    why: str = ""
    test: str = ""


def message_of(report: Any) -> str:
    """What was wrong: of the emulator's words those after the thread, else the first lines."""
    crash = getattr(report.longrepr, "reprcrash", None)
    said = crash.message if crash else report.longreprtext
    if found := re.search(r"emulator: .*?, thread \d+: (.*)", said):
        return found[1]
    return " ".join(" ".join(said.splitlines()[:2]).split())


class MutationRuns:
    """A pytest plugin. In place of running each test once, it finds which of them reach a mutant,
    and runs these on it until one fails."""

    def __init__(
        self,
        mutants: list[Mutant],
        switches: int,
        folder: Path,
        jobs: int,
        tell: Callable[[Verdict], None],
    ) -> None:
        self.mutants, self.switches, self.folder = mutants, switches, folder
        self.jobs, self.tell = jobs, tell
        self.items: dict[str, pytest.Item] = {}
        self.cost: dict[str, float] = {}  # seconds
        self.reaching: dict[int, list[str]] = {mutant.number: [] for mutant in mutants}
        self.kills: Counter[str] = Counter()
        self.said = ""  # by the first test that failed

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        if session.testsfailed:
            raise session.Interrupted("not all tests could be collected")
        self.items = {item.nodeid: item for item in session.items}
        self.run_all([Run(None, seed, list(self.items), 3600) for seed in SEEDS], self.recorded)
        self.run_all([self.run_of(mutant, SEEDS[0]) for mutant in self.mutants], self.judged)
        return True

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed and not self.said:
            self.said = message_of(report)

    # ---- What is run -----------------------------------------------------------------------------

    def recorded(self, run: Run, outcome: Outcome) -> None:
        if not outcome.passed:
            pytest.exit(f"without a mutant, {outcome.test} fails: {outcome.why}", returncode=1)
        for line in self.file_of(run, "json").read_text().splitlines():
            about = json.loads(line)
            self.cost[about["test"]] = about["seconds"]
            for number in self.reaching.keys() & set(about["reached"]):
                if about["test"] not in self.reaching[number]:
                    self.reaching[number].append(about["test"])

    def run_of(self, mutant: Mutant, seed: int) -> Run:
        tests = self.reaching[mutant.number]
        return Run(mutant, seed, tests, 60 + 5 * sum(self.cost[test] for test in tests))

    def judged(self, run: Run, outcome: Outcome) -> Run | None:
        assert run.mutant is not None
        if outcome.passed and run.tests and run.seed != SEEDS[-1]:
            return self.run_of(run.mutant, SEEDS[SEEDS.index(run.seed) + 1])
        self.kills[outcome.test] += 1
        why = f"{outcome.test.removeprefix('tests/test_attention_')}: {outcome.why}"
        if outcome.passed:
            why = f"{len(run.tests)} tests reach it"
        self.tell(Verdict(run.mutant, not outcome.passed, run.seconds, why))
        return None

    # ---- Processes -------------------------------------------------------------------------------

    def file_of(self, run: Run, suffix: str) -> Path:
        number = "none" if run.mutant is None else run.mutant.number
        return self.folder / f"{number}-{run.seed}.{suffix}"

    def run_all(self, runs: list[Run], finished: Callable[[Run, Outcome], Run | None]) -> None:
        waiting, running = deque(runs), list[Run]()
        try:
            while waiting or running:
                while waiting and len(running) < self.jobs:
                    running.append(waiting.popleft())
                    self.start(running[-1])
                time.sleep(0.02)
                for run in list(running):
                    outcome = self.outcome_of(run)
                    if outcome is not None:
                        running.remove(run)
                        following = finished(run, outcome)
                        waiting.extendleft([following] if following else [])
        finally:
            for run in running:
                os.kill(run.pid, signal.SIGKILL)

    def start(self, run: Run) -> None:
        run.started = time.monotonic()
        sys.stdout.flush()
        run.pid = os.fork()
        if run.pid == 0:
            try:
                self.run_tests(run)
            except BaseException:
                traceback.print_exc()
            os._exit(2)

    def run_tests(self, run: Run) -> None:
        """In the process of a run, until it ends: 0 if all pass, 1 if one fails (and 2
        if this file is wrong)."""
        from fastattn import _C

        log = os.open(self.file_of(run, "log"), os.O_CREAT | os.O_TRUNC | os.O_WRONLY)
        os.dup2(log, 1)
        os.dup2(log, 2)
        path = self.file_of(run, "switches")
        path.write_bytes(bytes(self.switches))
        os.environ["FASTATTN_MUTANTS"] = str(path)
        _C.set_emulator_seed(run.seed)
        with path.open("r+b") as file, self.file_of(run, "json").open("w") as results:
            switches = mmap.mmap(file.fileno(), 0)
            if run.mutant is not None:
                switches[run.mutant.number] = MUTATED
            for test in self.in_order(run.tests):
                print(json.dumps(self.run_test(test, run, switches)), file=results, flush=True)
                if self.said:
                    os._exit(1)
        os._exit(0)

    def in_order(self, tests: list[str]) -> list[str]:
        """Quick ones first, and those that have caught others."""
        return sorted(tests, key=lambda test: self.cost.get(test, 0) / (1 + self.kills[test]))

    def run_test(self, test: str, run: Run, switches: mmap.mmap) -> dict[str, Any]:
        """Its name, what the first failure said, and where none is mutated what it has reached."""
        print(test, flush=True)
        began, item = time.monotonic(), self.items[test]
        item.ihook.pytest_runtest_protocol(item=item, nextitem=None)
        about = {"test": test, "said": self.said, "seconds": time.monotonic() - began}
        if run.mutant is None:
            about["reached"] = [n for n, state in enumerate(switches[:]) if state == REACHED]
            switches[:] = bytes(self.switches)
        return about

    def outcome_of(self, run: Run) -> Outcome | None:
        """None: it still runs."""
        pid, status = os.waitpid(run.pid, os.WNOHANG)
        if pid == 0 and run.seconds < run.most_seconds:
            return None
        if pid == 0:
            os.kill(run.pid, signal.SIGKILL)
            os.waitpid(run.pid, 0)
            return self.broken_off(run, f"no end after {run.most_seconds:.0f} s")
        code = os.waitstatus_to_exitcode(status)
        if code == 0:
            return Outcome(True)
        if code == 1:
            last = json.loads(self.file_of(run, "json").read_text().splitlines()[-1])
            return Outcome(False, last["said"], last["test"])
        if code == 2:
            raise RuntimeError(self.file_of(run, "log").read_text(errors="replace"))
        return self.broken_off(run, f"the process ended with {code}")

    def broken_off(self, run: Run, why: str) -> Outcome:
        """What the test that was under way left of its process."""
        log = self.file_of(run, "log").read_text(errors="replace").splitlines()
        test = next((line for line in reversed(log) if line in self.items), "")
        said = "".join(f": {line}" for line in log[-1:] if line != test)
        return Outcome(False, why + said, test)
