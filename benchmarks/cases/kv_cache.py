"""A step of generation: append a token to the KV cache of every layer, and attend to all that it
holds; bound by reading the caches.

A model has as many caches as layers, and reads each once per token: none is still in the caches of
the processor when its turn comes again. Where those of all layers would take more than `MEMORY`,
the layers share fewer, and the shape of the row says how many.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from fastattn import reference
from torch import Tensor

from cases.base import DTYPES, Case, Forward, Inputs, Peer, normal, table
from checks import Compared, Oracle

MEMORY = 2 << 30
PAGE = 16
SPARE = 256  # rows of a contiguous cache that are still free


@dataclass
class CacheInputs(Inputs):
    """What one token brings, the same in all layers, and the caches: a tuple holds those of the
    layers, and layer i takes number i modulo their count."""

    query: Tensor  # (B, H, 1, D)
    key: Tensor  # (B, Hkv, 1, D)
    value: Tensor
    lengths: Tensor  # (B,), rows before this step
    k_caches: tuple[Tensor, ...]  # (B, Hkv, rows, D), or (pages, Hkv, PAGE, D)
    v_caches: tuple[Tensor, ...]
    k_dense: tuple[Tensor, ...]  # (B, Hkv, rows, D), what the peers have
    v_dense: tuple[Tensor, ...]
    slot: Tensor  # (1,), the row of the dense caches that the token takes
    k_scales: tuple[Tensor, ...] = ()  # (B, Hkv, rows), or (pages, Hkv, PAGE), of int8
    v_scales: tuple[Tensor, ...] = ()
    block_table: Tensor | None = None  # (B, pages of a sequence)


def attend(functions, case: CacheCase, x: CacheInputs, cache: int) -> Tensor:
    """One layer, by fastattn.functional or fastattn.reference."""
    scales = {}
    if x.k_scales:
        scales = {"k_scale": x.k_scales[cache], "v_scale": x.v_scales[cache]}
    return functions.attention_with_cache(
        x.query,
        x.k_caches[cache],
        x.v_caches[cache],
        cache_lengths=x.lengths,
        key=x.key,
        value=x.value,
        block_table=x.block_table,
        ring=case.kind == "ring",
        window=(case.context - 1, 0) if case.kind == "ring" else None,
        causal=True,
        **scales,
    )


def _fastattn(case: CacheCase) -> Forward:
    from fastattn import functional

    def forward(x: CacheInputs) -> tuple[Tensor, ...]:
        count = len(x.k_caches)
        return tuple(attend(functional, case, x, i % count) for i in range(case.layers))

    return forward


def _static(case: CacheCase) -> Forward:
    """A layer stores the token in its contiguous cache, and attends to the rows that are filled."""

    def forward(x: CacheInputs) -> tuple[Tensor, ...]:
        outs = []
        for i in range(case.layers):
            caches = x.k_dense[i % len(x.k_dense)], x.v_dense[i % len(x.v_dense)]
            key, value = (
                cache.index_copy_(2, x.slot, new)[:, :, : case.context]
                for cache, new in zip(caches, (x.key, x.value))
            )
            outs.append(F.scaled_dot_product_attention(x.query, key, value, enable_gqa=True))
        return tuple(outs)

    return forward


@dataclass(frozen=True)
class CacheCase(Case):
    """One row: `context` rows are cached once the token is appended."""

    batch: int
    heads: int
    heads_kv: int
    context: int
    head_dim: int
    kind: str = "contiguous"  # or paged16, ring
    int8: bool = False
    layers: int = 32

    family = "kv_cache"
    peers = table(
        Peer("fastattn", "fastattn", _fastattn, "fastattn.functional.attention_with_cache"),
        Peer("sdpa", "sdpa", _static, "index_copy_ into a contiguous cache, then SDPA"),
    )
    rivals = ("sdpa",)
    bound = "read"
    is_cold = True
    note = """\
