"""Where and with what a run was made: written beside every result."""

from __future__ import annotations

import ctypes
import datetime
import importlib.metadata
import platform
import re
import subprocess
from pathlib import Path

import fastattn
import torch

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("torch", "numpy", "onnxruntime", "openvino")


def provenance() -> dict[str, str | int]:
    """Commit, CPU, level, threads, versions and date."""
    versions = {"fastattn": fastattn.__version__} | {name: _version(name) for name in PACKAGES}
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "commit": commit(),
        "cpu": cpu_name(),
        "level": level(),
        "threads": torch.get_num_threads(),
        "affinity": _affinity(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
        **{name: version for name, version in versions.items() if version},
    }


def cpu_name() -> str:
    """The model name, as the CPU gives it; the architecture where it gives none."""
    info = Path("/proc/cpuinfo")
    match = re.search(r"model name\s*:\s*(.+)", info.read_text()) if info.exists() else None
    return match.group(1).strip() if match else platform.machine()


def cache_bytes() -> int:
    """Size of the last-level cache; 32 MiB where the system does not say."""
    sizes = [32 << 20]
    for file in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        number, unit = re.fullmatch(r"(\d+)([KMG])", file.read_text().strip()).groups()  # type: ignore[union-attr]
        sizes.append(int(number) << {"K": 10, "M": 20, "G": 30}[unit])
    return max(sizes[1:] or sizes)


def keep_freed_memory() -> None:
    """From now on, memory that is freed stays with the process (glibc; elsewhere nothing changes).

    By default each tensor above 32 MiB is new to the process, and the call that makes it pays for
    the system's zeroing of its pages: all peers alike, but more than for what they compute.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        m_trim_threshold, m_mmap_max = -1, -4
        libc.mallopt(m_mmap_max, 0)
        libc.mallopt(m_trim_threshold, -1)


def return_freed_memory() -> None:
    """Gives back what `keep_freed_memory` has kept."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)


def level() -> str:
    """The CPU level whose kernels run, FASTATTN_CPU_ISA considered."""
    return fastattn._C.active_cpu_level()


def commit() -> str:
    """Hash of the checkout, "+" when files differ from it; "unknown" outside of a repository."""

    def git(*arguments: str) -> str | None:
        try:
            command = ["git", "-C", str(ROOT), *arguments]
            return subprocess.run(
                command, capture_output=True, text=True, check=True
            ).stdout.strip()
        except (OSError, subprocess.CalledProcessError):
            return None

    head = git("rev-parse", "--short=12", "HEAD")
    if head is None:
        return "unknown"
    return head + ("+" if git("status", "--porcelain") else "")


def results_folder(level_name: str) -> Path:
    """benchmarks/results/<cpu>/<level>: one folder per machine and level, its history is git's."""
    cpu = re.sub(r"[^a-z0-9]+", "-", cpu_name().lower()).strip("-")
    return ROOT / "benchmarks" / "results" / cpu / level_name


def _affinity() -> str:
    """CPUs that this process may use, for example 0-3,8."""
    status = Path("/proc/self/status")
    text = status.read_text() if status.exists() else ""
    match = re.search(r"Cpus_allowed_list:\s*(\S+)", text)
    return match.group(1) if match else "unknown"


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
