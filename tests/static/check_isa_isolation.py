"""No instruction reaches a CPU that lacks it.

A unit compiled above the baseline must not offer anything that the linker could keep for everyone
(a weak symbol: an inline function, a template, type info), nor run anything before a level is
chosen (a static initialiser). And the registers of a level appear only in the units of that level.
"""

from __future__ import annotations

import platform
import re
from pathlib import Path

from common import ROOT, built, output, report, skip_without

NAME = "isa isolation"
WEAK_TYPES = set("WVuwv")

REGISTERS = {"ymm": re.compile(r"%ymm\d"), "zmm": re.compile(r"%zmm\d"), "tmm": re.compile(r"%tmm")}
ALLOWED = {
    "avx2": {"ymm"},
    "avx512": {"ymm", "zmm"},
    "avx512bf16": {"ymm", "zmm"},
    "amx": {"ymm", "zmm", "tmm"},
}


def source_of(unit: Path) -> Path:
    return ROOT / unit.relative_to(built()).with_suffix("")


def level_of(unit: Path) -> str | None:
    return unit.name.split("_")[1] if unit.name.startswith("isa_") else None


def weak_symbols(unit: Path) -> list[str]:
    rows = [row.split() for row in output("nm", "--demangle=none", unit).splitlines()]
    return [row[-1] for row in rows if len(row) >= 2 and row[-2] in WEAK_TYPES]


def initialisers(unit: Path) -> list[str]:
    headers = output("objdump", "--section-headers", unit)
    return re.findall(r"\s(\.(?:init_array|ctors|preinit_array)\S*)\s", headers)


def foreign_registers(unit: Path) -> set[str]:
    code = output("objdump", "--disassemble", "--no-show-raw-insn", unit)
    allowed = ALLOWED.get(level_of(unit) or "", set())
    return {r for r, pattern in REGISTERS.items() if r not in allowed and pattern.search(code)}


def main() -> None:
    skip_without(NAME, "nm", "objdump")
    built_units = sorted(built().glob("csrc/**/*.o"))
    units = [unit for unit in built_units if source_of(unit).exists()]
    levels = [level for unit in units if (level := level_of(unit))]
    problems = []
    for unit in units:
        where = source_of(unit).relative_to(ROOT)
        if level_of(unit) not in (None, "scalar"):
            problems += [f"{where}: weak symbol {symbol}" for symbol in weak_symbols(unit)]
            problems += [f"{where}: initialiser {section}" for section in initialisers(unit)]
        if platform.machine() == "x86_64":
            problems += [f"{where}: uses {name}" for name in sorted(foreign_registers(unit))]
    if not levels:
        problems.append("no unit of a level was built")
    report(NAME, problems, f"{len(units)} units, levels {', '.join(dict.fromkeys(levels))}")


if __name__ == "__main__":
    main()
