"""fastattn.convert and revert: what is replaced, what stays, and what the report says of it."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

import fastattn
import fastattn.nn as fnn
from fastattn.convert import Conversion, ConversionReport
from fastattn.testing import randn

pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")

NO_COUNTERPART = "no counterpart in fastattn.nn"
LINEAR = "other tools look for this class (fastattn.nn.Linear is for decoding)"


class CentredNorm(nn.LayerNorm):
    """A subclass with a forward of its own."""

    def forward(self, x):
        return super().forward(x) - 1.0


class OurNorm(fnn.LayerNorm):
    """A subclass of ours."""


class Twice(nn.Module):
    def forward(self, x):
        return 2.0 * x


class Block(nn.Module):
    """A module of the user's, with attention that it calls itself."""

    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(16)
        self.attention = nn.MultiheadAttention(16, 4, batch_first=True)
        self.calls = 0
        self.norm.register_forward_hook(self.count)

    def count(self, module, arguments, output):
        self.calls += 1

    def forward(self, x):
        y = self.norm(x)
        return x + self.attention(y, y, y)[0]


class Mixed(nn.Module):
    """Modules of every kind, some of them in two places."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(16, 4, 24, 0.0, "gelu", batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, nn.LayerNorm(16))
        self.decoder = nn.TransformerDecoderLayer(16, 4, 24, 0.0, nn.GELU("tanh"), batch_first=True)
        self.block = Block()
        self.again = self.block.norm
        self.rms = nn.RMSNorm(16)
        self.linear = nn.Linear(16, 16)
        self.centred = CentredNorm(16)
        self.parametrised = parametrize.register_parametrization(
            nn.LayerNorm(16), "weight", Twice()
        )
        self.patched = nn.LayerNorm(16)
        self.patched.forward = torch.tanh
        self.prepared = nn.GELU()
        self.prepared.qconfig = "any"
        self.scripted = torch.jit.script(nn.Sequential(nn.LayerNorm(16)))
        self.ours = fnn.LayerNorm(16)
        self.derived = OurNorm(16)

    def forward(self, x):
        x = self.decoder(self.encoder(x), self.block(x))
        for part in (self.again, self.rms, self.linear, self.centred, self.parametrised):
            x = part(x)
        x = self.scripted(self.prepared(self.patched(x)))
        return self.derived(self.ours(x))


def entry(cls, target, *paths):
    return Conversion(paths, cls, target, None)


def kept(cls, reason, *paths):
    return Conversion(paths, cls, None, reason)


ATTENTION = (
    "encoder.layers.0.self_attn",
    "encoder.layers.1.self_attn",
    "decoder.self_attn",
    "decoder.multihead_attn",
    "block.attention",
)
LAYERS = ("encoder.layers.0", "encoder.layers.1", "decoder")
DROPOUTS = [f"{layer}.{name}" for layer in LAYERS for name in ("dropout", "dropout1", "dropout2")]
REPORT = ConversionReport(
    replaced=(
        entry("torch.nn.TransformerEncoder", "fastattn.nn.TransformerEncoder", "encoder"),
        entry(
            "torch.nn.TransformerEncoderLayer", "fastattn.nn.TransformerEncoderLayer", *LAYERS[:2]
        ),
        entry("torch.nn.MultiheadAttention", "fastattn.nn.MultiheadAttention", *ATTENTION),
        entry(
            "torch.nn.LayerNorm",
            "fastattn.nn.LayerNorm",
            *(f"encoder.layers.{i}.norm{j}" for i in (0, 1) for j in (1, 2)),
            "encoder.norm",
            *(f"decoder.norm{j}" for j in (1, 2, 3)),
            "block.norm",
            "again",
        ),
        entry("torch.nn.TransformerDecoderLayer", "fastattn.nn.TransformerDecoderLayer", "decoder"),
        entry("torch.nn.GELU", "fastattn.nn.GELU", "decoder.activation"),
        entry("torch.nn.RMSNorm", "fastattn.nn.RMSNorm", "rms"),
    ),
    kept=(
        kept("test_convert.Mixed", NO_COUNTERPART, ""),
        kept("torch.nn.ModuleList", NO_COUNTERPART, "encoder.layers"),
        kept(
            "torch.nn.modules.linear.NonDynamicallyQuantizableLinear",
            NO_COUNTERPART,
            *(f"{path}.out_proj" for path in ATTENTION),
        ),
        kept(
            "torch.nn.Linear",
            LINEAR,
            *(f"{layer}.linear{i}" for layer in LAYERS for i in (1, 2)),
            "linear",
        ),
        kept("torch.nn.Dropout", NO_COUNTERPART, *DROPOUTS, "decoder.dropout3"),
        kept("test_convert.Block", NO_COUNTERPART, "block"),
        kept(
            "test_convert.CentredNorm",
            "a subclass of torch.nn.LayerNorm, whose forward may differ",
            "centred",
        ),
        kept(
            "torch.nn.utils.parametrize.ParametrizedLayerNorm",
            "a parametrised torch.nn.LayerNorm",
            "parametrised",
        ),
        kept("torch.nn.ModuleDict", NO_COUNTERPART, "parametrised.parametrizations"),
        kept(
            "torch.nn.utils.parametrize.ParametrizationList",
            NO_COUNTERPART,
            "parametrised.parametrizations.weight",
        ),
        kept("test_convert.Twice", NO_COUNTERPART, "parametrised.parametrizations.weight.0"),
        kept("torch.nn.LayerNorm", "its forward was replaced on the instance", "patched"),
        kept("torch.nn.GELU", "prepared for quantisation", "prepared"),
        kept(
            "torch.jit._script.RecursiveScriptModule",
            "TorchScript, whose code is fixed",
            "scripted",
        ),
        kept("fastattn.nn.LayerNorm", "already of fastattn", "ours"),
        kept(
            "test_convert.OurNorm",
            "a subclass of fastattn.nn.LayerNorm, whose forward may differ",
            "derived",
        ),
    ),
)


def types(model):
    return {path: type(module) for path, module in model.named_modules(remove_duplicate=False)}


def addresses(model):
    return {name: value.data_ptr() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("inplace", [False, True])
def test_a_model_of_every_kind_round_trips(level, inplace):
    model, x = Mixed(), randn(2, 5, 16, seed=0)
    want, before, parameters = model(x), types(model), list(model.parameters())

    converted, report = fastattn.convert(model, inplace=inplace)
    assert report == REPORT
    assert (converted is model) == inplace
    assert inplace or types(model) == before
    assert addresses(converted) == addresses(model)
    assert all(a is b for a, b in zip(converted.parameters(), parameters, strict=True))
    assert converted.again is converted.block.norm
    torch.testing.assert_close(converted(x), want)

    reverted, report = fastattn.revert(converted, inplace=inplace)
    # What was ours before is torch's now.
    assert types(reverted) == before | {"ours": nn.LayerNorm}
    undone = {(entry.target, entry.source) for entry in report.replaced}
    assert undone == {(entry.source, entry.target) for entry in REPORT.replaced}
    assert all(a is b for a, b in zip(reverted.parameters(), parameters, strict=True))
    torch.testing.assert_close(reverted(x), want)


def test_the_report_reads_as_a_list():
    model = nn.Sequential(nn.LayerNorm(4), *(nn.Linear(4, 4) for _ in range(5)))
    _, report = fastattn.convert(model)
    assert str(report).splitlines() == [
        "torch.nn.LayerNorm -> fastattn.nn.LayerNorm: 0",
        "torch.nn.Sequential kept: no counterpart in fastattn.nn: (model)",
        f"torch.nn.Linear kept: {LINEAR}: 1, 2, 3, 2 more",
    ]
    assert pickle.loads(pickle.dumps(report)) == report


ROOTS = {
    "GELU": nn.GELU("tanh"),
    "LayerNorm": nn.LayerNorm(16, eps=0.1, bias=False),
    "RMSNorm": nn.RMSNorm(16, eps=0.1),
    "MultiheadAttention": nn.MultiheadAttention(16, 2, 0.1, False, True, True, batch_first=True),
    "TransformerEncoderLayer": nn.TransformerEncoderLayer(16, 2, 8, norm_first=True),
    "TransformerDecoderLayer": nn.TransformerDecoderLayer(16, 2, 8, activation=nn.ELU()),
    "TransformerEncoder": nn.TransformerEncoder(
        nn.TransformerEncoderLayer(16, 2, 8, batch_first=True), 2
    ),
    "TransformerDecoder": nn.TransformerDecoder(nn.TransformerDecoderLayer(16, 2, 8), 2),
    "Transformer": nn.Transformer(16, 2, 1, 1, 8, batch_first=True),
}


TWO = ("Transformer", "TransformerDecoder", "TransformerDecoderLayer")


def call(module, x):
    name = type(module).__name__
    out = module(*(x,) * (3 if name == "MultiheadAttention" else 2 if name in TWO else 1))
    return out[0] if isinstance(out, tuple) else out


@pytest.mark.parametrize("name", ROOTS)
def test_the_outermost_module_may_be_one_to_replace(name):
    model, x = copy.deepcopy(ROOTS[name]), randn(2, 5, 16, seed=0)
    for mode in (False, True):
        model.train(mode)
        converted, report = fastattn.convert(model)
        assert type(converted) is getattr(fnn, name)
        assert report.replaced[0].paths == ("",)
        reverted, _ = fastattn.revert(converted)
        assert type(reverted) is getattr(nn, name)
        assert vars(reverted).keys() == vars(model).keys()
        for module, same in zip(model.modules(), reverted.modules(), strict=True):
            assert type(module) is type(same) and module.training == same.training == mode
            numbers = [n for n, x in vars(module).items() if isinstance(x, bool | int | float)]
            assert [vars(same)[n] for n in numbers] == [vars(module)[n] for n in numbers]
    model.eval()
    want = call(model, x)
    for same in (fastattn.convert(model)[0], pickle.loads(pickle.dumps(converted))):
        torch.testing.assert_close(call(same.eval(), x), want)


def built(name):
    """Ours, by hand."""
    if name in ("GELU", "LayerNorm", "RMSNorm"):
        return getattr(fnn, name)(*(() if name == "GELU" else (16,)))
    if name in ("TransformerEncoder", "TransformerDecoder"):
        return getattr(fnn, name)(getattr(fnn, f"{name}Layer")(16, 2, 8, batch_first=True), 2)
    return getattr(fnn, name)(16, 2, batch_first=True)


@pytest.mark.parametrize("name", ROOTS)
def test_what_was_built_from_ours_reverts(name):
    model, x = built(name).eval(), randn(2, 5, 16, seed=0)
    reverted, _ = fastattn.revert(model)
    assert type(reverted) is getattr(nn, name)
    assert not any(type(module).__module__.startswith("fastattn") for module in reverted.modules())
    assert list(reverted.state_dict()) == list(model.state_dict())
    torch.testing.assert_close(call(reverted, x), call(model, x))
    for mine in (reverted, pickle.loads(pickle.dumps(reverted))):
        again, _ = fastattn.convert(mine)
        assert types(again) == types(model)
        torch.testing.assert_close(call(again, x), call(model, x))


def test_what_torch_cannot_hold_stays():
    model = nn.Sequential(
        fnn.RMSNorm(8, casting="gemma"), fnn.RMSNorm(8), OurNorm(8), nn.LayerNorm(8), Twice()
    )
    reverted, report = fastattn.revert(model)
    assert report == ConversionReport(
        replaced=(entry("fastattn.nn.RMSNorm", "torch.nn.RMSNorm", "1"),),
        kept=(
            kept("torch.nn.Sequential", "not of fastattn", ""),
            kept("fastattn.nn.RMSNorm", "torch.nn.RMSNorm has no casting 'gemma'", "0"),
            kept(
                "test_convert.OurNorm",
                "a subclass of fastattn.nn.LayerNorm, whose forward may differ",
                "2",
            ),
            kept("torch.nn.LayerNorm", "not of fastattn", "3"),
            kept("test_convert.Twice", "not of fastattn", "4"),
        ),
    )
    x = randn(3, 8, seed=0)
    torch.testing.assert_close(reverted(x), model(x))


def test_heads_that_no_kernel_takes_stay():
    wide, narrow = nn.MultiheadAttention(1026, 2), nn.MultiheadAttention(1024, 2)
    _, report = fastattn.convert(nn.ModuleList([wide, narrow]), inplace=True)
    assert type(wide) is nn.MultiheadAttention and type(narrow) is fnn.MultiheadAttention
    assert "fastattn has heads up to 512" in str(report)


class Recorder:
    """Of the user's, outside of the model."""

    def __init__(self):
        self.seen = []

    def record(self, module, arguments, output):
        self.seen.append(output)


