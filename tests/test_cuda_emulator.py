"""The emulator that the CUDA kernels are tested on catches what it is there to catch.

It is compiled here with small kernels, right ones and wrong ones, and with csrc/cuda's probe.
"""

import os
import re
import shutil
import signal
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCES = [
    *sorted(ROOT.glob("tests/emulator/cuda/*.cpp")),
    *sorted(ROOT.glob("tests/emulator/cuda/self_test/*.cpp")),
    *(ROOT / "csrc/cuda" / name for name in ("inst/probe.cu", "device.cpp", "dispatch.cpp")),
]
FLAGS = [
    *("-std=c++20", "-O1", "-Wall", "-Wextra", "-Werror", "-pthread"),
    *("-ffp-contract=off", "-ftrivial-auto-var-init=pattern", "-DFASTATTN_CUDA_EMULATE"),
    *(f"-I{ROOT / folder}" for folder in ("tests/emulator/cuda", "csrc/include", "csrc/cuda")),
]

# What is said of each defect.
READS, WRITES = (f"race: {verb} .* unordered" for verb in ("reads", "writes"))
RACE, PENDING = f"{READS}|{WRITES}", "which a pending copy of thread .* is to fill"
DEFECTS = {
    "race across warps": RACE,
    "race within a warp": RACE,
    "write after read": RACE,
    "write after write": WRITES,
    "write of a half word": "race: writes 2 bytes at offset 156 .* write by thread 7[78]",
    "ldmatrix too early": r"race: reads 16 bytes .* write by thread \d+",
    "write after ldmatrix": r"race: writes 16 bytes .* read by several threads of warp \d",
    "copy over what is read": RACE,
    "read of a pending copy": f"reads 4 bytes .* {PENDING}",
    "wait for too few": f"reads 4 bytes .* {PENDING}",
    "wait without commit": f"reads 4 bytes .* {PENDING}",
    "write to a pending copy": f"writes 4 bytes .* {PENDING}",
    "copy to a pending copy": f"writes 16 bytes .* {PENDING}",
    "no barrier after a wait": RACE,
    "copy not waited for": "ends with 1 copies not waited for",
    "copy to misaligned": "writes 16 bytes misaligned",
    "copy from misaligned": "no multiple of 16 bytes",
    "beyond the end": "writes 4 bytes out of bounds, at offset 4[123].. of 4096",
    "before the start": "reads 4 bytes out of bounds, at offset -4 of 4096",
    "misaligned": "reads 16 bytes misaligned",
    "guard band": "wrote beside its shared memory",
    "barrier of some": "deadlock: .*sync_block, but .* ended",
    "barrier of the living": "deadlock: .*sync_block, but .* ended",
    "two barriers": "divergence: sync_block, while thread .* of the same block waits",
    "barrier against sync_warp": "deadlock: 97 threads .* sync_block .*, 31 threads .* sync_warp",
    "two operations": "divergence: shuffle.*, while thread .* of the same warp waits at shuffle",
    "lane that ended": r"divergence: any_in_warp, but lane 31 of warp \d has ended",
    "shared memory unasked for": "50176 bytes of shared memory, where the kernel is allowed 49152",
    "too much shared memory": "167936 bytes of shared memory: a block has at most 166912",
    "half a warp": "a block of part of a warp",
    "empty grid": "a grid of 0 x 1 x 1 blocks",
}
RIGHT = {
    *("probe", "uninitialised memory is NaN", "pipeline", "exchange", "place", "matrices"),
    *("product of bf16", "product of f16", "host threads", "numbers"),
}


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        pytest.skip("no C++ compiler")
    path = tmp_path_factory.mktemp("emulator") / "self_test"
    command = [compiler, *FLAGS, "-x", "c++", *map(str, SOURCES), "-o", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    return path


def run(program, *arguments, seed=1):
    return subprocess.run(
        [program, *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env=os.environ | {"FASTATTN_EMULATOR_SEED": str(seed)},
    )


@pytest.mark.parametrize("seed", range(1, 6))
def test_every_defect_is_named_and_right_kernels_pass(program, seed):
    done = run(program, seed=seed)
    assert done.returncode == 0, done.stderr
    said = dict(line.split(": ", 1) for line in done.stdout.splitlines())
    assert int(said.pop("launches")) > 150
    assert said.keys() == DEFECTS.keys() | RIGHT
    for name, pattern in DEFECTS.items():
        assert said[name].startswith("emulator: "), name
        assert re.search(pattern, said[name]), f"{name}: {said[name]}"
    assert {name: said[name] for name in RIGHT} == dict.fromkeys(RIGHT, "ok")


def test_an_error_names_the_kernel_the_block_the_thread_and_the_line(program):
    error = next(line for line in run(program).stdout.splitlines() if line.startswith("two op"))
    line = r"\S*self_test/wrong\.cpp:\d+"
    assert re.search(r"self_test::two_operations, block \([01], 0, 0\), thread \d+: ", error)
    assert re.search(rf"waits at shuffle\S* \({line}\) \({line}\)$", error)


def test_a_seed_decides_the_order(program):
    # Addresses of globals differ from run to run.
    outputs = [re.sub("0x[0-9a-f]+", "", run(program, seed=seed).stdout) for seed in (7, 7, 8)]
    assert outputs[0] == outputs[1] != outputs[2]


@pytest.mark.parametrize(
    ("fault", "said"),
    [("null", "segmentation fault at address 0x8"), ("overflow", "stack overflow")],
)
def test_a_fault_is_named_before_the_process_dies(program, fault, said):
    done = run(program, fault)
    assert done.returncode == -signal.SIGSEGV
    kernel = {"null": "write_to", "overflow": "overflow"}[fault]
    where = rf"self_test::{kernel}, block \([01], 0, 0\), thread \d+: "
    assert re.match(f"emulator: {where}{said}", done.stderr), done.stderr
