"""Options, the progress bar, and the fixture through which every row is measured and kept."""

from __future__ import annotations

import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

import ceilings
import cuda_ceilings
import machine
import plots
import report
import timing
from cases import PEERS
from cases.base import DEVICES, GRIDS, Case, Unavailable
from cuda_timing import CudaBench
from memory import MemoryMeter

BUILD = machine.ROOT / "build" / "bench"
SECONDS = {"cpu": 330.0, "cuda": 150.0}  # of the default grid
CAP = {"cpu": 1.5, "cuda": 0.15}  # seconds of samples per peer and row, at most


def pytest_addoption(parser):
    group = parser.getgroup("fastattn bench")
    group.addoption(
        "--grid", choices=GRIDS, default="default", help="which rows (default: %(default)s)"
    )
    group.addoption(
        "--device", choices=DEVICES, help="default: cuda where its kernels run, otherwise cpu"
    )
    group.addoption(
        "--emulated", action="store_true", help="the rows of the GPU on tensors of the CPU"
    )
    group.addoption(
        "--save", action="store_true", help="keep the results under benchmarks/results/"
    )
    group.addoption("--seconds", type=float, help="of the default grid (default: by device)")
    group.addoption("--threads", type=int, help="threads of every peer (default: torch's choice)")
    group.addoption("--peers", default=",".join(PEERS), help="default: %(default)s")
    group.addoption(
        "--compile", choices=("none", "some", "all"), help="rows that torch.compile takes part in"
    )
    group.addoption(
        "--cold", action="store_true", help="take inputs from memory, not from caches, in every row"
    )
    group.addoption("--no-memory", action="store_true", help="do not measure peak memory")


def pytest_configure(config):
    if config.option.threads:
        torch.set_num_threads(config.option.threads)
    machine.keep_freed_memory()
    config.pluginmanager.register(Run(config), "fastattn-bench")


@pytest.fixture
def measure(request, benchmark):
    """measure(case) checks, times and records one row."""
    run = request.config.pluginmanager.get_plugin("fastattn-bench")
    return lambda case: run.measure(case, benchmark)


