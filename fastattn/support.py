"""The support matrix, found by trying: each feature is run, forward and backward, and compared with
the reference. docs/support.md is what ``python -m fastattn support`` prints."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from fastattn import _C, functional, reference
from fastattn.testing import running_on

__all__ = ["cuda_level", "declared_on_cuda", "rows", "support", "try_on"]

_HEADS, _KV_HEADS, _QUERIES, _KEYS = 4, 2, 5, 7
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_HEAD_DIMS = (1, 40, 64, 128, 256, 512)


def support() -> str:
    """The matrix as Markdown.

    >>> print(support().splitlines()[0])
    # Support matrix
    """
    lines = [
        "# Support matrix",
        "",
        "Printed by `python -m fastattn support`, which runs every row, forward and backward, and",
        "compares it with `fastattn.reference`. Features compose: alone or together, yes is yes.",
        "Where there is no GPU, its column says what the tests find on an emulated one.",
        "",
        "| feature | CPU forward | CPU backward | CUDA forward | CUDA backward |",
        "|---|---|---|---|---|",
    ]
    cuda = cuda_level()
    for row in rows():
        on_cpu = try_on(_cpu_level(), row)
        on_cuda = try_on(cuda, row) if cuda else declared_on_cuda(row)
        words = (_word(works) for works in (*on_cpu, *on_cuda))
        lines.append(f"| {row[0]} | {' | '.join(words)} |")
    lines += [
        "",
        "| function | CPU | gradient | CUDA |",
        "|---|---|---|---|",
        *(
            f"| `{name}` | yes | {gradient} | {_FUNCTIONS_ON_CUDA.get(name, 'no')} |"
            for name, gradient in _FUNCTIONS.items()
        ),
        "",
        "Derivatives that are not there, second or in forward mode, raise. Every CPU level has",
        "all of this (float64 runs on `scalar`). On CUDA, what is not there raises too.",
    ]
    return "\n".join(lines) + "\n"


_NOT_ON_CUDA = ("float64", "head_dim 512")
_FUNCTIONS_ON_CUDA = {
    "attention": "yes",
    "attention_varlen": "yes",
    "scaled_dot_product_attention": "yes",
    "merge_attention": "yes",
    "kv_cache_update": "yes",
    "attention_with_cache": "yes",
    "nn.MultiheadAttention": "without weights",
    "nn.TransformerEncoderLayer": "yes",
    "nn.TransformerDecoderLayer": "yes",
    "nn.TransformerEncoder": "yes",
    "nn.TransformerDecoder": "yes",
    "nn.Transformer": "yes",
    "nn.Attention": "yes",
    "nn.TransformerBlock": "yes",
    "nn.CausalLM": "yes",
    "nn.RelativeAttention": "yes",
    "nn.T5RelativeBias": "yes",
    "nn.RelativeBias2d": "yes",
    "nn.LearnedPositions": "yes",
    "nn.SinusoidalPositions": "yes",
    "nn.ALiBi": "yes",
    "nn.KVCache": "yes",
    "nn.SlidingWindowKVCache": "yes",
    "nn.PagedKVCache": "yes",
    "generate": "yes",
    "layer_norm": "yes",
    "rms_norm": "yes",
    "add_layer_norm": "yes",
    "add_rms_norm": "yes",
    "qk_rms_norm": "yes",
    "nn.LayerNorm": "yes",
    "nn.RMSNorm": "yes",
    "nn.FeedForward": "yes",
    "nn.GatedFeedForward": "yes",
    "nn.RotaryEmbedding": "yes",
    "apply_rope": "yes",
    "apply_rope_": "yes",
    "apply_rope_qk": "yes",
    "apply_rope_qk_": "yes",
    "rope_tables": "yes",
    "gelu": "yes",
    "silu": "yes",
    "relu": "yes",
    "bias_gelu": "yes",
    "bias_silu": "yes",
    "bias_relu": "yes",
    "swiglu": "yes",
    "geglu": "yes",
    "reglu": "yes",
    "linear": "torch's",
    "nn.GELU": "yes",
    "nn.Linear": "torch's",
}
_FUNCTIONS = {
    "attention": "yes",
    "attention_varlen": "yes",
    "scaled_dot_product_attention": "yes",
    "nn.MultiheadAttention": "yes",
    "merge_attention": "yes, of any order",
    "attention_weights": "yes, of any order",
    "attention_column_sums": "none",
    "kv_cache_update": "none",
    "attention_with_cache": "none",
    "nn.TransformerEncoderLayer": "yes",
    "nn.TransformerDecoderLayer": "yes",
    "nn.TransformerEncoder": "yes",
    "nn.TransformerDecoder": "yes",
    "nn.Transformer": "yes",
    "nn.Attention": "yes",
    "nn.FeedForward": "yes",
    "nn.GatedFeedForward": "yes",
    "nn.TransformerBlock": "yes",
    "nn.CausalLM": "yes",
    "nn.RelativeAttention": "yes",
    "nn.T5RelativeBias": "yes",
    "nn.RelativeBias2d": "yes",
    "nn.LearnedPositions": "yes",
    "nn.RotaryEmbedding": "yes, of any order",
    "nn.SinusoidalPositions": "yes, of any order",
    "nn.ALiBi": "none",
    "nn.KVCache": "none",
    "nn.SlidingWindowKVCache": "none",
    "nn.PagedKVCache": "none",
    "generate": "none",
    "layer_norm": "yes",
    "rms_norm": "yes",
    "add_layer_norm": "yes",
    "add_rms_norm": "yes",
    "qk_rms_norm": "yes",
    "nn.LayerNorm": "yes",
    "nn.RMSNorm": "yes",
    "apply_rope": "yes, of any order",
    "apply_rope_": "yes, of any order",
    "apply_rope_qk": "yes, of any order",
    "apply_rope_qk_": "yes, of any order",
    "rope_tables": "none",
    "gelu": "yes",
    "silu": "yes",
    "relu": "yes",
    "bias_gelu": "yes",
    "bias_silu": "yes",
    "bias_relu": "yes",
    "swiglu": "yes",
    "geglu": "yes",
    "reglu": "yes",
    "linear": "yes, of any order",
    "nn.GELU": "yes",
    "nn.Linear": "yes, of any order",
}

Inputs = dict[str, Tensor]
Row = tuple[str, Inputs, dict[str, Any]]


def _inputs(dtype: torch.dtype = torch.float32, head_dim: int = 16, value_dim: int = 16) -> Inputs:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    return {
        "query": normal(2, _HEADS, _QUERIES, head_dim),
        "key": normal(2, _KV_HEADS, _KEYS, head_dim),
        "value": normal(2, _KV_HEADS, _KEYS, value_dim),
    }


def rows() -> Iterator[Row]:
    """The name of each feature, and what attention is called with."""
    for dtype in _DTYPES:
        yield str(dtype).removeprefix("torch."), _inputs(dtype), {}
    for head_dim in _HEAD_DIMS:
        yield f"head_dim {head_dim}", _inputs(head_dim=head_dim, value_dim=head_dim), {}
    yield "value head_dim != head_dim", _inputs(head_dim=24, value_dim=10), {}
    plain = _inputs()
    shape = (2, _HEADS, _QUERIES, _KEYS)
    generator = torch.Generator().manual_seed(1)
    visible = torch.rand(shape, generator=generator) > 0.3
    bias = torch.randn(shape, generator=generator)
    features: Mapping[str, dict[str, Any]] = {
        "causal, bottom right": {"causal": "bottom_right"},
        "causal, top left": {"causal": "top_left"},
        "window": {"window": (2, 1)},
        "boolean mask": {"mask": visible},
        "boolean mask, broadcast": {"mask": visible[:1, :1]},
        "query and key lengths": {
            "query_lengths": torch.tensor([3, 5]),
            "key_lengths": torch.tensor([7, 0]),
        },
        "ALiBi (heads)": {"alibi_slopes": functional.alibi_slopes(_HEADS)},
        "ALiBi (batch, heads)": {"alibi_slopes": functional.alibi_slopes(_HEADS).expand(2, -1)},
        "softcap": {"softcap": 2.0},
        "scale": {"scale": 0.3},
        "positions of parts": {"query_offset": 4, "key_offset": 2, "causal": True},
        "dropout": {"dropout_p": 0.25},
        "batch_invariant": {"batch_invariant": True},
    }
    for name, options in features.items():
        yield name, plain, options
    yield "bias with its gradient", plain | {"bias": bias}, {}
    yield "bias with its gradient, broadcast", plain | {"bias": bias[:1, :, :1]}, {}
    yield "sink with its gradient", plain | {"sink": torch.randn(_HEADS, generator=generator)}, {}
    bshd = {name: x.transpose(1, 2) for name, x in plain.items()}
    yield 'layout "bshd"', bshd, {"layout": "bshd"}
    five = {name: x.unsqueeze(1).expand(-1, 3, -1, -1, -1) for name, x in plain.items()}
    yield "two batch dimensions", five, {}
    yield "no batch dimension", {name: x[0] for name, x in plain.items()}, {}
    bounds = {"cu_seqlens_q": torch.tensor([0, 2, 4]), "cu_seqlens_k": torch.tensor([0, 3, 7])}
    yield "packed sequences", {name: x[0].transpose(0, 1) for name, x in plain.items()}, bounds


def cuda_level() -> str | None:
    """Where the CUDA kernels can be tried here: on a GPU, or in a build that emulates one."""
    if _C.emulated_levels:
        level = _C.active_cpu_level()
        return level if level in _C.emulated_levels else _C.emulated_levels[0]
    return "cuda" if _C.built_with_cuda and torch.cuda.is_available() else None


def declared_on_cuda(row: Row) -> tuple[bool, bool]:
    """Whether forward and backward are there, where that cannot be tried."""
    works = row[0] not in _NOT_ON_CUDA
    return works, works


def _cpu_level() -> str:
    level = _C.active_cpu_level()
    return "scalar" if level in _C.emulated_levels else level


def try_on(level: str, row: Row) -> tuple[bool, bool]:
    """Whether forward and backward at a level give what the reference gives."""
    _, inputs, options = row
    with running_on(level):
        device = torch.get_default_device()
        moved = {n: x.to(device) if isinstance(x, Tensor) else x for n, x in options.items()}
        return _try({n: x.to(device) for n, x in inputs.items()}, moved)


def _try(inputs: Inputs, options: dict[str, Any]) -> tuple[bool, bool]:
    packed = "cu_seqlens_q" in options
    given = functional.attention_varlen if packed else functional.attention
    meant: Callable[..., Any] = reference.attention_varlen if packed else reference.attention
    philox = {}
    if "dropout_p" in options:
        torch.manual_seed(0)
        philox = {"philox": tuple(torch.randint(2**63 - 1, (2,)).tolist())}
        torch.manual_seed(0)
    try:
        out, *gradients = _run(given, inputs, options)
    except (RuntimeError, TypeError, ValueError):
        return False, False
    expected, *expected_gradients = _run(meant, inputs, options | philox)
    return _close([out], [expected]), _close(gradients, expected_gradients)


def _run(function: Any, inputs: Inputs, options: dict[str, Any]) -> list[Tensor]:
    leaves = {name: x.detach().clone().requires_grad_() for name, x in inputs.items()}
    out, lse = function(**leaves, **options, return_lse=True)
    loss = out.float().square().sum() + torch.where(lse.isinf(), 0.0, lse).sum()
    return [out, *torch.autograd.grad(loss, list(leaves.values()))]


def _close(given: list[Tensor], expected: list[Tensor]) -> bool:
    tolerance = 64 * torch.finfo(expected[0].dtype).eps
    return all(
        torch.allclose(g, e, rtol=0.0, atol=tolerance * max(e.abs().max().item(), 1.0))
        for g, e in zip(given, expected, strict=True)
    )


def _word(works: bool) -> str:
    return "yes" if works else "no"
