"""What the name "fastattn" and patch promise for models of transformers, beyond the families."""

import copy
import importlib
import inspect
import pickle

import pytest
import torch

pytest.importorskip("transformers", minversion="5")

import transformers
from family_cases import (
    VOCABULARY,
    assert_as_eager,
    families,
    oracle_results,
    padding_mask,
    results,
    text,
)
from family_decoders import MODERN, causal_lm
from family_encoders import BERT, MODERNBERT
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForCausalLM, DataCollatorWithFlattening, StaticCache

from fastattn._ops import attention as ops
from fastattn.integrations import huggingface
from fastattn.integrations.huggingface.adapters import ADAPTERS
from fastattn.testing import randn

huggingface.register()

CONFIG = transformers.PreTrainedConfig
FAMILIES = {family.name: family for family in families()}
TINY_BLOOM = {"vocab_size": VOCABULARY, "hidden_size": 32, "n_layer": 2, "n_head": 4}


def built(name="LLaMA (GQA)", implementation="fastattn"):
    model = FAMILIES[name].build()
    model.set_attn_implementation(implementation)
    return model


@pytest.fixture
def calls(monkeypatch):
    """How often the attention of fastattn ran."""
    counted = []
    for name in ("attend", "attend_plain"):
        function = getattr(ops, name)

        def counting(*given, function=function, **named):
            counted.append(function.__name__)
            return function(*given, **named)

        monkeypatch.setattr(ops, name, counting)
    return counted


# The weights.

# Where padding on the right and a window meet, rows of padding see nothing.
WITH_WEIGHTS = {
    "BERT": ("left", 2),
    "GPT-2": ("right", 2),
    "LLaMA (GQA)": ("right", 2),
    "Gemma2": ("none", 2),
    "gpt-oss": ("none", 2),
    "DeepSeek-V3": ("right", 2),
    "T5": ("right", 6),
    "BART": ("right", 6),
    "ViT": ("none", 2),
    "Swin": ("none", 2),
    "Whisper": ("right", 6),
}


@pytest.mark.parametrize("name", WITH_WEIGHTS)
def test_weights_and_their_gradients_are_those_of_eager(name, calls):
    padding, count = WITH_WEIGHTS[name]
    inputs = FAMILIES[name].inputs(padding)
    plain = built(name)(**inputs)
    inputs["output_attentions"] = True
    outputs = built(name)(**inputs)
    kinds = [kind for kind in outputs if kind.endswith("attentions")]
    weights = [x for kind in kinds for x in outputs[kind]]
    assert len(weights) == count
    assert not any(plain.get(kind) for kind in kinds)
    sums = torch.cat([x.sum(-1).flatten() for x in weights])
    if name == "gpt-oss":
        assert sums.min() > 0 and sums.max() < 1
    else:
        torch.testing.assert_close(sums, torch.ones_like(sums))
    actual, eager, oracle = (built(name, way) for way in ("fastattn", "eager", "eager"))
    oracle = oracle_results(oracle, inputs)
    assert_as_eager(results(actual, inputs), oracle, results(eager, inputs), torch.float32)


def test_weights_are_before_dropout():
    model = causal_lm("Llama", **MODERN, attention_dropout=0.5)
    model.set_attn_implementation("fastattn")
    want = model(**text("none"), output_attentions=True).attentions[0]
    got = model.train()(**text("none"), output_attentions=True).attentions[0]
    assert torch.equal(got, want)


# The name.


def test_a_saved_model_is_loaded_with_the_name(tmp_path, calls):
    model = built(implementation="eager")
    want = model(**text("left")).logits
    model.set_attn_implementation("fastattn")
    model.save_pretrained(tmp_path)
    named = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="fastattn")
    got = named(**text("left")).logits
    assert len(calls) == 2
    visible = padding_mask("left").bool()
    torch.testing.assert_close(got[visible], want[visible])
    plain = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert plain.config._attn_implementation == "sdpa"


def test_there_and_back(calls):
    model = built(implementation="eager")
    eager = model(**text("left")).logits
    model.set_attn_implementation("fastattn")
    first = model(**text("left")).logits
    count = len(calls)
    model.set_attn_implementation("eager")
    assert torch.equal(model(**text("left")).logits, eager)
    assert len(calls) == count
    model.set_attn_implementation("fastattn")
    assert torch.equal(model(**text("left")).logits, first)


