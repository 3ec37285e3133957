"""What nvcc makes of each CUDA kernel, on every architecture it is compiled for: no kernel spills
registers or has local memory, and no unit takes more memory to compile than the build allots to it.

    python tests/static/check_nvcc_spills.py --table    all kernels, as a table

What a unit compiled to is kept under build/nvcc, named by a hash of all its files and the flags, so
that only what has changed is compiled again.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatchcase
from pathlib import Path

from common import ROOT, output, report, skip_without

NAME = "nvcc spills"
ARCHS = ("80", "90a")
CACHE = ROOT / "build" / "nvcc"
FLAGS = ("-std=c++20", "-O3", "-DNDEBUG", "-cubin", "-Xptxas=-v", f"-I{ROOT / 'csrc/include'}")
GIB = 1 << 30
MOST_BYTES = 2 * GIB  # of a job, as setup.py counts them

# The kernels that may have local memory, by short name (* stands for anything), each with its
# reason. Those of head_dim 64 and 128 never may.
ALLOWED: dict[str, str] = {}
NEVER_ALLOWED = ("64", "128")

INCLUDE = re.compile(r"#\s*include\s*[<\"]([^>\"]+)[>\"]")
ENTRY = re.compile(r"Compiling entry function '(?P<kernel>\S+)'")
PROPERTIES = re.compile(
    r"Function properties for (?P<kernel>\S+)\s+(?P<stack>\d+) bytes stack frame, "
    r"(?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads"
)
USED = re.compile(r"Used (?P<registers>\d+) registers(?:.*?(?P<shared>\d+) bytes smem)?")


@dataclasses.dataclass
class Kernel:
    """A kernel, or a function that one calls: that has no registers of its own."""

    name: str
    stack: int  # bytes of local memory, spilled registers among them
    spills: int  # bytes stored and loaded
    registers: int = 0
    shared: int = 0  # bytes, static; what is dynamic is chosen at the launch


@dataclasses.dataclass
class Unit:
    """One source compiled for one architecture."""

    source: str
    arch: str
    kernels: list[Kernel]
    seconds: float  # of the processor
    bytes: int  # of the largest process


def files_of(source: Path) -> list[Path]:
    """The source and every file of ours that it includes, directly or not."""
    found: set[Path] = set()
    waiting = [source]
    while waiting:
        path = waiting.pop().resolve()
        if path in found or not path.is_file():
            continue
        found.add(path)
        for name in INCLUDE.findall(path.read_text()):
            waiting += [path.parent / name, ROOT / "csrc/include" / name]
    return sorted(found)


@functools.cache
def compiler_version(nvcc: str) -> str:
    return output(nvcc, "--version")


def cache_path(nvcc: str, source: Path, arch: str) -> Path:
    key = hashlib.sha256("\0".join((compiler_version(nvcc), arch, *FLAGS)).encode())
    for path in files_of(source):
        key.update(path.read_bytes())
    return CACHE / f"{source.stem}-{arch}-{key.hexdigest()[:16]}.json"


def compile_unit(nvcc: str, source: Path, arch: str) -> Unit:
    """From the cache, or by nvcc."""
    cached = cache_path(nvcc, source, arch)
    if not cached.exists():
        compiled = run_nvcc(nvcc, source, arch)
        CACHE.mkdir(parents=True, exist_ok=True)
        for older in CACHE.glob(f"{source.stem}-{arch}-*.json"):
            older.unlink(missing_ok=True)
        cached.write_text(json.dumps(compiled))
    known = json.loads(cached.read_text())
    kernels = kernels_of(known["said"])
    return Unit(source.name, arch, kernels, known["seconds"], known["bytes"])


def run_nvcc(nvcc: str, source: Path, arch: str) -> dict[str, str | float]:
    """What the compiler says and takes."""
    with tempfile.TemporaryDirectory() as folder, open(f"{folder}/log", "w+") as log:
        command = [nvcc, *FLAGS, f"-arch=sm_{arch}", "-o", f"{folder}/out", str(source)]
        process = subprocess.Popen(command, stdout=log, stderr=log)
        # Of this process and of all that it waited for, where Popen.wait() would not tell.
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        log.seek(0)
        said = log.read()
    if process.returncode:
        raise SystemExit(f"{NAME}: {source.name} does not compile for sm_{arch}:\n{said}")
    seconds = usage.ru_utime + usage.ru_stime
    return {"said": said, "seconds": seconds, "bytes": 1024 * usage.ru_maxrss}


def kernels_of(said: str) -> list[Kernel]:
    """What `ptxas -v` reports, with short names."""
    found: dict[str, Kernel] = {}
    entry = ""
    for part in re.split(r"^ptxas info\s*: ", said, flags=re.MULTILINE):
        if match := ENTRY.match(part):
            entry = match["kernel"]
        elif match := PROPERTIES.match(part):
            spills = int(match["stores"]) + int(match["loads"])
            found[match["kernel"]] = Kernel(match["kernel"], int(match["stack"]), spills)
        elif (match := USED.match(part)) and entry in found:
            found[entry].registers = int(match["registers"])
            found[entry].shared = int(match["shared"] or 0)
    for kernel, name in zip(found.values(), demangled(found)):
        kernel.name = short(name)
    return sorted(found.values(), key=lambda kernel: kernel.name)


def demangled(names: Iterable[str]) -> list[str]:
    program = shutil.which("cu++filt") or shutil.which("c++filt")
    if program is None:
        return list(names)
    text = "\n".join(names)
    done = subprocess.run([program], input=text, capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


def short(name: str) -> str:
    """flash_fwd<bf16, 128> for void fastattn::cuda::flash_fwd_kernel<fastattn::bf16, 128>(...)."""
    name = name.replace("(anonymous namespace)::", "").removeprefix("void ")
    depth = 0
    for i, letter in enumerate(name):
        depth += {"<": 1, ">": -1}.get(letter, 0)
        if letter == "(" and depth == 0:
            name = name[:i]
            break
    name = re.sub(r">\s+(?=>)", ">", re.sub(r"\b(\w+::)+", "", name))
    return re.sub(r"_kernel\b", "", name, count=1)


def head_dim(name: str) -> str | None:
    """The first number among the arguments."""
    words = re.findall(r"[^<>,\s]+", name.partition("<")[2])
    return next((word for word in words if word.isdigit()), None)


def problems_of(units: list[Unit]) -> list[str]:
    problems, used = [], set()
    for unit in units:
        where = f"{unit.source}, sm_{unit.arch}"
        if unit.bytes > MOST_BYTES:
            problems.append(f"{where}: {unit.bytes / GIB:.2f} GiB to compile it")
        for kernel in unit.kernels:
            if not kernel.stack and not kernel.spills:
                continue
            reasons = [pattern for pattern in ALLOWED if fnmatchcase(kernel.name, pattern)]
            used |= set(reasons)
            if not reasons or head_dim(kernel.name) in NEVER_ALLOWED:
                problems.append(
                    f"{where}: {kernel.name}: {kernel.stack} bytes of stack, "
                    f"{kernel.spills} bytes of spills"
                )
    if not any(unit.kernels for unit in units):
        problems.append("ptxas reported no kernel")
    problems += [f"ALLOWED names {name}, and needs not" for name in ALLOWED if name not in used]
    return problems


def print_table(units: list[Unit]) -> None:
    names = [kernel.name for unit in units for kernel in unit.kernels]
    width = max(map(len, [unit.source for unit in units] + names), default=0)
    titles = ("arch", "registers", "shared", "stack", "spills")
    print(f"{'kernel':<{width}}", *(f"{title:>9}" for title in titles))
    for unit in units:
        for kernel in unit.kernels:
            registers = kernel.registers or "-"
            cells = (unit.arch, registers, kernel.shared, kernel.stack, kernel.spills)
            print(f"{kernel.name:<{width}}", *(f"{cell:>9}" for cell in cells))
    print(f"\n{'unit':<{width}}", *(f"{title:>9}" for title in ("arch", "CPU s", "GiB")))
    for unit in units:
        cost = (unit.arch, f"{unit.seconds:.1f}", f"{unit.bytes / GIB:.2f}")
        print(f"{unit.source:<{width}}", *(f"{cell:>9}" for cell in cost))
    print("\nshared: bytes, static; what is dynamic is chosen at the launch. stack, spills: bytes")


def jobs() -> int:
    """As many compilers at a time as the build takes."""
    sys.path.append(str(ROOT))
    from setup import job_count

    return job_count()[0]


def main() -> None:
    nvcc = os.environ.get("NVCC", "nvcc")
    skip_without(NAME, nvcc)
    work = [
        (nvcc, source, arch)
        for source in sorted((ROOT / "csrc/cuda/inst").glob("*.cu"))
        for arch in ARCHS
        if arch == "90a" or not source.stem.endswith("_sm90")
    ]
    pool = ThreadPoolExecutor(jobs())
    try:
        units = list(pool.map(lambda arguments: compile_unit(*arguments), work))
    finally:
        pool.shutdown(cancel_futures=True)  # not to compile the rest where one unit failed
    if "--table" in sys.argv[1:]:
        print_table(units)
    kernels = sum(len(unit.kernels) for unit in units)
    seconds = sum(unit.seconds for unit in units)
    largest = max((unit.bytes for unit in units), default=0) / GIB
    cost = f"{seconds:.0f} CPU s to compile, at most {largest:.2f} GiB"
    report(NAME, problems_of(units), f"{kernels} kernels, counted per architecture; {cost}")


if __name__ == "__main__":
    main()