def test_hooks_go_on():
    model, recorder, x = Mixed(), Recorder(), randn(2, 5, 16, seed=0)
    model.rms.register_forward_hook(recorder.record)
    model.encoder.layers[0].norm1.register_forward_hook(recorder.record)
    converted, _ = fastattn.convert(model)
    converted(x)
    assert len(recorder.seen) == 2
    # A hook that is a method of a module in the model is one of the copy in the copy.
    assert (model.block.calls, converted.block.calls) == (0, 2)
    fastattn.convert(model, inplace=True)
    model(x)
    assert len(recorder.seen) == 4
    assert (model.block.calls, converted.block.calls) == (2, 2)


def test_flags_and_gradients_stay():
    model, x = Mixed(), randn(2, 5, 16, seed=0)
    model.encoder.requires_grad_(False)
    model.block.eval()
    model(x).square().sum().backward()
    gradients = [p.grad for p in model.parameters()]
    converted, _ = fastattn.convert(model)
    for before, after in zip(model.modules(), converted.modules(), strict=True):
        assert before.training == after.training
    after = list(converted.parameters())
    assert [p.requires_grad for p in after] == [p.requires_grad for p in model.parameters()]
    assert all(p.grad is grad for p, grad in zip(after, gradients, strict=True))
    converted.zero_grad()
    converted(x).square().sum().backward()
    for p, grad in zip(after, gradients, strict=True):
        assert (p.grad is None) == (grad is None)
        if grad is not None:
            torch.testing.assert_close(p.grad, grad, rtol=1e-3, atol=1e-4)