def test_one_tower_alone(calls):
    model = built("LLaVA", "eager")
    model.set_attn_implementation({"text_config": "fastattn"})
    model(**FAMILIES["LLaVA"].inputs("none"))
    assert len(calls) == MODERN["num_hidden_layers"]
    assert model.config.vision_config._attn_implementation == "eager"


IGNORED = r'attn_implementation: "fastattn" would be ignored by Bloom.*huggingface\.patch\(model\)'


def test_a_model_that_ignores_the_name_says_so():
    config = transformers.BloomConfig(**TINY_BLOOM)
    with pytest.raises(ValueError, match=IGNORED):
        AutoModelForCausalLM.from_config(config, attn_implementation="fastattn")
    model = bloom()
    with pytest.raises(ValueError, match=IGNORED):
        model.set_attn_implementation("fastattn")
    assert model.config._attn_implementation != "fastattn"


# Generation.

GENERATION = {
    "beams": {"num_beams": 3, "do_sample": False},
    "samples": {"do_sample": True, "top_k": 20, "top_p": 0.9, "temperature": 0.8},
    "sampled beams": {"num_beams": 2, "do_sample": True},
    "prompt lookup": {"prompt_lookup_num_tokens": 2, "do_sample": False},
    "no cache": {"do_sample": False, "use_cache": False},
}


@pytest.mark.parametrize("how", GENERATION)
@pytest.mark.parametrize("name", ["LLaMA (GQA)", "Gemma2", "BART"])
def test_generation(name, how):
    if how == "prompt lookup":
        inputs = {n: x[:1] for n, x in FAMILIES[name].inputs("none").items()}
    else:
        inputs = FAMILIES[name].inputs("left")
    found = []
    for implementation in ("eager", "fastattn"):
        torch.manual_seed(3)
        model = built(name, implementation)
        found.append(model.generate(**inputs, max_new_tokens=8, **GENERATION[how]))
    assert torch.equal(*found)


def test_a_helper_that_drafts():
    inputs = {"input_ids": text("none")["input_ids"][:1], "do_sample": False}
    drafts = {"assistant_model": causal_lm("Llama", seed=1, **MODERN)}
    drafts["assistant_model"].set_attn_implementation("fastattn")
    got = built().generate(**inputs, max_new_tokens=8, **drafts)
    assert torch.equal(got, built(implementation="eager").generate(**inputs, max_new_tokens=8))


@pytest.mark.parametrize("name", ["LLaMA (GQA)", "Mistral", "gpt-oss", "Llama 4"])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("padding", ["none", "left"])
def test_a_prompt_in_parts(name, cache, padding):
    """5, 1 and 6 rows, to a cache that has room for more."""
    inputs = text(padding)
    whole = built(name, "eager")(**inputs, use_cache=False).logits
    model, mask = built(name), inputs.get("attention_mask")
    held = StaticCache(model.config, max_cache_len=20) if cache == "static" else None
    found = []
    for begin, end in ((0, 5), (5, 6), (6, 12)):
        part = {} if mask is None else {"attention_mask": mask[:, :end]}
        ids = inputs["input_ids"][:, begin:end]
        with torch.no_grad():
            outputs = model(ids, past_key_values=held, use_cache=True, **part)
        held = outputs.past_key_values
        found.append(outputs.logits)
    visible = padding_mask("left").bool() if padding == "left" else slice(None)
    torch.testing.assert_close(torch.cat(found, 1)[visible], whole[visible], atol=1e-4, rtol=1e-4)


# Packed sequences.

LENGTHS = (5, 1, 6)


def flattened():
    rows = text("none")["input_ids"][:, :6]
    sequences = [row[:n].tolist() for row, n in zip(rows, LENGTHS, strict=True)]
    collator = DataCollatorWithFlattening(return_flash_attn_kwargs=True)
    return sequences, dict(collator([{"input_ids": x} for x in sequences]))


def modernbert(implementation):
    config = transformers.ModernBertConfig(**(BERT | MODERNBERT))
    torch.manual_seed(0)
    model = transformers.ModernBertModel._from_config(config, attn_implementation=implementation)
    return model.eval()


