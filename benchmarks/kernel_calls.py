"""Every kind of call that has kernels, once, on small shapes: what compute-sanitizer watches.

    compute-sanitizer --tool racecheck python benchmarks/kernel_calls.py --seconds=60

Inputs are made on the CPU and results are read there, so that hardly a kernel runs but fastattn's
own. Results must not be NaN; that they are right is for the tests to say.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from fastattn import functional
from fastattn.functional import (
    attention,
    attention_varlen,
    attention_with_cache,
    kv_cache_update,
    rope_tables,
)
from fastattn.testing import cotangents, randn
from torch import Tensor

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
DIFFERENTIABLE = ("query", "key", "value", "bias", "sink")

# The inputs of each; odd and even rows, in few of which a block is whole.
ACTIVATIONS: dict[str, tuple[tuple[int, ...], ...]] = {
    "gelu": ((301, 77),),
    "silu": ((2, 33, 520),),
    "relu": ((9, 1),),
    "bias_gelu": ((700, 88), (88,)),
    "bias_silu": ((3, 5000), (5000,)),
    "bias_relu": ((70, 3), (3,)),
    "swiglu": ((65, 1376),),
    "geglu": ((130, 40), (130, 40)),
    "reglu": ((1, 7), (1, 7)),
}

Call = Callable[[str], tuple[Tensor, ...]]  # takes a device, returns all results


def calls() -> Iterator[tuple[str, Call]]:
    """By name, what matters most first."""
    yield "plain", partial(_trained, (2, 4, 4, 130, 130, 64))
    yield "causal, grouped heads", partial(_trained, (1, 6, 2, 97, 161, 128), causal=True)
    yield "decode", partial(_decoded, 1)
    yield "decode, pages", partial(_decoded, 1, page_rows=16)
    yield "cache write", _written
    yield "decode, new rows, rotated", partial(_decoded, 1, new=True)
    for head_dim in (64, 96, 128, 256):
        for dtype in DTYPES:
            shape = (1, 2, 1, 70, 133, head_dim)
            yield f"{dtype}, head_dim {head_dim}", partial(_trained, shape, dtype, causal=True)
    for dtype in ("bf16", "fp32"):
        for name, shapes in ACTIVATIONS.items():
            yield f"{dtype}, {name}", partial(_elementwise, name, shapes, dtype)
        for interleaved in (False, True):
            how = "interleaved" if interleaved else "halves"
            yield f"{dtype}, rope, {how}", partial(_rotated, dtype, interleaved)
    yield "deterministic", partial(_trained, (1, 4, 2, 200, 200, 64), deterministic=True)
    yield "packed", _packed
    yield "decode, int8", partial(_decoded, 1, dtype=torch.int8)
    yield "decode, several rows", partial(_decoded, 3, causal=True)
    for name, norm in _norms().items():
        yield name, norm
    yield "decode, int8, new rows, rotated", partial(_decoded, 2, dtype=torch.int8, new=True)
    yield "decode, pages, new rows, rotated", partial(_decoded, 3, page_rows=16, new=True)
    yield "cache write, int8", partial(_written, dtype=torch.int8)
    yield "cache write, odd head_dim", partial(_written, head_dim=81)
    yield "cache write, slots", partial(_written, slots=True)
    for name, options in _options().items():
        yield name, partial(_trained, (2, 2, 2, 83, 97, 40), **options)


def _options() -> dict[str, dict[str, Any]]:
    lengths = {"query_lengths": torch.tensor([83, 20]), "key_lengths": torch.tensor([1, 97])}
    return {
        "window": {"window": (20, 3)},
        "mask": {"mask": randn(2, 1, 83, 97, seed=1) < 0.7},
        "bias": {"bias": randn(1, 2, 83, 97, seed=2, dtype=torch.bfloat16)},
        "lengths": lengths,
        "alibi": {"alibi_slopes": torch.tensor([0.5, 0.1])},
        "sink": {"sink": torch.tensor([0.3, -1.0])},
        "softcap": {"softcap": 20.0},
        "dropout": {"dropout_p": 0.2},
        "batch_invariant": {"batch_invariant": True},
    }


def _norms() -> dict[str, Call]:
    """Rows within a warp, of several warps, and such as no block holds."""
    return {
        "layer norm": partial(_normed, "add_layer_norm", (130, 40), dropout_p=0.2),
        "layer norm, a row a block": partial(_normed, "add_layer_norm", (9, 1999)),
        "layer norm, wide rows": partial(_normed, "add_layer_norm", (5, 16400), "fp32"),
        "rms norm": partial(_normed, "add_rms_norm", (70, 1024), casting="llama"),
        "rms norm, wide rows": partial(_normed, "add_rms_norm", (5, 33000), casting="gemma"),
    }


def _normed(
    op: str, shape: tuple[int, int], dtype: str = "bf16", *, device: str, **options: Any
) -> tuple[Tensor, ...]:
    """Both results and all gradients."""
    width, names = shape[1:], ("weight", "bias")[: 2 if op == "add_layer_norm" else 1]
    rows = [randn(*shape, seed=i, dtype=DTYPES[dtype]) for i in range(4)]
    drawn = {"input": rows[0], "residual": rows[1]}
    drawn |= {n: randn(*width, seed=i, dtype=DTYPES[dtype]) for i, n in enumerate(names, 4)}
    leaves = {n: x.requires_grad_() for n, x in _placed(drawn, device).items()}
    outputs = getattr(functional, op)(**leaves, **options)
    arrived = [x.to(device) for x in rows[2:]]
    return *outputs, *torch.autograd.grad(outputs, list(leaves.values()), arrived)


def _trained(
    shape: tuple[int, ...], dtype: str = "bf16", *, device: str, **options: Any
) -> tuple[Tensor, ...]:
    """Of attention with shape (batch, heads, KV heads, queries, keys, head_dim)."""
    batch, heads, heads_kv, queries, keys, head_dim = shape
    drawn = {
        "query": randn(batch, heads, queries, head_dim, seed=1, dtype=DTYPES[dtype]),
        "key": randn(batch, heads_kv, keys, head_dim, seed=2, dtype=DTYPES[dtype]),
        "value": randn(batch, heads_kv, keys, head_dim, seed=3, dtype=DTYPES[dtype]),
    }
    return _results(attention, drawn | options, device)


def _packed(*, device: str) -> tuple[Tensor, ...]:
    names = ("query", "key", "value")
    drawn = {n: randn(141, 2, 64, seed=i, dtype=torch.bfloat16) for i, n in enumerate(names)}
    starts = torch.tensor([0, 40, 41, 141], dtype=torch.int32)
    lengths = {"cu_seqlens_q": starts, "cu_seqlens_k": starts, "max_seqlen_q": 100}
    return _results(attention_varlen, drawn | lengths | {"max_seqlen_k": 100}, device)


def _results(
    function: Callable[..., Any], arguments: dict[str, Any], device: str
) -> tuple[Tensor, ...]:
    """Output, log-sum-exp and all gradients."""
    placed = _placed(arguments, device)
    leaves = [placed[name].requires_grad_() for name in DIFFERENTIABLE if name in placed]
    out, lse = function(**placed, return_lse=True)
    douts = [x.to(device) for x in cotangents(out.detach().cpu(), lse.detach().cpu(), seed=4)]
    return out, lse, *torch.autograd.grad((out, lse), leaves, douts)


def _elementwise(
    name: str, shapes: tuple[tuple[int, ...], ...], dtype: str, *, device: str
) -> tuple[Tensor, ...]:
    """An activation and its gradients."""
    drawn = (randn(*shape, seed=i, dtype=DTYPES[dtype]) for i, shape in enumerate(shapes))
    leaves = [x.to(device).requires_grad_() for x in drawn]
    out = getattr(functional, name)(*leaves)
    dout = randn(*out.shape, seed=4, dtype=DTYPES[dtype]).to(device)
    return out, *torch.autograd.grad(out, leaves, dout)


def _rotated(dtype: str, interleaved: bool, *, device: str) -> tuple[Tensor, ...]:
    """Query and key, which are slices of a fused projection, and then a query in place."""
    fused = randn(2, 37, 11, 72, seed=1, dtype=DTYPES[dtype])
    positions = torch.randint(90, (2, 37), generator=torch.Generator().manual_seed(2))
    options = _placed({"offset": torch.tensor([3, 9]), "positions": positions}, device)
    cos, sin = (table.to(device) for table in functional.rope_tables(64, 100))
    leaf = fused.to(device).requires_grad_()
    outs = functional.apply_rope_qk(
        leaf[:, :, :6], leaf[:, :, 6:8], cos, sin, interleaved=interleaved, layout="bshd", **options
    )
    (gradient,) = torch.autograd.grad(outs[0].sum() + outs[1].sum(), leaf)
    with torch.no_grad():
        written = functional.apply_rope_(leaf[:, :, 9], cos, sin, interleaved=interleaved)
    return *outs, gradient, written


def _decoded(
    queries: int,
    *,
    device: str,
    page_rows: int = 0,
    dtype: torch.dtype = torch.bfloat16,
    causal: bool = False,
    new: bool = False,
) -> tuple[Tensor, ...]:
    """Of two requests over a cache, contiguous or in pages, of 700 rows. new: with keys and values
    of their own, which are written first."""
    pages = -(-700 // page_rows) if page_rows else 1
    shape = (2 * pages, 2, page_rows or 700, 128)
    arguments: dict[str, Any] = {
        "query": randn(2, 8, queries, 128, seed=1, dtype=torch.bfloat16),
        "k_cache": randn(*shape, seed=2, dtype=torch.bfloat16),
        "v_cache": randn(*shape, seed=3, dtype=torch.bfloat16),
        "cache_lengths": torch.tensor([700, 33], dtype=torch.int32),
    }
    if page_rows:
        arguments["block_table"] = torch.randperm(2 * pages).int().reshape(2, pages)
    if dtype == torch.int8:
        for name in ("k", "v"):
            arguments[f"{name}_cache"] = (50 * arguments[f"{name}_cache"]).char()
            arguments[f"{name}_scale"] = torch.full(shape[:-1], 0.02)
    if new:
        rows = (randn(2, 2, queries, 128, seed=seed, dtype=torch.bfloat16) for seed in (4, 5))
        arguments |= dict(zip(("key", "value"), rows))
        arguments |= {"rope": rope_tables(128, 700), "causal": True}
        arguments["cache_lengths"] -= queries
    with torch.no_grad():
        return attention_with_cache(
            **_placed({"causal": causal} | arguments, device), return_lse=True
        )


def _written(
    *,
    device: str,
    dtype: torch.dtype = torch.bfloat16,
    head_dim: int = 128,
    slots: bool = False,
) -> tuple[Tensor, ...]:
    """The caches after a write of 5 rows of two requests, which stand beyond their end in part."""
    int8 = dtype == torch.int8
    shape = (2, 3, 40, head_dim)
    drawn = [randn(2, 3, 5, head_dim, seed=seed, dtype=torch.bfloat16) for seed in (1, 2)]
    arguments: dict[str, Any] = {"positions": torch.tensor([1, 37 if device != "cpu" else 35])}
    if slots:
        drawn = [x.transpose(1, 2).flatten(0, 1) for x in drawn]
        arguments["positions"] = torch.tensor([0, 7, -1, 7, 79, 40, 41, -5, 42, 43])
    else:
        arguments["rope"] = tuple(x[:, : head_dim // 2] for x in rope_tables(128, 40))
    caches = {name: torch.zeros(shape, dtype=dtype) for name in ("k_cache", "v_cache")}
    if int8:
        caches |= {name: torch.zeros(shape[:-1]) for name in ("k_scale", "v_scale")}
    caches = _placed(caches, device)
    rows = dict(zip(("key", "value"), drawn))
    kv_cache_update(**caches, **_placed(rows | arguments, device))
    return tuple(caches.values())


def _placed(arguments: dict[str, Any], device: str) -> dict[str, Any]:
    def moved(x: Any) -> Any:
        if isinstance(x, tuple):
            return tuple(map(moved, x))
        return x.to(device) if isinstance(x, Tensor) else x

    return {name: moved(x) for name, x in arguments.items()}


def main(argv: list[str] | None = None) -> int:
    """Exit status 1 where a call fails. What time does not allow is left out, and counted."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="start no call later")
    options = parser.parse_args(argv)
    end, failures, work = time.monotonic() + options.seconds, 0, list(calls())
    for i, (name, call) in enumerate(work):
        if time.monotonic() > end:
            print(f"{i} of {len(work)} calls in time, {failures} failed")
            break
        try:
            results = [x.detach().cpu() for x in call(device=options.device)]
            assert not any(x.isnan().any() for x in results), "a result has NaN"
        except Exception as error:
            failures += 1
            print(f"{name}: FAILED: {type(error).__name__}: {error}", flush=True)
        else:
            print(f"{name}: ok", flush=True)
    else:
        print(f"{len(work)} calls, {failures} failed")
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main())
