"""New keys and values go into a KV cache; bound by memory."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import torch
from fastattn import reference
from torch import Tensor

from cases.base import DTYPES, Case, Forward, Inputs, Peer, compiled, normal, table
from checks import Compared, Oracle

PAGE = 16
SPARE = 256  # rows of a cache that stay as they are, half of them before those that are written


@dataclass
class WriteInputs(Inputs):
    """The new rows, and caches of zeros."""

    key: Tensor  # (B, Hkv, new, D)
    value: Tensor
    k_cache: Tensor  # (B, Hkv, rows, D), or (pages, Hkv, PAGE, D)
    v_cache: Tensor
    positions: Tensor  # (B,), of the first new row
    places: tuple[Tensor, Tensor]  # (B, new) each: entry of the cache and row in it, for the peers
    block_table: Tensor | None = None  # (B, pages of a sequence)


def fused(functions) -> Forward:
    """The op as a function of its inputs, of fastattn.functional or fastattn.reference."""

    def write(x: WriteInputs) -> tuple[Tensor, Tensor]:
        functions.kv_cache_update(
            x.k_cache, x.v_cache, x.key, x.value, x.positions, block_table=x.block_table
        )
        return x.k_cache, x.v_cache

    return write


def _fastattn(case: CacheWriteCase) -> Forward:
    from fastattn import functional

    return fused(functional)


def eager(x: WriteInputs) -> tuple[Tensor, Tensor]:
    """An assignment by index for keys, and one for values."""
    entries, rows = x.places
    x.k_cache[entries, :, rows] = x.key.transpose(1, 2)
    x.v_cache[entries, :, rows] = x.value.transpose(1, 2)
    return x.k_cache, x.v_cache


@dataclass(frozen=True)
class CacheWriteCase(Case):
    """One row; `length` rows of each sequence are new: 1 in a decode step."""

    batch: int
    heads_kv: int
    length: int
    head_dim: int
    kind: str = "contiguous"  # or paged16

    family = "cache write"
    peers = table(
        Peer("fastattn", "fastattn", _fastattn, "fastattn.functional.kv_cache_update"),
        Peer("eager", "eager", lambda case: eager, "cache[entries, :, rows] = new, twice"),
        Peer("compile", "compile", lambda case: compiled(eager), "torch.compile(the same)"),
    )
    rivals = ("eager", "compile")
    note = """\
shape: batch x KV heads x new rows x head_dim. rate: GB/s of the new keys and values, read and \
written once. %: of the copy rate."""

    @property
    def shape(self) -> str:
        return f"{self.batch}x{self.heads_kv}x{self.length}x{self.head_dim}"

    @property
    def details(self) -> dict[str, str]:
        return {"cache": self.kind}

    @property
    def size(self) -> int:
        return self.length

    @property
    def _row_bytes(self) -> int:
        """Of keys and values, one row of every sequence."""
        return 2 * self.batch * self.heads_kv * self.head_dim * DTYPES[self.dtype].itemsize

    @property
    def work(self) -> float:
        return 2.0 * self.length * self._row_bytes

    @property
    def input_bytes(self) -> int:
        return (2 * self.length + SPARE) * self._row_bytes

    def tiny(self) -> CacheWriteCase:
        return replace(self, batch=1, length=min(self.length, 2))

    def inputs(self) -> WriteInputs:
        """Normally distributed rows. The sequences begin at different rows."""
        generator = self.generator()
        draw = partial(normal, generator, dtype=DTYPES[self.dtype])
        key, value = (draw((self.batch, self.heads_kv, self.length, self.head_dim)) for _ in "kv")
        device = self.device
        positions = SPARE // 2 + torch.arange(self.batch, device=device) % PAGE
        entries = torch.arange(self.batch, device=device)[:, None].expand(-1, self.length)
        rows = positions[:, None] + torch.arange(self.length, device=device)
        block_table, shape = None, (self.batch, self.heads_kv, self.length + SPARE, self.head_dim)
        if self.kind == "paged16":
            count = -(-shape[2] // PAGE)
            pages = torch.randperm(self.batch * count, generator=generator, device=device)
            block_table = pages.view(self.batch, count).to(torch.int32)
            entries, rows = block_table.gather(1, rows // PAGE).long(), rows % PAGE
            shape = (self.batch * count, self.heads_kv, PAGE, self.head_dim)
        caches = (torch.zeros(shape, dtype=key.dtype, device=device) for _ in "kv")
        return WriteInputs(
            key, value, *caches, positions, (entries.contiguous(), rows), block_table=block_table
        )

    def oracle(self, inputs: WriteInputs) -> WriteOracle:
        return WriteOracle(inputs)


class WriteOracle(Oracle):
    """Compares whole caches, to the bit."""

    def __init__(self, inputs: WriteInputs):
        self.checked = inputs
        self.written = fused(reference)(inputs.copy())

    def compared(self, results: tuple[Tensor, ...]) -> Compared:
        got = [cache.clone() for cache in results]
        for cache in results:  # so that whoever is compared next has to write them, too
            cache.zero_()
        for name, cache, want in zip(("k_cache", "v_cache"), got, self.written):
            assert torch.equal(cache, want), f"{name}: not as written"
            yield name, cache, want.double(), want, 0.0

    def peer_obstacle(self, results: tuple[Tensor, ...]) -> str | None:
        try:
            return super().peer_obstacle(results)
        except AssertionError as error:
            return f"wrong result: {error}"
