"""The adapters of Swin-v2, SAM, BLIP and WavLM, beyond what test_families.py shows of them."""

import pytest
import torch

pytest.importorskip("transformers", minversion="5")

import transformers
from family_cases import assert_as_eager, oracle_results, padding_mask, results, text
from family_media_adapters import (
    blip,
    captions,
    noise,
    pixels,
    points,
    questions,
    sam,
    sounds,
    swinv2,
    wavlm,
)

from fastattn.integrations.huggingface import patch, register, unpatch
from fastattn.integrations.huggingface.adapters import sam as sam_adapter


def captioner(**changes):
    return blip("BlipForConditionalGeneration", **changes)


MODELS = {
    "Swin-v2": (swinv2, pixels("none", 32)),
    "SAM": (sam, points("none")),
    "BLIP": (captioner, captions("right")),
    "WavLM": (wavlm, sounds("right")),
}

# An attention layer of each family, in a model that drops 0.3 of the weights, and a row for it.
LAYERS = {
    "Swin-v2": (
        lambda: swinv2(attention_probs_dropout_prob=0.3),
        "encoder.layers.0.blocks.0.attention.self",
        noise(1, 16, 16),
    ),
    "SAM": (
        lambda: sam(attention_dropout=0.3),
        "vision_encoder.layers.0.attn",
        noise(1, 4, 4, 32),
    ),
    "BLIP's images": (
        lambda: captioner(of_vision={"attention_dropout": 0.3}),
        "vision_model.encoder.layers.0.self_attn",
        noise(1, 9, 32),
    ),
    "BLIP's texts": (
        lambda: captioner(of_text={"attention_probs_dropout_prob": 0.3}),
        "text_decoder.bert.encoder.layer.0.attention.self",
        noise(1, 9, 32),
    ),
    "WavLM": (
        lambda: wavlm(attention_dropout=0.3),
        "encoder.layers.0.attention",
        noise(1, 9, 32),
    ),
}

each_model = pytest.mark.parametrize("name", MODELS)
each_layer = pytest.mark.parametrize("name", LAYERS)


def in_double(inputs):
    return {n: x.double() if x.is_floating_point() else x for n, x in inputs.items()}


def outputs(model, inputs):
    with torch.no_grad():
        return [x for x in model(**inputs).to_tuple() if isinstance(x, torch.Tensor)]


def assert_same_bits(got, want):
    assert len(got) == len(want) > 0
    assert all(torch.equal(x, y) for x, y in zip(got, want))


def assert_same_weights(got, want, kinds):
    assert got.keys() == want.keys()
    for kind in kinds:
        assert len(got[kind]) == len(want[kind]) > 0
        for mine, theirs in zip(got[kind], want[kind]):
            torch.testing.assert_close(mine, theirs)


@each_model
def test_weights_are_those_of_eager(name):
    build, inputs = MODELS[name]
    inputs = in_double(inputs) | {"output_attentions": True}
    want = build().double()(**inputs)
    got = patch(build().double())[0](**inputs)
    assert_same_weights(got, want, [kind for kind in want if "attentions" in kind])


@pytest.mark.parametrize("is_decoder", [False, True])
def test_weights_of_blip_text_are_those_of_eager(is_decoder):
    image = noise(3, 5, 32).double()
    inputs = text("none") | {"encoder_hidden_states": image, "is_decoder": is_decoder}
    inputs |= {"use_cache": False, "output_attentions": True}
    want = captioner().text_decoder.bert.double()(**inputs)
    got = patch(captioner().text_decoder.bert.double())[0](**inputs)
    assert_same_weights(got, want, ("attentions", "cross_attentions"))
    torch.testing.assert_close(got.last_hidden_state, want.last_hidden_state)


