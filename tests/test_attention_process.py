"""What a whole process sees: memory, what an import brings, and that CUDA is left alone."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from attention_options import skip_on_gpu

from fastattn import _C

MEMORY = """
import resource, torch, fastattn.functional as fa
from fastattn import _C
_C.set_cpu_level({level!r})
dtype = torch.{dtype}

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

def step(length):
    leaves = [torch.randn(1, 8, length, 64, dtype=dtype).requires_grad_() for _ in range(3)]
    out = fa.attention(*leaves, causal=True, window={window})
    out.backward(torch.randn(1, 8, length, 64, dtype=dtype))

step(64)
before = peak()
step(16384)
tensors = 8 * 8 * 16384 * 64 * dtype.itemsize + 8 * 16384 * 4
print((peak() - before - tensors) // 2**20)
"""


def run(program, **environment):
    done = python(program, **environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


def python(program, **environment):
    package = Path(_C.__file__).parent.parent  # the one under test, not what the folder has
    environment["PYTHONPATH"] = os.pathsep.join([str(package), *sys.path])
    return subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        cwd=Path(__file__).parent,
        env=os.environ | environment,
    )


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_memory_grows_with_the_length_and_not_with_its_square(level, dtype):
    """Forward and backward of 8 heads of length 16384; the matrix of scores alone is 8 GiB."""
    skip_on_gpu("the process's memory is not the GPU's")
    if level in _C.emulated_levels:
        pytest.skip(f"{level}: the emulation would take hours")
    window = (300, None) if level == "scalar" else None  # the whole would take minutes there
    extra = int(run(MEMORY.format(level=level, dtype=dtype, window=window)))
    assert extra < 300, f"{extra} MiB over the tensors themselves"


def test_importing_leaves_cuda_alone():
    program = "import torch, fastattn.functional; print(torch.cuda.is_initialized())"
    assert run(program).strip() == "False"


def test_importing_pulls_in_no_heavy_module():
    program = "import torch, sys; before = set(sys.modules); import fastattn.functional\n"
    program += "print(*sorted({m.split('.')[0] for m in set(sys.modules) - before}))"
    new = set(run(program).split())
    assert not new & {"numpy", "scipy", "triton", "transformers", "matplotlib", "hypothesis"}


def test_the_level_of_the_environment_is_taken_and_an_unknown_one_refused():
    program = "import fastattn._C as c; print(c.active_cpu_level())"
    assert run(program, FASTATTN_CPU_ISA="scalar").strip() == "scalar"
    refused = python(program, FASTATTN_CPU_ISA="sse9")
    assert refused.returncode != 0
    assert "ValueError: FASTATTN_CPU_ISA: expected one of" in refused.stderr


def test_peak_rates_count_what_was_done(level):
    for what in ("fp32", "bf16", "fp16", "exp"):
        assert _C.cpu_peak(what, 200) == 2 * _C.cpu_peak(what, 100) > 0
    with pytest.raises(ValueError, match=r"what: expected .* got 'int4'"):
        _C.cpu_peak("int4", 1)
