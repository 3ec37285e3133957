"""convert and revert of models that something else has wrapped, sharded, quantised or compiled."""

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter

import fastattn
import fastattn.nn as fnn
from fastattn.testing import randn


class LoRA(nn.Module):
    """A projection with a low-rank addition, as adapters wrap it."""

    def __init__(self, base):
        super().__init__()
        self.base_layer = base.requires_grad_(False)
        self.a, self.b = nn.Linear(16, 2, bias=False), nn.Linear(2, 8, bias=False)

    def forward(self, x):
        return self.base_layer(x) + self.b(self.a(x))


def test_a_model_with_adapters_converts():
    model = nn.TransformerEncoderLayer(16, 2, 8, 0.0, batch_first=True)
    model.linear1 = LoRA(model.linear1)
    converted, _ = fastattn.convert(model)
    x = randn(2, 5, 16, seed=0)
    torch.testing.assert_close(converted(x), model(x))
    converted(x).sum().backward()
    assert model.linear1.b.weight.grad.abs().sum() > 0
    assert model.linear1.base_layer.weight.grad is None


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_a_quantised_model_converts():
    ao = pytest.importorskip("torch.ao.nn.quantizable")
    model = nn.TransformerEncoderLayer(16, 2, 8, 0.0, batch_first=True).eval()
    model = torch.ao.quantization.quantize_dynamic(model, {nn.Linear})
    if type(model.linear1) is nn.Linear:
        pytest.skip("torch was built without a quantised engine")
    x = randn(2, 5, 16, seed=0)
    converted, _ = fastattn.convert(model)
    want = model.train()(x)  # in evaluation torch's layer reads weights that are not there
    torch.testing.assert_close(converted(x), want, rtol=1e-2, atol=1e-2)
    _, report = fastattn.convert(ao.MultiheadAttention(16, 2))
    assert report.kept[0].reason == "a quantised torch.nn.MultiheadAttention"


def test_a_compiled_model_converts_and_compiles_again():
    torch._dynamo.reset()
    counter = CompileCounter()
    model, x = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8)), randn(3, 8, seed=0)
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    want = compiled(x)
    _, report = fastattn.convert(compiled, inplace=True)
    assert report.replaced[0].paths == ("_orig_mod.1",)
    torch.testing.assert_close(compiled(x), want)
    assert counter.frame_count == 2


@pytest.fixture
def one_process():
    """A group of this process alone."""
    if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
        pytest.skip("torch was built without gloo")
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_a_sharded_model_converts_in_place(one_process):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, fully_shard

    torch.manual_seed(0)
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 8, 0.0, batch_first=True), 2)
    model.norm = nn.LayerNorm(16)
    x, mesh = randn(2, 5, 16, seed=0), init_device_mesh("cpu", (1,))
    want = model(x)
    for part in (*model.layers, model.norm, model):
        fully_shard(part, mesh=mesh)
    before = [type(module) for module in model.modules()]
    with pytest.raises(TypeError, match="inplace=True"):
        fastattn.convert(model)
    _, report = fastattn.convert(model, inplace=True)
    assert [(entry.target, len(entry.paths)) for entry in report.replaced] == [
        ("fastattn.nn.TransformerEncoder", 1),
        ("fastattn.nn.TransformerEncoderLayer", 2),
        ("fastattn.nn.MultiheadAttention", 2),
        ("fastattn.nn.LayerNorm", 5),
    ]
    for part in (*model.layers, model.norm, model):
        assert isinstance(part, FSDPModule)
    assert isinstance(model.norm, fnn.LayerNorm)
    assert type(model.layers[0]) is type(model.layers[1])
    out = model(x)
    torch.testing.assert_close(out, want)
    out.sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    fastattn.revert(model, inplace=True)
    assert [type(module) for module in model.modules()] == before
    torch.testing.assert_close(model(x), want)


def test_a_model_in_ddp_converts_in_place(one_process):
    model, x = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8)), randn(3, 8, seed=0)
    wrapped = nn.parallel.DistributedDataParallel(model)
    want = wrapped(x)
    fastattn.convert(wrapped, inplace=True)
    assert type(model[1]) is fnn.LayerNorm
    out = wrapped(x)
    torch.testing.assert_close(out, want)
    out.sum().backward()
    assert all(p.grad is not None for p in model.parameters())