@each_model
def test_patching_changes_no_parameter_and_is_undone(name):
    build, inputs = MODELS[name]
    model = build()
    before, state = outputs(model, inputs), model.state_dict()
    classes = [type(module) for module in model.modules()]

    model, report = patch(model)
    fused = [type(module) for module in model.modules()]
    assert any(".adapters." in entry.target for entry in report.replaced) and not report.kept
    assert all(issubclass(new, old) for new, old in zip(fused, classes))
    assert model.state_dict().keys() == state.keys()
    assert all(x.data_ptr() == state[n].data_ptr() for n, x in model.state_dict().items())

    once = outputs(model, inputs)
    model, report = patch(model)
    assert not any(".adapters." in entry.target for entry in report.replaced)
    assert [type(module) for module in model.modules()] == fused
    assert_same_bits(outputs(model, inputs), once)

    model = unpatch(model)
    assert [type(module) for module in model.modules()] == classes
    assert_same_bits(outputs(model, inputs), before)


@each_model
def test_a_name_alone_is_refused(name):
    register()
    model = MODELS[name][0]()
    with pytest.raises(ValueError, match=r"attn_implementation.*patch\(model\)"):
        model.set_attn_implementation("fastattn")
    with pytest.raises(ValueError, match=r"attn_implementation.*patch\(model\)"):
        type(model)._from_config(model.config, attn_implementation="fastattn")


@each_layer
def test_dropout_is_of_weights_and_in_training_alone(name):
    build, path, row = LAYERS[name]
    layer = patch(build())[0].get_submodule(path)
    rows = row.expand(4000, *row.shape[1:])
    with torch.no_grad():
        want = layer(row)[0].double()
        assert torch.equal(layer(row)[0].double(), want)
        layer.train()
        torch.manual_seed(0)
        drawn = layer(rows)[0].double()
        torch.manual_seed(0)
        assert torch.equal(layer(rows)[0].double(), drawn)
    # A layer is linear in its weights: what it gives is right on the average, and never constant.
    deviation = drawn.std(0)
    assert (deviation > 0).all()
    assert ((drawn.mean(0) - want).abs() < 5 * deviation / len(drawn) ** 0.5).all()


@each_layer
def test_layers_compile_in_one_graph(name):
    build, path, row = LAYERS[name]
    layer = patch(build())[0].get_submodule(path)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    results = []
    for call in (layer, compiled):
        layer.zero_grad()
        x = row.clone().requires_grad_()
        out = call(x)[0]
        out.backward(noise(*out.shape))
        gradients = [p.grad for p in layer.parameters() if p.grad is not None]
        results.append([out.detach(), x.grad, *gradients])
    for got, want in zip(*results):
        torch.testing.assert_close(got, want)


@each_model
def test_autocast(name):
    build, inputs = MODELS[name]
    with torch.autocast("cpu", torch.bfloat16):
        eager, got = (results(model, inputs) for model in (build(), patch(build())[0]))
    assert_as_eager(got, oracle_results(build(), inputs), eager, torch.bfloat16)


@each_model
def test_gradient_checkpointing(name):
    build, inputs = MODELS[name]
    want = results(patch(build())[0], inputs)
    model = patch(build())[0]
    model.gradient_checkpointing_enable()
    for module in model.modules():
        if hasattr(module, "gradient_checkpointing"):
            module.training = True  # of the layer itself: nothing is dropped
    got = results(model, inputs)
    assert got.keys() == want.keys()
    for key, x in want.items():
        torch.testing.assert_close(got[key], x)


def test_swinv2_clamps_the_scale_of_a_head():
    def clamped():
        model = swinv2()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("logit_scale"):
                    parameter[-1] = 5.0
        return model

    inputs = pixels("none", 32)
    eager, got = (results(model, inputs) for model in (clamped(), patch(clamped())[0]))
    assert_as_eager(got, oracle_results(clamped(), inputs), eager, torch.float32)
    scales = [x for name, x in got.items() if name.endswith("logit_scale")]
    assert all(x[-1] == 0 and x[:-1].all() for x in scales)


def test_swinv2_adds_any_mask_twice():
    rows, mask = noise(6, 16, 16).double(), noise(3, 16, 16).double()
    models = [swinv2().double(), patch(swinv2().double())[0]]
    layers = [model.encoder.layers[0].blocks[1].attention.self for model in models]
    want, got = (layer(rows, mask, output_attentions=True) for layer in layers)
    for mine, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_swinv2_pads_images_that_windows_do_not_divide():
    inputs = pixels("none", 40)
    eager, got = (results(model, inputs) for model in (swinv2(), patch(swinv2())[0]))
    assert_as_eager(got, oracle_results(swinv2(), inputs), eager, torch.float32)


