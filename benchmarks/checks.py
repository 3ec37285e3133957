"""Is the result right? Before it is timed, every row is held to the accuracy contract of
`fastattn.testing`.

What is right is the float64 reference; long rows are compared on a sample. For gradients the sample
is exact all the same: the output gradient is zero outside of it, so that a gradient which adds up
over all rows (of a weight, of a key) is the sum over the sampled rows alone, and one which has a
row for every row of the output must be 0 everywhere else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from fastattn.testing import assert_accurate
from torch import Tensor

WHOLE = 512
BLOCK = 64
# How far a peer may be off, relative to the largest entry, before it is said to compute something
# else.
PEER_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 1e-2}

Compared = Iterator[tuple[str, Tensor, Tensor, Tensor, float]]


def sampled_rows(count: int) -> Tensor:
    """Indices of the rows that are compared: all up to 512, three blocks of 64 beyond."""
    if count <= WHOLE:
        return torch.arange(count)
    starts = (0, (count - BLOCK) // 2, count - BLOCK)
    return torch.cat([torch.arange(start, start + BLOCK) for start in starts])


def zero_elsewhere(tensor: Tensor, dim: int, rows: Tensor) -> Tensor:
    """A copy in which all but some rows are zero."""
    return torch.zeros_like(tensor).index_copy_(dim, rows, tensor.index_select(dim, rows))


def evaluate(forward: Callable[[Any], Any], x: Any) -> tuple[Tensor, ...]:
    """What is timed: the outputs and, where the pass goes backward, the gradients of all leaves."""
    out = forward(x)
    outs = out if isinstance(out, tuple) else (out,)
    if not x.douts:
        return outs
    return *outs, *torch.autograd.grad(outs, tuple(x.leaves.values()), x.douts)


class Oracle:
    """What is right for one case, and what the eager formula makes of it."""

    checked: Any  # the inputs of the run that is compared

    def compared(self, results: tuple[Tensor, ...]) -> Compared:
        """(name, got, exact, eager, magnitude) of every result, or of a sample of it."""
        raise NotImplementedError

    def check_rest(self, results: tuple[Tensor, ...]) -> None:
        """AssertionError if what is not in the sample is wrong."""

    def budget_used(self, results: tuple[Tensor, ...]) -> float:
        """The largest share of the allowed error that a result uses; above 1, AssertionError."""
        self.check_rest(results)
        return max(
            assert_accurate(got.detach(), exact, eager, name, magnitude=magnitude)
            for name, got, exact, eager, magnitude in self.compared(results)
        )

    def peer_obstacle(self, results: tuple[Tensor, ...]) -> str | None:
        """Why the results of a peer are not those of this problem, or None if they are."""
        tolerance = PEER_TOLERANCE[results[0].dtype]
        for name, got, exact, *_ in self.compared(results):
            error = ((got.detach().double() - exact).abs().max() / exact.abs().max()).item()
            if not error <= tolerance:
                return f"wrong result: {name} is off by {error:.2g} of its largest entry"
        return None


class RowOracle(Oracle):
    """For functions that treat every row of their matrices alike, and adds up over them only the
    gradients of vectors; `rows` is their number, or None for tensors of another kind, which are
    compared whole.

    `exact` is the function in float64, `eager` the one whose error is the measure. `magnitudes`
    returns, from the float64 inputs of the sample, those that `assert_accurate` wants, by name.
    """

    def __init__(
        self,
        inputs: Any,
        rows: int | None,
        exact: Callable[[Any], Any],
        eager: Callable[[Any], Any],
        magnitudes: Callable[[Any], dict[str, float]] = lambda wide: {},
    ):
        self.rows = None if rows is None or rows <= WHOLE else sampled_rows(rows).to(inputs.device)
        self.checked, part = inputs, inputs
        if self.rows is not None:
            douts = tuple(zero_elsewhere(dout, 0, self.rows) for dout in inputs.douts)
            self.checked = replace(inputs, douts=douts)
            part = inputs.map(self._sample)
        wide = part.cast(torch.float64)
        self.exact, self.eager = evaluate(exact, wide), evaluate(eager, part)
        leaves = list(inputs.leaves) if inputs.douts else []
        outs = len(self.exact) - len(leaves)
        self.names = [f"out{i}" if outs > 1 else "out" for i in range(outs)]
        self.names += [f"d{name}" for name in leaves]
        self.magnitudes = magnitudes(wide)

    def compared(self, results: tuple[Tensor, ...]) -> Compared:
        for name, got, exact, eager in zip(self.names, results, self.exact, self.eager):
            magnitude = self.magnitudes.get(name, 0.0)
            yield name, self._sample(got), exact.detach(), eager.detach(), magnitude

    def check_rest(self, results: tuple[Tensor, ...]) -> None:
        if self.rows is None:
            return
        for name, got in zip(self.names, results):
            if name.startswith("d") and got.dim() > 1:
                others = got.detach().index_fill(0, self.rows, 0)
                assert not others.count_nonzero(), f"{name} is not zero where the output's is"

    def _sample(self, tensor: Tensor) -> Tensor:
        if self.rows is None or tensor.dim() < 2:
            return tensor
        return tensor.detach()[self.rows].requires_grad_(tensor.requires_grad)
