"""The five transformer classes against torch.nn's, which in training mode take no short cuts."""

import copy
import inspect
import math
import pickle
import warnings

import pytest
import torch
import transformer_cases as cases
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

import fastattn.nn as fnn
from fastattn import _C
from fastattn.testing import assert_accurate, randn

NAMES = tuple(cases.AXES)
LEVELS = [name for name, obstacle in _C.cpu_levels() if not obstacle]
LENGTHS = (3, 7, 1, 4)
FLAG = {
    name: "is_causal" if name.startswith("TransformerEncoder") else "tgt_is_causal"
    for name in NAMES
}


def layer(cls=fnn.TransformerEncoderLayer, **options):
    """A small layer without dropout, of the same values for every class."""
    torch.manual_seed(1)
    return cls(16, 4, **{"dim_feedforward": 24, "dropout": 0.0, "batch_first": True} | options)


def model(name, package=fnn, **options):
    """One of the five classes."""
    if name == "Transformer":
        options = {"num_encoder_layers": 2, "num_decoder_layers": 2} | options
    if name == "Transformer" or name.endswith("Layer"):
        return layer(getattr(package, name), **options)
    return getattr(package, name)(layer(getattr(package, f"{name}Layer"), **options), 2)


def sequences(name, lengths=LENGTHS):
    """What forward takes, each as a list of sequences: those of the second are longer."""
    count = 1 if "Encoder" in name else 2
    return [
        [randn(n + 2 * i, 16, seed=10 * i + j) for j, n in enumerate(lengths)] for i in range(count)
    ]


def batched(name, length=5):
    return [torch.stack(rows) for rows in sequences(name, (length, length))]


def nested(rows):
    return torch.nested.nested_tensor(rows, layout=torch.jagged)


@pytest.mark.filterwarnings("ignore::UserWarning")  # torch's, about masks of two kinds and others
@pytest.mark.parametrize("name", NAMES)
def test_outputs_and_gradients_are_torchs(level, name):
    """Over more than 200 combinations, shared among the levels; the keys of state_dict as well."""
    count = math.ceil(204 / len(LEVELS))
    cases.check(name, cases.sample(name, count, seed=LEVELS.index(level)))


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


class Spy(fnn.TransformerEncoderLayer):
    """Keeps what its container passes."""

    def forward(self, src, **options):
        self.given = options
        return super().forward(src, **options)


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


class LoRA(nn.Module):
    """A projection with a low-rank addition, as adapters wrap it."""

    def __init__(self, base):
        super().__init__()
        self.base = base
        self.down = nn.Linear(base.in_features, 2, bias=False)
        self.up = nn.Linear(2, base.out_features, bias=False)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))

    def merged(self):
        linear = copy.deepcopy(self.base)
        linear.weight.data += self.up.weight @ self.down.weight
        return linear


@pytest.mark.parametrize("norm_first", [False, True])
def test_wrapped_projections_take_effect(level, norm_first):
    ours, tensors = model("TransformerDecoderLayer", norm_first=norm_first), batched("Decoder")
    wrapped = copy.deepcopy(ours)
    for path in ("linear1", "linear2", "self_attn.out_proj", "multihead_attn.out_proj"):
        owner, name = wrapped.get_submodule(path.rpartition(".")[0]), path.rpartition(".")[2]
        setattr(owner, name, LoRA(getattr(owner, name)))
        merged = copy.deepcopy(wrapped)
        for place, module in list(merged.named_modules()):
            if isinstance(module, LoRA):
                merged.set_submodule(place, module.merged())
        got = wrapped(*tensors)
        torch.testing.assert_close(got, merged(*tensors))
        assert not torch.allclose(got, ours(*tensors))
    got.sum().backward()
    assert all(m.up.weight.grad.abs().sum() > 0 for m in wrapped.modules() if isinstance(m, LoRA))


