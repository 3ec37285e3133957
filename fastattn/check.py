"""``python -m fastattn check``: this machine's CPU levels and GPU against the reference."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastattn import _C, functional, reference
from fastattn.testing import (
    DTYPES,
    assert_accurate,
    attention_inputs,
    check_attention,
    randn,
    running_on,
    to_float64,
)

__all__ = ["run_check"]

# Takes a dtype, and returns the used part of the error that the accuracy contract allows.
Case = Callable[[torch.dtype], float]


def run_check() -> bool:
    """Hold every level that this machine can run to the accuracy contract; prints a table."""
    passed = True
    print(f"{'level':<12}{'dtype':<10}{'case':<16}error, in % of what the accuracy contract allows")
    for level, obstacle in (*_C.cpu_levels(), ("cuda", _cuda_obstacle())):
        if obstacle is not None:
            print(f"{level:<12}not run: {obstacle}")
            continue
        with running_on(level):
            for dtype in DTYPES:
                for name, case in _cases():
                    line = f"{level:<12}{str(dtype).removeprefix('torch.'):<10}{name:<16}"
                    try:
                        print(f"{line}{100 * case(dtype):5.1f}  ok")
                    except (AssertionError, RuntimeError) as error:
                        passed = False
                        print(f"{line}FAILED: {error}")
    return passed


def _cuda_obstacle() -> str | None:
    if not _C.built_with_cuda:
        return "not built"
    return None if torch.cuda.is_available() else "no GPU, or a torch without CUDA"


def _cases() -> Iterator[tuple[str, Case]]:
    attentions: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
        "plain": ({"queries": 129, "head_dim": 64}, {}),
        "causal": ({"queries": 65, "keys": 130, "head_dim": 80}, {"causal": True}),
        "window": ({"queries": 200, "heads": 4, "kv_heads": 2}, {"window": (17, 5)}),
        "softcap": ({"queries": 33, "head_dim_v": 24}, {"softcap": 5.0}),
        "decode": ({"queries": 1, "keys": 1025, "heads": 8, "kv_heads": 2}, {"causal": True}),
    }
    for name, (shape, options) in attentions.items():
        yield name, partial(_attention, shape, options)
    rows, row = (37, 131), (131,)
    yield "gelu", partial(_function, "gelu", (rows,), {}, ())
    yield "bias_gelu", partial(_function, "bias_gelu", (rows, row), {"approximate": "tanh"}, ())
    yield "swiglu", partial(_function, "swiglu", (rows, rows), {}, ())
    tables = functional.rope_tables(24, 19)
    yield "rope", partial(_function, "apply_rope", ((2, 3, 19, 40),), {}, tables)
    yield "cache", partial(_cache, False)
    yield "cache, int8", partial(_cache, True)
    yield "layer_norm", partial(_function, "layer_norm", (rows, row, row), {}, ())
    yield "rms_norm", partial(_function, "rms_norm", (rows, row), {}, ())
    yield "add_rms_norm", partial(_function, "add_rms_norm", (rows, rows, row), {}, ())


def _attention(shape: dict[str, Any], options: dict[str, Any], dtype: torch.dtype) -> float:
    return check_attention(functional.attention, attention_inputs(**shape, dtype=dtype), **options)


def _function(
    name: str,
    shapes: tuple[tuple[int, ...], ...],
    options: dict[str, Any],
    tables: tuple[Tensor, ...],
    dtype: torch.dtype,
) -> float:
    """Results, and the gradients of those that are as large as the first input."""
    inputs = [randn(*shape, seed=i, dtype=dtype) for i, shape in enumerate(shapes)]
    large = [i for i, shape in enumerate(shapes) if shape == shapes[0]]

    def run(module: Any, wide: bool) -> list[Tensor]:
        leaves = [to_float64(x) if wide else x.clone() for x in inputs]
        for i in large:
            leaves[i].requires_grad_()
        width = [shapes[0][-1]] if name.endswith("_norm") and not name.startswith("add") else []
        results = getattr(module, name)(leaves[0], *width, *leaves[1:], *tables, **options)
        outs = list(results) if isinstance(results, tuple) else [results]
        douts = [randn(*out.shape, seed=9, dtype=dtype).to(out.dtype) for out in outs]
        gradients = torch.autograd.grad(outs, [leaves[i] for i in large], douts)
        return [out.detach() for out in outs] + list(gradients)

    return _compare(run(functional, False), run(reference, True), run(reference, False), name)


def _cache(quantized: bool, dtype: torch.dtype) -> float:
    """A chunk of a prompt, written into pages and attended to."""
    inputs = attention_inputs(queries=21, heads=4, kv_heads=2, head_dim=40, dtype=dtype)
    block_table = torch.tensor([[3, 1, 6], [2, 5, 0]])

    def run(module: Any, wide: bool) -> list[Tensor]:
        storage = torch.int8 if quantized else torch.float64 if wide else dtype
        caches = {name: torch.zeros(7, 2, 16, 40, dtype=storage) for name in ("k_cache", "v_cache")}
        if quantized:
            caches |= {name: torch.zeros(7, 2, 16) for name in ("k_scale", "v_scale")}
        given = {name: to_float64(x) if wide else x for name, x in inputs.items()}
        lengths = torch.tensor([20, 11])
        out = module.attention_with_cache(
            **given, **caches, cache_lengths=lengths, block_table=block_table, window=(15, 0)
        )
        return [out]

    return _compare(run(functional, False), run(reference, True), run(reference, False), "cache")


def _compare(given: list[Tensor], oracle: list[Tensor], eager: list[Tensor], name: str) -> float:
    triples = zip(given, oracle, eager, strict=True)
    return max(assert_accurate(*triple, f"{name}[{i}]") for i, triple in enumerate(triples))
