"""Attention on the GPU: the shapes that FlashAttention's papers count FLOPs of, and decoding."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from cases import cuda_attention_peers
from cases.attention import AttentionCase
from cases.base import DTYPES

TOKENS, HIDDEN = 16384, 2048  # batch x length, heads x head_dim
LENGTHS = (512, 1024, 2048, 4096, 8192, 16384)
HEAD_DIMS = (64, 128, 256)
CACHES, BATCHES = (8192, 32768, 131072), (1, 8, 64)


@dataclass(frozen=True)
class CudaAttentionCase(AttentionCase):
    """One row of "cuda attention" or "cuda decode"."""

    device: str = field(default="cuda", kw_only=True)

    backward_alone = True
    is_cold = True  # the caches are overwritten before each call
    peers = cuda_attention_peers.PEERS
    note = """\
shape: batch x heads[/KV heads] x length (queries>keys) x head_dim. rate: TFLOP/s, with 4 Sq Sk D \
operations per head, half if causal, 2.5 times in the backward pass, which is timed alone; in \
decode GB/s of K, V, query and output. %: of the best torch.mm of that dtype, in decode of the \
copy rate. Times are those of the GPU; its second-level cache is overwritten before each call."""

    @property
    def family(self) -> str:  # type: ignore[override]
        return f"cuda {self.op}"

    @property
    def rivals(self) -> tuple[str, ...]:  # type: ignore[override]
        return ("efficient",) if self.dtype == "fp32" else ("flash", "cudnn", "efficient", "flex")

    @property
    def bound(self) -> str:  # type: ignore[override]
        return "copy" if self.op == "decode" else "flops"

    @property
    def id(self) -> str:
        return f"cuda-{super().id}"

    @property
    def score_bytes(self) -> float:
        """What an implementation needs that writes out the scores, in float32, and keys and values
        for each query head."""
        matrices, group = 5 if self.backward else 3, self.heads // self.heads_kv
        scores = 4 * matrices * self.batch * self.heads * self.queries * self.keys
        return scores + (self.input_bytes * group if group > 1 else 0)


def _square(
    head_dim: int, length: int, mask: str, dtype: str, backward: bool, grids: tuple[str, ...]
) -> CudaAttentionCase:
    heads = HIDDEN // head_dim
    return CudaAttentionCase(
        TOKENS // length,
        heads,
        heads,
        length,
        length,
        head_dim,
        mask,
        op="attention",
        dtype=dtype,
        backward=backward,
        grids=grids,
        compiled=length == 4096 and head_dim < 256 and mask == "causal" and dtype == "bf16",
    )


def _whole_sequences() -> Iterator[CudaAttentionCase]:
    """The same number of tokens, from 32 sequences of 512 to one of 16384: bfloat16 by default."""
    others = {("fp16", 4096, 128), ("fp16", 16384, 64), ("fp32", 2048, 64), ("fp32", 4096, 128)}
    for dtype in ("bf16", "fp16", "fp32"):
        for head_dim in HEAD_DIMS:
            for mask in ("none", "causal"):
                for length in LENGTHS:
                    usual = mask == "causal" and (dtype, length, head_dim) in others
                    grids = ("default", "full") if dtype == "bf16" or usual else ("full",)
                    for backward in (False, True):
                        yield _square(head_dim, length, mask, dtype, backward, grids)


def _decode_steps() -> Iterator[CudaAttentionCase]:
    """One new token of 32 query heads on a cache of 8 heads x 128."""
    for dtype in ("bf16", "fp16", "fp32"):
        for keys in CACHES:
            for batch in BATCHES:
                middle = (keys, batch) == (32768, 8)
                yield CudaAttentionCase(
                    batch,
                    32,
                    8,
                    1,
                    keys,
                    128,
                    op="decode",
                    dtype=dtype,
                    grids=("default", "full") if dtype == "bf16" or middle else ("full",),
                    compiled=middle and dtype == "bf16",
                )


def _tiny() -> Iterator[CudaAttentionCase]:
    """Every dtype, pass and bucket of head_dim on lengths that no tile divides."""
    for dtype in DTYPES:
        options = {"dtype": dtype, "grids": ("quick",)}
        for head_dim in (40, 64, 96, 128, 256):
            for mask in ("none", "causal", "padded"):
                for backward in (False, True):
                    shape = (2, 2, 2, 177, 177, head_dim, mask)
                    yield CudaAttentionCase(*shape, op="attention", backward=backward, **options)
        shape = (1, 2, 2, 600, 600, 64, "causal")
        yield CudaAttentionCase(*shape, op="attention", backward=True, **options)
        yield CudaAttentionCase(2, 8, 2, 1, 3333, 128, op="decode", **options)


ALL = [*_whole_sequences(), *_decode_steps(), *_tiny()]
