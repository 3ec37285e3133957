"""Every test that takes ``level`` runs once on every CPU level, or says why it cannot."""

import os

import pytest
import torch

from fastattn import _C
from fastattn.testing import cpu_level


def _levels():
    only = os.environ.get("FASTATTN_CPU_ISA")
    for name, obstacle in _C.cpu_levels():
        if only in (None, "", name):
            marks = [pytest.mark.skip(reason=f"{name}: {obstacle}")] if obstacle else []
            yield pytest.param(name, id=name, marks=marks)


@pytest.fixture(params=list(_levels()))
def level(request):
    with cpu_level(request.param):
        yield request.param


@pytest.fixture
def threads():
    """Sets the number of threads of torch; the test leaves it as it was."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)
