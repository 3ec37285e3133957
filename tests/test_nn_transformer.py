"""The five transformer classes against torch.nn's, which in training mode take no short cuts."""

import inspect
import math
import warnings

import pytest
import torch
from attention_options import is_on_cuda
from torch import nn
from transformer_cases import (
    FLAG,
    NAMES,
    Spy,
    batched,
    check,
    layer,
    model,
    nested,
    sample,
    sequences,
)

import fastattn.nn as fnn
from fastattn import _C
from fastattn.testing import randn

LEVELS = [name for name, why in _C.cpu_levels() if not why and name not in _C.emulated_levels]


@pytest.mark.filterwarnings("ignore::UserWarning")  # torch's, about masks of two kinds and others
@pytest.mark.parametrize("name", NAMES)
def test_outputs_and_gradients_are_torchs(level, name):
    """Over more than 200 combinations, shared among the levels; the keys of state_dict as well."""
    if is_on_cuda(level):  # where float64 has no kernels
        cases = sample(name, 30, seed=len(LEVELS))
        check(name, [case for case in cases if case["dtype"] != torch.float64])
        return
    count = math.ceil(204 / len(LEVELS))
    check(name, sample(name, count, seed=LEVELS.index(level)))


@pytest.mark.parametrize("name", NAMES)
def test_signatures_and_initial_values_are_torchs(name):
    ours, theirs = getattr(fnn, name), getattr(nn, name)
    assert issubclass(ours, theirs)
    for method in ("__init__", "forward"):
        mine, its = (inspect.signature(getattr(c, method)).parameters for c in (ours, theirs))
        assert {n: p.default for n, p in mine.items()} == {n: p.default for n, p in its.items()}
        assert list(mine) == list(its)
    for options in ({}, {"norm_first": True, "bias": False, "dtype": torch.bfloat16}):
        mine, my_next = model(name, **options), torch.rand(3)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's, about conversions that it will not make
            its, its_next = model(name, nn, **options), torch.rand(3)
        assert torch.equal(my_next, its_next)
        assert list(mine.state_dict()) == list(its.state_dict())
        for key, value in its.state_dict().items():
            assert torch.equal(mine.state_dict()[key], value), key
        assert repr(mine) == repr(its)


@pytest.mark.parametrize("name", NAMES)
def test_every_part_is_ours_and_nothing_warns(name):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        built = model(name, device="meta", batch_first=False)
    assert all(p.is_meta for p in built.parameters())
    for module in built.modules():
        if type(module) is not nn.Linear:  # which convert and revert leave alone
            assert type(module) is getattr(fnn, type(module).__name__, type(module))


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_nested_sequences_are_attended_each_by_itself(level, name, norm_first):
    ours = model(name, norm_first=norm_first)
    alone = [[x.requires_grad_() for x in rows] for rows in sequences(name)]
    want = [ours(*tensors, **{FLAG[name]: True}) for tensors in zip(*alone, strict=True)]
    douts = [randn(*x.shape, seed=i) for i, x in enumerate(want)]
    leaves = [*(x for rows in alone for x in rows), *ours.parameters()]
    want_gradients = torch.autograd.grad(want, leaves, douts)

    together = [nested(rows).requires_grad_() for rows in sequences(name)]
    out = ours(*together, **{FLAG[name]: True})
    like = together[1] if name == "Transformer" else together[0]
    assert out.layout == torch.jagged and out.shape == like.shape
    leaves = [*together, *ours.parameters()]
    gradients = torch.autograd.grad(out.values(), leaves, torch.cat(douts))
    rows = [x.unbind() if x.is_nested else [x] for x in gradients]
    got = [*out.unbind(), *(x for part in rows for x in part)]
    for x, y in zip(got, [*want, *want_gradients], strict=True):
        torch.testing.assert_close(x, y)


