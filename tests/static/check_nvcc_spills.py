"""No CUDA kernel spills registers or has local memory, on any architecture it is compiled for."""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from pathlib import Path

from common import ROOT, report, skip_without

NAME = "nvcc spills"
ARCHS = ("80", "90a")
USAGE = re.compile(
    r"Function properties for (?P<kernel>\S+)\s+(?P<stack>\d+) bytes stack frame, "
    r"(?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads"
)


def ptxas_report(nvcc: str, source: Path, arch: str) -> str:
    with tempfile.TemporaryDirectory() as folder:
        command = [nvcc, "-std=c++20", "-O3", "-DNDEBUG", f"-arch=sm_{arch}", "-cubin"]
        command += ["-Xptxas=-v", f"-I{ROOT / 'csrc/include'}", "-o", f"{folder}/out", str(source)]
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{NAME}: {source.name} does not compile for sm_{arch}:\n{done.stderr}")
    return done.stderr


def main() -> None:
    nvcc = os.environ.get("NVCC", "nvcc")
    skip_without(NAME, nvcc)
    problems, kernels = [], 0
    for source in sorted((ROOT / "csrc/cuda/inst").glob("*.cu")):
        for arch in ARCHS:
            if source.stem.endswith("_sm90") and arch != "90a":
                continue
            for usage in USAGE.finditer(ptxas_report(nvcc, source, arch)):
                kernels += 1
                if any(int(usage[key]) for key in ("stack", "stores", "loads")):
                    problems.append(f"{source.name}, sm_{arch}: {usage[0]}")
    if not kernels:
        problems.append("ptxas reported no kernel")
    report(NAME, problems, f"{kernels} kernels, counted per architecture")


if __name__ == "__main__":
    main()
