"""What tests of functions on CUDA share."""

from contextlib import contextmanager

import pytest
import torch

from fastattn import _C
from fastattn.support import cuda_level

gpu = pytest.mark.skipif(cuda_level() != "cuda", reason="no GPU, or a build without CUDA")
emulated = pytest.mark.skipif(not _C.emulated_levels, reason="a build without an emulated GPU")


def orders_of_threads(level):
    """Goes round once for each; on a GPU the order differs by itself."""
    for seed in (1, 2, 3):
        if level in _C.emulated_levels:
            _C.set_emulator_seed(seed)
        yield


@contextmanager
def hidden_from_host():
    """As on a GPU, the host reads no tensor, and refuses nothing that they hold."""
    if _C.emulated_levels:
        _C.hide_from_host(True)
    try:
        yield
    finally:
        if _C.emulated_levels:
            _C.hide_from_host(False)


def captured(step):
    """The results of ``step`` in a CUDA graph that has been replayed once."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()
    graph.replay()
    return results


def far_apart(x, folder, name):
    """A copy of x whose last entry of the first dimension begins 2**31 elements behind the one
    before, in a file that is mostly a hole."""
    far = 2**31 + 64
    size = far * (x.shape[0] - 1) + x[0].numel()
    path = folder / name
    with path.open("wb") as file:
        file.truncate(x.element_size() * size)
    memory = torch.from_file(str(path), shared=True, size=size, dtype=x.dtype)
    return memory.as_strided(x.shape, (far, *x.stride()[1:])).copy_(x)
