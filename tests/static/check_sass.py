"""What makes the kernels of Hopper fast is in their machine code: products of warpgroups, loads by
TMA, registers handed from the warps that load to those that compute, no local memory, and softmax
computed while a product runs.

ptxas waits for products earlier than the source says where registers get short, and then softmax
comes behind them. That is what decides the sizes of tiles (csrc/cuda/tiles.h).
"""

from __future__ import annotations

from fnmatch import fnmatchcase

from common import report
from nvcc import HOPPER_ONLY, Kernel, Unit, compiled_units
from sass import Sass, disassembler

NAME = "sass"
NEEDED = ("HGMMA", "UTMALDG")
LOCAL = ("LDL", "STL")

# Of the exponentials of a step, by short name of the kernel: the part that is computed while a
# product is under way. 0: a kernel that has no such step.
LEAST_HIDDEN = {
    "flash_fwd_sm90<*, false>*": 0.5,
    "flash_fwd_sm90<*, true>*": 0.0,  # terms of scores take the registers
    "flash_bwd_sm90<BackwardRolesSm90<*": 0.0,  # those of one role are hidden by the other's
    "flash_bwd_sm90<*": 0.25,  # behind the wait, others are hidden by the other group alone
}


def problems_of(units: list[Unit]) -> list[str]:
    problems = []
    for unit in units:
        if not unit.kernels:
            problems.append(f"{unit.source}: ptxas reported no kernel")
        for kernel in unit.kernels:
            problems += [
                f"{unit.source}: {kernel.name}: {what}" for what in problems_of_kernel(kernel)
            ]
    return problems


def problems_of_kernel(kernel: Kernel) -> list[str]:
    if kernel.sass is None:
        return [] if not kernel.registers else ["not in the disassembly"]
    found = kernel.sass
    problems = [f"no {opcode}" for opcode in NEEDED if opcode not in found.opcodes]
    problems += [f"{found.opcodes[opcode]} {opcode}" for opcode in LOCAL if opcode in found.opcodes]
    before, after = kernel.registers, found.registers
    if not after or not after[0] < before < after[-1]:
        problems.append(f"setmaxnreg: {before} registers at entry, then {after or 'as many'}")
    return problems + problems_of_steps(kernel.name, found)


def problems_of_steps(name: str, found: Sass) -> list[str]:
    least = next((least for key, least in LEAST_HIDDEN.items() if fnmatchcase(name, key)), None)
    if least is None:
        return ["LEAST_HIDDEN does not know it"]
    if least > 0 and not found.steps:
        return ["no step computes while a product is under way"]
    return [
        f"{step.hidden} of {step.exponentials} exponentials of a step while a product is under way"
        for step in found.steps
        if step.hidden < least * step.exponentials or not step.exponentials
    ]


def main() -> None:
    if disassembler() is None:
        print(f"{NAME}: SKIPPED, no nvdisasm on PATH, in CUDA_HOME or installed (the extra `dev`)")
        return
    units = compiled_units(NAME, f"*{HOPPER_ONLY}")
    kernels = sum(len(unit.kernels) for unit in units)
    report(NAME, problems_of(units), f"{kernels} kernels of Hopper")


if __name__ == "__main__":
    main()
