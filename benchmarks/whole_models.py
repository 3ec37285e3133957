"""What the benchmarks of whole models share: their options, their clock, their files."""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

import machine

PRECISIONS = ("fp32", "bf16")
OURS, THEIRS = "fastattn", "torch"


def parser(doc: str) -> argparse.ArgumentParser:
    """The options that all have; the description is the doc of the module."""
    made = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--quick", action="store_true", help="a tiny model: results, not times")
    made.add_argument("--save", action="store_true", help="write to benchmarks/results/<cpu>/")
    made.add_argument("--out", type=Path, default=machine.ROOT / "build" / "bench", help="or here")
    made.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=PRECISIONS)
    return made


def gpu_parser(doc: str) -> argparse.ArgumentParser:
    """The options of the programs for a GPU."""
    made = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    made.add_argument("--save", action="store_true", help="write to benchmarks/results/<device>/")
    made.add_argument("--out", type=Path, default=machine.ROOT / "build" / "bench", help="or here")
    return made


def write_of_gpu(name: str, options: argparse.Namespace, results: dict[str, Any]) -> None:
    """A file of this name, to where the options say."""
    chosen: Path = options.out
    if options.save:
        if options.device != "cuda":
            raise SystemExit("--save: without a GPU there is nothing to keep")
        chosen = machine.gpu_results_folder(torch.cuda.get_device_name())
    chosen.mkdir(parents=True, exist_ok=True)
    known = {"provenance": machine.provenance(options.device)} | results
    (chosen / name).write_text(json.dumps(known, indent=1) + "\n")
    print(chosen / name)


def folder(options: argparse.Namespace) -> Path:
    """Where the files go. Results of --quick are never kept."""
    if options.save and options.quick:
        raise SystemExit("--save: --quick checks results, its times mean nothing")
    chosen = machine.results_folder(machine.level()) if options.save else options.out
    chosen.mkdir(parents=True, exist_ok=True)
    return chosen


def write(path: Path, options: argparse.Namespace, results: dict[str, Any]) -> None:
    given = {"provenance": machine.provenance(), "quick": options.quick}
    path.write_text(json.dumps(given | results, indent=1) + "\n")
    print(path)


def timed(function: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    result = function()
    return time.perf_counter() - start, result


def in_turns(round_: int) -> tuple[str, str]:
    """Who comes first changes from round to round."""
    return (OURS, THEIRS) if round_ % 2 == 0 else (THEIRS, OURS)


def summary(seconds: dict[str, list[float]]) -> dict[str, float]:
    """Medians, and how many times as long the other takes."""
    medians = {name: statistics.median(samples) for name, samples in seconds.items()}
    return {
        **{f"{n}_ms": 1e3 * m for n, m in medians.items()},
        "ratio": medians[THEIRS] / medians[OURS],
    }


@contextlib.contextmanager
def quiet_process() -> Iterator[None]:
    """No collections of garbage, and no zeroing of pages, while something is timed."""
    machine.keep_freed_memory()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        machine.return_freed_memory()
