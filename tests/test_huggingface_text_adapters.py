"""Adapters of families of text: what test_families.py does not show."""

import copy

import pytest
import torch

pytest.importorskip("transformers", minversion="5")

import transformers
from family_cases import InDouble, text
from family_text_adapters import ENCODER, FAMILIES
from torch import nn
from transformers.models.falcon.modeling_falcon import FalconFlashAttention2
from transformers.models.gpt_neo.modeling_gpt_neo import GPTNeoFlashAttention2
from transformers.models.gptj import modeling_gptj as gptj

from fastattn.integrations.huggingface import patch, unpatch
from fastattn.integrations.huggingface.adapters import ADAPTERS
from fastattn.testing import assert_accurate, randn

BY_NAME = {family.name: family for family in FAMILIES}
# One of each module, and the attribute of its attention that is the dropout of the weights.
DROPOUTS = {
    "DeBERTa": "dropout",
    "DeBERTa-v3": "dropout",
    "MPNet": "dropout",
    "GPT-Neo": "attn_dropout",
    "GPT-J": "attn_dropout",
    "BLOOM": "attention_dropout",
    "Falcon (grouped-query)": "attention_dropout",
    "Falcon (ALiBi)": "attention_dropout",
}
DROPOUTS = {name: x for name, x in DROPOUTS.items() if BY_NAME[name].way == "adapter"}
one_of_each = pytest.mark.parametrize("name", DROPOUTS)


def pair(name):
    """A model, and a copy on fastattn."""
    model = BY_NAME[name].build()
    return model, patch(copy.deepcopy(model))[0]


def inputs(name):
    """Padded, but where a padded row of DeBERTa or of a local window sees no key: transformers'
    weights are arbitrary there."""
    return text("none" if "DeBERTa" in name or name == "GPT-Neo" else "right")


def adapted(model):
    """The attention layers that are ours."""
    return [m for m in model.modules() if type(m).__module__ in ADAPTERS.values()]


def call(model, **given):
    with torch.no_grad():
        return model(**given)


@pytest.mark.parametrize("name", [name for name in DROPOUTS if name != "Falcon (ALiBi)"])
def test_weights_are_those_of_eager_and_outputs_stay(name):
    model, ours = pair(name)
    given = inputs(name)
    with InDouble():
        want = call(model.double(), **given, output_attentions=True).attentions
        outputs = call(ours.double(), **given, output_attentions=True)
        plain = call(ours, **given)
    assert len(outputs.attentions) == len(want) == 2
    for i, weights in enumerate(outputs.attentions):
        assert_accurate(weights, want[i], want[i], f"layer {i}")
    assert torch.equal(outputs[0], plain[0])
    assert "attentions" not in plain


def test_falcon_alibi_weights_give_its_outputs():
    """Against its formula: transformers' own weights have the biases twice."""
    model, ours = pair("Falcon (ALiBi)")
    given = text("right")
    seen = {}
    for path, layer in model.named_modules():
        if path.endswith("self_attention.dense"):
            layer.register_forward_pre_hook(lambda _, x: seen.setdefault("merged", x[0]))
        if path.endswith("self_attention.query_key_value"):
            layer.register_forward_hook(lambda _, __, out: seen.setdefault("fused", out))
    call(model, **given)
    weights = call(ours, **given, output_attentions=True).attentions[0]
    assert torch.allclose(weights.sum(-1), torch.ones(()))
    value = seen["fused"].unflatten(-1, (4, 3, 8))[..., 2, :].transpose(1, 2)
    merged = (weights @ value).transpose(1, 2).flatten(2)
    torch.testing.assert_close(merged, seen["merged"])


