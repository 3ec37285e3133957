"""Each kind of code stays in its room.

asm, intrinsics, torch and Python headers appear only in the files made for them; kernels are
launched by a function, so that any C++ compiler can read the CUDA sources; a kernel file stays
short enough to hold one idea.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from common import ROOT, report, sources

NAME = "sources"
SUFFIXES = (".h", ".inc", ".cpp", ".cu", ".cuh")
MOST_LINES = 450


@dataclass
class Rule:
    what: str
    pattern: re.Pattern[str]
    allowed: tuple[str, ...]  # shell patterns of the files that may have it


RULES = [
    # On the CPU asm is for what no intrinsic says: a compiler barrier before a tile configuration.
    Rule(
        "asm",
        re.compile(r"\b(asm|__asm__|__asm)\b"),
        ("csrc/cuda/ptx.cuh", "csrc/cuda/ptx_sm90.cuh", "csrc/cpu/tile_amx.h"),
    ),
    Rule(
        "a SIMD intrinsic",
        re.compile(
            r"\b_mm\d*_\w+|\b__m(128|256|512)[a-z]*\b|\b__mmask\d+\b|\b_tile_\w+|immintrin\.h"
        ),
        ("csrc/cpu/vec_*.h", "csrc/cpu/tile_amx.h", "csrc/cpu/dispatch.cpp"),
    ),
    Rule(
        "a torch or Python header",
        re.compile(r"#\s*include\s*[<\"](torch|ATen|c10|pybind11|Python\.h)\b"),
        ("csrc/bind/*",),
    ),
    Rule(
        "torch's unstable C++ interface",
        re.compile(r"#\s*include\s*[<\"](torch/extension\.h|torch/torch\.h|ATen/|c10/)"),
        (),
    ),
    Rule("a <<<>>> launch", re.compile("<<<"), ()),
    Rule(
        "a CUDA header",
        re.compile(r"#\s*include\s*[<\"](cuda|cooperative_groups|mma\.h)"),
        ("csrc/cuda/*", "csrc/bind/*"),
    ),
]

# In isa_*.cpp and all that it includes: what the standard library defines inline would be compiled
# with the flags of a level.
STANDARD_LIBRARY = Rule(
    "the standard library in a unit above the baseline",
    re.compile(r"#\s*include\s*<(?!fastattn/|stddef\.h|stdint\.h|string\.h|\w*intrin\.h)"),
    (),
)
INCLUDE = re.compile(r"#\s*include\s*[<\"]([^>\"]+)[>\"]")


def without_comments(text: str) -> str:
    """The text with comments blanked, line by line in place."""

    def blank(found: re.Match[str]) -> str:
        return found[0] if found[0].startswith('"') else re.sub(r"[^\n]", " ", found[0])

    return re.sub(r'"(?:\\.|[^"\\\n])*"|//[^\n]*|/\*.*?\*/', blank, text, flags=re.DOTALL)


def above_baseline() -> set[Path]:
    """isa_*.cpp and every file of ours that they include, directly or not."""
    found: set[Path] = set()
    waiting = [path for path in sources(".cpp") if path.name.startswith("isa_")]
    while waiting:
        path = waiting.pop()
        if path in found:
            continue
        found.add(path)
        for name in INCLUDE.findall((ROOT / path).read_text()):
            candidates = [path.parent / name, Path("csrc/include") / name]
            waiting += [c for c in candidates if (ROOT / c).is_file()]
    return found


def main() -> None:
    problems, count = [], 0
    isolated = above_baseline()
    for path in sources(*SUFFIXES):
        count += 1
        text = (ROOT / path).read_text()
        lines = without_comments(text).splitlines()
        if len(lines) > MOST_LINES:
            problems.append(f"{path}: {len(lines)} lines, more than {MOST_LINES}")
        for rule in [*RULES, STANDARD_LIBRARY] if path in isolated else RULES:
            if any(fnmatch(str(path), pattern) for pattern in rule.allowed):
                continue
            problems += [
                f"{path}:{number}: {rule.what}: {line.strip()}"
                for number, line in enumerate(lines, 1)
                if rule.pattern.search(line)
            ]
    report(NAME, problems, f"{count} files")


if __name__ == "__main__":
    main()
