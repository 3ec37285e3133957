"""What computes attention on the GPU, besides fastattn."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from cases import attention_peers
from cases.base import Forward, Peer, Unavailable, compiled, table

if TYPE_CHECKING:
    from collections.abc import Callable

    from cases.attention import AttentionInputs
    from cases.cuda_attention import CudaAttentionCase

MOST_SCORE_BYTES = 16 << 30


def _forced(backend: SDPBackend) -> Callable[[CudaAttentionCase], Forward]:
    """torch's function, held to one of its backends."""

    def build(case: CudaAttentionCase) -> Forward:
        if backend == SDPBackend.MATH:
            _expect_room(case)
        call = attention_peers.sdpa(case)

        def forward(x: AttentionInputs) -> Tensor:
            with sdpa_kernel(backend):
                try:
                    return call(x)
                except torch.OutOfMemoryError:
                    raise
                except RuntimeError as error:
                    raise Unavailable(_why(call, x) or str(error)) from error

        return forward

    return build


def _why(call: Forward, x: AttentionInputs) -> str:
    """What torch warns of when a backend refuses: the reasons, one a warning."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            call(x)
        except RuntimeError:
            texts = [str(warning.message).partition(" (Triggered")[0] for warning in said]
    # The backends that are switched off say so, too, and that something had no reason.
    reasons = [text for text in texts if "runtime disabled" not in text and "because:" not in text]
    return "; ".join(dict.fromkeys(reasons))


def _expect_room(case: CudaAttentionCase) -> None:
    if case.score_bytes > MOST_SCORE_BYTES:
        gib = case.score_bytes / 2**30
        raise Unavailable(f"left out: it would take about {gib:.0f} GiB for whole score matrices")


def _eager(case: CudaAttentionCase) -> Forward:
    _expect_room(case)
    return attention_peers.naive


def _expect_plain(case: CudaAttentionCase) -> None:
    if case.mask not in ("none", "causal"):
        raise Unavailable("not tried with this mask")


def _flex(case: CudaAttentionCase) -> Forward:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    _expect_plain(case)
    mask = None
    if case.is_causal:
        offset = case.keys - case.queries
        mask = create_block_mask(
            lambda batch, head, i, j: i + offset >= j,
            None,
            None,
            case.queries,
            case.keys,
            device=case.device,
        )
    flex, grouped = compiled(flex_attention), case.heads != case.heads_kv

    def forward(x: AttentionInputs) -> Tensor:
        return flex(x.query, x.key, x.value, block_mask=mask, enable_gqa=grouped)

    return forward


def _rows_first(x: AttentionInputs) -> list[Tensor]:
    """(B, S, H, D), as views."""
    return [tensor.transpose(1, 2) for tensor in (x.query, x.key, x.value)]


def _flash_attn(case: CudaAttentionCase) -> Forward:
    from flash_attn import flash_attn_func

    _expect_plain(case)
    return lambda x: flash_attn_func(*_rows_first(x), causal=case.is_causal).transpose(1, 2)


def _xformers(case: CudaAttentionCase) -> Forward:
    from xformers.ops import LowerTriangularMask, memory_efficient_attention

    _expect_plain(case)
    if case.heads != case.heads_kv:
        raise Unavailable("takes no grouped heads in four dimensions")
    mask = LowerTriangularMask() if case.is_causal else None

    def forward(x: AttentionInputs) -> Tensor:
        return memory_efficient_attention(*_rows_first(x), attn_bias=mask).transpose(1, 2)

    return forward


PEERS = table(
    Peer("fastattn", "fastattn", attention_peers.ours, "fastattn.functional.attention"),
    Peer("flash", "flash", _forced(SDPBackend.FLASH_ATTENTION), "SDPA, FLASH"),
    Peer("cudnn", "cudnn", _forced(SDPBackend.CUDNN_ATTENTION), "SDPA, CUDNN"),
    Peer("efficient", "effic", _forced(SDPBackend.EFFICIENT_ATTENTION), "SDPA, EFFICIENT"),
    Peer("flex", "flex", _flex, "torch.compile(flex_attention, dynamic=False)"),
    Peer("math", "math", _forced(SDPBackend.MATH), "SDPA, MATH"),
    Peer("eager", "eager", _eager, "softmax(Q K^T) V by hand, eager"),
    Peer("flash_attn", "fa", _flash_attn, "the package flash-attn"),
    Peer("xformers", "xf", _xformers, "xformers, memory_efficient_attention"),
)