@pytest.mark.parametrize("height, width", [(4, 4), (3, 5)])
@pytest.mark.parametrize("largest", [256, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sam_with_and_without_a_bias(height, width, largest, dtype, monkeypatch):
    """A head_dim of 8 leaves no room for the columns that stand for relative positions."""
    monkeypatch.setattr(sam_adapter, "_LARGEST_HEAD_DIM", largest)

    def grown(model, dtype):
        layer = model.vision_encoder.layers[0].attn.to(dtype)
        x = noise(2, height, width, 32).to(dtype).requires_grad_()
        out, _ = layer(x)
        out.backward(noise(*out.shape).to(dtype))
        gradients = {f"d {n}": p.grad for n, p in layer.named_parameters()}
        return {"out": out.detach(), "d x": x.grad} | gradients

    eager, got = grown(sam().to(dtype), dtype), grown(patch(sam().to(dtype))[0], dtype)
    oracle = grown(sam().to(dtype), torch.float64)
    assert_as_eager(got, oracle, eager, dtype)


def test_sam_of_the_implementation_sdpa():
    def loaded():
        model = sam()
        config = model.config
        state = model.state_dict()
        config._attn_implementation = "sdpa"
        model = transformers.SamModel(config).eval()
        model.load_state_dict(state)
        return model

    inputs = points("none")
    before = outputs(loaded(), inputs)
    model, report = patch(loaded())
    assert any("FusedSamVisionSdpaAttention" in str(entry.target) for entry in report.replaced)
    for got, want in zip(outputs(model, inputs), outputs(sam(), inputs)):
        torch.testing.assert_close(got, want)
    assert_same_bits(outputs(unpatch(model), inputs), before)


def test_blip_answers_as_eager():
    options = {"do_sample": False, "max_new_tokens": 8, "min_new_tokens": 8}
    inputs = {n: x for n, x in questions("left").items() if n != "labels"}
    models = [blip("BlipForQuestionAnswering"), patch(blip("BlipForQuestionAnswering"))[0]]
    want, got = (model.generate(**inputs, **options) for model in models)
    assert torch.equal(got, want)


@pytest.mark.parametrize("padding", ["none", "left"])
def test_blip_generates_the_same_without_a_cache(padding):
    options = {"do_sample": False, "max_new_tokens": 8, "min_new_tokens": 8}
    model = patch(captioner())[0]
    cached, computed = (
        model.generate(**captions(padding), **options, use_cache=use) for use in (True, False)
    )
    assert torch.equal(cached, computed)


def test_blip_caches_what_eager_caches():
    image = noise(3, 5, 32).double()
    ids = text("none")["input_ids"]
    models = [captioner().text_decoder.double(), patch(captioner().text_decoder.double())[0]]
    caches = []
    for model in models:
        outputs = model(ids[:, :7], encoder_hidden_states=image, use_cache=True)
        for at in range(7, 10):
            given = {"encoder_hidden_states": image, "past_key_values": outputs.past_key_values}
            outputs = model(ids[:, at : at + 1], use_cache=True, **given)
        caches.append(outputs.past_key_values)
    want, got = caches
    for kind in ("self_attention_cache", "cross_attention_cache"):
        for mine, theirs in zip(getattr(got, kind).layers, getattr(want, kind).layers, strict=True):
            torch.testing.assert_close(mine.keys, theirs.keys)
            torch.testing.assert_close(mine.values, theirs.values)


def test_blip_takes_masks_that_are_added():
    inputs = text("right") | {"is_decoder": True, "use_cache": False}
    visible = padding_mask("right")[:, None, None].bool() & torch.ones(12, 12).tril().bool()
    added = inputs | {"attention_mask": torch.zeros(3, 1, 12, 12).masked_fill(~visible, -1e30)}
    model = patch(captioner().text_decoder.bert)[0]
    (want,), (got,) = outputs(model, inputs), outputs(model, added)
    torch.testing.assert_close(got, want)
