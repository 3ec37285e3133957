"""Activations of the feed-forward block, with a bias or a gate; all bound by memory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch.nn.functional as F
from fastattn import reference
from torch import Tensor

from cases.base import DTYPES, Case, Forward, Inputs, Peer, compiled, normal, table
from checks import RowOracle, evaluate

GATED = ("swiglu", "geglu", "reglu")
ACTIVATIONS = {"swiglu": F.silu, "geglu": F.gelu, "reglu": F.relu}


@dataclass
class ActivationInputs(Inputs):
    """input (rows, width), or (rows, 2 width) for a gate and what it gates, packed."""

    input: Tensor
    bias: Tensor | None = None  # (width,)
    up: Tensor | None = None  # (rows, width): what `input` gates


def eager(case: ActivationCase) -> Forward:
    """Torch's own functions, one after another."""
    if case.op in GATED:
        activation = ACTIVATIONS[case.op]

        def gated(x: ActivationInputs) -> Tensor:
            gate, up = x.input.chunk(2, -1) if x.up is None else (x.input, x.up)
            return activation(gate) * up

        return gated
    if case.op == "silu":
        return lambda x: F.silu(x.input)
    approximate = case.variant
    if case.op == "bias_gelu":
        return lambda x: F.gelu(x.input + x.bias, approximate=approximate)
    return lambda x: F.gelu(x.input, approximate=approximate)


def fused(functions, case: ActivationCase) -> Forward:
    """The op as a function of its inputs, of fastattn.functional or fastattn.reference."""
    function = getattr(functions, case.op)
    if case.op in GATED:
        return lambda x: function(x.input, x.up)
    if case.op == "silu":
        return lambda x: function(x.input)
    approximate = case.variant
    if case.op == "bias_gelu":
        return lambda x: function(x.input, x.bias, approximate)
    return lambda x: function(x.input, approximate)


def _fastattn(case: ActivationCase) -> Forward:
    from fastattn import functional

    return fused(functional, case)


@dataclass(frozen=True)
class ActivationCase(Case):
    """One row; op is the name of the function."""

    rows: int
    width: int  # of the output
    variant: str = ""  # of GELU: none or tanh (what is approximated); of a gate: two or packed

    family = "activation"
    peers = table(
        Peer("fastattn", "fastattn", _fastattn, "fastattn.functional"),
        Peer("eager", "eager", eager, "torch's functions, one after another"),
        Peer("compile", "compile", lambda case: compiled(eager(case)), "torch.compile(the same)"),
    )
    rivals = ("eager", "compile")
    axis = "elements"
    note = """\
shape: rows x width of the output. variant: approximation of GELU; gate and up as two tensors or \
packed in one. rate: GB/s of what must be moved: each matrix in and out once; backward reads the \
inputs and the gradient again and writes the gradients of the inputs. %: of the copy rate; small \
shapes stay in caches and may exceed it."""

    @property
    def shape(self) -> str:
        return f"{self.rows}x{self.width}"

    @property
    def details(self) -> dict[str, str]:
        return {"variant": self.variant}

    @property
    def size(self) -> int:
        return self.rows * self.width

    @property
    def _inputs(self) -> int:
        return 2 if self.op in GATED else 1

    @property
    def work(self) -> float:
        matrices = self._inputs + 1 + self.backward * (2 * self._inputs + 1)
        return float(matrices * self.size * DTYPES[self.dtype].itemsize)

    @property
    def input_bytes(self) -> int:
        return (self._inputs + self.backward) * self.size * DTYPES[self.dtype].itemsize

    @property
    def groups(self) -> tuple[str, ...]:
        kind = "gate" if self.op in GATED else "bias+GELU" if self.op == "bias_gelu" else "unary"
        return "activation", kind, f"{kind} {self.dtype} {self.passes}"

    @property
    def shows_memory(self) -> bool:
        return self.backward and 1 << 22 < self.size < 1 << 25

    def tiny(self) -> ActivationCase:
        return replace(self, rows=2, width=16)

    def inputs(self) -> ActivationInputs:
        """Normally distributed."""
        draw, grad = partial(normal, self.generator(), dtype=DTYPES[self.dtype]), self.backward
        width = 2 * self.width if self.variant == "packed" else self.width
        inputs = ActivationInputs(draw((self.rows, width), grad=grad))
        if self.op == "bias_gelu":
            inputs.bias = draw((self.width,), grad=grad)
        if self.variant == "two":
            inputs.up = draw((self.rows, self.width), grad=grad)
        if self.backward:
            inputs.douts = (draw((self.rows, self.width)),)
        return inputs

    def oracle(self, inputs: Inputs) -> RowOracle:
        exact = fused(reference, self)

        def magnitudes(wide: ActivationInputs) -> dict[str, float]:
            """dbias adds up the rows of the gradient of the input."""
            if wide.bias is None or not self.backward:
                return {}
            rows = evaluate(exact, wide)[1]
            return {"dbias": rows.square().sum(0).max().sqrt().item()}

        return RowOracle(inputs, self.rows, exact, eager(self), magnitudes)


def _grid() -> Iterator[ActivationCase]:
    ops = [
        ("gelu", "none"),
        ("gelu", "tanh"),
        ("bias_gelu", "none"),
        ("bias_gelu", "tanh"),
        ("silu", ""),
        ("swiglu", "two"),
        ("swiglu", "packed"),
        ("geglu", "two"),
    ]
    usual = {("bias_gelu", "none"), ("bias_gelu", "tanh"), ("swiglu", "two"), ("swiglu", "packed")}
    usual |= {("gelu", "none")}
    for op, variant in ops:
        for dtype in ("fp32", "bf16"):
            for backward in (False, True):
                for rows, width in ((512, 3072), (4096, 4096), (4096, 11008)):
                    # Widths as models have them: a gate's is not 3072, a GELU's not 11008.
                    wide = 11008 if op in GATED else 4096
                    default = (op, variant) in usual and width in (3072, wide)
                    fast = default and (width == 3072 or not backward)
                    headline = op == "bias_gelu" or (op, variant) == ("swiglu", "two")
                    yield ActivationCase(
                        rows,
                        width,
                        variant,
                        op=op,
                        dtype=dtype,
                        backward=backward,
                        grids=("default", "full") if fast else ("full",),
                        compiled=headline and fast and backward == (width == 3072),
                    )
        for dtype in DTYPES:
            for backward in (False, True):
                options = {"dtype": dtype, "backward": backward, "grids": ("quick",)}
                yield ActivationCase(77, 131, variant, op=op, **options)
        yield ActivationCase(700, 64, variant, op=op, dtype="bf16", backward=True, grids=("quick",))


ALL = list(_grid())
