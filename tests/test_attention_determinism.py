"""The same call gives the same bits: for any number of threads, again, in a fork, beside others."""

import multiprocessing
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from attention_options import skip_on_gpu, skip_on_sm90, with_features

import fastattn.functional as fa
from fastattn.testing import (
    DTYPES,
    attention_inputs,
    attention_results,
    inference_results,
    randn,
)

OF_SM80 = "what is batch_invariant has kernels of sm80 alone"
REPEATED = "test_the_number_of_threads_changes_no_bit runs the kernels again"
NO_FORK = "CUDA does not live on in a forked process"
CASES = {
    "prefill": ({"queries": 150, "keys": 150, "heads": 4, "kv_heads": 2}, ["causal"]),
    "shared": ({"queries": 70, "keys": 90, "heads": 6, "kv_heads": 1}, ["bias", "sink"]),
    "decode": ({"batch": (1,), "queries": 1, "keys": 700, "heads": 4, "kv_heads": 1}, ["causal"]),
    "bias": ({"batch": (3,), "queries": 33, "keys": 40, "heads": 3}, ["bias", "key_lengths"]),
}


def case(name, dtype):
    shape, names = CASES[name]
    return with_features(names, attention_inputs(**shape, head_dim=32, dtype=dtype), seed=2)


def results(inputs, options):
    """Of both passes of training, and of inference, which has kernels of its own."""
    options = options | {"deterministic": True}
    inferred = inference_results(fa.attention, inputs, options)
    trained = attention_results(fa.attention, inputs, options)
    return {n: x.detach() for n, x in trained.items()} | {
        f"{n} alone": x for n, x in inferred.items()
    }


def same_bits(a, b):
    return all(torch.equal(x, b[name]) for name, x in a.items())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_the_number_of_threads_changes_no_bit(level, dtype, name, threads):
    inputs, options = case(name, dtype)
    runs = []
    for count in (1, 2, 3, 4, 2):
        threads(count)
        runs.append(results(inputs, options))
    assert all(same_bits(runs[0], other) for other in runs[1:])


@pytest.mark.parametrize("name", CASES)
def test_running_again_changes_no_bit(level, name):
    skip_on_sm90(REPEATED)
    inputs, options = case(name, torch.float32)
    first = results(inputs, options)
    for _ in range(10):
        assert same_bits(first, results(inputs, options))


@pytest.mark.parametrize("name", CASES)
def test_the_lse_may_be_left_out(level, name):
    inputs, options = case(name, torch.float32)
    with_lse, _ = fa.attention(**inputs, **options, return_lse=True)
    assert torch.equal(fa.attention(**inputs, **options), with_lse)


def test_the_deterministic_flag_is_accepted_either_way(level):
    inputs = attention_inputs(queries=9)
    want = fa.attention(*inputs.values())
    for flag in (None, True, False):
        assert torch.equal(fa.attention(*inputs.values(), deterministic=flag), want)


@pytest.mark.parametrize("name", ["prefill", "decode"])
def test_several_threads_of_python_at_once_get_the_bits_of_one(level, name):
    skip_on_sm90(REPEATED)
    inputs, options = case(name, torch.float32)
    want = results(inputs, options)
    with ThreadPoolExecutor(6) as pool:
        runs = [pool.submit(results, inputs, options) for _ in range(24)]
        assert all(same_bits(want, run.result(timeout=120)) for run in runs)


def test_a_forked_child_computes_the_same_after_the_parent_used_its_threads(level, threads):
    skip_on_gpu(NO_FORK)
    threads(2)
    inputs, options = case("prefill", torch.float32)
    want, _ = fa.attention(**inputs, **options, return_lse=True)
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_forward_in_child, args=(sender, inputs))
    child.start()
    try:
        assert receiver.poll(60), "the forked child hangs"
        assert torch.equal(torch.from_numpy(receiver.recv()), want)
    finally:
        child.kill()
        child.join()


def _forward_in_child(pipe, inputs):
    pipe.send(fa.attention(*inputs.values(), causal=True).numpy())


class _Dataset(torch.utils.data.Dataset):
    def __len__(self):
        return 2

    def __getitem__(self, index):
        inputs, options = case("prefill", torch.float32)
        return results(inputs, options)