@pytest.mark.parametrize("name", ["LLaMA (GQA)", "Mistral", "gpt-oss", "ModernBERT"])
@pytest.mark.parametrize("positions", [True, False])
@pytest.mark.parametrize("weights", [False, True])
def test_packed_sequences_are_apart(name, positions, weights):
    """Rotary positions are relative, so that those of the batch do as well."""
    sequences, packed = flattened()
    packed.pop("labels")
    if not positions:
        packed.pop("position_ids")
    with torch.no_grad():
        got = built(name)(**packed, output_attentions=weights)
        want = [built(name, "eager")(torch.tensor([x])) for x in sequences]
    torch.testing.assert_close(got[0][0], torch.cat([x[0][0] for x in want]), atol=1e-4, rtol=1e-4)
    if weights:
        begin = torch.tensor(LENGTHS).cumsum(0) - torch.tensor(LENGTHS)
        for b, n in zip(begin.tolist(), LENGTHS, strict=True):
            rows = got.attentions[0][0, :, b : b + n]
            assert not torch.cat([rows[..., :b], rows[..., b + n :]], -1).any()


def heads(batch, length, count=4, seed=0):
    return randn(batch, count, length, 8, seed=seed)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("window", [None, 1, 3])
def test_packed_rows_without_a_mask(causal, biased, window):
    """The window is then the attention's own: the diagonal counts."""
    query, key, value = heads(1, 12, seed=1), heads(1, 12, 2, seed=2), heads(1, 12, 2, seed=3)
    bounds = torch.tensor([0, 5, 6, 12], dtype=torch.int32)
    bias = {"position_bias": randn(1, 4, 12, 12, seed=4)} if biased else {}
    options = bias | {"is_causal": causal}
    packed = {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "sliding_window": window}
    sequence = torch.arange(3).repeat_interleave(torch.tensor(LENGTHS))
    distance = torch.arange(12)[:, None] - torch.arange(12)
    seen = sequence[:, None] == sequence
    if causal:
        seen &= distance >= 0
    if window is not None:
        seen &= distance.abs() < window
    module = torch.nn.Identity()
    got, _ = huggingface.attention_forward(module, query, key, value, None, **options, **packed)
    want, _ = huggingface.attention_forward(module, query, key, value, seen[None, None], **options)
    torch.testing.assert_close(got, want)


# What is refused, and what is not.


@pytest.mark.parametrize("name", ["indices", "block_indices", "block_table", "cache"])
def test_what_would_be_lost_is_refused(name):
    x = heads(1, 3)
    with pytest.raises(ValueError, match=f"{name}: expected None.* got Tensor from Identity"):
        huggingface.attention_forward(torch.nn.Identity(), x, x, x, None, **{name: torch.ones(1)})


def test_weights_on_cuda_are_refused():
    with FakeTensorMode():
        x = torch.empty(1, 4, 3, 8, device="cuda")
    asked = {"is_causal": False, "output_attentions": True}
    with pytest.raises(ValueError, match=r"^output_attentions: expected False on cuda:0"):
        huggingface.attention_forward(torch.nn.Identity(), x, x, x, None, **asked)


def test_continuous_batching_is_refused():
    with pytest.raises(ValueError, match="fastattn is not supported for continuous batching"):
        built().generate_batch(inputs=[[5, 6, 7], [8, 9]])