def test_rows_between_nested_sequences_are_passed_over(level):
    ours, buffer = layer(), randn(3, 9, 16, seed=0)
    gaps = torch.nested.narrow(
        buffer, 1, torch.tensor([1, 0, 4]), torch.tensor([2, 9, 0]), torch.jagged
    )
    want = [ours(buffer[0:1, 1:3])[0], ours(buffer[1:2])[0], buffer[2, :0]]
    for x, y in zip(ours(gaps).unbind(), want, strict=True):
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize("name", NAMES)
def test_nothing_at_all_has_an_output_of_its_shape(level, name):
    for shape in ((0, 5, 16), (2, 0, 16)):
        tensors = [torch.zeros(shape).requires_grad_() for _ in batched(name)]
        out = model(name)(*tensors)
        assert out.shape == shape
        out.sum().backward()
        assert all(torch.equal(x.grad, torch.zeros(shape)) for x in tensors)


@pytest.mark.parametrize("name", ["TransformerEncoder", "Transformer"])
def test_padded_rows_stay_in_evaluation(name):
    """torch's classes zero them, or cut them off where no sequence is as long."""
    ours, tensors = model(name), batched(name)
    padding = torch.tensor([[False] * 3 + [True] * 2] * 2)
    want = ours(*tensors, src_key_padding_mask=padding)
    ours.eval()
    with torch.no_grad():
        got = ours(*tensors, src_key_padding_mask=padding)
    assert got.shape == want.shape
    torch.testing.assert_close(got, want)


def test_a_query_that_sees_no_key_gets_nothing_from_attention(level):
    ours, (x,) = layer(norm_first=True, bias=False), batched("TransformerEncoder")
    nn.init.zeros_(ours.linear2.weight)
    hidden = torch.zeros(5, 5, dtype=torch.bool)
    hidden[2] = True
    out = ours(x, src_mask=hidden)
    assert torch.equal(out[:, 2], x[:, 2])
    assert out.isfinite().all() and not torch.equal(out[:, 1], x[:, 1])


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32, torch.bfloat16])
def test_the_encoder_finds_out_whether_a_mask_is_causal(dtype):
    encoder = fnn.TransformerEncoder(layer(Spy), 1)
    x, causal = randn(2, 5, 16, seed=0), torch.ones(5, 5, dtype=torch.bool).triu(1)
    if dtype != torch.bool:
        causal = torch.zeros(5, 5, dtype=dtype).masked_fill(causal, -math.inf)

    def found(mask, is_causal=None):
        encoder(x.to(encoder.layers[0].linear1.weight.dtype), mask, is_causal=is_causal)
        return encoder.layers[0].given["is_causal"]

    encoder.to(dtype if dtype.is_floating_point else torch.float32)
    assert found(causal) is True
    assert found(causal, is_causal=False) is False
    assert found(None) is False
    assert found(None, is_causal=True) is True
    other = causal.clone()
    other[3, 1] = other[0, 1]
    assert found(other) is False
    assert found(causal.expand(8, 5, 5)) is False
    if dtype != torch.bool:
        assert found(causal.clone().requires_grad_()) is False


def test_a_mask_that_wants_a_gradient_gets_it_though_it_is_causal(level):
    mask = torch.zeros(5, 5).masked_fill(torch.ones(5, 5).triu(1).bool(), -math.inf)
    mask.requires_grad_()
    for name in ("TransformerEncoder", "TransformerDecoder"):
        option = {"mask" if "Encoder" in name else "tgt_mask": mask}
        out = model(name)(*batched(name), **option)
        (gradient,) = torch.autograd.grad(out.square().sum(), mask)
        assert gradient.tril().abs().sum() > 0


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("name", ["TransformerEncoderLayer", "TransformerDecoderLayer"])
def test_each_dropout_is_honoured(level, name, norm_first):
    """With probability 1 dropout is no matter of chance: torch's layer gives the same."""
    theirs = model(name, nn, norm_first=norm_first)
    ours, tensors = model(name, norm_first=norm_first), batched(name)
    plain = ours(*tensors)
    for part in [n for n, m in ours.named_children() if isinstance(m, nn.Dropout)]:
        for x in (ours, theirs):
            getattr(x, part).p = 1.0
        got = ours(*tensors)
        assert not torch.equal(got, plain), part
        torch.testing.assert_close(got, theirs(*tensors))
        torch.testing.assert_close(ours.eval()(*tensors), plain)
        for x in (ours.train(), theirs):
            getattr(x, part).p = 0.0


