"""The transformer classes around other modules and in torch's tools: what is replaced or hooked,
torch's containers, copies, compilation, autocast."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint
from transformer_cases import NAMES, Spy, batched, layer, model, nested, sequences

import fastattn.nn as fnn
from fastattn.testing import assert_accurate


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


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
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


@pytest.mark.filterwarnings("ignore::UserWarning")  # torch's, about what it will not convert
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
