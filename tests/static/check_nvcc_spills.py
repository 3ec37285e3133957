"""What nvcc makes of each CUDA kernel, on every architecture it is compiled for: no kernel spills
registers or has local memory, ptxas ignores and serialises nothing, and no unit takes more memory
to compile than the build allots to it. (kernel_table.py shows all kernels.)
"""

from __future__ import annotations

import re
from fnmatch import fnmatchcase

from common import report
from nvcc import GIB, Unit, compiled_units

NAME = "nvcc spills"
MOST_BYTES = 2 * GIB  # of a job, as setup.py counts them

# The kernels that may have local memory, by short name (* stands for anything), each with its
# reason. Those of head_dim 64 and 128 never may.
ALLOWED: dict[str, str] = {}
NEVER_ALLOWED = ("64", "128")


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
        problems += [f"{where}: {advice}" for advice in unit.advice]
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


def main() -> None:
    units = compiled_units(NAME)
    kernels = sum(len(unit.kernels) for unit in units)
    seconds = sum(unit.seconds for unit in units)
    largest = max((unit.bytes for unit in units), default=0) / GIB
    cost = f"{seconds:.0f} CPU s to compile, at most {largest:.2f} GiB"
    report(NAME, problems_of(units), f"{kernels} kernels, counted per architecture; {cost}")


if __name__ == "__main__":
    main()
