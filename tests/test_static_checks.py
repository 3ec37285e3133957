"""What the static checks read out of the compiler's words and the machine code, and what they find
wrong there. (`make check` runs them on the kernels themselves.)"""

import importlib
from pathlib import Path

import pytest

# In the words of ptxas 13.0.
ADVICE = """\
ptxas info    : (C7508) Potential Performance Loss: 'setmaxnreg' ignored; unable to determine \
register count at entry.
ptxas info    : (C7517) warpgroup.wait is injected in around line 64 by compiler to allow use of \
registers defined by GMMA in function 'kernel'
ptxas info    : (C7511) Potential Performance Loss: wgmma.mma_async instructions are serialized \
due to insufficient register resources for the wgmma pipeline in the function 'kernel'
"""
SAID = """\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'kernel' for 'sm_90a'
ptxas info    : Function properties for kernel
    {stack} bytes stack frame, 4 bytes spill stores, 8 bytes spill loads
ptxas info    : Used 168 registers, used 16 barriers, 32 bytes smem
"""

# A kernel whose loop begins two products and computes an exponential in each of three places: after
# both, after the first, and after none is under way. One more stands outside of the loop.
CODE = """\
USETMAXREG.DEALLOC.CTAPOOL 0x18
USETMAXREG.TRY_ALLOC.CTAPOOL UP0, 0xf0
@!P0 UTMALDG.5D [UR8], [UR16]
MUFU.EX2 R9, R9
.L_x_1:
.L_x_2:
SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR4], R3
@!P0 BRA `(.L_x_2)
HGMMA.64x128x16.F32.BF16 R24, gdesc[UR16], R24, gsb0
HGMMA.64x128x16.F32.BF16 R88, R56, gdesc[UR16].tnspB, R88, gsb0
MUFU.EX2 R1, R1
WARPGROUP.DEPBAR.LE gsb0, 0x1
MUFU.EX2 R2, R2
@P1 MUFU.EX2 R2, R2
WARPGROUP.DEPBAR.LE gsb0, 0x0
MUFU.EX2 R3, R3
@P1 BRA `(.L_x_1)
WARPGROUP.DEPBAR.LE gsb0, 0x1
EXIT
"""


@pytest.fixture
def module(monkeypatch):
    """A module of the static checks by name."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent / "static"))
    return importlib.import_module


def disassembly(code, kernel="kernel"):
    lines = [f'\t.section\t.text.{kernel},"ax",@progbits', f".text.{kernel}:"]
    for i, line in enumerate(code.splitlines()):
        lines.append(line if line.endswith(":") else f"        /*{16 * i:04x}*/          {line} ;")
    return "\n".join(lines) + "\n"


def test_kernels_and_their_instructions(module):
    found = module("sass").read(disassembly(CODE) + disassembly("EXIT\n", "other"))
    assert list(found) == ["kernel", "other"]
    opcodes = found["kernel"].opcodes
    assert (opcodes["HGMMA"], opcodes["UTMALDG"], opcodes["MUFU"], opcodes["BRA"]) == (2, 1, 5, 2)
    assert found["kernel"].registers == [24, 240]
    assert found["other"].opcodes == {"EXIT": 1} and not found["other"].steps


def test_a_step_is_the_innermost_loop_around_the_wait(module):
    (step,) = module("sass").read(disassembly(CODE))["kernel"].steps
    assert (step.hidden, step.exponentials) == (2, 4)
    assert step.opcodes["MUFU"] == 4 and "UTMALDG" not in step.opcodes


def test_what_ptxas_says_and_the_machine_code_come_together(module):
    sass, nvcc = module("sass"), module("nvcc")
    facts = {"kernel": vars(sass.Sass({"HGMMA": 1}, [24, 240], []))}
    (kernel,) = nvcc.kernels_of(ADVICE + SAID.format(stack=16), facts)
    assert (kernel.registers, kernel.shared, kernel.stack, kernel.spills) == (168, 32, 16, 12)
    assert kernel.sass.opcodes == {"HGMMA": 1}
    assert [advice[:7] for advice in nvcc.advice_of(ADVICE)] == ["(C7508)", "(C7517)", "(C7511)"]
    assert nvcc.advice_of(SAID) == []


def test_spills_and_advice_are_problems(module):
    nvcc, check = module("nvcc"), module("check_nvcc_spills")
    kernels = nvcc.kernels_of(SAID.format(stack=16), {})
    unit = nvcc.Unit("unit.cu", "90a", kernels, nvcc.advice_of(ADVICE), 1.0, 1)
    *advice, spills = check.problems_of([unit])
    assert len(advice) == 3 and "16 bytes of stack, 12 bytes of spills" in spills


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ("", "", None),
        ("HGMMA", "HMMA", "no HGMMA"),
        ("UTMALDG", "LDGSTS", "no UTMALDG"),
        ("EXIT", "STL [R1], R2 ;\nEXIT", "1 STL"),
        ("USETMAXREG", "NOP", "setmaxnreg: 168 registers at entry, then as many"),
        ("0xf0", "0xa0", "setmaxnreg: 168 registers at entry, then [24, 160]"),
        ("gsb0, 0x1", "gsb0, 0x0", "no step computes while a product is under way"),
        ("@P1 MUFU.EX2", "MUFU.RCP", "1 of 3 exponentials"),
    ],
)
def test_what_a_kernel_of_hopper_lacks_is_a_problem(module, old, new, problem):
    found = module("sass").read(disassembly(CODE.replace(old, new) if old else CODE))["kernel"]
    kernel = module("nvcc").Kernel(
        "flash_fwd_sm90<Config<bf16, false>>", 0, 0, registers=168, sass=found
    )
    problems = module("check_sass").problems_of_kernel(kernel)
    assert len(problems) == (problem is not None)
    assert problem is None or problems[0].startswith(problem)


def test_only_kernels_with_terms_may_lack_a_step(module):
    check, sass = module("check_sass"), module("sass")
    without = sass.Sass({}, [], [])
    name = "flash_fwd_sm90<ForwardConfigSm90<bf16, 64, 64, ForwardTileSm90{{3, 48, 2, true}}, {}>>"
    assert check.problems_of_steps(name.format("true"), without) == []
    assert check.problems_of_steps(name.format("false"), without) != []
    assert check.problems_of_steps("_Z14flash_fwd_sm90", without) != []
