"""What the machine code of a kernel is made of, read from what nvdisasm prints."""

from __future__ import annotations

import functools
import importlib.util
import os
import re
import shutil
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SECTION = re.compile(r"^\s*\.section\s+\.text\.(?P<kernel>[^,\s]+)", re.MULTILINE)
LABEL = re.compile(r"^(?P<label>\.L_\w+):")
INSTRUCTION = re.compile(
    r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?(?P<opcode>[A-Z]\S*)\s*(?P<operands>[^;]*?)\s*;"
)
TARGET = re.compile(r"`\((?P<label>\.L_\w+)\)")


@dataclass
class Instruction:
    opcode: str  # with what its dots add
    operands: str

    def waits_for_products(self, pending: int) -> bool:
        """All but the newest `pending` groups of products are done."""
        return self.opcode.startswith("WARPGROUP.DEPBAR") and self.operands.endswith(
            f", {pending:#x}"
        )


@dataclass
class Step:
    """A loop that computes while products are under way."""

    opcodes: dict[str, int]
    exponentials: int
    hidden: int  # of them, between a wait that leaves a product under way and one for all


@dataclass
class Sass:
    """Of one kernel. Opcodes are counted without what follows the first dot."""

    opcodes: dict[str, int]
    registers: list[int]  # of a thread, after each setmaxnreg
    steps: list[Step]

    @classmethod
    def of(cls, facts: dict[str, Any]) -> Sass:
        steps = [Step(**step) for step in facts["steps"]]
        return cls(facts["opcodes"], facts["registers"], steps)


@functools.cache
def disassembler() -> str | None:
    """nvdisasm: on PATH, in CUDA_HOME, or that of the package nvidia-cuda-nvdisasm."""
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    nvidia = importlib.util.find_spec("nvidia")
    packages = (nvidia and nvidia.submodule_search_locations) or ()
    installed = [path for root in packages for path in Path(root).glob("cu*/bin/nvdisasm")]
    candidates = ["nvdisasm", f"{home}/bin/nvdisasm", *map(str, installed)]
    return next((found for name in candidates if (found := shutil.which(name))), None)


def read(text: str) -> dict[str, Sass]:
    """The kernels of `nvdisasm -c`, by mangled name."""
    starts = list(SECTION.finditer(text))
    ends = [start.start() for start in starts[1:]] + [len(text)]
    return {
        start["kernel"]: read_kernel(text[start.end() : end]) for start, end in zip(starts, ends)
    }


def read_kernel(text: str) -> Sass:
    code: list[Instruction] = []
    labels: dict[str, int] = {}
    for line in text.splitlines():
        if match := LABEL.match(line):
            labels[match["label"]] = len(code)
        elif match := INSTRUCTION.match(line):
            code.append(Instruction(match["opcode"], match["operands"]))
    registers = [
        int(one.operands.split()[-1], 16) for one in code if one.opcode.startswith("USETMAXREG")
    ]
    return Sass(counted(code), sorted(set(registers)), steps_of(code, labels))


def counted(code: list[Instruction]) -> dict[str, int]:
    return dict(Counter(one.opcode.partition(".")[0] for one in code))


def steps_of(code: list[Instruction], labels: dict[str, int]) -> list[Step]:
    """The innermost loops around waits that leave a product under way."""
    loops = [(start, end + 1) for end, start in back_branches(code, labels)]
    waits = [i for i, one in enumerate(code) if one.waits_for_products(1)]
    hidden: Counter[tuple[int, int]] = Counter()
    for wait in waits:
        around = [loop for loop in loops if loop[0] <= wait < loop[1]]
        if not around:
            continue
        start, end = min(around, key=lambda loop: loop[1] - loop[0])
        ready = (i for i in range(wait, end) if code[i].waits_for_products(0))
        hidden[start, end] += exponentials(code[wait : next(ready, end)])
    return [
        Step(counted(code[start:end]), exponentials(code[start:end]), count)
        for (start, end), count in hidden.items()
    ]


def back_branches(code: list[Instruction], labels: dict[str, int]) -> list[tuple[int, int]]:
    """Branches, and where they go, where that is before them."""
    found = []
    for i, one in enumerate(code):
        target = TARGET.search(one.operands)
        if one.opcode.startswith("BRA") and target and labels.get(target["label"], i + 1) <= i:
            found.append((i, labels[target["label"]]))
    return found


def exponentials(code: list[Instruction]) -> int:
    return sum(one.opcode.startswith("MUFU.EX2") for one in code)
