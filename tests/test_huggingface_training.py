"""Models of transformers on fastattn in training and compiled, in 16 bits, with LoRA."""

import pytest
import torch

pytest.importorskip("transformers", minversion="5")

import transformers
from family_cases import assert_as_eager, families, oracle_results, results, text
from family_decoders import MODERN, causal_lm
from family_encoders import BERT

from fastattn.integrations import huggingface

huggingface.register()

FAMILIES = {family.name: family for family in families()}


def built(name, implementation="fastattn"):
    model = FAMILIES[name].build()
    model.set_attn_implementation(implementation)
    return model


@pytest.mark.parametrize("name", ["Llama", "Bert"])
def test_dropout(name):
    def outputs(seed, p):
        model = dropping(name, p)
        torch.manual_seed(seed)
        out = model(**text("right"))[0]
        out.square().sum().backward()
        return out, [x.grad for x in model.parameters() if x.grad is not None]

    out, gradients = outputs(1, 0.5)
    again, same = outputs(1, 0.5)
    assert torch.equal(out, again)
    assert all(torch.equal(x, y) for x, y in zip(gradients, same, strict=True))
    other, _ = outputs(2, 0.5)
    assert not torch.equal(out, other)
    assert len(gradients) > 8 and all(x.isfinite().all() and x.any() for x in gradients)
    assert torch.equal(outputs(1, 0.0)[0], dropping(name, 0.5).eval()(**text("right"))[0])


def dropping(name, p):
    """In training; nothing else in it is dropped."""
    if name == "Llama":
        model = causal_lm(name, **MODERN, attention_dropout=p)
    else:
        probabilities = {"attention_probs_dropout_prob": p, "hidden_dropout_prob": 0.0}
        config = transformers.BertConfig(**BERT, **probabilities)
        torch.manual_seed(0)
        model = transformers.BertModel(config, add_pooling_layer=False)
    model.set_attn_implementation("fastattn")
    return model.train()


def test_each_layer_and_call_drops_other_weights():
    model = dropping("Llama", 0.5)
    first, second = (model(**text("none")).logits for _ in range(2))
    assert not torch.equal(first, second)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints_have_the_same_gradients(reentrant):
    found = []
    for checkpoints in (False, True):
        model = dropping("Llama", 0.5)
        if checkpoints:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        torch.manual_seed(1)
        model(**text("right"), use_cache=False).logits.square().sum().backward()
        found.append({n: p.grad for n, p in model.named_parameters()})
    want, got = found
    assert all(torch.equal(got[n], x) for n, x in want.items())


@pytest.mark.parametrize("name", ["LLaMA (GQA)", "Mistral", "BERT", "T5"])
@pytest.mark.parametrize("padding", ["none", "right"])
def test_compiled(name, padding):
    torch._dynamo.reset()  # transformers' decorators share one code, whose versions are limited
    inputs = FAMILIES[name].inputs(padding) | ({} if name == "BERT" else {"use_cache": False})
    model = built(name)
    want = results(model, inputs)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    got = results(compiled, inputs)
    for (_, x), y in zip(got.items(), want.values(), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["LLaMA (GQA)", "BERT", "T5"])
def test_autocast(name, dtype):
    assert_autocast_as_eager(lambda way: built(name, way), FAMILIES[name].inputs("right"), dtype)


def test_autocast_with_sinks():
    """Every expert takes every token: rounding would send tokens to others."""

    def build(way):
        experts = {"num_local_experts": 2, "num_experts_per_tok": 2}
        model = causal_lm("GptOss", **MODERN, **experts, head_dim=8)
        model.set_attn_implementation(way)
        return model

    assert_autocast_as_eager(build, text("right"), torch.bfloat16)


def assert_autocast_as_eager(build, inputs, dtype):
    with torch.autocast("cpu", dtype):
        actual, eager = (results(build(way), inputs) for way in ("fastattn", "eager"))
    assert_as_eager(actual, oracle_results(build("eager"), inputs), eager, dtype)


@pytest.mark.parametrize("name", ["LLaMA (GQA)", "gpt-oss", "Gemma2", "BERT", "BART", "Swin"])
def test_float16(name):
    family = FAMILIES[name]
    inputs = family.inputs("right" if "right" in family.paddings else "none")
    actual, eager, oracle = (built(name, way).half() for way in ("fastattn", "eager", "eager"))
    oracle = oracle_results(oracle, inputs)
    assert_as_eager(results(actual, inputs), oracle, results(eager, inputs), torch.float16)


def test_adapters_of_peft_train():
    peft = pytest.importorskip("peft")
    model, _ = huggingface.patch(causal_lm("Llama", **MODERN))
    config = peft.LoraConfig(target_modules=["q_proj", "v_proj"], r=2, init_lora_weights=False)
    model = peft.get_peft_model(model, config)
    optimiser = torch.optim.AdamW(model.parameters(), lr=0.03)
    inputs = text("right")
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    losses = []
    for _ in range(10):
        loss = model(**inputs, labels=labels).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    trained = {n for n, p in model.named_parameters() if p.grad is not None}
    assert trained and all("lora" in n for n in trained)
