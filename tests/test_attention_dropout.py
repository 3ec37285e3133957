"""Dropout: its mask is a function of seed, offset and place, and nothing else."""

import math

import pytest
import torch
from attention_options import is_on_cuda
from torch.utils.checkpoint import checkpoint

import fastattn.functional as fa
from fastattn import reference
from fastattn.testing import DTYPES, attention_inputs, check_attention, randn

SEED, OFFSET = 0x1234_5678_9ABC_DEF0, 77


def attention_with_philox(query, key, value, *, philox, bias=None, layout="bhsd", **options):
    """attention with a chosen (seed, offset), which the public function draws itself."""
    names = {"dropout_p", "query_lengths", "key_lengths", "return_lse"}
    assert set(options) <= names
    options.pop("return_lse")
    return _Philox.apply(query, key, value, bias, philox, layout == "bshd", options)


class _Philox(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value, bias, philox, bshd, options):
        ctx.options = {"philox": torch.tensor(philox), "bias": bias, "bshd": bshd, **options}
        out, lse = torch.ops.fastattn.attention_forward(query, key, value, **ctx.options)
        ctx.save_for_backward(query, key, value, out, lse)
        return out, lse

    @staticmethod
    def backward(ctx, dout, dlse):
        grads = torch.ops.fastattn.attention_backward(
            dout,
            dlse,
            *ctx.saved_tensors,
            need_dquery=True,
            need_dkey_dvalue=True,
            need_dbias=ctx.needs_input_grad[3],
            need_dsink=False,
            **ctx.options,
        )
        dbias = grads[3] if ctx.needs_input_grad[3] else None
        return (*grads[:3], dbias, None, None, None)


def kept(batch, heads, queries, keys, dropout_p, philox, layout="bhsd"):
    """Which weights the kernel kept; with one-hot values, out shows them."""
    query, key = torch.zeros(*batch, heads, queries, 4), torch.zeros(*batch, heads, keys, 4)
    parts = []
    for value in torch.eye(keys).expand(*batch, heads, -1, -1).split(256, dim=-1):
        tensors = (query, key, value)
        if layout == "bshd":
            tensors = (x.transpose(-3, -2) for x in tensors)
        out, _ = torch.ops.fastattn.attention_forward(
            *tensors,
            philox=torch.tensor(philox),
            dropout_p=dropout_p,
            bshd=layout == "bshd",
        )
        parts.append((out.transpose(-3, -2) if layout == "bshd" else out) > 0)
    return torch.cat(parts, dim=-1)


@pytest.mark.parametrize("dropout_p", [0.001, 0.1, 0.5, 0.9])
def test_the_mask_is_that_of_the_reference_to_the_bit(level, dropout_p):
    for batch, heads, queries, keys in (
        ((2,), 3, 70, 131),
        ((1,), 1, 1, 500),
        ((2, 2), 2, 5, 64),
        ((1,), 4, 200, 7),
    ):
        for layout in ("bhsd", "bshd"):
            got = kept(batch, heads, queries, keys, dropout_p, (SEED, OFFSET), layout)
            want = reference.dropout_mask(got.shape, dropout_p, (SEED, OFFSET))
            assert torch.equal(got, want), f"{batch} {heads} {queries} {keys} {layout}"


def test_the_mask_uses_all_bits_of_the_seed_and_32_of_the_offset(level):
    shape = ((1,), 2, 9, 40)
    masks = [
        kept(*shape, 0.5, philox)
        for philox in ((1, 0), (1 + 2**32, 0), (1 + 2**62, 0), (1, 1), (1, 2**31))
    ]
    for i, a in enumerate(masks):
        assert not any(torch.equal(a, b) for b in masks[:i])
    assert torch.equal(kept(*shape, 0.5, (1, 2**32)), masks[0])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