class Run:
    """One run of the suite."""

    def __init__(self, config):
        option = config.option
        self.config, self.grid, self.quick = config, option.grid, option.grid == "quick"
        wanted = [name.strip() for name in option.peers.split(",")]
        if unknown := set(wanted) - set(PEERS):
            raise pytest.UsageError(f"--peers: {sorted(unknown)} not among {list(PEERS)}")
        if self.quick and option.save:
            raise pytest.UsageError("--save: the quick grid checks results, its times mean nothing")
        if option.emulated and not self.quick:
            raise pytest.UsageError("--emulated: the times mean nothing, so with --grid=quick only")
        full = self.grid == "full"
        self.emulated = option.emulated
        self.device = "cpu" if self.emulated else self._device(option.device)
        settings = timing.Settings(
            peers=[name for name in PEERS if name in wanted or name == report.OURS],
            compile=option.compile or ("none" if self.quick else "all" if full else "some"),
            cap=CAP[self.device],
            patience=60.0 if full else 0.5 if self.quick else 4.0,
            rounds=1 if self.quick else None,
            cold=option.cold,
            cache_bytes=machine.cache_bytes(),
            memory=not option.no_memory,
        )
        self.bench = (CudaBench if self.device == "cuda" else timing.Bench)(settings)
        seconds = option.seconds or SECONDS[self.device]
        self.deadline = time.monotonic() + (seconds if self.grid == "default" else float("inf"))
        self.rows: list[timing.Row] = []
        self.failures: list[str] = []
        self.left_out: dict[str, str] = {}
        self.left = 0
        self.meter = None
        if settings.memory and self.device == "cpu" and not self.emulated:
            self.meter = MemoryMeter(torch.get_num_threads())
        self.console = self._console()
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=self.console,
            transient=True,
        )
        self.ceilings: ceilings.Ceilings | cuda_ceilings.CudaCeilings | None = None

    @staticmethod
    def _device(wanted: str | None) -> str:
        obstacle = machine.cuda_obstacle()
        if wanted == "cuda" and obstacle:
            raise pytest.UsageError(f"--device=cuda: {obstacle}")
        return wanted or ("cpu" if obstacle else "cuda")

    def _console(self) -> Console:
        """The real terminal: pytest captures what peers print, and the bar must not be among it."""
        capture = self.config.pluginmanager.getplugin("capturemanager")
        with capture.global_and_fixture_disabled():
            terminal = os.fdopen(os.dup(1), "w", buffering=1)
        columns = os.environ.get("COLUMNS")
        width = None if terminal.isatty() or columns else 160
        return Console(file=terminal, width=width)

    @pytest.hookimpl(trylast=True)  # after -k
    def pytest_collection_modifyitems(self, items):
        chosen = [item for item in items if self._wanted(item.callspec.params["case"])]
        self.config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
        items[:] = chosen
        self.left = len(items)

    def _wanted(self, case: Case) -> bool:
        device = "cuda" if self.emulated else self.device
        return case.device == device and self.grid in case.grids

    @pytest.hookimpl(wrapper=True)
    def pytest_runtestloop(self, session):
        if not session.items or self.config.option.collectonly:
            return (yield)
        self.task = self.progress.add_task("ceilings", total=len(session.items))
        with self.progress:
            seconds = 0.02 if self.quick else 1.0
            if self.device == "cuda":
                self.ceilings = cuda_ceilings.measure(seconds)
            else:
                self.ceilings = ceilings.measure(seconds, machine.cache_bytes())
                self.bench.probe = self.ceilings.probe
            return (yield)

    def measure(self, case: Case, benchmark) -> None:
        if self.emulated:
            case = replace(case, device="cpu")
        self.progress.update(self.task, description=case.id)
        self.left -= 1
        most = self.bench.settings.cap
        # What is left of the time is shared out over the rows and peers to come; half goes into
        # inputs and checks.
        share = 0.5 * (self.deadline - time.monotonic()) / (self.left + 1) / 3
        machine.return_freed_memory()  # of the rows before
        try:
            row = self.bench.run(case, benchmark, cap=max(0.05, min(most, share)))
            self._add_memory(row)
        except Unavailable as why:
            self.left_out[case.id] = str(why)
            pytest.skip(str(why))
        except Exception:
            self.failures.append(case.id)
            raise
        finally:
            self.progress.advance(self.task)
        self.rows.append(row)
        benchmark.group = case.family
        benchmark.extra_info.update(
            case=case.id,
            medians={name: peer.median for name, peer in row.timings.items()},
            reasons=row.reasons,
            memory=row.memory,
            error_used=row.error_used,
        )
        if not self.console.is_terminal:
            self.console.print(self._line(row), highlight=False)

    def _add_memory(self, row: timing.Row) -> None:
        """Of rows long enough for it to matter, and of peers that need not compile for it anew."""
        if self.meter is None or not row.case.shows_memory:
            return
        for name in row.timings:
            if name != "compile" and row.timings[name].median < self.bench.settings.patience:
                row.memory[name] = self.meter.measure(row.case.id, name)

    def _line(self, row: timing.Row) -> str:
        rival = row.case.rivals[0]
        ratio = row.ratio(rival)
        versus = f"{ratio:.2f}x vs {rival}" if ratio else f"{rival} left out"
        count = len(self.rows) + len(self.failures)
        median = 1e6 * row.timings[report.OURS].median
        return f"{count}/{count + self.left} {row.case.id}: {median:.0f} us, {versus}"

    def pytest_report_teststatus(self, report):
        """No letter per row beside the progress bar; what failed is told at the end."""
        if report.when == "call" and report.outcome in ("passed", "failed"):
            return report.outcome, "", ""
        return None

    @pytest.hookimpl(trylast=True)
    def pytest_unconfigure(self):
        """After everything that pytest prints: the table, and the verdict as the last line."""
        if self.meter is not None:
            self.meter.close()
        if self.ceilings is None:
            return
        finished = report.Report(
            machine.provenance(self.device),
            self.ceilings,
            self.grid,
            self.rows,
            self.failures,
            self.left_out,
        )
        if not self.rows:
            self.console.print(finished.last_line())
            return
        folder: Path = BUILD
        if self.config.option.save:
            folder = self._results_folder(finished.provenance)
        report.save(finished, folder)
        page = plots.save(finished, folder)
        report.terminal(finished, self.console, page)

    def _results_folder(self, provenance: dict[str, Any]) -> Path:
        if self.device == "cuda":
            return machine.gpu_results_folder(provenance["device"])
        return machine.results_folder(provenance["level"])
