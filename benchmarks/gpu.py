"""All that a GPU proves, in one go: `make gpu`, or `python benchmarks/gpu.py [stage ...]`.

    build       with FASTATTN_CUDA=1, in place
    probe       what runs here, and a kernel that says so
    tests       those of what has CUDA kernels, on the GPU
    memcheck    compute-sanitizer over every kind of call that has kernels, on small shapes
    racecheck   the same, for races in shared memory
    bench       the benchmarks of the GPU, into benchmarks/results/<device>/
                (FULL=1: the whole grid, for up to an hour)
    decode      a captured decode step of a large model, into the same folder
    models      layers, and a Llama where transformers is installed, on fastattn and on torch, into
                the same folder

It installs nothing: the Python that runs it has torch and all that the stages need. Every stage has
a log in build/gpu, a budget of seconds (and what the stages before it have left of theirs), and
runs whether those before it went well or not; the exit status is 0 where all did. provenance.json,
beside the results, says with what and when, and how each stage ended.

OUT=<folder> in the environment: summary.txt and gpu.tar.gz (logs and results) are written there.
--dry-run: the same over the emulated GPU and tiny shapes, to try this program itself.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import importlib.metadata
import importlib.util
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import machine

HERE, ROOT = Path(__file__).resolve().parent, machine.ROOT
LOGS = ROOT / "build" / "gpu"
EMULATED = ROOT / "build" / "emulated_cuda"
MOST_LOG_BYTES = 1 << 20  # of a log, its end, in the archive
CLOCKS = ("clocks.sm", "clocks.mem", "clocks.max.sm")
PACKAGES = (
    *("torch", "triton", "numpy", "transformers"),
    *("xformers", "flash-attn", "liger-kernel", "liger_kernel"),
)
PROBE = """
import fastattn, torch
from fastattn import _C
print(fastattn.info())
print(torch.cuda.get_device_properties(0))
print("probe:", _C.cuda_probe())
"""


@dataclass
class Stage:
    """A command with its budget. Where `obstacle` is set it is skipped, and that is why."""

    name: str
    command: list[str]
    seconds: float
    environment: dict[str, str] = field(default_factory=dict)
    folder: Path = LOGS
    obstacle: str | None = None


@dataclass
class Outcome:
    """How a stage ended: "ok", "FAILED: ..." or "skipped: ..."."""

    stage: str
    result: str
    seconds: float
    last_line: str
    log: str

    @property
    def failed(self) -> bool:
        return self.result.startswith("FAILED")


def stages() -> list[Stage]:
    python, here = sys.executable, {"PYTHONPATH": str(ROOT)}
    listing = [python, str(ROOT / "tests" / "cuda_tests.py"), "cuda"]
    tests = subprocess.run(listing, capture_output=True, text=True, check=True).stdout.split()
    bench = 3600 if os.environ.get("FULL", "0") not in ("", "0") else 130
    return [
        Stage(
            "build",
            [python, "setup.py", "-q", "build_ext", "--inplace"],
            150,
            {"FASTATTN_CUDA": "1"},
            ROOT,
        ),
        Stage("probe", [python, "-c", PROBE], 15, here),
        Stage(
            "tests", [python, "-m", "pytest", *pytest_options(), "-k", "cuda", *tests], 110, here
        ),
        sanitizer("memcheck", 50, here),
        sanitizer("racecheck", 50, here),
        Stage("bench", [python, str(HERE / "run.py"), "--device=cuda", "--save"], bench, here),
        Stage("decode", [python, str(HERE / "decode_step.py"), "--save"], 40, here),
        Stage("models", [python, str(HERE / "cuda_models.py"), "--save"], 50, here),
    ]


def pytest_options() -> list[str]:
    """Several processes where pytest-xdist is installed: small shapes leave most of a GPU idle."""
    options = ["-q", "-p", "no:cacheprovider"]
    if importlib.util.find_spec("xdist"):
        options += ["-n", str(min(8, len(os.sched_getaffinity(0))))]
    return options


def sanitizer(tool: str, seconds: float, environment: dict[str, str]) -> Stage:
    """Half of the budget is for calls, the rest for the start of Python and the last of them."""
    program = find_sanitizer()
    command = [program or "compute-sanitizer", "--tool", tool, "--error-exitcode", "9"]
    command += [sys.executable, str(HERE / "kernel_calls.py"), f"--seconds={seconds / 2}"]
    # Every tensor is an allocation of its own, so that memcheck knows where it ends.
    environment = environment | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    obstacle = None if program else "compute-sanitizer is not installed"
    return Stage(tool, command, seconds, environment, obstacle=obstacle)


def find_sanitizer() -> str | None:
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    folders = (os.environ.get("PATH", ""), f"{home}/bin", f"{home}/compute-sanitizer")
    return shutil.which("compute-sanitizer", path=os.pathsep.join(folders))


def dry_stages() -> list[Stage]:
    """The same names, over the emulated GPU."""
    python, here = sys.executable, {"PYTHONPATH": str(EMULATED), "FASTATTN_CPU_ISA": "sm80"}
    calls = [python, str(HERE / "kernel_calls.py"), "--device=cpu", "--seconds=60"]
    test = str(ROOT / "tests" / "test_attention_sdpa.py")
    row_by_row = "norm or gelu or swiglu or rope or kv_cache_update"
    rows = ["--emulated", "-k", f"177x64-causal-bf16 or decode or ({row_by_row}) and not fp16"]
    return [
        Stage(
            "build",
            [python, "setup.py", "-q", "build", "--build-lib", str(EMULATED)],
            600,
            {"FASTATTN_CUDA": "emulate"},
            ROOT,
        ),
        Stage("probe", [python, "-c", "import fastattn; print(fastattn.info())"], 60, here),
        Stage("tests", [python, "-m", "pytest", "-q", "-k", "sm80", test], 300, here),
        Stage("memcheck", calls, 200, here),
        Stage("racecheck", [], 0, obstacle="the emulator looks for races wherever it runs"),
        Stage("bench", [python, str(HERE / "run.py"), *rows], 200, here | {"QUICK": "1"}),
        Stage("decode", [python, str(HERE / "decode_step.py"), "--device=cpu"], 60, here),
        Stage("models", [python, str(HERE / "cuda_models.py"), "--device=cpu"], 60, here),
    ]


def run(stage: Stage, limit: float) -> Outcome:
    """Runs a stage for at most `limit` seconds; nothing that it started outlives it."""
    log = LOGS / f"{stage.name}.log"
    if stage.obstacle:
        log.write_text(f"{stage.obstacle}\n")
        return Outcome(stage.name, f"skipped: {stage.obstacle}", 0.0, "", log.name)
    start = time.monotonic()
    environment = os.environ | {"PYTHONUNBUFFERED": "1"} | stage.environment
    with open(log, "w") as file:
        file.write(f"$ {' '.join(stage.command)}\n")
        file.flush()
        process = subprocess.Popen(
            stage.command,
            cwd=stage.folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            status = process.wait(limit)
            result = "ok" if status == 0 else f"FAILED: exit status {status}"
        except subprocess.TimeoutExpired:
            result = f"FAILED: stopped after {limit:.0f} seconds"
        finally:
            end_group(process)
    seconds = time.monotonic() - start
    return Outcome(stage.name, result, round(seconds, 1), last_line(log), log.name)


def end_group(process: subprocess.Popen[bytes]) -> None:
    """Asks what is left of a process and its children to end (pytest then still reports, and the
    benchmarks save what they have), and ends what does not."""
    for number, patience in ((signal.SIGINT, 20), (signal.SIGTERM, 5), (signal.SIGKILL, 5)):
        with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
            os.killpg(process.pid, number)
            process.wait(patience)
            time.sleep(0.2)


def last_line(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines()]
    return re.sub(r"\x1b\[[0-9;]*m", "", next((line for line in reversed(lines) if line), ""))


def summary(outcomes: list[Outcome]) -> str:
    """A table: stage, result, seconds, and the last line of the log."""
    rows = [(o.stage, o.result, f"{o.seconds:.0f} s", o.last_line[:100]) for o in outcomes]
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    cells = [
        f"{name:<{widths[0]}}  {result:<{widths[1]}}  {seconds:>{widths[2]}}  {line}".rstrip()
        for name, result, seconds, line in rows
    ]
    failed = sum(outcome.failed for outcome in outcomes)
    total = f"{len(outcomes)} stages, {failed} failed, {sum(o.seconds for o in outcomes):.0f} s"
    return "\n".join([*cells, f"{total}; logs: {LOGS}"])


def provenance() -> dict[str, object]:
    """The GPU and its clocks, software and sources; nothing here needs a build or a GPU."""
    names = ("name", "driver_version", "power.limit", "temperature.gpu", *CLOCKS)
    nvcc = shutil.which(os.environ.get("NVCC", "nvcc")) or "/usr/local/cuda/bin/nvcc"
    toolkit = "none"
    if Path(nvcc).exists():
        said = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
        toolkit = next(iter(re.findall(r"V(\d[\d.]+)", said)), "unknown")
    packages = {d.name: d.version for d in importlib.metadata.distributions() if d.name in PACKAGES}
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "commit": machine.commit(),
        "kernels": machine.kernel_hash(),
        "gpu": machine.nvidia_smi(*names),
        "toolkit": toolkit,
        "python": sys.version.split()[0],
        "packages": packages,
        "cpu": machine.cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
    }


def record(known: dict[str, object], outcomes: list[Outcome]) -> None:
    """provenance.json and summary.txt, and OUT."""
    known = known | {"clocks_after": machine.nvidia_smi(*CLOCKS)}
    known["stages"] = [asdict(outcome) for outcome in outcomes]
    (LOGS / "provenance.json").write_text(json.dumps(known, indent=1) + "\n")
    (LOGS / "summary.txt").write_text(summary(outcomes) + "\n")
    if os.environ.get("OUT"):
        pack(Path(os.environ["OUT"]), results_folder(known, outcomes))


def results_folder(known: dict[str, object], outcomes: list[Outcome]) -> Path | None:
    """Where the benchmarks have saved their results, if they ran and a GPU has a name."""
    gpu = known["gpu"]
    assert isinstance(gpu, dict)
    ran = any(outcome.stage in ("bench", "decode", "models") for outcome in outcomes)
    return machine.gpu_results_folder(gpu["name"]) if ran and "name" in gpu else None


def pack(out: Path, results: Path | None) -> None:
    """Two files: how the stages ended, and all else (of a long log its end)."""
    out.mkdir(parents=True, exist_ok=True)
    shutil.copy(LOGS / "summary.txt", out)
    with tarfile.open(out / "gpu.tar.gz", "w:gz") as archive:
        archive.add(LOGS / "provenance.json", "provenance.json")
        for log in sorted(LOGS.glob("*.log")):
            data = log.read_bytes()[-MOST_LOG_BYTES:]
            entry = tarfile.TarInfo(f"logs/{log.name}")
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
        if results and results.exists():
            archive.add(results, f"results/{results.name}")


def main(argv: list[str] | None = None) -> int:
    """Exit status 0 where no stage failed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("stages", nargs="*", metavar="stage", help="default: all of them")
    parser.add_argument("--dry-run", action="store_true")
    options = parser.parse_args(argv)
    chosen = dry_stages() if options.dry_run else stages()
    if unknown := set(options.stages) - {stage.name for stage in chosen}:
        parser.error(f"no stage {', '.join(sorted(unknown))}")
    chosen = [stage for stage in chosen if stage.name in (options.stages or stage.name)]
    LOGS.mkdir(parents=True, exist_ok=True)
    for log in LOGS.glob("*.log"):
        log.unlink()
    known, outcomes, start, budget = provenance(), [], time.monotonic(), 0.0
    print(json.dumps(known, indent=1), flush=True)
    for stage in chosen:
        budget += stage.seconds
        outcomes.append(run(stage, budget - (time.monotonic() - start)))
        print(summary(outcomes[-1:]).splitlines()[0], flush=True)
        record(known, outcomes)  # each time: what is done so far comes back even if the rest hangs
    for outcome in outcomes:
        if outcome.failed:
            lines = (LOGS / outcome.log).read_text(errors="replace").splitlines()
            print(f"\n--- the end of {outcome.log}", *lines[-25:], sep="\n")
    if folder := results_folder(known, outcomes):
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(LOGS / "provenance.json", folder)
    print(f"\n{summary(outcomes)}")
    return int(any(outcome.failed for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