shape: layers (distinct caches, where not all fit) x batch x heads/KV heads x cached rows x \
head_dim. Peers attend to contiguous caches in the dtype of the query; int8 has a float32 scale \
per row and head. us: of all layers. rate: GB/s of the caches, read once. %: of the read rate."""

    @property
    def caches(self) -> int:
        """How many distinct ones there are."""
        return max(1, min(self.layers, MEMORY // self._cache_bytes))

    @property
    def _rows(self) -> int:
        return self.batch * self.heads_kv * self.context

    @property
    def _row_bytes(self) -> int:
        """Of one key or value as it is cached."""
        return self.head_dim + 4 if self.int8 else self.head_dim * DTYPES[self.dtype].itemsize

    @property
    def _cache_bytes(self) -> int:
        """Of keys and values of a layer, with those of the peers where they are others."""
        dense = self.head_dim * DTYPES[self.dtype].itemsize
        shared = self.kind != "paged16" and not self.int8
        return 2 * self._rows * (self._row_bytes + (0 if shared else dense))

    @property
    def shape(self) -> str:
        layers = f"{self.layers}" + ("" if self.caches == self.layers else f"({self.caches})")
        heads = f"{self.heads}/{self.heads_kv}"
        return f"{layers}x{self.batch}x{heads}x{self.context}x{self.head_dim}"

    @property
    def details(self) -> dict[str, str]:
        return {"cache": self.kind, "stored": "int8" if self.int8 else ""}

    @property
    def size(self) -> int:
        return self.context

    @property
    def work(self) -> float:
        outer = 2 * self.batch * self.heads * self.head_dim * DTYPES[self.dtype].itemsize
        return float(self.layers * (2 * self._rows * self._row_bytes + outer))

    @property
    def input_bytes(self) -> int:
        return self.caches * self._cache_bytes

    @property
    def groups(self) -> tuple[str, ...]:
        return "kv_cache", f"kv_cache {'int8' if self.int8 else self.dtype}"

    def tiny(self) -> CacheCase:
        return replace(self, batch=1, context=2 * PAGE, layers=1)

    def inputs(self) -> CacheInputs:
        """Normally distributed; all layers have the same values. Where the token goes the caches
        hold NaN (numbers that are far off in int8): a step that does not store it is found out."""
        generator, dtype = self.generator(), DTYPES[self.dtype]

        def draw(heads: int, rows: int) -> Tensor:
            return normal(generator, (self.batch, heads, rows, self.head_dim), dtype)

        length, slot, capacity = self.context - 1, self.context - 1, self.context
        if self.kind == "contiguous":
            capacity += SPARE
        if self.kind == "ring":  # it has gone round: the token takes the place of the oldest
            length, slot = self.context + 5, 5
        new = draw(self.heads, 1), draw(self.heads_kv, 1), draw(self.heads_kv, 1)
        block_table = self._block_table(generator) if self.kind == "paged16" else None
        stored, dense, scales = [], [], []
        for _ in "kv":
            rows = draw(self.heads_kv, capacity)
            if self.int8:
                numbers, scale = reference.quantize_rows(rows)
                rows = (numbers * scale.unsqueeze(-1)).to(dtype)
                numbers[:, :, slot], scale[:, :, slot] = 127, 1e3
                scale = _in_pages(scale.unsqueeze(-1), block_table).squeeze(-1)
                stored.append(_in_pages(numbers, block_table))
                scales.append(self._per_layer(scale))
            else:
                rows[:, :, slot] = torch.nan
                stored.append(_in_pages(rows, block_table))
            dense.append(rows)
        caches = [self._per_layer(tensor) for tensor in stored]
        shared = all(a is b for a, b in zip(stored, dense))
        others = caches if shared else [self._per_layer(tensor) for tensor in dense]
        return CacheInputs(
            *new,
            torch.full((self.batch,), length),
            *caches,
            *others,
            torch.tensor([slot]),
            *scales,
            block_table=block_table,
        )

    def _block_table(self, generator: torch.Generator) -> Tensor:
        pages = -(-self.context // PAGE)
        shuffled = torch.randperm(self.batch * pages, generator=generator)
        return shuffled.view(self.batch, pages).to(torch.int32)

    def _per_layer(self, tensor: Tensor) -> tuple[Tensor, ...]:
        return (tensor, *(tensor.clone() for _ in range(self.caches - 1)))

    def oracle(self, inputs: CacheInputs) -> CacheOracle:
        return CacheOracle(self, inputs)


def _in_pages(rows: Tensor, block_table: Tensor | None) -> Tensor:
    """(B, Hkv, rows, D) as (pages, Hkv, PAGE, D), where there is a block table."""
    if block_table is None:
        return rows
    padded = F.pad(rows, (0, 0, 0, -rows.shape[2] % PAGE))
    paged = padded.unflatten(2, (-1, PAGE)).transpose(1, 2).flatten(0, 1)
    return torch.empty_like(paged).index_copy_(0, block_table.flatten().long(), paged)


class CacheOracle(Oracle):
    """Compares the first and the last (sequence, KV head) of the first and the last layer, and what
    the step has stored for them."""

    def __init__(self, case: CacheCase, inputs: CacheInputs):
        self.case, self.checked = case, inputs
        self.parts = []
        for batch, head in sorted({(0, 0), (case.batch - 1, case.heads_kv - 1)}):
            part = self._part(inputs, batch, head)
            eager = attend(reference, case, part, 0)
            wide = self._part(inputs, batch, head).cast(torch.float64)
            exact = attend(reference, case, wide, 0)
            self.parts.append((batch, head, exact, eager, part))

    def compared(self, results: tuple[Tensor, ...]) -> Compared:
        group = self.case.heads // self.case.heads_kv
        for batch, head, exact, eager, _ in self.parts:
            heads = slice(head * group, (head + 1) * group)
            for name, got in (("the first layer", results[0]), ("the last layer", results[-1])):
                yield name, got[batch : batch + 1, heads], exact, eager, 0.0

    def check_rest(self, results: tuple[Tensor, ...]) -> None:
        x = self.checked
        for batch, head, *_, part in self.parts:
            entry, row = self._place(x.block_table, batch)
            own_entry, _ = self._place(part.block_table, 0)
            for name in ("k_caches", "v_caches", "k_scales", "v_scales"):
                for got, want in zip(getattr(x, name)[:1], getattr(part, name)):
                    stored, right = got[entry, head, row], want[own_entry, 0, row]
                    # Rounding may take the other one of two numbers that are equally near.
                    error = (stored.double() - right.double()).abs().max()
                    allowed = 1 if stored.dtype == torch.int8 else 1e-6 * right.abs().max()
                    assert error <= (allowed if self.case.int8 else 0), f"{name}: not as appended"

    def _place(self, block_table: Tensor | None, batch: int) -> tuple[int, int]:
        slot = int(self.checked.slot)
        if block_table is None:
            return batch, slot
        return int(block_table[batch, slot // PAGE]), slot % PAGE

    def _part(self, x: CacheInputs, batch: int, head: int) -> CacheInputs:
        """Copies for one KV head, its query heads, and one layer."""
        group = self.case.heads // self.case.heads_kv
        entries = slice(batch, batch + 1) if x.block_table is None else slice(None)

        def one(caches: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            return tuple(cache[entries, head : head + 1].clone() for cache in caches[:1])

        return replace(
            x,
            query=x.query[batch : batch + 1, head * group : (head + 1) * group],
            key=x.key[batch : batch + 1, head : head + 1],
            value=x.value[batch : batch + 1, head : head + 1],
            lengths=x.lengths[batch : batch + 1],
            k_caches=one(x.k_caches),
            v_caches=one(x.v_caches),
            k_dense=(),
            v_dense=(),
            k_scales=one(x.k_scales),
            v_scales=one(x.v_scales),
            block_table=None if x.block_table is None else x.block_table[batch : batch + 1],
        )


def _grid() -> Iterator[CacheCase]:
    usual = {
        (1, 8192, kind, stored)
        for kind, stored in (
            ("contiguous", "fp32"),
            ("contiguous", "bf16"),
            ("contiguous", "int8"),
            ("paged16", "bf16"),
            ("paged16", "int8"),
            ("ring", "bf16"),
        )
    } | {
        (4, 8192, "contiguous", "int8"),
        (1, 32768, "contiguous", "bf16"),
        (1, 32768, "contiguous", "int8"),
    }
    for context in (8192, 32768):
        for batch in (1, 4):
            # Eight layers with four times the rows take as long.
            layers = 32 if batch * context == 8192 else 8
            for kind in ("contiguous", "paged16", "ring"):
                for stored in ("fp32", "bf16", "int8"):
                    default = (batch, context, kind, stored) in usual
                    yield CacheCase(
                        *(batch, 32, 8, context, 128, kind, stored == "int8", layers),
                        op="cache_step",
                        dtype="bf16" if stored == "int8" else stored,
                        grids=("default", "full") if default else ("full",),
                    )
    for kind in ("contiguous", "paged16", "ring"):
        for dtype in DTYPES:
            for int8 in (False, True):
                yield CacheCase(
                    *(2, 6, 2, 101, 40, kind, int8, 3),
                    op="cache_step",
                    dtype=dtype,
                    grids=("quick",),
                )


ALL = list(_grid())