def attention_call(name):
    """The first attention layer of a model and the one that is ours, without any dropout, and the
    call of each with what the model gives it."""
    model, ours = pair(name)
    layer = adapted(ours)[0]
    path = next(path for path, module in ours.named_modules() if module is layer)
    theirs, seen = model.get_submodule(path), []

    def note(_, args, kwargs):
        seen.append((args, kwargs))

    handles = [x.register_forward_pre_hook(note, with_kwargs=True) for x in (theirs, layer)]
    for x in (model, ours):
        cached = {"use_cache": False} if BY_NAME[name].kind == "decoder" else {}
        call(x, **inputs(name), **cached)
    for handle in handles:
        handle.remove()
    for x in (theirs, layer):
        for part in x.modules():
            if isinstance(part, nn.Dropout):
                part.p = 0.0
    calls = []
    for x, (args, kwargs) in zip((theirs, layer), seen):

        def run(x=x, args=args, kwargs=kwargs):
            with torch.no_grad():
                return x(*args, **kwargs)[0]

        calls.append(run)
    return theirs, layer, *calls


@one_of_each
def test_attention_drops_weights_in_training(name):
    """The output is linear in the weights, and so its mean over masks is what evaluation gives."""
    _, layer, _, run = attention_call(name)
    whole = run()
    getattr(layer, DROPOUTS[name]).p = 0.5
    assert torch.equal(run(), whole)
    layer.train()
    torch.manual_seed(0)
    draws = torch.stack([run() for _ in range(400)]).double()
    if name == "Falcon (grouped-query)":  # transformers drops nothing beside rotary embedding
        assert (draws == whole).all()
        return
    assert (draws.std(0) > 0).any()
    error = draws.std(0) / 400**0.5
    assert ((draws.mean(0) - whole).abs() <= 5 * error + 1e-6).all()
    torch.manual_seed(0)
    assert torch.equal(run().double(), draws[0])


@one_of_each
def test_dropping_all_weights_leaves_what_eager_leaves(name):
    theirs, layer, eager, run = attention_call(name)
    for x in (theirs, layer):
        getattr(x, DROPOUTS[name]).p = 1.0
        x.train()
    torch.testing.assert_close(run(), eager())


@one_of_each
def test_unpatch_gives_the_eager_bits_back(name):
    model = BY_NAME[name].build()
    before = call(model, **inputs(name))[0]
    state = dict(model.state_dict())
    layers = [type(module) for module in model.modules()]
    model, report = patch(model)
    assert sum(len(entry.paths) for entry in report.replaced) == len(adapted(model)) == 2
    patched = call(model, **inputs(name))[0]
    model, again = patch(model)
    assert not any("adapters" in entry.target for entry in again.replaced)
    assert torch.equal(call(model, **inputs(name))[0], patched)
    after = model.state_dict()
    assert after.keys() == state.keys()
    assert all(after[key].data_ptr() == x.data_ptr() for key, x in state.items())
    unpatch(model)
    assert [type(module) for module in model.modules()] == layers
    assert torch.equal(call(model, **inputs(name))[0], before)


@pytest.mark.parametrize("name, cache", [(f.name, c) for f in FAMILIES for c in f.caches])
def test_a_cache_is_filled_in_parts(name, cache):
    model, ours = pair(name)
    ids = text("none")["input_ids"]
    eager = call(model, input_ids=ids).logits
    with InDouble():
        oracle = call(model.double(), input_ids=ids).logits
    kept = (
        transformers.DynamicCache(config=ours.config)
        if cache == "dynamic"
        else transformers.StaticCache(config=ours.config, max_cache_len=20)
    )
    parts = [
        call(ours, input_ids=part, past_key_values=kept).logits
        for part in ids.split((6, 1, 4, 1), dim=1)
    ]
    assert_accurate(torch.cat(parts, dim=1), oracle, eager, name)


def test_falcon_caches_the_heads_of_keys_that_it_has():
    ours = pair("Falcon (grouped-query)")[1]
    cache = call(ours, **text("none")).past_key_values
    assert cache.layers[0].keys.shape == (3, 2, 12, 8)


