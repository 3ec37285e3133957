"""Every module of fastattn.nn inside of what torch builds on modules."""

import copy
import gc
import io
import os
import pickle
import shutil

import pytest
import torch
import torch.distributed as dist
from nn_modules import MODULES
from torch._dynamo.testing import CompileCounterWithBackend
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, Dataset

from fastattn import nn
from fastattn.testing import randn

NAMES = [name for name in MODULES if name.split()[0] in nn.__all__]
# Every part is in one of these.
WHOLE = ["MultiheadAttention", "MultiheadAttention across", "Transformer", "RelativeAttention"]
WHOLE += ["Attention T5", "TransformerBlock across", "CausalLM"]
WHOLE = [name for name in WHOLE if name in NAMES]
QUICK = ["MultiheadAttention", "TransformerBlock across"]


def some_are_slow(quick):
    return [pytest.param(n, marks=[] if n in quick else pytest.mark.slow) for n in NAMES]


def build(name, dropout=0.0, dtype=None):
    torch.manual_seed(0)
    module = MODULES[name][0](dropout)
    for seed, x in enumerate(module.parameters()):
        if x.dim() < 2:  # zeros and ones, else
            x.data += 0.1 * randn(*x.shape, seed=seed)
    return module.to(dtype)


def inputs_of(name, length=6):
    return MODULES[name][1](length)


def outputs(module, inputs):
    found = module(*inputs)
    return [x for x in (found if isinstance(found, tuple) else (found,)) if x is not None]


def loss_of(module, inputs):
    return sum((x.float() * randn(*x.shape, seed=9)).sum() for x in outputs(module, inputs))


def gradients(module, inputs):
    """By name: those of the parameters and of the floating-point inputs."""
    leaves, seen = [], {}
    for x in inputs:  # one tensor given twice stays one
        seen.setdefault(id(x), x.detach().requires_grad_(x.is_floating_point()))
        leaves.append(seen[id(x)])
    module.zero_grad()
    loss_of(module, leaves).backward()
    found = {n: x.grad for n, x in module.named_parameters()}
    return found | {f"input {i}": x.grad for i, x in enumerate(leaves) if x.requires_grad}


def assert_close(got, want, **tolerances):
    assert got.keys() == want.keys()
    for name, x in got.items():
        torch.testing.assert_close(x, want[name], **tolerances, msg=lambda m, n=name: f"{n}: {m}")


def compiles(name, backend):
    module, seen = build(name), []
    torch._dynamo.reset()
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(module, backend=counter, fullgraph=True)
    for length in (6, 9, 14):
        inputs = inputs_of(name, length)
        want = gradients(module, inputs)
        got = gradients(compiled, inputs)
        seen.append(({n.removeprefix("_orig_mod."): x for n, x in got.items()}, want))
    return seen, counter.frame_count


@pytest.mark.parametrize("name", some_are_slow(QUICK))
def test_one_graph_serves_all_lengths_and_gives_the_gradients_of_eager(name):
    seen, graphs = compiles(name, "aot_eager")
    for got, want in seen:
        assert_close(got, want)
    assert graphs <= 2


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
@pytest.mark.parametrize("name", WHOLE)
def test_inductor_gives_the_gradients_of_eager(name):
    for got, want in compiles(name, "inductor")[0]:
        assert_close(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", some_are_slow(WHOLE))
def test_exported_it_computes_the_same(name):
    module, inputs = build(name).eval(), inputs_of(name)
    program = torch.export.export(module, inputs)
    with torch.no_grad():
        for got, want in zip(outputs(program.module(), inputs), outputs(module, inputs)):
            torch.testing.assert_close(got, want)


@pytest.mark.parametrize("name", NAMES)
def test_autocast_is_near_and_leaves_gradients_in_the_dtype_of_parameters(name):
    module, inputs = build(name), inputs_of(name)
    want = gradients(module, inputs)
    with torch.autocast("cpu", torch.bfloat16):
        got = gradients(module, inputs)
    for n, x in got.items():
        assert x.dtype == torch.float32
        error = (x - want[n]).abs().max() / (1.0 + want[n].abs().max())
        assert error < 0.1, (n, error)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_it_moves_to_any_dtype(name, dtype):
    module = build(name, dtype=dtype)
    inputs = [x.to(dtype) if x.is_floating_point() else x for x in inputs_of(name)]
    assert all(x.dtype == dtype for x in outputs(module, inputs))
    assert all(x.dtype == dtype and x.isfinite().all() for x in gradients(module, inputs).values())


@pytest.mark.parametrize("name", NAMES)
def test_recomputing_a_checkpoint_gives_the_same_gradients(name):
    module, inputs = build(name, dropout=0.3), inputs_of(name)

    class Checkpointed(torch.nn.Module):
        def forward(self, *inputs):
            return checkpoint(module, *inputs, use_reentrant=False)

    both = Checkpointed()
    both.inner = module
    torch.manual_seed(1)
    want = gradients(module, inputs)
    torch.manual_seed(1)
    got = gradients(both, inputs)
    assert_close({n.removeprefix("inner."): x for n, x in got.items()}, want, rtol=0, atol=0)


@pytest.mark.parametrize("name", NAMES)
def test_copies_pickles_and_checkpoints_hold_the_same_module(name):
    module, inputs = build(name).eval(), inputs_of(name)
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    loaded = MODULES[name][0](0.0).eval()
    loaded.load_state_dict(torch.load(file), strict=True)
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module)), loaded):
        for got, want in zip(outputs(other, inputs), outputs(module, inputs)):
            assert torch.equal(got, want)
        assert repr(other) == repr(module)