def test_the_worker_of_a_data_loader_computes_the_same(level):
    skip_on_gpu(NO_FORK)
    inputs, options = case("prefill", torch.float32)
    want = results(inputs, options)
    loader = torch.utils.data.DataLoader(
        _Dataset(),
        batch_size=None,
        num_workers=1,
        timeout=120,
        multiprocessing_context="fork",
    )
    for got in loader:
        assert same_bits(want, got)


def invariant(*tensors, **options):
    """(out, lse), the same ones in inference and in training."""
    options |= {"batch_invariant": True, "return_lse": True}
    out, lse = fa.attention(*tensors, **options)
    trained, trained_lse = fa.attention(*(x.detach().requires_grad_() for x in tensors), **options)
    assert torch.equal(trained, out) and torch.equal(trained_lse, lse)
    return out, lse


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("keys", [7, 90, 600])
def test_batch_invariant_rows_do_not_depend_on_the_rest_of_the_batch(level, dtype, keys, threads):
    skip_on_sm90(OF_SM80)
    shape = {"batch": (5,), "queries": 40, "keys": keys, "heads": 4, "kv_heads": 2}
    query, key, value = attention_inputs(**shape, head_dim=32, dtype=dtype).values()
    whole = invariant(query, key, value)
    for count in (1, 2):
        threads(count)
        for b in (0, 3):
            alone = invariant(query[b : b + 1], key[b : b + 1], value[b : b + 1])
            assert all(torch.equal(x[0], y[b]) for x, y in zip(alone, whole, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_batch_invariant_rows_do_not_depend_on_how_queries_are_split(level, dtype):
    """A prefill in chunks, down to decoding one query at a time, gives the bits of a single one."""
    skip_on_sm90(OF_SM80)
    shape = {"batch": (1,), "queries": 90, "heads": 4, "kv_heads": 2, "head_dim": 32}
    query, key, value = attention_inputs(**shape, dtype=dtype).values()
    out, lse = invariant(query, key, value, causal=True)
    for first, last in ((0, 1), (0, 33), (33, 64), (64, 90), (89, 90), (40, 41), (50, 58)):
        part, part_lse = invariant(
            query[:, :, first:last], key[:, :, :last], value[:, :, :last], causal=True
        )
        assert torch.equal(part, out[:, :, first:last]), f"queries {first} to {last}"
        assert torch.equal(part_lse, lse[:, :, first:last])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_batch_invariant_rows_do_not_depend_on_padding_or_packing(level, dtype):
    skip_on_sm90(OF_SM80)
    shape = {"batch": (2,), "queries": 70, "heads": 4, "kv_heads": 2, "head_dim": 32}
    query, key, value = attention_inputs(**shape, dtype=dtype).values()
    lengths = torch.tensor([70, 29])
    padded, padded_lse = invariant(
        query, key, value, causal=True, query_lengths=lengths, key_lengths=lengths
    )
    alone, alone_lse = invariant(*(x[1:, :, :29] for x in (query, key, value)), causal=True)
    assert torch.equal(padded[1, :, :29], alone[0])
    assert torch.equal(padded_lse[1, :, :29], alone_lse[0])
    packed = (torch.cat([x[0], x[1, :, :29]], dim=1).transpose(0, 1) for x in (query, key, value))
    bounds = torch.tensor([0, 70, 99])
    out, lse = fa.attention_varlen(
        *packed, bounds, bounds, causal=True, batch_invariant=True, return_lse=True
    )
    assert torch.equal(out[70:].transpose(0, 1), alone[0])
    assert torch.equal(lse[:, 70:], alone_lse[0])


def test_batch_invariant_gradients_do_not_depend_on_the_rest_of_the_batch(level):
    skip_on_sm90(OF_SM80)
    inputs = attention_inputs(batch=(3,), queries=70, keys=90, heads=4, kv_heads=2)
    dout = randn(3, 4, 70, 16, seed=7)
    grads = []
    for rows in (slice(0, 3), slice(1, 2)):
        leaves = [x[rows].detach().requires_grad_() for x in inputs.values()]
        out = fa.attention(*leaves, causal=True, batch_invariant=True)
        grads.append(torch.autograd.grad(out, leaves, dout[rows]))
    assert all(torch.equal(a[1], b[0]) for a, b in zip(*grads, strict=True))
