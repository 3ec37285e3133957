"""The grid: every benchmark row as a `Case`, and the tensors that it runs on."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
GRIDS = ("quick", "default", "full")


@dataclass(frozen=True)
class Case:
    """One row: a problem, a dtype and a pass."""

    op: str  # "attention", or "decode" (few queries against a long cache)
    batch: int
    heads: int
    heads_kv: int
    queries: int
    keys: int
    head_dim: int
    dtype: str = "fp32"
    mask: str = "none"  # or causal, padded (by key lengths), bias (a dense one)
    backward: bool = False
    grids: tuple[str, ...] = ("full",)
    compiled: bool = False  # torch.compile takes part by default: it costs seconds per shape

    @property
    def shape(self) -> str:
        heads = f"{self.heads}" if self.heads == self.heads_kv else f"{self.heads}/{self.heads_kv}"
        length = f"{self.keys}" if self.queries == self.keys else f"{self.queries}>{self.keys}"
        return f"{self.batch}x{heads}x{length}x{self.head_dim}"

    @property
    def passes(self) -> str:
        return "fwd+bwd" if self.backward else "fwd"

    @property
    def id(self) -> str:
        return f"{self.op}-{self.shape}-{self.mask}-{self.dtype}-{self.passes}"

    @property
    def series(self) -> str:
        """Rows of one series differ in length (and in batch, for the same number of tokens)."""
        heads = f"{self.heads}" if self.heads == self.heads_kv else f"{self.heads}/{self.heads_kv}"
        size = (
            f"{self.batch * self.keys} tokens" if self.op == "attention" else f"batch {self.batch}"
        )
        mask = "no mask" if self.mask == "none" else self.mask
        kind = f"{mask}, {self.dtype} {self.passes}"
        return f"{self.op} {heads} heads x {self.head_dim}, {size}, {kind}"

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
    def flops(self) -> float:
        """4 Sq Sk D per head, half if causal, padding not counted; backward adds 2.5 times that."""
        forward = 4.0 * self.heads * self.queries * sum(self.lengths) * self.head_dim
        return forward * (0.5 if self.is_causal else 1.0) * (3.5 if self.backward else 1.0)

    @property
    def bytes(self) -> float:
        """What a decode step must move: K, V and the query read once, the output written."""
        size = DTYPES[self.dtype].itemsize * self.head_dim
        return size * (
            2.0 * self.heads_kv * sum(self.lengths) + 2.0 * self.batch * self.heads * self.queries
        )

    @property
    def input_bytes(self) -> int:
        return (
            self.batch * self.heads_kv * self.keys * self.head_dim * 2 * DTYPES[self.dtype].itemsize
        )


@dataclass
class Inputs:
    """query (B, H, Sq, D), key and value (B, Hkv, Sk, D), and what the mask of the case adds."""

    query: Tensor
    key: Tensor
    value: Tensor
    dout: Tensor | None = None  # (B, H, Sq, D)
    bias: Tensor | None = None  # (1, H, Sq, Sk), in the dtype of the query
    key_lengths: Tensor | None = None  # (B,)
    visible: Tensor | None = (
        None  # boolean, broadcasts to (B, H, Sq, Sk): what peers without lengths are given
    )

    @property
    def leaves(self) -> list[Tensor]:
        """What the backward pass differentiates: query, key, value, and a bias."""
        return [t for t in (self.query, self.key, self.value, self.bias) if t is not None]

    def copy(self) -> Inputs:
        """The same values at other addresses."""

        def copied(tensor: Tensor | None) -> Tensor | None:
            if tensor is None:
                return None
            return tensor.detach().clone().requires_grad_(tensor.requires_grad)

        return Inputs(**{name: copied(tensor) for name, tensor in vars(self).items()})


def make_inputs(case: Case) -> Inputs:
    """Normally distributed inputs; the same for a given case in every process."""
    generator = torch.Generator().manual_seed(zlib.crc32(case.id.encode()))
    dtype = DTYPES[case.dtype]

    def normal(*shape: int, grad: bool = case.backward) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype).requires_grad_(grad)

    query_shape = (case.batch, case.heads, case.queries, case.head_dim)
    cache_shape = (case.batch, case.heads_kv, case.keys, case.head_dim)
    inputs = Inputs(normal(*query_shape), normal(*cache_shape), normal(*cache_shape))
    if case.backward:
        inputs.dout = normal(*query_shape, grad=False)
    if case.mask == "bias":
        inputs.bias = normal(1, case.heads, case.queries, case.keys)
    if case.mask == "padded":
        inputs.key_lengths = torch.tensor(case.lengths)
        inputs.visible = (torch.arange(case.keys) < inputs.key_lengths[:, None])[:, None, None, :]
    if case.is_causal:  # the bottom-right corner: the last query sees every key
        seen = torch.ones(case.queries, case.keys, dtype=torch.bool)
        inputs.visible = seen.tril(case.keys - case.queries)
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
) -> Case:
    grids = ("default", "full") if default else ("full",)
    shape = (batch, heads, heads, length, length, head_dim)
    return Case("attention", *shape, dtype, mask, backward, grids, compiled)


def _model_shapes() -> Iterator[Case]:
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


def _masked_batches() -> Iterator[Case]:
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


def _length_sweep() -> Iterator[Case]:
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


def _decode_steps() -> Iterator[Case]:
    """One new token (or four, when speculating) of 32 query heads on a cache of 8 heads x 128."""

    def decode(batch: int, queries: int, keys: int, dtype: str, default: bool = False) -> Case:
        grids = ("default", "full") if default else ("full",)
        mask = "causal" if queries > 1 else "none"
        return Case("decode", batch, 32, 8, queries, keys, 128, dtype, mask, grids=grids)

    for dtype in ("fp32", "bf16"):
        for keys in (1024, 2048, 4096, 8192, 16384, 32768):
            yield decode(1, 1, keys, dtype, default=keys in (1024, 4096, 8192, 32768))
        yield decode(8, 1, 1024, dtype)
        yield decode(8, 1, 4096, dtype)
        yield decode(1, 4, 8192, dtype, default=dtype == "bf16")
    yield decode(1, 1, 8192, "fp16")


def _tiny() -> Iterator[Case]:
    """Every op, mask, dtype and pass on shapes that take no time; lengths that no tile divides."""
    for dtype in DTYPES:
        for mask in ("none", "causal", "padded", "bias"):
            for backward in (False, True):
                shape = (1 if mask == "bias" else 3, 2, 2, 77, 77, 40)
                yield Case("attention", *shape, dtype, mask, backward, ("quick",))
        yield Case("attention", 2, 3, 3, 600, 600, 64, dtype, "causal", True, ("quick",))
        yield Case("decode", 2, 8, 2, 1, 333, 64, dtype, "none", False, ("quick",))
        yield Case("decode", 1, 8, 2, 4, 1025, 128, dtype, "causal", False, ("quick",))


ALL = [*_model_shapes(), *_masked_batches(), *_length_sweep(), *_decode_steps(), *_tiny()]
BY_ID = {case.id: case for case in ALL}


def cases(op: str) -> list[Case]:
    return [case for case in BY_ID.values() if case.op == op]
