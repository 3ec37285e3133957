"""The emulator that the CUDA kernels are tested on catches what it is there to catch.

It is compiled here with small kernels, right ones and wrong ones, for devices of sm_80 and sm_90a,
and with csrc/cuda's probe.
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
    *(
        ROOT / "csrc/cuda" / name
        for name in ("inst/probe.cu", "device.cpp", "dispatch.cpp", "tensor_map.cpp")
    ),
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
UNFENCED = r"asynchronously 16 bytes .* which thread \d+ has stored without a fence_async_proxy"
TO_READ = "which a pending copy or product is to read"
UNORDERED_SUM = "race: adds to global memory after another sum there, unordered"
BEFORE_FENCE = "wgmma without a wgmma_fence since registers were last free"
SM90_DEFECTS = {
    "sm_90a on sm_80": "an instruction of sm_90a on a device of sm_80",
    "arrival at nothing": "mbarrier_arrive of an mbarrier that is not initialised",
    "mbarrier_init twice": r"mbarrier_init of what is an mbarrier already \(.*wrong_sm90.cpp:\d+\)",
    "arrival before the init": "mbarrier_arrive of an mbarrier that (thread 0 has|is not) init",
    "too many arrivals": "phase 0 has had all of its 1 arrivals and still waits for bytes",
    "wait for nobody": "deadlock: 128 threads .* at mbarrier_wait .* 1 arrivals and 0 bytes",
    "wait for the wrong parity": "deadlock: .* in phase 1 128 arrivals and 0 bytes",
    "missed phase": r"phase 1 .* is complete while \d+ threads|deadlock: .* at mbarrier_wait",
    "store to an mbarrier": "writes 4 bytes .* where an mbarrier is",
    "arrival of one lane": READS,
    "wait of one lane": READS,
    "named barrier of other counts": "sync_named for .* where others wait for",
    "named barrier of too few": "deadlock: .* 64 threads .* at sync_named",
    "named barrier reached twice": "arrive_named: warp 0 is at barrier 1 already",
    "named barrier left over": "ends with 32 of 128 threads at named barrier 1",
    "named barrier 0": "sync_named at barrier 0: 1 to 15",
    "named barrier of half a warp": "deadlock: 64 .* sync_block .* 64 threads .* sync_named",
    "read after arrive_named": RACE,
    "too many registers": "deadlock: .* 256 threads .* at more_registers",
    "fewer registers that are more": "fewer_registers<136> by a thread that has 128",
    "wait for another load": f"reads 4 bytes .*{PENDING}|{READS}",
    "load without fence_init": "without an mbarrier_fence_init",
    "touch of a pending load": f"reads 4 bytes .*{PENDING}",
    "load not waited for": "ends with 1 copies that nobody has waited for",
    "load of too few bytes": "deadlock: .* 0 arrivals and 8192 bytes, with 0 copies in flight",
    "load to misaligned": "TMA at address 2176 .* no multiple of 1024",
    "load of another rank": "TMA of rank 3 with a tensor map of rank 2",
    "load without a map": "TMA without a tensor map",
    "load of odd bytes": "bulk copy of 24 bytes .* multiples of 16",
    "load over what is read": f"reads 4 bytes .*{PENDING}|{WRITES}",
    "load over unfenced stores": f"writes {UNFENCED}",
    "store of unfenced stores": f"reads {UNFENCED}",
    "store fenced too late": f"reads {UNFENCED}",
    "store without a barrier": f"{RACE}|{TO_READ}",
    "store overwritten": f"writes 4 bytes .*{TO_READ}",
    "store not waited for": "ends with a store from shared memory not waited for",
    "sum out of turn": UNORDERED_SUM,
    "turn passed on too early": UNORDERED_SUM,
    "turn that nobody passes on": "deadlock: await_global for 1 at a number that is 0",
    "product without a fence": BEFORE_FENCE,
    "product without another fence": BEFORE_FENCE,
    "accumulator after the fence": "wgmma of an accumulator that was written since wgmma_fence",
    "A after the fence": "wgmma of an A that was written since wgmma_fence",
    "A before the wait": "A in registers of a wgmma .* was written before this wait",
    "accumulator before the wait": "accumulator of a wgmma .* was written before this wait",
    "operand overwritten": f"writes 4 bytes .*{TO_READ}",
    "operand loaded over": f"writes 16 bytes .*{TO_READ}",
    "operand of another group": f"writes 4 bytes .*{TO_READ}|{RACE}",
    "unfenced operands": f"reads {UNFENCED}",
    "unordered operands": f"{READS}|{UNFENCED}",
    "operands not awaited by all": f"{READS}|{PENDING}",
    "product not waited for": "ends with 1 products not waited for",
    "operand out of place": "address 2176 .* not in the first 128 bytes of 1024",
    "operand of another layout": "wgmma of a layout of type 2",
    "operands per warp": "divergence: wgmma with other operands in thread 96",
    "product of three warps": "deadlock: 32 threads .* sync_block .* 96 threads .* wgmma_fence",
    "product of part of a group": "wgmma_fence, but warpgroup 0 has 96 threads alone",
}
RIGHT = {
    *("probe", "uninitialised memory is NaN", "pipeline", "exchange", "place", "matrices"),
    *("product of bf16", "product of f16", "host threads", "numbers"),
    *("product K x K", "product K x MN", "product MN x K", "product MN x MN"),
    *("product registers x K", "product registers x MN", "boxes", "conversation"),
    *("accumulators are NaN before the wait", "wrong boxes are refused", "turns in order"),
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
    defects = DEFECTS | SM90_DEFECTS
    assert said.keys() == defects.keys() | RIGHT
    for name, pattern in defects.items():
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
