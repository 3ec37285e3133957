"""All CUDA kernels as tables: registers, shared and local memory, what compiling takes, and what
the machine code of those of Hopper is made of.

    python tests/static/kernel_table.py [PATTERN]    of the units whose names match (*_sm90)
"""

from __future__ import annotations

import sys
from collections.abc import Iterable

from nvcc import GIB, Kernel, Unit, compiled_units

NAME = "kernel table"
FP32 = ("FFMA", "FADD", "FMUL")
# Of an SM: matrix units, special functions, arithmetic, shared memory, barriers, copies.
COLUMNS: dict[str, tuple[str, ...]] = {
    "HGMMA": ("HGMMA",),
    "HMMA": ("HMMA",),
    "MUFU": ("MUFU",),
    "FP32": FP32,
    "F2FP": ("F2FP",),
    "LDS": ("LDS", "LDSM"),
    "STS": ("STS", "STSM"),
    "SYNCS": ("SYNCS",),
    "BAR": ("BAR",),
    "UTMALDG": ("UTMALDG",),
    "UBLKCP": ("UBLKCP",),
    "UBLKRED": ("UBLKRED",),
}


def print_rows(titles: Iterable[str], rows: list[tuple[str, ...]]) -> None:
    """The first column to the left, the others to the right."""
    table = [tuple(titles), *rows]
    widths = [max(map(len, column)) for column in zip(*table)]
    for first, *cells in table:
        print(first.ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(cells, widths[1:])))
    print()


def kernel_row(unit: Unit, kernel: Kernel) -> tuple[str, ...]:
    later = "/".join(map(str, kernel.sass.registers)) if kernel.sass else ""
    figures = (kernel.registers or "-", later or "-", kernel.shared, kernel.stack, kernel.spills)
    return (kernel.name, unit.arch, *map(str, figures))


def mix(opcodes: dict[str, int]) -> tuple[str, ...]:
    groups = [sum(opcodes.get(one, 0) for one in group) for group in COLUMNS.values()]
    return tuple(str(count) for count in (sum(opcodes.values()), *groups))


def mix_rows(kernel: Kernel) -> list[tuple[str, ...]]:
    if kernel.sass is None:
        return []
    steps = [
        ("    its step", *mix(step.opcodes), f"{step.hidden} of {step.exponentials}")
        for step in kernel.sass.steps
    ]
    return [(kernel.name, *mix(kernel.sass.opcodes), ""), *steps]


def main() -> None:
    units = compiled_units(NAME, *sys.argv[1:2])
    titles = ("kernel", "arch", "registers", "setmaxnreg", "shared", "stack", "spills")
    print_rows(titles, [kernel_row(unit, kernel) for unit in units for kernel in unit.kernels])
    rows = [row for unit in units for kernel in unit.kernels for row in mix_rows(kernel)]
    if rows:
        print_rows(("instructions of", "all", *COLUMNS, "hidden"), rows)
    print_rows(
        ("unit", "arch", "CPU s", "GiB"),
        [(u.source, u.arch, f"{u.seconds:.1f}", f"{u.bytes / GIB:.2f}") for u in units],
    )
    print("shared: bytes, static; what is dynamic is chosen at the launch. stack, spills: bytes")
    if rows:
        print(f"FP32: {' '.join(FP32)}. hidden: exponentials computed while a product is under way")


if __name__ == "__main__":
    main()
