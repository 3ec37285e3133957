"""Every test that takes ``level`` runs once on every level, or says why it cannot.

Levels are those of the CPU and, in the files that cuda_tests.py names, those of CUDA: "sm80" is an
emulated GPU, in a build that has one (FASTATTN_CUDA=emulate), and "cuda" a real one.
FASTATTN_CPU_ISA chooses one of all but the last.
"""

import os
from pathlib import Path

import pytest
import torch
from cuda_tests import are_of_cuda

from fastattn import _C
from fastattn.testing import running_on


def _levels(has_cuda):
    only = os.environ.get("FASTATTN_CPU_ISA")
    for name, obstacle in _C.cpu_levels():
        if only in (None, "", name) and (has_cuda or name != "sm80"):
            marks = [pytest.mark.skip(reason=f"{name}: {obstacle}")] if obstacle else []
            yield pytest.param(name, id=name, marks=marks)
    if has_cuda and not only and _C.built_with_cuda and torch.cuda.is_available():
        yield pytest.param("cuda", id="cuda")


def pytest_generate_tests(metafunc):
    if "level" in metafunc.fixturenames:
        has_cuda = are_of_cuda(Path(metafunc.module.__file__))
        metafunc.parametrize("level", list(_levels(has_cuda)), indirect=True)


def pytest_collection_modifyitems(items):
    if os.environ.get("FASTATTN_CPU_ISA") != "sm80":
        return
    for item in items:
        if not are_of_cuda(item.path):
            item.add_marker(pytest.mark.skip(reason="sm80: what is tested has no CUDA kernels"))


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
