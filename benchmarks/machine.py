"""Where and with what a run was made: written beside every result."""

from __future__ import annotations

import ctypes
import datetime
import hashlib
import importlib.metadata
import platform
import re
import subprocess
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("torch", "numpy", "onnxruntime", "openvino")


def provenance(device: str = "cpu") -> dict[str, str | int]:
    """Commit, CPU, level, threads, versions and date; on "cuda" the GPU, too."""
    import fastattn

    versions = {"fastattn": fastattn.__version__} | {name: _version(name) for name in PACKAGES}
    found = {
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
    return found if device == "cpu" else found | gpu()


def cuda_obstacle() -> str | None:
    """Why no row runs on a GPU here, or None if they do."""
    import fastattn

    if not fastattn._C.built_with_cuda:
        return "fastattn is built without CUDA"
    return None if torch.cuda.is_available() else "torch sees no GPU"


def gpu() -> dict[str, str | int]:
    """The current GPU, the software between it and a kernel, and a hash of the kernels."""
    major, minor = torch.cuda.get_device_capability()
    asked = ("driver_version", "clocks.max.sm", "power.limit")
    known = {
        "device": torch.cuda.get_device_name(),
        "level": f"sm{major}{minor}",
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "kernels": kernel_hash(),
        **nvidia_smi(*asked),
    }
    return {name: value for name, value in known.items() if value is not None}


def nvidia_smi(*names: str) -> dict[str, str]:
    """Properties of the first GPU by the name of the query; none where the program is not there."""
    command = ["nvidia-smi", "-i", "0", "--format=csv,noheader", f"--query-gpu={','.join(names)}"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return {}
    return dict(zip(names, (value.strip() for value in done.stdout.split(","))))


def gpu_clock() -> int | None:
    """MHz of the multiprocessors now; None where the package that asks is not installed."""
    try:
        return torch.cuda.clock_rate()
    except Exception:  # of several libraries, and the figure is worth no failure
        return None


def kernel_hash() -> str:
    """Of all files under csrc/cuda, by name and content."""
    folder, digest = ROOT / "csrc" / "cuda", hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        digest.update(f"{path.relative_to(folder)}\0".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


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
    import fastattn

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
    return ROOT / "benchmarks" / "results" / _slug(cpu_name()) / level_name


def gpu_results_folder(device: str) -> Path:
    """benchmarks/results/<device>"""
    return ROOT / "benchmarks" / "results" / _slug(device)


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


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