@pytest.mark.parametrize("norm_first", [False, True])
def test_replaced_modules_take_effect(norm_first):
    """As they do in torch's layer."""
    name = "TransformerEncoderLayer"
    for path, module in (
        ("norm1", nn.RMSNorm(16)),
        ("norm2", nn.Identity()),
        ("norm2", nn.LayerNorm(16, eps=1.0)),
        ("norm2", fnn.LayerNorm(16, eps=0.5, elementwise_affine=False)),
        ("dropout1", nn.Hardtanh(-0.1, 0.1)),
        ("dropout", nn.Tanh()),
        ("dropout2", nn.Hardtanh(-0.1, 0.1)),
        ("linear1", nn.Linear(16, 24, bias=False)),
        ("activation", nn.ELU()),
    ):
        ours, theirs = model(name, norm_first=norm_first), model(name, nn, norm_first=norm_first)
        (x,), plain = batched(name), ours(*batched(name))
        for y in (ours, theirs):
            setattr(y, path, module)
        torch.testing.assert_close(ours(x), theirs(x), msg=path)
        assert not torch.allclose(ours(x), plain), path


def test_hooks_and_patched_forwards_take_effect():
    def negate(module, arguments, output):
        return -output

    for path in ("norm1", "norm2", "dropout1", "dropout2", "linear1", "linear2", "dropout"):
        (x,), ours, theirs = batched("Encoder"), layer(), layer(nn.TransformerEncoderLayer)
        for y in (ours, theirs):
            y.get_submodule(path).register_forward_hook(negate)
        torch.testing.assert_close(ours(x), theirs(x), msg=path)
        ours, theirs = layer(), layer(nn.TransformerEncoderLayer)
        for y in (ours, theirs):
            part = y.get_submodule(path)
            part.forward = lambda x, forward=part.forward: -forward(x)
        torch.testing.assert_close(ours(x), theirs(x), msg=path)


def with_own_blocks(base):
    class Layer(base):
        def _sa_block(self, *arguments, **options):
            return -super()._sa_block(*arguments, **options)

    return Layer


@pytest.mark.parametrize("name", ["TransformerEncoderLayer", "TransformerDecoderLayer"])
def test_overridden_blocks_are_called(name):
    tensors = batched(name)
    ours, theirs = (
        layer(with_own_blocks(getattr(fnn, name))),
        layer(with_own_blocks(getattr(nn, name))),
    )
    torch.testing.assert_close(ours(*tensors), theirs(*tensors))
    with torch.no_grad():
        torch.testing.assert_close(ours.eval()(*tensors), theirs(*tensors))
    ours, theirs = model(name), model(name, nn)
    for x in (ours, theirs):
        x._ff_block = torch.zeros_like
    torch.testing.assert_close(ours(*tensors), theirs(*tensors))


def test_torchs_encoder_calls_our_layer_in_evaluation():
    (x,), padding = batched("Encoder"), torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    ours = fnn.TransformerEncoder(layer(), 2).eval()
    with pytest.warns(UserWarning, match="activation_relu_or_gelu"):
        around = nn.TransformerEncoder(layer(Spy), 2).eval()
    swapped = nn.TransformerEncoder(layer(nn.TransformerEncoderLayer), 2).eval()
    for i in range(2):
        swapped.layers[i] = layer(Spy).eval()
    with torch.no_grad():
        want = ours(x, src_key_padding_mask=padding)
        torch.testing.assert_close(around(x, src_key_padding_mask=padding), want)
        out = swapped(x, src_key_padding_mask=padding)
        torch.testing.assert_close(swapped(x), ours(x))
    torch.testing.assert_close(out[~padding], want[~padding])
    assert (out[padding] == 0).all()  # torch's container converted x and padded the output
    assert all(hasattr(y, "given") for z in (around, swapped) for y in z.layers)


def test_a_custom_encoder_is_used_as_it_is():
    class Encoder(nn.Module):
        def forward(self, src, mask, src_key_padding_mask, is_causal):
            return src + 1

    encoder = Encoder()
    ours = model("Transformer", custom_encoder=encoder)
    assert ours.encoder is encoder
    src, tgt = batched("Transformer")
    torch.testing.assert_close(ours(src, tgt), ours.decoder(tgt, src + 1))