def test_dropout_keeps_its_share_and_scales_it(level):
    ours, x = layer(norm_first=True), randn(4, 64, 16, seed=0)
    nn.init.zeros_(ours.linear2.weight)
    nn.init.zeros_(ours.linear2.bias)
    nn.init.normal_(ours.self_attn.out_proj.bias)
    part = ours(x) - x
    ours.dropout1.p = 0.25
    torch.manual_seed(3)
    dropped = ours(x) - x
    kept = dropped.abs() > 1e-6
    assert abs(kept.float().mean().item() - 0.75) < 5 * math.sqrt(0.25 * 0.75 / kept.numel())
    torch.testing.assert_close(dropped[kept], part[kept] / 0.75, rtol=1e-4, atol=1e-5)
    torch.manual_seed(3)
    assert torch.equal(ours(x) - x, dropped)
    assert not torch.equal(ours(x) - x, dropped)


X, MASK = torch.zeros(2, 5, 16), torch.zeros(5, 5, dtype=torch.bool)
NESTED = nested([X[0], X[0, :3]])
ENCODER, DECODER, BOTH = (model(f"Transformer{n}") for n in ("Encoder", "Decoder", ""))
REFUSED = [
    (lambda: ENCODER([X]), TypeError, "src"),
    (lambda: DECODER(None, X), TypeError, "tgt"),
    (lambda: ENCODER(X[..., :15]), ValueError, "src"),
    (lambda: ENCODER(X[0, 0]), ValueError, "src"),
    (lambda: ENCODER(X, MASK[:4]), ValueError, "src_mask"),
    (lambda: ENCODER(X, MASK.int()), TypeError, "src_mask"),
    (lambda: ENCODER(X, MASK.expand(3, 5, 5)), ValueError, "src_mask"),
    (lambda: ENCODER(X, src_key_padding_mask=MASK), ValueError, "src_key_padding_mask"),
    (lambda: ENCODER(NESTED, MASK), ValueError, "src_mask"),
    (lambda: ENCODER(NESTED, src_key_padding_mask=MASK[:2]), ValueError, "src_key_padding_mask"),
    (lambda: ENCODER(NESTED.transpose(1, 2)), ValueError, "src"),
    (lambda: DECODER(X[..., :15], X), ValueError, "tgt"),
    (lambda: DECODER(X, X[..., :15]), ValueError, "memory"),
    (lambda: DECODER(X, X[:1]), ValueError, "memory"),
    (lambda: DECODER(X, X, MASK[:4]), ValueError, "tgt_mask"),
    (lambda: DECODER(X, X, memory_mask=MASK[:4]), ValueError, "memory_mask"),
    (lambda: DECODER(NESTED, NESTED, memory_mask=MASK), ValueError, "memory_mask"),
    (lambda: DECODER(NESTED, X), (TypeError, ValueError), "memory"),
    (lambda: DECODER(X, NESTED), (TypeError, ValueError), "memory"),
    (lambda: DECODER(X, X, None, None, MASK), ValueError, "tgt_key_padding_mask"),
    (
        lambda: DECODER(X, X, memory_key_padding_mask=MASK),
        ValueError,
        "memory_key_padding_mask",
    ),
    (lambda: BOTH(X[..., :15], X), ValueError, "src"),
    (lambda: BOTH(X, X[..., :15]), ValueError, "tgt"),
    (lambda: BOTH(X, X[:1]), ValueError, "tgt"),
    (lambda: BOTH(X, X[0]), ValueError, "tgt"),
    (lambda: BOTH(NESTED, X), ValueError, "tgt"),
]


@pytest.mark.parametrize("case", range(len(REFUSED)))
def test_bad_input_is_refused_by_name(case):
    function, error, name = REFUSED[case]
    with pytest.raises(error, match=rf"^{name}: expected"):
        function()