@pytest.mark.parametrize("name", NAMES)
def test_on_the_meta_device_it_has_shapes_and_no_data(name):
    inputs = inputs_of(name)
    want = outputs(build(name), inputs)
    with torch.device("meta"):
        module = MODULES[name][0](0.0)
    got = outputs(module, [x.to("meta") for x in inputs])
    assert all(x.is_meta for x in [*got, *module.parameters(), *module.buffers()])
    assert [x.shape for x in got] == [x.shape for x in want]


@pytest.mark.parametrize("name", NAMES)
def test_what_needs_no_gradient_gets_none(name):
    module, inputs = build(name), inputs_of(name)
    parameters = dict(module.named_parameters())
    for frozen in parameters.values():
        frozen.requires_grad_(False)
    with torch.inference_mode():
        plain = outputs(module, inputs)
    for got, want in zip(outputs(module, inputs), plain):
        assert not got.requires_grad
        torch.testing.assert_close(got, want)


class Results(Dataset):
    """Each worker process calls the module."""

    def __init__(self, name):
        self.module, self.inputs = build(name).eval(), inputs_of(name)

    def __len__(self):
        return 4

    def __getitem__(self, index):
        with torch.no_grad():
            return outputs(self.module, self.inputs)[0]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forked workers need fork")
@pytest.mark.parametrize("name", WHOLE[:1] + WHOLE[-1:])
def test_forked_workers_compute_the_same(name):
    data = Results(name)
    want = data[0]
    for got in DataLoader(data, batch_size=None, num_workers=2, multiprocessing_context="fork"):
        assert torch.equal(got, want)


@pytest.fixture
def one_process(tmp_path):
    """A group of this process alone."""
    join(tmp_path, 0, 1)
    yield
    dist.destroy_process_group()


def join(folder, rank, size):
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=size)


@pytest.mark.parametrize("name", NAMES)
def test_distributed_data_parallel(name, one_process):
    module, inputs = build(name), inputs_of(name)
    if not list(module.parameters()):
        pytest.skip("nothing to train")
    want = gradients(module, inputs)
    got = gradients(DistributedDataParallel(module), inputs)
    assert_close({n.removeprefix("module."): x for n, x in got.items()}, want)


def shard(module, size, everywhere, **options):
    """As one group of parameters, or each submodule with parameters as its own.

    Tables that other modules read belong to the group of the whole, as FSDP asks for.
    """
    mesh = init_device_mesh("cpu", (size,))
    for part in reversed(list(module.modules())) if everywhere else []:
        own = list(part.parameters(recurse=False))
        if own and part is not module and not isinstance(part, torch.nn.Embedding):
            fully_shard(part, mesh=mesh, **options)
    return fully_shard(module, mesh=mesh, **options)


def whole(gradients):
    return {n: x.full_tensor() if hasattr(x, "full_tensor") else x for n, x in gradients.items()}


