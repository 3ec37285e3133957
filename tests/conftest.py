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

KERNEL_FIXTURES = {"level", "cuda", "hopper"}


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


def _why_not(item, level):
    """Why a test has nothing to try on an emulated level."""
    name = item.path.name
    if not run_at(level, item.path) or (name in LAYERS and "level" not in item.fixturenames):
        return "what is tested has no kernels of its own"
    if level != "sm90":
        return None
    if name == "test_attention_with_cache.py" and not item.name.startswith(
        "test_any_split_through"
    ):
        return "all else of caches is tried at sm80, or in test_attention_hopper_caches.py"
    if not KERNEL_FIXTURES & {*item.fixturenames}:
        return "no kernel is tried"
    dtype = item.callspec.params.get("dtype") if hasattr(item, "callspec") else None
    if dtype in (torch.float32, torch.float64):
        return f"{dtype} has kernels of sm80 alone"
    if dtype == torch.float16:
        return "float16 takes the way of bfloat16, and test_attention_hopper.py tries both"
    return None


def pytest_collection_modifyitems(items):
    level = os.environ.get("FASTATTN_CPU_ISA")
    if level not in _C.emulated_levels:
        return
    for item in items:
        if reason := _why_not(item, level):
            item.add_marker(pytest.mark.skip(reason=f"{level}: {reason}"))


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
def hopper():
    """The level whose GPU has compute capability 9.0, in use."""
    level = cuda_level()
    is_hopper = level == "sm90"
    if level == "cuda":
        is_hopper = torch.cuda.get_device_capability() == (9, 0)
    if not is_hopper:
        pytest.skip("neither a GPU of compute capability 9.0 nor an emulated one")
    with running_on(level):
        yield level


@pytest.fixture
def threads():
    """Sets the number of threads of torch; the test leaves it as it was."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)
