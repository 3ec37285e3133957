"""Compiles the units of CUDA kernels as the build does, and reads what the compiler made of them.

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
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import sass
from common import ROOT, output, skip_without
from sass import Sass

ARCHS = ("80", "90a")
HOPPER_ONLY = "_sm90"  # how the names of units end that are compiled for sm_90a alone
CACHE = ROOT / "build" / "nvcc"
FLAGS = ("-std=c++20", "-O3", "-DNDEBUG", "-cubin", "-Xptxas=-v", f"-I{ROOT / 'csrc/include'}")
GIB = 1 << 30

INCLUDE = re.compile(r"#\s*include\s*[<\"]([^>\"]+)[>\"]")
ENTRY = re.compile(r"Compiling entry function '(?P<kernel>\S+)'")
PROPERTIES = re.compile(
    r"Function properties for (?P<kernel>\S+)\s+(?P<stack>\d+) bytes stack frame, "
    r"(?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads"
)
USED = re.compile(r"Used (?P<registers>\d+) registers(?:.*?(?P<shared>\d+) bytes smem)?")
# Of setmaxnreg and products of warpgroups: what was ignored, serialised or waited for.
ADVICE = re.compile(r"\(C75\d\d\).*|Potential Performance Loss.*")


@dataclasses.dataclass
class Kernel:
    """A kernel, or a function that one calls: that has no registers of its own."""

    name: str
    stack: int  # bytes of local memory, spilled registers among them
    spills: int  # bytes stored and loaded
    registers: int = 0
    shared: int = 0  # bytes, static; what is dynamic is chosen at the launch
    sass: Sass | None = None  # of units for Hopper, where there was a disassembler


@dataclasses.dataclass
class Unit:
    """One source compiled for one architecture."""

    source: str
    arch: str
    kernels: list[Kernel]
    advice: list[str]  # what ptxas says beside figures
    seconds: float  # of the processor
    bytes: int  # of the largest process


def compiled_units(check: str, pattern: str = "*") -> list[Unit]:
    """The units whose names match, for each architecture; the check ends where there is no nvcc."""
    nvcc = os.environ.get("NVCC", "nvcc")
    skip_without(check, nvcc)
    work = [
        (nvcc, source, arch)
        for source in sorted((ROOT / "csrc/cuda/inst").glob("*.cu"))
        if fnmatch(source.stem, pattern)
        for arch in ARCHS
        if arch == "90a" or not source.stem.endswith(HOPPER_ONLY)
    ]
    pool = ThreadPoolExecutor(jobs())
    try:
        return list(pool.map(lambda arguments: compile_unit(*arguments), work))
    finally:
        pool.shutdown(cancel_futures=True)  # not to compile the rest where one unit failed


def jobs() -> int:
    """As many compilers at a time as the build takes."""
    sys.path.append(str(ROOT))
    from setup import job_count

    return job_count()[0]


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
    if source.stem.endswith(HOPPER_ONLY):
        key.update(Path(sass.__file__).read_bytes())  # which says what is kept of the SASS
    return CACHE / f"{source.stem}-{arch}-{key.hexdigest()[:16]}.json"


def compile_unit(nvcc: str, source: Path, arch: str) -> Unit:
    """From the cache, or by nvcc."""
    nvdisasm = sass.disassembler() if source.stem.endswith(HOPPER_ONLY) else None
    cached = cache_path(nvcc, source, arch)
    known = json.loads(cached.read_text()) if cached.exists() else None
    if known is None or (nvdisasm and known["sass"] is None):
        known = run_nvcc(nvcc, nvdisasm, source, arch)
        CACHE.mkdir(parents=True, exist_ok=True)
        for older in CACHE.glob(f"{source.stem}-{arch}-*.json"):
            older.unlink(missing_ok=True)
        cached.write_text(json.dumps(known))
    return Unit(
        source.name,
        arch,
        kernels_of(known["said"], known["sass"] or {}),
        advice_of(known["said"]),
        known["seconds"],
        known["bytes"],
    )


def run_nvcc(nvcc: str, nvdisasm: str | None, source: Path, arch: str) -> dict[str, Any]:
    """What the compiler says and takes, and what is in the SASS of each kernel."""
    with tempfile.TemporaryDirectory() as folder, open(f"{folder}/log", "w+") as log:
        binary = f"{folder}/out.cubin"
        command = [nvcc, *FLAGS, f"-arch=sm_{arch}", "-o", binary, str(source)]
        process = subprocess.Popen(command, stdout=log, stderr=log)
        # Of this process and of all that it waited for, where Popen.wait() would not tell.
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        log.seek(0)
        said = log.read()
        if process.returncode:
            raise SystemExit(f"nvcc: {source.name} does not compile for sm_{arch}:\n{said}")
        found = sass.read(output(nvdisasm, "-c", binary)) if nvdisasm else None
    return {
        "said": said,
        "sass": found
        and {name: dataclasses.asdict(of_kernel) for name, of_kernel in found.items()},
        "seconds": usage.ru_utime + usage.ru_stime,
        "bytes": 1024 * usage.ru_maxrss,
    }


def kernels_of(said: str, disassembled: dict[str, dict[str, Any]]) -> list[Kernel]:
    """What `ptxas -v` reports, and the SASS by kernel, with short names."""
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
        if facts := disassembled.get(kernel.name):
            kernel.sass = Sass.of(facts)
        kernel.name = short(name)
    return sorted(found.values(), key=lambda kernel: kernel.name)


def advice_of(said: str) -> list[str]:
    return [match[0] for match in ADVICE.finditer("\n".join(demangled(said.splitlines())))]


def demangled(lines: Iterable[str]) -> list[str]:
    program = shutil.which("cu++filt") or shutil.which("c++filt")
    if program is None:
        return list(lines)
    text = "\n".join(lines)
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