@pytest.mark.parametrize("everywhere", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_fully_sharded(name, everywhere, one_process):
    module, inputs = build(name), inputs_of(name)
    if not list(module.parameters()):
        pytest.skip("nothing to shard")
    want = gradients(module, inputs)
    assert_close(whole(gradients(shard(module, 1, everywhere), inputs)), want)


@pytest.mark.parametrize("name", NAMES)
def test_fully_sharded_in_two_precisions(name, one_process):
    module, inputs = build(name), inputs_of(name)
    if not list(module.parameters()):
        pytest.skip("nothing to shard")
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    got = gradients(shard(module, 1, False, mp_policy=policy), inputs)
    assert all(x.dtype == torch.float32 and x.isfinite().all() for x in whole(got).values())


def half_of_the_batch(rank, folder, names, kind):
    """What each of two processes does."""
    torch.set_num_threads(1)
    join(folder, rank, 2)
    for name in names:
        check_half(rank, name, kind)
    gc.collect()  # what still holds the group must not be freed after it: threads wait for it then
    dist.barrier()
    dist.destroy_process_group()


def check_half(rank, name, kind):
    """The gradients of half of the batch, averaged, are those of the whole one."""
    module, inputs = build(name), inputs_of(name)
    want = gradients(module, inputs)
    wrapped = DistributedDataParallel(module) if kind == "ddp" else shard(module, 2, True)
    wrapped.zero_grad()
    found = outputs(wrapped, [x[rank : rank + 1] for x in inputs])
    batch = outputs(copy.deepcopy(build(name)), inputs)
    loss = sum(
        (x.float() * randn(*y.shape, seed=9)[rank : rank + 1]).sum() for x, y in zip(found, batch)
    )
    (2.0 * loss).backward()
    got = {n.removeprefix("module."): x.grad for n, x in wrapped.named_parameters()}
    assert_close(whole(got), {n: want[n] for n in got}, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_two_processes_share_a_batch(kind, tmp_path):
    names = [name for name in WHOLE if name != "Attention T5"]
    torch.multiprocessing.spawn(half_of_the_batch, (tmp_path, names, kind), nprocs=2)


LORA = {
    "MultiheadAttention": ["out_proj"],
    "TransformerEncoderLayer": ["out_proj", "linear1", "linear2"],
    "TransformerDecoderLayer": ["out_proj", "linear1", "linear2"],
    "Attention": ["q_proj", "v_proj", "o_proj"],
    "TransformerBlock": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "down_proj"],
    "CausalLM": ["q_proj", "v_proj", "up_proj"],
}


@pytest.mark.parametrize("name", [name for name in LORA if name in NAMES])
def test_low_rank_adapters_count(name):
    peft = pytest.importorskip("peft", reason="adapters are PEFT's")
    module, inputs = build(name).eval(), inputs_of(name)
    before = outputs(module, inputs)[0].detach()
    config = peft.LoraConfig(r=2, target_modules=LORA[name], init_lora_weights=False)
    adapted = peft.get_peft_model(copy.deepcopy(module), config).eval()
    with_adapters = outputs(adapted, inputs)[0]
    assert (with_adapters - before).abs().max() > 1e-3
    loss_of(adapted, inputs).backward()
    trained = {n: x for n, x in adapted.named_parameters() if x.requires_grad}
    targets = {target for target in LORA[name] for n in trained if f".{target}.lora_B" in n}
    assert targets == set(LORA[name])
    assert all(x.grad.abs().max() > 0 for x in trained.values())
    merged = adapted.merge_and_unload()
    torch.testing.assert_close(outputs(merged, inputs)[0], with_adapters, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["TransformerEncoderLayer"])
def test_low_rank_adapters_of_the_whole_attention(name):
    peft = pytest.importorskip("peft", reason="adapters are PEFT's")
    if name not in NAMES:
        pytest.skip(f"no {name}")
    results = []
    for kind in (nn.TransformerEncoderLayer, torch.nn.TransformerEncoderLayer):
        torch.manual_seed(0)
        module = kind(16, 4, 24, dropout=0.0, batch_first=True)
        config = peft.LoraConfig(r=2, target_modules=["self_attn"], init_lora_weights=False)
        results.append(gradients(peft.get_peft_model(module, config), inputs_of(name)))
    got, want = ({n: x for n, x in found.items() if x is not None} for found in results)
    assert_close(got, want, rtol=1e-5, atol=1e-4)