@pytest.mark.parametrize("queries, keys", [(1, 3), (3, 1)])
@pytest.mark.parametrize("masked", [False, True])
def test_a_batch_of_one_counts_for_all(queries, keys, masked):
    given = [heads(queries, 5, seed=1), heads(keys, 7, 2, seed=2), heads(keys, 7, 2, seed=3)]
    given = [x.requires_grad_() for x in given]
    mask = randn(3, 1, 5, 7, seed=4) > -0.5 if masked else None

    def found(expanded):
        sides = [x.expand(3, -1, -1, -1) for x in given] if expanded else given
        module = torch.nn.Identity()
        out, _ = huggingface.attention_forward(module, *sides, mask, is_causal=False)
        return out, *torch.autograd.grad(out.square().sum(), given)

    for got, want in zip(found(False), found(True), strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("adapter", sorted(set(ADAPTERS.values())))
def test_adapters_take_each_argument_by_name(adapter):
    """One that is renamed by a new version of transformers would be lost among the others."""

    def names(cls):
        parameters = inspect.signature(cls.forward).parameters.values()
        return {x.name for x in parameters if x.kind is x.POSITIONAL_OR_KEYWORD}

    for source, ours in importlib.import_module(adapter).REPLACEMENTS.items():
        assert names(source) <= names(ours), source


# Patch and unpatch.


def state(model):
    return [(n, type(m), getattr(m, "config", None)) for n, m in model.named_modules()], [
        m.config._attn_implementation for m in model.modules() if hasattr(m, "config")
    ]


def bloom():
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(transformers.BloomConfig(**TINY_BLOOM)).eval()


@pytest.mark.parametrize("build", [bloom, lambda: built("LLaVA", "eager")], ids=["BLOOM", "LLaVA"])
def test_unpatch_restores(build):
    model = build()
    before = state(model)
    model, first = huggingface.patch(model)
    assert model.config._attn_implementation == "fastattn"
    assert first.replaced and not first.kept
    patched = state(model)
    huggingface.patch(model)
    assert state(model) == patched
    assert state(huggingface.unpatch(model)) == before
    with pytest.raises(ValueError, match="model: expected one that patch returned"):
        huggingface.unpatch(model)
    huggingface.patch(model)
    assert state(model) == patched


@pytest.mark.parametrize("build", [bloom, lambda: causal_lm("Llama", **MODERN)])
@pytest.mark.parametrize("through", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_stay_patched(build, through, calls):
    model, _ = huggingface.patch(build())
    want = model(**text("left")).logits
    twin = through(model)
    calls.clear()
    assert torch.equal(twin(**text("left")).logits, want)
    assert calls
    huggingface.unpatch(twin)
    calls.clear()
    twin(**text("left"))
    assert not calls
    model(**text("left"))
    assert calls


def configs(model):
    return [m.config for m in model.modules() if isinstance(getattr(m, "config", None), CONFIG)]


@pytest.mark.parametrize("name", ["LLaMA (GQA)", "LLaVA", "BLOOM", "T5"])
def test_models_of_the_same_config_keep_their_attention(name, calls):
    first = FAMILIES[name].build()
    config, inputs = first.config, FAMILIES[name].inputs("none")
    want = first(**inputs)[0]
    huggingface.patch(first)
    second = type(first)._from_config(config, attn_implementation="eager").eval()
    second.load_state_dict(first.state_dict())
    assert torch.equal(second(**inputs)[0], want) and not calls
    torch.testing.assert_close(first(**inputs)[0], want, atol=1e-4, rtol=1e-4)
    assert calls and {x._attn_implementation for x in configs(first)} == {"fastattn"}


@pytest.mark.parametrize("name", ["LLaMA (GQA)", "LLaVA"])
def test_a_patched_model_has_one_config(name, tmp_path):
    """Whoever changes it changes it for all parts, and it is what is saved."""
    model = FAMILIES[name].build()
    before, config = [id(x) for x in configs(model)], model.config
    huggingface.patch(model)
    after = [id(x) for x in configs(model)]
    assert not set(before) & set(after)
    assert len(set(zip(before, after, strict=True))) == len(set(before)) == len(set(after))
    text_config = model.config.get_text_config()
    assert any(x is text_config for x in configs(model))
    assert model.config.to_dict() == config.to_dict()
    model.resize_token_embeddings(VOCABULARY + 5)
    huggingface.unpatch(model)
    assert text_config.vocab_size == VOCABULARY + 5
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert loaded.get_input_embeddings().weight.equal(model.get_input_embeddings().weight)


def test_a_wrapped_model_has_one_config():
    peft = pytest.importorskip("peft")
    lora = peft.LoraConfig(target_modules=["q_proj"], r=2)
    model = peft.get_peft_model(causal_lm("Llama", **MODERN), lora)
    huggingface.patch(model)
    assert model.config is model.get_base_model().config is model.get_base_model().model.config
    assert model.config._attn_implementation == "fastattn"


def unknown():
    config = transformers.XLNetConfig(
        vocab_size=VOCABULARY, d_model=32, n_layer=1, n_head=4, d_inner=48
    )
    return transformers.XLNetModel(config)


def test_attention_that_would_stay_is_refused():
    model = unknown()
    before = state(model)
    with pytest.raises(ValueError, match=r"got .*XLNetRelativeAttention \(layer.0.rel_attn\)"):
        huggingface.patch(model)
    assert state(model) == before and not hasattr(model, "_fastattn_before")
    _, report = huggingface.patch(model, strict=False)
    assert [entry.paths for entry in report.kept] == [("layer.0.rel_attn",)]
    assert not report.replaced


def test_patch_takes_modules():
    with pytest.raises(TypeError, match=r"model: expected a torch.nn.Module, got str"):
        huggingface.patch("gpt2")
    holder = torch.nn.ModuleDict({"llama": causal_lm("Llama", **MODERN), "head": torch.nn.ReLU()})
    _, report = huggingface.patch(holder)
    assert report.replaced[0].paths[0] == "llama.model.layers.0.self_attn"
    assert holder["llama"].config._attn_implementation == "fastattn"