def test_copies_and_pickles_give_the_same(level):
    ours, tensors = model("Transformer", activation=nn.GELU("tanh")), batched("Transformer")
    want = ours(*tensors)
    for same in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert torch.equal(same(*tensors), want)


@pytest.mark.parametrize("name", ["TransformerEncoder", "TransformerDecoder"])
def test_layers_that_are_copied_keep_a_module_as_activation(name):
    """torch's decoder layer does not."""
    tensors = batched(name)
    for module, function in ((nn.GELU(), "gelu"), (nn.ELU(), nn.functional.elu)):
        got = model(name, activation=module)(*tensors)
        torch.testing.assert_close(got, model(name, activation=function)(*tensors))


@pytest.mark.parametrize("name", ["TransformerEncoder", "TransformerDecoder"])
def test_recomputing_a_checkpoint_repeats_dropout(name):
    ours, gradients = model(name, dropout=0.5), []
    for run in (ours, lambda *x: checkpoint(ours, *x, use_reentrant=False)):
        leaves = [x.requires_grad_() for x in batched(name)]
        torch.manual_seed(11)
        gradients.append(torch.autograd.grad(run(*leaves).square().sum(), leaves))
    assert all(torch.equal(x, y) for x, y in zip(*gradients, strict=True))


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in NAMES[1:]]


@pytest.mark.parametrize("name", [NAMES[0], *SLOW])
def test_one_graph_serves_all_lengths(name):
    """The mask is read where it cannot be looked at, and means the same."""
    torch._dynamo.reset()
    ours, counter = model(name, norm_first=True), CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(ours, backend=counter, fullgraph=True, dynamic=True)
    option = {"TransformerEncoder": "mask", "TransformerEncoderLayer": "src_mask"}
    for length in range(3, 7):
        tensors = batched(name, length)
        mask = nn.Transformer.generate_square_subsequent_mask(length)
        masks = {option.get(name, "tgt_mask"): mask}
        if name == "Transformer":
            tensors.reverse()
        torch.testing.assert_close(compiled(*tensors, **masks), ours(*tensors, **masks))
    assert counter.frame_count <= 2


@pytest.mark.parametrize("name", [NAMES[0], pytest.param(NAMES[4], marks=pytest.mark.slow)])
def test_nested_sequences_compile_to_one_graph(name):
    torch._dynamo.reset()
    ours = model(name)
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    tensors = [nested(rows) for rows in sequences(name)]
    torch.testing.assert_close(compiled(*tensors).values(), ours(*tensors).values())


def test_export():
    ours, tensors = model("Transformer").eval(), tuple(batched("Transformer"))
    exported = torch.export.export(ours, tensors, strict=False)
    torch.testing.assert_close(exported.module()(*tensors), ours(*tensors))


@pytest.mark.parametrize("norm_first", [False, True])
def test_autocast_gives_the_dtype_and_the_accuracy_of_torch(level, norm_first):
    ours, theirs = (model("Transformer", p, norm_first=norm_first) for p in (fnn, nn))
    tensors = batched("Transformer", 33)
    want = copy.deepcopy(theirs).double()(*(x.double() for x in tensors))
    with torch.autocast("cpu", torch.bfloat16):
        plain, got = theirs(*tensors), ours(*tensors)
    assert got.dtype == plain.dtype
    assert_accurate(got, want, plain, "out", dtype=torch.bfloat16)
    got.sum().backward()
    assert all(p.grad.isfinite().all() and p.grad.dtype == p.dtype for p in ours.parameters())


X, MASK = torch.zeros(2, 5, 16), torch.zeros(5, 5, dtype=torch.bool)
NESTED = nested([X[0], X[0, :3]])
ENCODER, DECODER, BOTH = (model(f"Transformer{n}") for n in ("Encoder", "Decoder", ""))
REFUSED = [
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
