"""Rotary embedding of query and key in one call; bound by memory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch
from fastattn import reference
from torch import Tensor

from cases.base import DTYPES, Case, Forward, Inputs, Peer, compiled, normal, table
from checks import RowOracle

CONTEXT = 4096  # positions of the tables, of which a decode step takes one per sequence


@dataclass
class RopeInputs(Inputs):
    """query (B, H, S, D), key (B, Hkv, S, D), and the angles: for fastattn as tables, for models
    written by hand as they are computed once for all layers, in float32."""

    query: Tensor
    key: Tensor
    cos: Tensor  # (positions, D / 2)
    sin: Tensor
    cos_wide: Tensor  # (B or 1, 1, S, D): gathered, an entry for each of the two of a pair
    sin_wide: Tensor
    positions: Tensor | None = None  # (B, S); None: 0 to S - 1


def rotate_half(x: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return torch.cat((-second, first), -1)


def rotate_pairs(x: Tensor) -> Tensor:
    return torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2)


def eager(case: RopeCase) -> Forward:
    """x cos + rotate(x) sin in float32, as models write it."""
    rotate = rotate_pairs if case.interleaved else rotate_half

    def forward(x: RopeInputs) -> tuple[Tensor, Tensor]:
        wide = torch.promote_types(x.query.dtype, x.cos_wide.dtype)

        def rotated(tensor: Tensor) -> Tensor:
            t = tensor.to(wide)
            return (t * x.cos_wide + rotate(t) * x.sin_wide).to(tensor.dtype)

        return rotated(x.query), rotated(x.key)

    return forward


def fused(functions, case: RopeCase) -> Forward:
    """The op as a function of its inputs, of fastattn.functional or fastattn.reference."""
    function, interleaved = functions.apply_rope_qk, case.interleaved
    return lambda x: function(
        x.query, x.key, x.cos, x.sin, interleaved=interleaved, positions=x.positions
    )


def _fastattn(case: RopeCase) -> Forward:
    from fastattn import functional

    return fused(functional, case)


@dataclass(frozen=True)
class RopeCase(Case):
    """One row; with a length of 1 a decode step, at positions that differ between sequences."""

    batch: int
    heads: int
    heads_kv: int
    length: int
    head_dim: int
    interleaved: bool = False

    family = "rope"
    peers = table(
        Peer("fastattn", "fastattn", _fastattn, "fastattn.functional.apply_rope_qk"),
        Peer("eager", "eager", eager, "x cos + rotate_half(x) sin, by hand in float32"),
        Peer("compile", "compile", lambda case: compiled(eager(case)), "torch.compile(the same)"),
    )
    rivals = ("eager", "compile")
    note = """\
shape: batch x heads/KV heads x length x head_dim. pairs: which dimensions rotate together, those \
half apart or neighbours. rate: GB/s of query and key in and out, and of their gradients. %: of \
the copy rate; small shapes stay in caches and may exceed it."""

    @property
    def shape(self) -> str:
        heads = f"{self.heads}" if self.heads == self.heads_kv else f"{self.heads}/{self.heads_kv}"
        return f"{self.batch}x{heads}x{self.length}x{self.head_dim}"

    @property
    def details(self) -> dict[str, str]:
        return {"pairs": "neighbours" if self.interleaved else "half"}

    @property
    def size(self) -> int:
        return self.length

    @property
    def input_bytes(self) -> int:
        rows = self.batch * (self.heads + self.heads_kv) * self.length
        return (1 + self.backward) * rows * self.head_dim * DTYPES[self.dtype].itemsize

    @property
    def work(self) -> float:
        return 2.0 * self.input_bytes

    @property
    def groups(self) -> tuple[str, ...]:
        kind = "rope of one token" if self.length == 1 else "rope"
        return "rope", f"{kind} {self.dtype} {self.passes}"

    def tiny(self) -> RopeCase:
        return replace(self, batch=1, length=min(self.length, 2))

    def inputs(self) -> RopeInputs:
        """Normally distributed; the angles are those of LLaMA."""
        draw = partial(normal, self.generator(), dtype=DTYPES[self.dtype])
        shapes = [(self.batch, h, self.length, self.head_dim) for h in (self.heads, self.heads_kv)]
        exponents = torch.arange(0, self.head_dim, 2, dtype=torch.float64) / self.head_dim
        angles = torch.outer(torch.arange(CONTEXT, dtype=torch.float64), 10000.0**-exponents)
        positions, taken = None, torch.arange(self.length)[None]
        if self.length == 1:
            last = torch.arange(self.batch) * CONTEXT // self.batch + CONTEXT // (2 * self.batch)
            positions = taken = last[:, None]
        wide = angles[taken][:, None]
        wide = wide.repeat_interleave(2, -1) if self.interleaved else torch.cat((wide, wide), -1)
        if positions is not None:
            positions = positions.to(self.device)
        else:
            angles = angles[: self.length]
        tables = (
            t.float().to(self.device) for t in (angles.cos(), angles.sin(), wide.cos(), wide.sin())
        )
        leaves = (draw(shape, grad=self.backward) for shape in shapes)
        inputs = RopeInputs(*leaves, *tables, positions=positions)
        if self.backward:
            inputs.douts = tuple(draw(shape) for shape in shapes)
        return inputs

    def oracle(self, inputs: Inputs) -> RowOracle:
        return RowOracle(inputs, None, fused(reference, self), eager(self))


def _grid() -> Iterator[RopeCase]:
    for interleaved in (False, True):
        for dtype in ("fp32", "bf16"):
            for backward in (False, True):
                for batch, heads, heads_kv, length, head_dim in (
                    (1, 32, 8, 2048, 128),
                    (8, 12, 12, 512, 64),
                    (8, 32, 8, 1, 128),
                ):
                    if backward and length == 1:
                        continue  # nobody trains on one token
                    yield RopeCase(
                        *(batch, heads, heads_kv, length, head_dim, interleaved),
                        op="rope",
                        dtype=dtype,
                        backward=backward,
                        grids=("default", "full") if not interleaved or batch == 1 else ("full",),
                        compiled=not interleaved and not backward,
                    )
        for dtype in DTYPES:
            for backward in (False, True):
                for length in (1, 37):
                    yield RopeCase(
                        *(3, 4, 2, length, 40, interleaved),
                        op="rope",
                        dtype=dtype,
                        backward=backward,
                        grids=("quick",),
                    )


ALL = list(_grid())
