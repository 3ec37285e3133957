"""The extension loads beside any torch >= 2.10.

It needs nothing of torch but its stable C functions, brings no second OpenMP runtime and no CUDA
library, shows nothing but its entry point, and is small.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from pathlib import Path

from common import built, output, report, skip_without

NAME = "binary"
UNSTABLE = re.compile(r"\b(c10|at|torch|caffe2)::")
SYSTEM_LIBRARIES = re.compile(r"lib(stdc\+\+|gcc_s|m|c|pthread|dl|rt)\.so\.\d+|ld-linux.*\.so\.\d+")
MIB = 1 << 20
MOST_MIB = {"cpu": 15, "cuda": 100}


def stripped_size(library: Path) -> int:
    with tempfile.TemporaryDirectory() as folder:
        copy = shutil.copy(library, folder)
        subprocess.run(["strip", "-s", copy], check=True)
        return Path(copy).stat().st_size


def main() -> None:
    skip_without(NAME, "nm", "readelf", "strip")
    variant = built()
    library = variant / "_C.so"
    undefined = output("nm", "--dynamic", "--demangle", "--undefined-only", library).splitlines()
    problems = [f"undefined symbol {row.strip()}" for row in undefined if UNSTABLE.search(row)]
    shown = output("nm", "--dynamic", "--defined-only", library).split()[2::3]
    problems += [f"exports {name}" for name in shown if name != "PyInit__C"]
    needed = re.findall(r"\(NEEDED\).*\[(.+)\]", output("readelf", "--dynamic", library))
    problems += [
        f"needs {name}"
        for name in needed
        if name != "libtorch.so" and not SYSTEM_LIBRARIES.fullmatch(name)
    ]
    if "libtorch.so" not in needed:
        problems.append("does not name libtorch.so, so weak CUDA symbols would stay null")
    if variant.name == "cpu":
        problems += [f"mentions CUDA: {row.strip()}" for row in undefined if "cuda" in row.lower()]
    size = stripped_size(library)
    if size > MOST_MIB[variant.name] * MIB:
        problems.append(f"takes {size / MIB:.1f} MiB, more than {MOST_MIB[variant.name]}")
    report(NAME, problems, f"{len(undefined)} undefined symbols, {size / MIB:.1f} MiB stripped")


if __name__ == "__main__":
    main()