def test_dropout_keeps_the_accuracy_contract(level, dtype, layout):
    for queries, keys in ((40, 70), (3, 129), (65, 65)):
        shape = {"queries": queries, "keys": keys, "heads": 4, "kv_heads": 2, "layout": layout}
        check_attention(
            attention_with_philox,
            attention_inputs(**shape, dtype=dtype),
            dropout_p=0.3,
            philox=(SEED, OFFSET),
            layout=layout,
            key_lengths=torch.tensor([keys, keys // 2]),
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_gradient_of_a_bias_is_that_of_the_weights_that_were_kept(level, dtype):
    inputs = attention_inputs(queries=40, keys=70, dtype=dtype)
    inputs["bias"] = randn(2, 40, 70, seed=5, dtype=dtype)
    check_attention(attention_with_philox, inputs, dropout_p=0.3, philox=(SEED, OFFSET))


def test_dropout_in_packed_sequences_uses_the_place_inside_of_each(level):
    bounds_q, bounds_k = torch.tensor([0, 5, 5, 45]), torch.tensor([0, 60, 60, 80])
    query, key = torch.zeros(45, 2, 4), torch.zeros(80, 2, 4)
    value = torch.zeros(80, 2, 60)
    for first, last in ((0, 60), (60, 80)):
        value[first:last] = torch.eye(60)[: last - first, None]
    out, _ = torch.ops.fastattn.attention_forward(
        query,
        key,
        value,
        cu_seqlens_q=bounds_q,
        cu_seqlens_k=bounds_k,
        philox=torch.tensor([SEED, OFFSET]),
        dropout_p=0.4,
        bshd=True,
    )
    for n, keys in ((0, 60), (2, 20)):
        got = out[bounds_q[n] : bounds_q[n + 1], :, :keys].transpose(0, 1) > 0
        want = reference.dropout_mask(got.shape, 0.4, (SEED, OFFSET), batch_index=n)
        assert torch.equal(got, want)


def test_each_call_draws_a_fresh_mask_and_manual_seed_repeats_it(level):
    inputs = attention_inputs(queries=20, keys=30)

    def call():
        return fa.attention(*inputs.values(), dropout_p=0.5)

    torch.manual_seed(5)
    first, second = call(), call()
    torch.manual_seed(5)
    assert torch.equal(call(), first) and torch.equal(call(), second)
    assert not torch.equal(first, second)


def test_no_dropout_draws_no_random_number(level):
    inputs = attention_inputs(queries=4)
    state = torch.get_rng_state()
    fa.attention(*inputs.values(), dropout_p=0.0, return_lse=True)
    assert torch.equal(torch.get_rng_state(), state)


def test_the_lse_does_not_depend_on_dropout_and_dropping_all_gives_zero(level):
    query, key, value = attention_inputs(queries=20, keys=30).values()
    _, want = fa.attention(query, key, value, return_lse=True)
    for dropout_p in (0.5, 1.0):
        out, lse = fa.attention(query, key, value, dropout_p=dropout_p, return_lse=True)
        if is_on_cuda(level):  # other kernels, which round in another order
            torch.testing.assert_close(lse, want)
        else:
            assert torch.equal(lse, want)
    assert (out == 0).all()
    leaves = [x.requires_grad_() for x in (query, key, value)]
    fa.attention(*leaves, dropout_p=1.0).sum().backward()
    assert all((x.grad == 0).all() for x in leaves)


def test_the_share_that_is_kept_is_the_stated_one(level):
    for dropout_p in (0.05, 0.5, 0.95):
        mask = kept((2,), 4, 128, 256, dropout_p, (SEED, OFFSET))
        sigma = math.sqrt(dropout_p * (1 - dropout_p) / mask.numel())
        assert abs(mask.double().mean().item() - (1 - dropout_p)) < 4 * sigma


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_recomputing_a_checkpoint_repeats_the_mask(level, use_reentrant):
    inputs = attention_inputs(queries=20, keys=30)

    def block(*tensors):
        return fa.attention(*tensors, dropout_p=0.5, causal=True)

    outs, grads = [], []
    for run in (block, lambda *t: checkpoint(block, *t, use_reentrant=use_reentrant)):
        torch.manual_seed(11)
        leaves = [x.detach().requires_grad_() for x in inputs.values()]
        outs.append(run(*leaves))
        outs[-1].backward(randn(*outs[-1].shape, seed=2))
        grads.append([x.grad for x in leaves])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
    torch.testing.assert_close(*outs)
