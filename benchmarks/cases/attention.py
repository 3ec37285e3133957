"""Attention: over whole sequences, and of a few new tokens against a long key/value cache, which is
bound by reading the cache."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from cases import attention_peers
from cases.attention_check import AttentionOracle
from cases.base import DTYPES, Case, Inputs


@dataclass
class AttentionInputs(Inputs):
    """query (B, H, Sq, D), key and value (B, Hkv, Sk, D), and what the mask of the case adds."""

    query: Tensor
    key: Tensor
    value: Tensor
    bias: Tensor | None = None  # (1, H, Sq, Sk), in the dtype of the query
    key_lengths: Tensor | None = None  # (B,)
    visible: Tensor | None = (
        None  # boolean, broadcasts to (B, H, Sq, Sk): what peers without lengths are given
    )


@dataclass(frozen=True)
class AttentionCase(Case):
    """One row of the family of its op: attention, or decode (few queries against a long cache)."""

    batch: int
    heads: int
    heads_kv: int
    queries: int
    keys: int
    head_dim: int
    mask: str = "none"  # or causal, padded (by key lengths), bias (a dense one)

    peers = attention_peers.PEERS
    rivals = ("sdpa",)
    note = """\
shape: batch x heads[/KV heads] x length (queries>keys) x head_dim. rate: TFLOP/s, with 4 Sq Sk D \
operations per head, half if causal, padding not counted, 3.5 times with backward; in decode GB/s \
of K, V, query and output. %: of the products on registers, in decode of the read rate. Decode \
rows take their inputs in turn from so many copies that none is still in a cache."""

    @property
    def family(self) -> str:  # type: ignore[override]
        return self.op

    @property
    def bound(self) -> str:  # type: ignore[override]
        return "read" if self.op == "decode" else "flops"

    @property
    def is_cold(self) -> bool:  # type: ignore[override]
        return self.op == "decode"

    @property
    def details(self) -> dict[str, str]:
        return {"mask": self.mask}

    @property
    def _heads(self) -> str:
        return f"{self.heads}" if self.heads == self.heads_kv else f"{self.heads}/{self.heads_kv}"

    @property
    def shape(self) -> str:
        length = f"{self.keys}" if self.queries == self.keys else f"{self.queries}>{self.keys}"
        return f"{self.batch}x{self._heads}x{length}x{self.head_dim}"

    @property
    def series(self) -> str:
        """Rows of one series differ in length (and in batch, for the same number of tokens)."""
        size = (
            f"{self.batch * self.keys} tokens" if self.op == "attention" else f"batch {self.batch}"
        )
        mask = "no mask" if self.mask == "none" else self.mask
        kind = f"{mask}, {self.dtype} {self.passes}"
        return f"{self.op} {self._heads} heads x {self.head_dim}, {size}, {kind}"

    @property
    def size(self) -> int:
        return self.keys

    @property
    def is_causal(self) -> bool:
        return self.mask == "causal"

    @property
    def lengths(self) -> list[int]:
        """Visible keys of each sequence; in a padded batch from a quarter of them to all."""
        if self.mask != "padded":
            return [self.keys] * self.batch
        first, steps = self.keys // 4, max(self.batch - 1, 1)
        return [first + (self.keys - first) * i // steps for i in range(self.batch)]

    @property
    def work(self) -> float:
        """4 Sq Sk D FLOPs per head, half if causal, padding not counted; backward takes 2.5 times
        that. In decode what must be moved: K, V and the query read once, the output written."""
        if self.op == "decode":
            size = DTYPES[self.dtype].itemsize * self.head_dim
            outer = 2.0 * self.batch * self.heads * self.queries
            return size * (2.0 * self.heads_kv * sum(self.lengths) + outer)
        forward = 4.0 * self.heads * self.queries * sum(self.lengths) * self.head_dim
        passes = {"fwd": 1.0, "bwd": 2.5, "fwd+bwd": 3.5}[self.passes]
        return forward * (0.5 if self.is_causal else 1.0) * passes

    @property
    def input_bytes(self) -> int:
        return (
            self.batch * self.heads_kv * self.keys * self.head_dim * 2 * DTYPES[self.dtype].itemsize
        )

    @property
    def shows_memory(self) -> bool:
        return self.keys >= 256

    def tiny(self) -> AttentionCase:
        heads = self.heads // self.heads_kv
        return replace(self, batch=1, heads=heads, heads_kv=1, queries=1, keys=16)

    def oracle(self, inputs: Inputs) -> AttentionOracle:
        return AttentionOracle(self, inputs)

    def inputs(self) -> AttentionInputs:
        """Normally distributed."""
        generator, dtype, device = self.generator(), DTYPES[self.dtype], self.device

        def normal(*shape: int, grad: bool = self.backward) -> Tensor:
            numbers = torch.randn(shape, generator=generator, device=device)
            return numbers.to(dtype).requires_grad_(grad)

        query_shape = (self.batch, self.heads, self.queries, self.head_dim)
        cache_shape = (self.batch, self.heads_kv, self.keys, self.head_dim)
        inputs = AttentionInputs(normal(*query_shape), normal(*cache_shape), normal(*cache_shape))
        if self.backward:
            inputs.douts = (normal(*query_shape, grad=False),)
        if self.mask == "bias":
            inputs.bias = normal(1, self.heads, self.queries, self.keys)
        if self.mask == "padded":
            inputs.key_lengths = torch.tensor(self.lengths, device=device)
            inputs.visible = torch.arange(self.keys, device=device) < inputs.key_lengths[:, None]
            inputs.visible = inputs.visible[:, None, None, :]
        if self.is_causal:  # the bottom-right corner: the last query sees every key
            seen = torch.ones(self.queries, self.keys, dtype=torch.bool, device=device)
            inputs.visible = seen.tril(self.keys - self.queries)
        return inputs


def _attention(
    batch: int,
    heads: int,
    length: int,
    head_dim: int,
    dtype: str,
    mask: str = "none",
    *,
    backward: bool = False,
    default: bool = False,
    compiled: bool = False,
) -> AttentionCase:
    grids = ("default", "full") if default else ("full",)
    shape = (batch, heads, heads, length, length, head_dim)
    return AttentionCase(
        *shape,
        mask,
        op="attention",
        dtype=dtype,
        backward=backward,
        grids=grids,
        compiled=compiled,
    )


def _model_shapes() -> Iterator[AttentionCase]:
    """From BERT-base to long contexts, one sequence each."""
    shapes = [(12, 512, 64), (16, 2048, 64), (8, 2048, 128), (4, 8192, 128)]
    trained = {(12, 512, "none"), (8, 2048, "causal")}
    for heads, length, head_dim in shapes:
        for dtype in ("fp32", "bf16"):
            for mask in ("none", "causal"):
                shape = (1, heads, length, head_dim, dtype, mask)
                # The longest shape is in the default grid once, as it is used: causal and in 16
                # bits.
                usual = length < 8192 or (dtype == "bf16" and mask == "causal")
                bert = length == 512 and mask == "none"
                yield _attention(*shape, default=usual, compiled=bert)
                yield _attention(*shape, backward=True, default=(heads, length, mask) in trained)
    for heads, length, head_dim in shapes[:3]:
        yield _attention(1, heads, length, head_dim, "fp16", default=length == 512)


def _masked_batches() -> Iterator[AttentionCase]:
    """Padded batches and dense biases; with backward, the gradient of the bias is wanted too."""
    for dtype in ("fp32", "bf16"):
        for backward in (False, True):
            default = dtype == "fp32" or not backward
            for batch, heads, length, head_dim in ((8, 12, 512, 64), (4, 16, 1024, 64)):
                shape = (batch, heads, length, head_dim, dtype, "padded")
                yield _attention(*shape, backward=backward, default=default and batch == 8)
            for heads, length, head_dim in ((12, 512, 64), (8, 2048, 128)):
                shape = (1, heads, length, head_dim, dtype, "bias")
                yield _attention(*shape, backward=backward, default=default and length == 512)


def _length_sweep() -> Iterator[AttentionCase]:
    """4096 tokens of a BERT-base layer, from 256 sequences of 16 to one of 4096."""
    lengths = [16, 32, 64, 128, 256, 512, 1024, 2048, 4096]
    for dtype in ("fp32", "bf16"):
        for length in lengths:
            shape = (4096 // length, 12, length, 64, dtype)
            trained = length in (32, 128, 512, 1024)
            yield _attention(*shape, default=True)
            yield _attention(*shape, backward=True, default=trained)
            yield _attention(*shape, "causal")
            yield _attention(*shape, "causal", backward=True)


def _decode_steps() -> Iterator[AttentionCase]:
    """One new token (or four, when speculating) of 32 query heads on a cache of 8 heads x 128."""

    def decode(
        batch: int, queries: int, keys: int, dtype: str, default: bool = False
    ) -> AttentionCase:
        grids = ("default", "full") if default else ("full",)
        mask = "causal" if queries > 1 else "none"
        shape = (batch, 32, 8, queries, keys, 128)
        return AttentionCase(*shape, mask, op="decode", dtype=dtype, grids=grids)

    for dtype in ("fp32", "bf16"):
        for keys in (1024, 2048, 4096, 8192, 16384, 32768):
            yield decode(1, 1, keys, dtype, default=keys in (1024, 4096, 8192, 32768))
        yield decode(8, 1, 1024, dtype)
        yield decode(8, 1, 4096, dtype)
        yield decode(1, 4, 8192, dtype, default=dtype == "bf16")
    yield decode(1, 1, 8192, "fp16")


def _tiny() -> Iterator[AttentionCase]:
    """Every op, mask, dtype and pass on shapes that take no time; lengths that no tile divides."""
    for dtype in DTYPES:
        options = {"dtype": dtype, "grids": ("quick",)}
        for mask in ("none", "causal", "padded", "bias"):
            for backward in (False, True):
                shape = (1 if mask == "bias" else 3, 2, 2, 77, 77, 40)
                yield AttentionCase(*shape, mask, op="attention", backward=backward, **options)
        shape = (2, 3, 3, 600, 600, 64)
        yield AttentionCase(*shape, "causal", op="attention", backward=True, **options)
        yield AttentionCase(2, 8, 2, 1, 333, 64, op="decode", **options)
        yield AttentionCase(1, 8, 2, 4, 1025, 128, "causal", op="decode", **options)


ALL = [*_model_shapes(), *_masked_batches(), *_length_sweep(), *_decode_steps(), *_tiny()]
