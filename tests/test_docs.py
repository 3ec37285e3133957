"""What the docs show runs, and what they list is so."""

import doctest
import importlib
import math
import re
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from fastattn.support import support

ROOT = Path(__file__).parent.parent
BLOCK = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)


def modules_with_examples():
    for path in sorted((ROOT / "fastattn").rglob("*.py")):
        if ">>> " in path.read_text():
            parts = path.relative_to(ROOT).with_suffix("").parts
            yield ".".join(parts).removesuffix(".__init__")


def pages_with_snippets():
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))):
        if BLOCK.search(path.read_text()):
            yield str(path.relative_to(ROOT))


@contextmanager
def skipping_what_is_not_installed():
    try:
        yield
    except ModuleNotFoundError as error:
        if str(error.name).partition(".")[0] in ("fastattn", "flash_attn"):
            raise  # those are ours
        pytest.skip(f"needs {error.name}, which is not installed")


@pytest.mark.parametrize("name", list(modules_with_examples()))
def test_examples_of_docstrings_run(name):
    with skipping_what_is_not_installed():
        module = importlib.import_module(name)
    torch.manual_seed(0)
    results = doctest.testmod(module, extraglobs={"torch": torch, "math": math})
    assert results.attempted > 0
    assert results.failed == 0


@pytest.mark.parametrize("page", list(pages_with_snippets()))
def test_the_snippets_of_a_page_run_one_after_the_other(page):
    torch.manual_seed(0)
    text = (ROOT / page).read_text()
    names = {"__name__": "snippets"}
    for block in BLOCK.finditer(text):
        lines_before = "\n" * text.count("\n", 0, block.start(1))  # so that errors name the line
        with skipping_what_is_not_installed():
            exec(compile(lines_before + block[1], page, "exec"), names)


def test_the_support_matrix_is_what_runs():
    written = ROOT / "docs" / "support.md"
    assert written.read_text() == support(), "python -m fastattn support > docs/support.md"
