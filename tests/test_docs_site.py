"""The site builds without a warning, and its reference has all that is public."""

import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("mkdocs")
pytest.importorskip("material")
pytest.importorskip("mkdocstrings_handlers.python")

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
PUBLIC = ("fastattn", "fastattn.functional", "fastattn.nn", "fastattn.reference")
OPTIONAL = (
    "fastattn.compat",
    "fastattn.compat.flash_attn",
    "fastattn.integrations.huggingface",
    "fastattn.integrations.sdpa",
    "fastattn.onnx",
)
CODE = re.compile(r"<(pre|code)\b.*?</\1>", re.DOTALL)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """Every page of the reference, by its path."""
    out = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(out)]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    built = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    pages = {str(page.relative_to(out)): page.read_text() for page in out.glob("api/*/index.html")}
    assert len(pages) == len(list((ROOT / "docs" / "api").glob("*.md")))
    return pages


@pytest.mark.parametrize("name", [*PUBLIC, *OPTIONAL])
def test_every_public_name_is_in_the_reference(site, name):
    if name in OPTIONAL:
        pytest.importorskip(name)
    anchors = {anchor for page in site.values() for anchor in re.findall(r'\bid="([^"]+)"', page)}
    public = [f"{name}.{each}" for each in importlib.import_module(name).__all__]
    assert public
    assert [each for each in public if each not in anchors] == []


def test_docstrings_are_read_as_they_are_meant(site):
    """No role, literal block, example or star of a docstring is left in the text."""
    for path, page in site.items():
        text = CODE.sub("", re.search(r"<article.*</article>", page, re.DOTALL)[0])
        assert not re.search(r"::|:\w+:`|``|<em>|<blockquote>|&gt;&gt;&gt;", text), path
