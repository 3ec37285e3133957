"""Fused norms, activations, rotary embedding and linear layers in models of transformers."""

import copy
import pickle

import pytest
import torch

pytest.importorskip("transformers", minversion="5")

import transformers
from family_cases import assert_as_eager, families, oracle_results, results, text
from family_decoders import MODERN, causal_lm

from fastattn.integrations import huggingface
from fastattn.testing import assert_accurate

FAMILIES = {family.name: family for family in families() if family.way != "nn"}
ALL = {"norms": True, "activations": True, "rotary": True, "linears": True}
CASES = [(name, dtype) for name, family in FAMILIES.items() for dtype in family.dtypes]


@pytest.mark.parametrize("name, dtype", CASES, ids=[f"{n}-{str(d)[6:]}" for n, d in CASES])
def test_families_keep_their_results(name, dtype):
    family = FAMILIES[name]
    inputs = family.inputs("none")
    eager = results(family.build().to(dtype), inputs)
    model, _ = huggingface.patch(family.build().to(dtype), **ALL)
    actual = results(model, inputs)
    oracle = oracle_results(family.build().to(dtype), inputs)
    assert_as_eager(actual, oracle, eager, dtype)
    again = results(huggingface.unpatch(model), inputs)
    assert all(torch.equal(again[n], x) for n, x in eager.items())


def replaced(report):
    """By the names of classes alone."""
    return {
        entry.source.rpartition(".")[2]: entry.target.rpartition(".")[2]
        for entry in report.replaced
        if "implementation" not in entry.target
    }


LLAMA_LIKE = ("RMSNorm", "MLP", "Attention")


@pytest.mark.parametrize(
    "name, parts",
    [
        ("Llama", LLAMA_LIKE),
        ("Gemma", LLAMA_LIKE),
        ("Olmo2", LLAMA_LIKE),
        ("Qwen3", LLAMA_LIKE),
        ("Phi3", LLAMA_LIKE),
        ("Glm", LLAMA_LIKE),
        ("Cohere", ("LayerNorm", "MLP", "Attention")),
    ],
)
def test_what_is_replaced(name, parts):
    config = getattr(transformers, f"{name}Config")(**MODERN)
    model = transformers.AutoModelForCausalLM.from_config(config)
    _, report = huggingface.patch(model, **ALL)
    found = replaced(report)
    for part in parts:
        assert found[f"{name}{part}"] == f"Fused{name}{part}"


def test_bert_gets_the_bias_and_the_activation_in_one_pass():
    config = transformers.BertConfig(hidden_size=32, intermediate_size=48, num_attention_heads=4)
    _, report = huggingface.patch(transformers.BertModel(config), **ALL)
    found = replaced(report)
    assert found["BertIntermediate"] == "FusedBertIntermediate"
    assert found["LayerNorm"] == "LayerNorm"


@pytest.mark.parametrize("option", ALL)
def test_only_what_is_asked_for_is_replaced(option):
    _, report = huggingface.patch(causal_lm("Llama", **MODERN), attention=False, **{option: True})
    counts = {"norms": 1, "activations": 2, "rotary": 1, "linears": 1}
    assert len(report.replaced) == counts[option]
    named = "nn.Linear" if option == "linears" else option
    assert all(named in entry.target for entry in report.replaced)


def test_projections_of_either_orientation_are_one_product_in_decoding():
    small = {"vocab_size": 99, "n_embd": 32, "n_layer": 2, "n_head": 4, "eos_token_id": None}
    gpt2 = transformers.GPT2LMHeadModel(transformers.GPT2Config(**small, bos_token_id=None))
    for model in (gpt2, causal_lm("Llama", **MODERN)):
        model.eval().bfloat16()
        projections = [m for m in model.modules() if type(m).__name__ in ("Linear", "Conv1D")]
        tokens = torch.tensor([[5]])
        with torch.no_grad():
            want = copy.deepcopy(model).double()(tokens).logits
            eager = model(tokens).logits
            huggingface.patch(model, linears=True)
            with torch.profiler.profile() as profile:
                actual = model(tokens).logits
        assert_accurate(actual, want, eager, "logits")
        names = {event.key: event.count for event in profile.key_averages()}
        assert names["fastattn::linear"] == len(projections)
        assert not {"aten::linear", "aten::addmm"} & set(names)
    assert type(gpt2.transformer.h[0].mlp.c_fc).__name__ == "FusedConv1D"
    assert type(huggingface.unpatch(gpt2).transformer.h[0].mlp.c_fc).__name__ == "Conv1D"


def test_what_is_kept_says_why():
    config = transformers.CLIPTextConfig(
        hidden_size=32, intermediate_size=48, num_attention_heads=4, num_hidden_layers=1
    )
    assert config.hidden_act == "quick_gelu"
    _, report = huggingface.patch(transformers.CLIPTextModel(config), **ALL)
    reasons = {entry.source.rpartition(".")[2]: entry.reason for entry in report.kept}
    assert reasons == {
        "CLIPMLP": "a feed-forward layer whose activation has no kernel",
        "QuickGELUActivation": "an activation without a kernel",
    }


def test_a_forward_on_the_instance_is_kept():
    model = causal_lm("Llama", **MODERN)
    norm = model.model.norm
    norm.forward = norm.forward
    _, report = huggingface.patch(model, **ALL)
    assert type(norm).__name__ == "LlamaRMSNorm"
    assert [entry.paths for entry in report.kept] == [("model.norm",)]
    bloom = causal_lm("Bloom", vocab_size=99, hidden_size=32, n_layer=1, n_head=4)
    attention = bloom.transformer.h[0].self_attention
    attention.forward = attention.forward
    with pytest.raises(ValueError, match=r"BloomAttention .* strict=False keeps it"):
        huggingface.patch(bloom)
    _, report = huggingface.patch(bloom, strict=False)
    assert report.kept[0].reason == "its forward was replaced on the instance"


def test_copies_and_pickles():
    model, _ = huggingface.patch(causal_lm("Llama", **MODERN), **ALL)
    want = model(**text("none")).logits
    for same in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(same.model.norm) is type(model.model.norm)
        assert torch.equal(same(**text("none")).logits, want)
        assert type(huggingface.unpatch(same).model.norm).__name__ == "LlamaRMSNorm"
    assert type(model.model.norm).__name__ == "FusedLlamaRMSNorm"


def test_classes_stay_what_they_were():
    model, _ = huggingface.patch(causal_lm("Llama", **MODERN), **ALL)
    llama = transformers.models.llama.modeling_llama
    assert isinstance(model.model.norm, llama.LlamaRMSNorm)
    assert isinstance(model.model.layers[0].self_attn, llama.LlamaAttention)
    other, _ = huggingface.patch(causal_lm("Llama", **MODERN), **ALL)
    assert type(other.model.norm) is type(model.model.norm)


def test_a_second_patch_adds_to_the_first():
    model = causal_lm("Llama", **MODERN)
    classes = [type(module) for module in model.modules()]
    huggingface.patch(model)
    huggingface.patch(model, norms=True)
    huggingface.patch(model, **ALL)
    assert type(model.model.layers[0].mlp).__name__ == "FusedLlamaMLP"
    huggingface.unpatch(model)
    assert [type(module) for module in model.modules()] == classes
    assert model.config._attn_implementation == "eager"


def test_compiled():
    model, _ = huggingface.patch(causal_lm("Llama", **MODERN), **ALL)
    inputs = text("none") | {"use_cache": False}
    want = model(**inputs).logits
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(**inputs).logits, want)