@pytest.mark.parametrize("name", [name for name in DROPOUTS if name != "DeBERTa"])
def test_compiled_in_one_graph(name):
    """Not DeBERTa before v2: transformers' bias cuts its table by numbers that it makes tensors."""
    ours = pair(name)[1]
    given = inputs(name) | ({"use_cache": False} if BY_NAME[name].kind == "decoder" else {})
    want = ours(**given)[0]
    want.square().sum().backward()
    wanted = {key: p.grad.clone() for key, p in ours.named_parameters() if p.grad is not None}
    ours.zero_grad()
    got = torch.compile(ours, backend="aot_eager", fullgraph=True)(**given)[0]
    torch.testing.assert_close(got, want)
    got.square().sum().backward()
    for key, parameter in ours.named_parameters():
        if key in wanted:
            torch.testing.assert_close(parameter.grad, wanted[key], atol=1e-4, rtol=1e-4)


@one_of_each
def test_autocast(name):
    ours = pair(name)[1]
    with torch.autocast("cpu", torch.bfloat16):
        out = ours(**inputs(name))[0]
        out.float().square().sum().backward()
    assert all(p.grad.isfinite().all() for p in ours.parameters() if p.grad is not None)


def test_talking_heads_are_refused():
    model = transformers.DebertaModel(transformers.DebertaConfig(**ENCODER, talking_head=True))
    with pytest.raises(ValueError, match="talking_head: expected False"):
        patch(model)[0](**text("none"))


def test_deberta_attends_from_other_states():
    model, ours = pair("DeBERTa-v3")
    encoder, layer = model.encoder, adapted(ours)[0]
    theirs, states, others = encoder.layer[0].attention.self, *randn(2, 3, 7, 32, seed=0)
    given = {"attention_mask": torch.ones(3, 1, 7, 7), "query_states": others}
    given |= {"hidden_states": states}
    eager = call(theirs, **given, **relative(encoder))[0]
    got = call(layer, **given, **relative(encoder))[0]
    with InDouble():
        encoder.double()
        given = {name: x.double() for name, x in given.items()}
        oracle = call(theirs, **given, **relative(encoder))[0]
    assert_accurate(got, oracle, eager, "DeBERTa-v3")


def relative(encoder):
    positions = encoder.get_rel_pos(torch.empty(3, 7, 32))
    return {"relative_pos": positions, "rel_embeddings": encoder.get_rel_embedding()}


def test_deberta_attends_from_other_states_before_v2():
    """transformers' own code for it raises: the same states must give what none gives."""
    layer = adapted(pair("DeBERTa")[1])[0]
    states, others = randn(2, 3, 7, 32, seed=0)
    mask = torch.ones(3, 1, 7, 7)
    plain = call(layer, hidden_states=states, attention_mask=mask)[0]
    same, other = (
        call(layer, hidden_states=states, attention_mask=mask, query_states=x)[0]
        for x in (states, others)
    )
    assert torch.equal(same, plain)
    assert not torch.equal(other, plain)


def test_bloom_sums_parts_in_order():
    _, layer, _, run = attention_call("BLOOM")
    whole = run()
    layer.pretraining_tp, layer.slow_but_exact = 2, True
    torch.testing.assert_close(run(), whole - layer.dense.bias)


@pytest.mark.parametrize(
    "name, of_flash",
    [
        ("GPT-Neo", GPTNeoFlashAttention2),
        ("Falcon (grouped-query)", FalconFlashAttention2),
        *([("GPT-J", gptj.GPTJFlashAttention2)] if "GPT-J" in DROPOUTS else []),
    ],
)
def test_layers_of_models_loaded_with_flash_attn(name, of_flash):
    """Their layers have a class of their own; the rest of such a model is as any other."""
    model, ours = pair(name)
    layers = [m for m in model.modules() if type(m) is of_flash.__mro__[1]]
    for layer in layers:
        layer.__class__ = of_flash
    patched = patch(model)[0]
    assert all(isinstance(layer, of_flash) for layer in adapted(patched))
    assert torch.equal(call(patched, **inputs(name))[0], call(ours, **inputs(name))[0])
    unpatch(patched)
    assert all(type(layer) is of_flash for layer in layers)
