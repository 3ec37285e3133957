"""LayerNorm and RMSNorm, alone and after the addition of a residual; all bound by memory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from fastattn import reference
from torch import Tensor

from cases.base import DTYPES, Case, Forward, Inputs, Peer, compiled, normal, table
from checks import RowOracle

EPS = 1e-5


@dataclass
class NormInputs(Inputs):
    """input and residual (rows, width), weight and bias (width,)."""

    input: Tensor
    weight: Tensor
    bias: Tensor | None = None  # of LayerNorm
    residual: Tensor | None = None  # of the ops that add


def eager(x: NormInputs) -> Tensor | tuple[Tensor, Tensor]:
    """Torch's own functions, one after another."""
    summed = x.input if x.residual is None else x.input + x.residual
    if x.bias is None:
        out = F.rms_norm(summed, summed.shape[-1:], x.weight, EPS)
    else:
        out = F.layer_norm(summed, summed.shape[-1:], x.weight, x.bias, EPS)
    return out if x.residual is None else (out, summed)


def fused(functions, op: str) -> Forward:
    """The op as a function of its inputs, of fastattn.functional or fastattn.reference."""
    function = getattr(functions, op)
    if op == "layer_norm":
        return lambda x: function(x.input, x.input.shape[-1:], x.weight, x.bias, EPS)
    if op == "rms_norm":
        return lambda x: function(x.input, x.input.shape[-1:], x.weight, EPS)
    if op == "add_layer_norm":
        return lambda x: function(x.input, x.residual, x.weight, x.bias, EPS)
    return lambda x: function(x.input, x.residual, x.weight, EPS)


def _fastattn(case: NormCase) -> Forward:
    from fastattn import functional

    return fused(functional, case.op)


@dataclass(frozen=True)
class NormCase(Case):
    """One row; op is one of layer_norm, rms_norm, add_layer_norm and add_rms_norm."""

    rows: int
    width: int

    family = "norm"
    peers = table(
        Peer("fastattn", "fastattn", _fastattn, "fastattn.functional"),
        Peer(
            "eager", "eager", lambda case: eager, "x + r, then torch's F.layer_norm or F.rms_norm"
        ),
        Peer("compile", "compile", lambda case: compiled(eager), "torch.compile(the same)"),
    )
    rivals = ("eager", "compile")
    axis = "elements"
    note = """\
shape: rows x width. rate: GB/s of what must be moved: each matrix in and out once; backward reads \
what was normalised (and both gradients, after an addition) and writes one gradient. %: of the \
copy rate; small shapes stay in caches and may exceed it."""

    @property
    def adds(self) -> bool:
        return self.op.startswith("add_")

    @property
    def shape(self) -> str:
        return f"{self.rows}x{self.width}"

    @property
    def size(self) -> int:
        return self.rows * self.width

    @property
    def work(self) -> float:
        matrices = (4 if self.adds else 2) + self.backward * (4 if self.adds else 3)
        return float(matrices * self.size * DTYPES[self.dtype].itemsize)

    @property
    def input_bytes(self) -> int:
        return (1 + self.adds) * (1 + self.backward) * self.size * DTYPES[self.dtype].itemsize

    @property
    def groups(self) -> tuple[str, ...]:
        kind = "add+norm" if self.adds else "norm alone"
        return "norm", kind, f"{kind} {self.dtype} {self.passes}"

    @property
    def shows_memory(self) -> bool:
        return self.backward and 1 << 20 < self.size < 1 << 24

    def tiny(self) -> NormCase:
        return replace(self, rows=2, width=16)

    def inputs(self) -> NormInputs:
        """Normally distributed, weights around 1."""
        draw = partial(normal, self.generator(), dtype=DTYPES[self.dtype])
        matrix, vector, grad = (self.rows, self.width), (self.width,), self.backward
        inputs = NormInputs(draw(matrix, grad=grad), draw(vector, mean=1.0, grad=grad))
        if self.op.endswith("layer_norm"):
            inputs.bias = draw(vector, grad=grad)
        if self.adds:
            inputs.residual = draw(matrix, grad=grad)
        if self.backward:
            inputs.douts = tuple(draw(matrix) for _ in range(1 + self.adds))
        return inputs

    def oracle(self, inputs: Inputs) -> RowOracle:
        exact = fused(reference, self.op)
        return RowOracle(inputs, self.rows, exact, eager, partial(self._magnitudes, exact))

    @torch.no_grad()
    def _magnitudes(self, exact: Forward, wide: NormInputs) -> dict[str, float]:
        """dweight and dbias add up as many terms as there are rows."""
        if not self.backward:
            return {}
        bias = None if wide.bias is None else torch.zeros_like(wide.bias)
        unscaled = exact(replace(wide, weight=torch.ones_like(wide.weight), bias=bias))
        normalised = unscaled[0] if self.adds else unscaled
        terms = {"dweight": wide.douts[0] * normalised, "dbias": wide.douts[0]}
        return {name: t.square().sum(0).max().sqrt().item() for name, t in terms.items()}


def _grid() -> Iterator[NormCase]:
    for op in ("layer_norm", "rms_norm", "add_layer_norm", "add_rms_norm"):
        for dtype in ("fp32", "bf16"):
            for backward in (False, True):
                for rows, width in ((512, 768), (4096, 1024), (8192, 4096)):
                    adds = op.startswith("add_")
                    if rows == 8192:  # the longest calls
                        default = not backward or (adds and dtype == "bf16")
                    else:
                        default = adds or rows == 4096
                    yield NormCase(
                        rows,
                        width,
                        op=op,
                        dtype=dtype,
                        backward=backward,
                        grids=("default", "full") if default else ("full",),
                        compiled=adds or (rows == 4096 and not backward),
                    )
        for dtype in DTYPES:
            for backward in (False, True):
                options = {"dtype": dtype, "backward": backward, "grids": ("quick",)}
                yield NormCase(77, 131, op=op, **options)
        yield NormCase(700, 64, op=op, dtype="bf16", backward=True, grids=("quick",))


ALL = list(_grid())