def test_a_step_of_an_optimizer_reaches_both_models():
    model, x = Mixed(), randn(2, 5, 16, seed=0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    converted, _ = fastattn.convert(model)
    converted(x).square().sum().backward()
    optimizer.step()
    torch.testing.assert_close(converted(x), model(x))


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_tensors_that_hooks_compute_are_no_obstacle_to_a_copy():
    model = nn.Sequential(nn.utils.weight_norm(nn.Linear(8, 8)), nn.LayerNorm(8))
    x = randn(3, 8, seed=0)
    want = model(x)
    converted, report = fastattn.convert(model)
    assert len(report.replaced) == 1
    torch.testing.assert_close(converted(x), want)


def test_a_copy_keeps_an_activation_that_is_a_module():
    """Copies of torch's decoder layer do not."""
    model, x = nn.TransformerDecoderLayer(16, 2, 8, 0.0, nn.Tanh()), randn(3, 2, 16, seed=0)
    converted, _ = fastattn.convert(model)
    assert type(converted.activation) is nn.Tanh
    torch.testing.assert_close(converted(x, x), model(x, x))
    reverted, _ = fastattn.revert(converted)
    torch.testing.assert_close(reverted(x, x), model(x, x))


@pytest.mark.parametrize("function", [fastattn.convert, fastattn.revert])
def test_what_is_no_module_is_refused(function):
    with pytest.raises(TypeError, match=r"^model: expected a torch.nn.Module, got dict"):
        function({})
