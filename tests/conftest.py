"""Every test that takes ``level`` runs once on every level, or says why it cannot.

Levels are those of the CPU and, in the files that cuda_tests.py names, those of CUDA: "sm80" and
"sm90" are emulated GPUs, in a build that has them (FASTATTN_CUDA=emulate), and "cuda" a real one.
FASTATTN_CPU_ISA chooses one of all but the last.
"""

import os
from pathlib import Path

import pytest
import torch
from cuda_tests import LAYERS, run_at

from fastattn import _C
from fastattn.support import cuda_level
from fastattn.testing import running_on


def _levels(path):
    only = os.environ.get("FASTATTN_CPU_ISA")
    for name, obstacle in _C.cpu_levels():
        if only in (None, "", name) and (name not in _C.emulated_levels or run_at(name, path)):
            marks = [pytest.mark.skip(reason=f"{name}: {obstacle}")] if obstacle else []
            yield pytest.param(name, id=name, marks=marks)
    if run_at("cuda", path) and not only and _C.built_with_cuda and torch.cuda.is_available():
        yield pytest.param("cuda", id="cuda")


def pytest_generate_tests(metafunc):
    if "level" in metafunc.fixturenames:
        levels = list(_levels(Path(metafunc.module.__file__)))
        metafunc.parametrize("level", levels, indirect=True)


def pytest_collection_modifyitems(items):
    level = os.environ.get("FASTATTN_CPU_ISA")
    if level not in _C.emulated_levels:
        return
    for item in items:
        without_level = item.path.name in LAYERS and "level" not in item.fixturenames
        if without_level or not run_at(level, item.path):
            reason = f"{level}: what is tested has no kernels of its own"
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture
def level(request):
    with running_on(request.param):
        yield request.param


@pytest.fixture
def cuda():
    """The level of CUDA that there is, in use."""
    level = cuda_level()
    if level is None:
        pytest.skip("no GPU, nor an emulated one")
    with running_on(level):
        yield level


@pytest.fixture
def threads():
    """Sets the number of threads of torch; the test leaves it as it was."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)
