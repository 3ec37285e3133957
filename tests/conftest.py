"""Every test that takes ``level`` runs once on every level, or says why it cannot.

Levels are those of the CPU and, in the modules of ON_CUDA alone, those of CUDA: "sm80" is an
emulated GPU, in a build that has one (FASTATTN_CUDA=emulate), and "cuda" a real one.
FASTATTN_CPU_ISA chooses one of all but the last.
"""

import os

import pytest
import torch

from fastattn import _C
from fastattn.testing import running_on

KERNELS = ("test_attention_", "test_kv_cache")  # beginnings of names
LAYERS = ("test_nn_cache", "test_generation")  # which run on CUDA what takes level, and no more
ON_CUDA = KERNELS + LAYERS


def _levels(on_cuda):
    only = os.environ.get("FASTATTN_CPU_ISA")
    for name, obstacle in _C.cpu_levels():
        if only in (None, "", name) and (on_cuda or name != "sm80"):
            marks = [pytest.mark.skip(reason=f"{name}: {obstacle}")] if obstacle else []
            yield pytest.param(name, id=name, marks=marks)
    if on_cuda and not only and _C.built_with_cuda and torch.cuda.is_available():
        yield pytest.param("cuda", id="cuda")


def pytest_generate_tests(metafunc):
    if "level" in metafunc.fixturenames:
        levels = list(_levels(metafunc.module.__name__.startswith(ON_CUDA)))
        metafunc.parametrize("level", levels, indirect=True)


def pytest_collection_modifyitems(items):
    if os.environ.get("FASTATTN_CPU_ISA") != "sm80":
        return
    for item in items:
        name = item.path.name
        runs = name.startswith(LAYERS) and "level" in item.fixturenames
        if not runs and not name.startswith(KERNELS):
            item.add_marker(pytest.mark.skip(reason="sm80: nothing here runs on CUDA"))


@pytest.fixture
def level(request):
    with running_on(request.param):
        yield request.param


@pytest.fixture
def threads():
    """Sets the number of threads of torch; the test leaves it as it was."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)
