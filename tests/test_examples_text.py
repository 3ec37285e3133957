"""Examples of text and of long contexts: tiny, they run, and what they say is so."""

import importlib
import io
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastattn import _C, generate
from fastattn.nn import PagedKVCache
from fastattn.testing import assert_accurate

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture
def example(monkeypatch):
    """An example, by its name."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return importlib.import_module


@pytest.fixture
def model(example):
    """A model of random weights, so large that what it says varies."""
    char_gpt = example("char_gpt")
    torch.manual_seed(0)
    model = char_gpt.gpt(**char_gpt.QUICK_SIZES).eval()
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.5)
    return model


def test_a_gpt_learns_and_talks(example, tmp_path, capsys):
    char_gpt, path = example("char_gpt"), tmp_path / "gpt.pt"
    assert char_gpt.main(["--quick", "--save", str(path)]) == 0
    said = capsys.readouterr().out
    losses = [float(x) for x in re.findall(r"^step .* loss (\S+)", said, re.MULTILINE)]
    assert len(losses) == 20 and losses[-1] < losses[0] - 0.3
    assert float(re.search(r"held-out loss (\S+)", said)[1]) < losses[0] - 0.3
    assert said.count(f"\n{char_gpt.PROMPT}") == 3
    assert "--- temperature 0.8, top_k 10" in said

    package = Path(_C.__file__).parent.parent  # the one under test
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(package), *sys.path])}
    program = [sys.executable, str(EXAMPLES / "char_gpt.py"), "--load", str(path), "--chat"]
    done = subprocess.run(
        program, input="The list\n", capture_output=True, text=True, timeout=300, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("> ") and done.stdout.count("> ") >= 2
    assert "step" not in done.stdout and len(done.stdout) > 4


def test_a_chat_remembers_what_was_said(example, model, monkeypatch, capsys):
    char_gpt, text = example("char_gpt"), example("python_text")
    lines = ["The list", "def f(x):"]
    monkeypatch.setattr(char_gpt, "ANSWER", 40)
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join([*lines, "", "not read"])))
    char_gpt.chat(model, temperature=0)
    said, history = capsys.readouterr().out, "\n"
    for line in lines:
        history += line
        prompt = text.encode(history).unsqueeze(0)
        found = generate(model, prompt, cache=False, max_new_tokens=40, temperature=0)
        answer = "".join(map(text.decode, found))
        assert len(set(answer)) > 5 and "\n\n" not in answer
        assert said.startswith(f"> {answer}\n"), (said, answer)
        said = said.removeprefix(f"> {answer}\n")
        history += answer + "\n\n"
    assert said == "> "


def test_the_text(example):
    text = example("python_text")
    train, held_out = text.corpus()
    assert len(train) > 1e6 and len(held_out) > 1e4
    assert "the following" in text.decode(train) and "the following" in text.decode(held_out)
    assert text.decode(text.encode("def f(é):\n")) == "def f(?):\n"


def test_ways_to_decode(example, capsys):
    assert example("efficient_inference").main(["--quick"]) == 0
    said = capsys.readouterr().out.splitlines()
    rows = [re.split(r" {2,}", line) for line in said if line.endswith("%")]
    assert len(rows) == 9
    sizes = {way: int(size) for way, _, _, size, _ in rows}
    whole = sizes["KVCache"]
    assert 0 < sizes["KVCache, int8"] < whole / 2 and 0 < sizes["SlidingWindowKVCache"] < whole
    assert 0 < sizes["requests, paged"] < whole
    assert {same for way, *_, same in rows if way != "KVCache, int8"} == {"100.00%"}
    assert re.fullmatch(r"A KVCache .* \d\S* times as fast as none .* \d+%\.", said[-1])


def test_a_cache_by_hand_finds_the_same(example, model):
    by_hand = example("efficient_inference").by_hand
    for block in model.blocks:
        block.attention.window = None
    prompts = torch.randint(90, (3, 20))
    found = torch.stack([*by_hand(model, prompts, 30)])
    want = torch.stack([*generate(model, prompts, max_new_tokens=30, temperature=0)])
    assert len(want.unique()) > 10
    assert torch.equal(found, want)


def test_requests_that_come_and_go(example, model):
    batching = example("continuous_batch")
    counts = torch.randint(1, 20, (9, 2)).tolist()
    requests = [(torch.randint(90, (length,)), count) for length, count in counts]
    cache = model.make_cache(3, 40, kind=PagedKVCache, page_size=4, pages=14)
    found = batching.serve(model, requests, cache)
    assert cache.free_pages == cache.pages
    assert sum(map(batching.rows_of, requests)) > 2 * 4 * cache.pages  # each page is used again
    for ours, alone in zip(found, batching.alone(model, requests), strict=True):
        assert torch.equal(ours, alone)
    assert len(torch.cat(found).unique()) > 10
    with pytest.raises(ValueError, match="requests: expected a need of at most 14 pages, got 15"):
        batching.serve(model, [*requests, (torch.zeros(40, dtype=torch.int64), 20)], cache)


def test_long_contexts(example, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    long_context, path = example("long_context"), tmp_path / "plot.png"
    # 10 MB are enough for the second length by hand, but not with backward.
    assert long_context.main(["--quick", "--budget", "0.01", "--out", str(path)]) == 0
    said = capsys.readouterr().out
    shorter, longer = (re.split(r" {2,}", line.strip()) for line in said.splitlines()[1:3])
    assert shorter[0] == "128" and longer[0] == "256"
    assert len(shorter) == 1 + 4 * 2 and len(longer) == 1 + 3 * 2 + 1 and longer[3] == "-"
    hand, fused = (float(x.removesuffix(" MB")) for x in (longer[1], longer[4]))
    assert hand > 2 * fused > 0
    assert "times the memory" in said
    assert path.read_bytes().startswith(b"\x89PNG")


def test_both_attentions_are_the_same(example):
    ways = example("long_context").WAYS
    inputs = torch.randn(3, 1, 8, 33, 64).unbind()
    oracle = ways["by hand"](*(x.double() for x in inputs))
    assert_accurate(ways["fused"](*inputs), oracle, ways["by hand"](*inputs), "out")
