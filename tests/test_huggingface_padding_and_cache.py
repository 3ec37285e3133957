"""Encoders without their padding, and caches that grow in place."""

import copy

import pytest
import torch

pytest.importorskip("transformers", minversion="5")

import transformers
from family_cases import assert_as_eager, oracle_results, padding_mask, randomise, results, text
from family_decoders import MODERN, causal_lm

from fastattn.integrations import huggingface
from fastattn.testing import randn


def encoder(name="Bert", **config):
    made = getattr(transformers, f"{name}Config")(
        vocab_size=99,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        pad_token_id=0,
        **config,
    )
    return randomise(transformers.AutoModel.from_config(made, attn_implementation="eager"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("padding", ["right", "left"])
@pytest.mark.parametrize("name", ["Bert", "Roberta", "XLMRoberta", "Electra", "Camembert"])
def test_an_encoder_without_its_padding(name, padding, dtype):
    inputs = text(padding)
    eager_model, oracle_model = encoder(name).to(dtype), encoder(name).to(dtype)
    model, report = huggingface.patch(encoder(name).to(dtype), unpad=True)
    for each in (eager_model, oracle_model, model):
        each.pooler = None  # it reads the first row, which is padding on the left
    assert any(entry.target.endswith(f"Fused{name}Encoder") for entry in report.replaced)
    seen = []
    model.encoder.layer[0].register_forward_pre_hook(lambda _, args: seen.append(args[0].shape))
    actual = results(model, inputs)
    assert seen == [(1, int(padding_mask(padding).sum()), 32)]
    eager = results(eager_model, inputs)
    oracle = oracle_results(oracle_model, inputs)
    assert_as_eager(actual, oracle, eager, dtype)


@pytest.mark.parametrize("asked", ["output_hidden_states", "output_attentions"])
def test_what_layers_report_has_all_rows(asked):
    model, _ = huggingface.patch(encoder(), unpad=True)
    inputs = text("right") | {asked: True}
    want = getattr(encoder()(**inputs), asked.removeprefix("output_"))
    got = getattr(model(**inputs), asked.removeprefix("output_"))
    assert [x.shape for x in got] == [x.shape for x in want]


def test_padding_rows_are_zero_and_other_masks_are_kept():
    model, _ = huggingface.patch(encoder(), unpad=True)
    mask = padding_mask("right")
    out = model(**text("right")).last_hidden_state
    assert (out[~mask.bool()] == 0).all()
    visible = torch.ones(3, 1, 12, 12, dtype=torch.bool).tril()  # no padding: a mask of its own
    got = model(input_ids=text("none")["input_ids"], attention_mask=visible).last_hidden_state
    plain, _ = huggingface.patch(encoder())
    want = plain(input_ids=text("none")["input_ids"], attention_mask=visible).last_hidden_state
    assert torch.equal(got, want)


def test_a_compiled_encoder_keeps_its_padding():
    model, _ = huggingface.patch(encoder(), unpad=True)
    mask = padding_mask("right").bool()
    want = model(**text("right")).last_hidden_state
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    got = compiled(**text("right")).last_hidden_state
    torch.testing.assert_close(got[mask], want[mask])


def test_an_encoder_with_keys_before_its_own_keeps_its_padding():
    """As in prefix tuning: the mask has those keys too."""
    models = [huggingface.patch(encoder(), unpad=unpad)[0] for unpad in (True, False)]
    mask = torch.cat((torch.ones(3, 4).long(), padding_mask("right")), 1)
    outputs = []
    for model in models:
        prefix = transformers.DynamicCache(config=model.config)
        for layer in range(2):
            prefix.update(randn(3, 4, 4, 8, seed=layer), randn(3, 4, 4, 8, seed=9 + layer), layer)
        inputs = text("none") | {"attention_mask": mask, "past_key_values": prefix}
        outputs.append(model(**inputs).last_hidden_state)
    assert torch.equal(*outputs)
    assert not torch.equal(outputs[0], models[0](**text("right")).last_hidden_state)


def test_unpadding_needs_attention():
    with pytest.raises(ValueError, match=r"^unpad: expected attention=True"):
        huggingface.patch(encoder(), attention=False, unpad=True)


def rows(length, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, 3, length, 4, generator=generator)


def filled(cache, lengths):
    """The cache after updates of these lengths, and what it returned last."""
    for i, length in enumerate(lengths):
        out = cache.update(rows(length, i), rows(length, 100 + i), 0)
    return out


CONFIG = transformers.LlamaConfig(**MODERN)


@pytest.mark.parametrize(
    "lengths", [(1,), (5, 1, 1), (0, 3), (64, 1), (63, 2), (100, 1, 70, 1), (1,) * 70]
)
def test_a_growing_cache_holds_what_a_dynamic_one_does(lengths):
    ours, theirs = huggingface.growing_cache(CONFIG), transformers.DynamicCache(config=CONFIG)
    for got, want in zip(filled(ours, lengths), filled(theirs, lengths), strict=True):
        assert torch.equal(got, want)
    assert ours.get_seq_length() == theirs.get_seq_length() == sum(lengths)


def test_a_token_is_written_in_place():
    cache = huggingface.growing_cache(CONFIG)
    keys, _ = filled(cache, (9,))
    longer, _ = filled(cache, (1,))
    assert longer.data_ptr() == keys.data_ptr() and longer.shape[-2] == 10
    assert torch.equal(keys, rows(9, 0))


@pytest.mark.parametrize(
    "change",
    [
        lambda cache: cache.crop(-3),
        lambda cache: cache.reorder_cache(torch.tensor([1, 0])),
        lambda cache: cache.batch_repeat_interleave(2),
        lambda cache: cache.batch_select_indices(torch.tensor([1])),
        lambda cache: cache.reset(),
    ],
    ids=["crop", "reorder", "repeat", "select", "reset"],
)
def test_what_transformers_does_to_a_cache(change):
    ours, theirs = huggingface.growing_cache(CONFIG), transformers.DynamicCache(config=CONFIG)
    for cache in (ours, theirs):
        filled(cache, (9, 1))
        change(cache)
    caches = [ours, copy.deepcopy(ours), theirs]
    for cache in caches:
        batch = cache.layers[0].keys.shape[0] if cache.get_seq_length() else 2
        new = rows(2, 7)[:1].repeat(batch, 1, 1, 1)
        cache.update(new, -new, 0)
    *got, want = (cache.layers[0] for cache in caches)
    for layer in got:
        assert torch.equal(layer.keys, want.keys) and torch.equal(layer.values, want.values)


def test_what_a_copy_writes_stays_with_it():
    cache = huggingface.growing_cache(CONFIG)
    filled(cache, (9,))
    other = copy.deepcopy(cache)
    cache.update(rows(1, 5), rows(1, 5), 0)
    other.update(rows(1, 6), rows(1, 6), 0)
    assert torch.equal(cache.layers[0].keys[..., 9:, :], rows(1, 5))
    assert torch.equal(other.layers[0].keys[..., 9:, :], rows(1, 6))


def test_gradients_go_through_a_cache():
    cache = huggingface.growing_cache(CONFIG)
    first, second = (rows(3, seed).requires_grad_() for seed in (1, 2))
    cache.update(first, first.detach(), 0)
    keys, _ = cache.update(second, second.detach(), 0)
    keys.sum().backward()
    assert (first.grad == 1).all() and (second.grad == 1).all()


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
def test_generation(options):
    model, _ = huggingface.patch(causal_lm("Llama", **MODERN))
    inputs = text("left") | {"do_sample": False, "max_new_tokens": 70, "min_new_tokens": 70}
    want = model.generate(**inputs, **options)
    got = model.generate(
        **inputs, **options, past_key_values=huggingface.growing_cache(model.config)
    )
    assert torch.equal(got, want)


def test_sliding_layers_stay_as_they_are():
    config = transformers.Gemma2Config(**MODERN, sliding_window=4)
    kinds = [type(layer).__name__ for layer in huggingface.growing_cache(config).layers]
    assert kinds == ["DynamicSlidingWindowLayer", "GrowingLayer"]
