"""What the docs show runs, and what they list is so."""

import doctest
import importlib
import math
import re
from pathlib import Path

import pytest
import torch

from fastattn.support import support

MODULES = (
    "fastattn.convert",
    "fastattn.functional.activation",
    "fastattn.functional.attention",
    "fastattn.functional.helpers",
    "fastattn.functional.kv_cache",
    "fastattn.functional.rope",
    "fastattn.functional.norm",
    "fastattn.functional.weights",
    "fastattn.generation.decoding",
    "fastattn.info",
    "fastattn.nn.activation",
    "fastattn.nn.attention",
    "fastattn.nn.block",
    "fastattn.nn.cache.contiguous",
    "fastattn.nn.cache.paged",
    "fastattn.nn.language_model",
    "fastattn.nn.multihead_attention",
    "fastattn.nn.transformer",
    "fastattn.nn.transformer_layers",
    "fastattn.nn.norm",
    "fastattn.nn.feed_forward",
    "fastattn.nn.positions",
    "fastattn.nn.relative_attention",
    "fastattn.nn.relative_bias",
    "fastattn.support",
)


@pytest.mark.parametrize("name", MODULES)
def test_examples_of_docstrings_run(name):
    module = importlib.import_module(name)
    torch.manual_seed(0)
    results = doctest.testmod(module, extraglobs={"torch": torch, "math": math})
    assert results.attempted > 0
    assert results.failed == 0


def test_the_examples_of_the_readme_run():
    readme = (Path(__file__).parent.parent / "README.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", readme, flags=re.DOTALL)
    assert len(blocks) >= 2
    names = {}
    for block in blocks:
        exec(block, names)


def test_the_support_matrix_is_what_runs():
    written = Path(__file__).parent.parent / "docs" / "support.md"
    assert written.read_text() == support(), "python -m fastattn support > docs/support.md"
