"""Two megabytes of text that every Python carries, as characters: prose and some code.

The topics of help(), and the docstrings of the standard library's modules.
"""

from __future__ import annotations

import ast
import random
import string
import sysconfig
from pathlib import Path

import torch
from torch import Tensor

CHARACTERS = "\n" + string.printable[:95]
TOKENS = {character: token for token, character in enumerate(CHARACTERS)}


def encode(text: str) -> Tensor:
    """(characters,) int64; what is not among CHARACTERS becomes a question mark."""
    return torch.tensor([TOKENS.get(character, TOKENS["?"]) for character in text])


def decode(tokens: Tensor) -> str:
    return "".join(CHARACTERS[token] for token in tokens.tolist())


def documents() -> list[str]:
    from pydoc_data.topics import topics

    found = [topics[name] for name in sorted(topics)]
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef)
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        nodes = ast.walk(ast.parse(path.read_bytes()))
        texts = [ast.get_docstring(node) or "" for node in nodes if isinstance(node, documented)]
        found.append("\n\n".join(filter(None, texts)))
    return found


def corpus() -> tuple[Tensor, Tensor]:
    """Text to train on, and one document in twenty to test on."""
    texts = documents()
    random.Random(0).shuffle(texts)
    count = len(texts) // 20
    return encode("\n\n".join(texts[count:])), encode("\n\n".join(texts[:count]))
