"""No kernel reads outside of its inputs: each of them ends, or begins, at a page that traps."""

import ctypes
import mmap
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from attention_options import skip_on_gpu, with_features

import fastattn.functional as fa
from fastattn.testing import DTYPES, attention_inputs, cotangents, randn, running_on

PAGE = mmap.PAGESIZE
ALIVE = []


def fenced(x, at_end):
    """A contiguous copy of x that touches a page without access, behind it or before it."""
    if x.numel() == 0:
        return x
    size = x.numel() * x.element_size()
    inner = -(-size // PAGE) * PAGE
    memory = mmap.mmap(-1, inner + PAGE)
    ALIVE.append(memory)
    base = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    libc = ctypes.CDLL(None, use_errno=True)
    trap = base + inner if at_end else base
    no_access = 0
    assert libc.mprotect(ctypes.c_void_p(trap), ctypes.c_size_t(PAGE), no_access) == 0
    offset = inner - size if at_end else PAGE
    flat = torch.frombuffer(memory, dtype=x.dtype, count=x.numel(), offset=offset)
    return flat.view(x.shape).copy_(x)


def attend(inputs, options, at_end):
    """Every op once, all of whose inputs are fenced."""

    def fence(x):
        return fenced(x, at_end) if torch.is_tensor(x) else x

    inputs = {n: fence(x).requires_grad_() for n, x in inputs.items()}
    options = {n: fence(x) for n, x in options.items()}
    fa.attention(**{n: x.detach() for n, x in inputs.items()}, **options)
    out, lse = fa.attention(**inputs, **options, return_lse=True)
    dout, dlse = (fence(x) for x in cotangents(out, lse, 1))
    torch.autograd.grad((out, lse), list(inputs.values()), (dout, dlse))
    query, key, lse = inputs["query"].detach(), inputs["key"].detach(), fence(lse.detach())
    if "bias" in inputs:
        options["bias"] = inputs["bias"].detach()
    fa.attention_weights(query, key, lse, **options)
    fa.attention_column_sums(query, key, lse, **options)


def attend_packed(dtype, at_end):
    shapes = ((11, 2, 13), (19, 2, 13), (19, 2, 7))
    leaves = [fenced(randn(*s, seed=1, dtype=dtype), at_end).requires_grad_() for s in shapes]
    bounds = [fenced(torch.tensor(b), at_end) for b in ([0, 4, 4, 11], [0, 9, 12, 19])]
    out = fa.attention_varlen(*leaves, *bounds, causal=True)
    out.backward(fenced(torch.ones_like(out), at_end))


def main(level):
    with running_on(level):
        for dtype in DTYPES:
            for at_end in (True, False):
                attend_packed(dtype, at_end)
                for seed, names in enumerate(
                    (["bias"], ["mask", "sink", "alibi"], ["key_lengths", "bias"], ["causal"])
                ):
                    for queries, keys, head_dim in ((1, 67, 5), (5, 3, 40), (70, 129, 17)):
                        shape = {"queries": queries, "keys": keys, "head_dim": head_dim}
                        more = {"heads": 2, "kv_heads": 1, "batch": (2,), "dtype": dtype}
                        inputs = attention_inputs(**shape, **more)
                        attend(*with_features(names, inputs, seed=seed), at_end)
                        ALIVE.clear()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="uses mprotect")
def test_nothing_is_read_outside_of_the_inputs(level):
    skip_on_gpu("its memory has no such pages")
    program = [sys.executable, str(Path(__file__)), level]
    done = subprocess.run(program, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, f"exit status {done.returncode} (-11: a trap)\n{done.stderr}"


if __name__ == "__main__":
    main(sys.argv[1])
