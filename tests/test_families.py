"""Model families of transformers on fastattn, against their own eager code in float64."""

import functools
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers", minversion="5")

from family_cases import assert_as_eager, families, oracle_results, page, results

from fastattn.integrations import huggingface

FAMILIES = {family.name: family for family in families()}
CASES = [
    (name, padding, dtype)
    for name, family in FAMILIES.items()
    for padding in family.paddings
    for dtype in family.dtypes
]


def built(family, dtype=torch.float32):
    """The eager model, its weights rounded to dtype."""
    return family.build().to(dtype)


def on_fastattn(family, dtype=torch.float32):
    model = built(family, dtype)
    if family.way == "nn":
        return model.fused()
    if family.way == "hook":
        huggingface.register()
        model.set_attn_implementation("fastattn")
        return model
    model, report = huggingface.patch(model)
    assert any("adapters" in entry.target for entry in report.replaced)
    return model


@pytest.fixture
def calls(monkeypatch):
    """How often the attention of fastattn ran."""
    from fastattn._ops import attention as ops

    counted = []

    def counting(function):
        @functools.wraps(function)
        def wrapped(*given, **named):
            counted.append(function.__name__)
            return function(*given, **named)

        return wrapped

    for name in ("attend", "attend_plain"):
        monkeypatch.setattr(ops, name, counting(getattr(ops, name)))
    return counted


@pytest.mark.parametrize(
    "name, padding, dtype", CASES, ids=[f"{n}-{p}-{str(d)[6:]}" for n, p, d in CASES]
)
def test_results_are_those_of_eager(name, padding, dtype, calls):
    family = FAMILIES[name]
    inputs = family.inputs(padding)
    eager = results(built(family, dtype), inputs)
    assert not calls
    actual = results(on_fastattn(family, dtype), inputs)
    assert calls
    oracle = oracle_results(built(family, dtype), inputs)
    assert_as_eager(actual, oracle, eager, dtype)


@pytest.mark.parametrize(
    "name, cache", [(name, cache) for name, f in FAMILIES.items() for cache in f.caches]
)
def test_generated_tokens_are_those_of_eager(name, cache, calls):
    family = FAMILIES[name]
    options = {"do_sample": False, "max_new_tokens": 8, "min_new_tokens": 8}
    padding = "left" if "left" in family.paddings else "none"
    inputs = family.inputs(padding) | options
    want = built(family).generate(**inputs)
    assert not calls
    cached = {} if cache == "dynamic" else {"cache_implementation": cache}
    got = on_fastattn(family).generate(**inputs, **cached)
    assert calls
    assert torch.equal(got, want)


@pytest.mark.skipif(
    FAMILIES["GPT-J"].way == "adapter", reason="the page says what is so from transformers 5.24 on"
)
def test_the_page_lists_them():
    written = Path(__file__).parent.parent / "docs" / "families.md"
    assert written.read_text() == page(), "python tests/family_cases.py > docs/families.md"
