"""Is the result right? Before it is timed, every row is held to the accuracy contract of
`fastattn.testing`.

Long rows are compared on a sample: the first and the last (sequence, KV head), whole up to 512
queries, and beyond that three blocks of 64 queries. For gradients the sample is exact all the same:
the output gradient is zero outside of the blocks, so that every entry of dK and dV is the sum over
the sampled queries alone, and dQ must be 0 everywhere else.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from fastattn import reference
from fastattn.testing import assert_accurate
from torch import Tensor

import peers
from shapes import Case, Inputs

WHOLE = 512
BLOCK = 64
NAMES = ("out", "dq", "dk", "dv", "dbias")
# How far a peer may be off, relative to the largest entry, before it is said to compute something
# else.
PEER_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 1e-2}

Step = Callable[[Inputs], tuple[Tensor, ...]]


def sampled_rows(case: Case) -> Tensor:
    """Indices of the queries that are compared."""
    if case.queries <= WHOLE:
        return torch.arange(case.queries)
    starts = (0, (case.queries - BLOCK) // 2, case.queries - BLOCK)
    return torch.cat([torch.arange(start, start + BLOCK) for start in starts])


def checked_inputs(case: Case, inputs: Inputs) -> Inputs:
    """The inputs of the run that is compared: dout is zero for the queries that are not sampled."""
    if inputs.dout is None or case.queries <= WHOLE:
        return inputs
    rows = sampled_rows(case)
    dout = torch.zeros_like(inputs.dout)
    dout[:, :, rows] = inputs.dout[:, :, rows]
    return replace(inputs, dout=dout)


class Oracle:
    """What is right for the sample of one case, and what the eager formula makes of it."""

    def __init__(self, case: Case, inputs: Inputs):
        self.case = case
        self.rows = sampled_rows(case)
        self.samples = sorted({(0, 0), (case.batch - 1, case.heads_kv - 1)})
        self.parts = []
        for batch, head in sorted({(0, 0), (case.batch - 1, case.heads_kv - 1)}):
            part = self._part(inputs, batch, head)
            wide = _cast(part, torch.float64)
            exact = _results(
                reference.attention(
                    wide.query, wide.key, wide.value, mask=wide.visible, bias=wide.bias
                ),
                wide,
            )
            eager = _results(peers.naive(part), part)
            self.parts.append((batch, head, exact, eager, _magnitudes(wide, exact[0])))

    def budget_used(self, results: tuple[Tensor, ...]) -> float:
        """The largest share of the allowed error that a result uses; above 1, AssertionError."""
        if len(results) > 1 and self.case.queries > WHOLE:
            others = torch.ones(self.case.queries, dtype=torch.bool)
            others[self.rows] = False
            assert not results[1][:, :, others].count_nonzero(), "dq is not zero where dout is"
        return max(
            assert_accurate(got, exact, eager, name, magnitude=magnitude)
            for name, got, exact, eager, magnitude in self._compared(results)
        )

    def peer_obstacle(self, results: tuple[Tensor, ...]) -> str | None:
        """Why the results of a peer are not those of this problem, or None if they are."""
        tolerance = PEER_TOLERANCE[results[0].dtype]
        for name, got, exact, *_ in self._compared(results):
            error = ((got.double() - exact).abs().max() / exact.abs().max()).item()
            if not error <= tolerance:
                return f"wrong result: {name} is off by {error:.2g} of its largest entry"
        return None

    def _compared(self, results: tuple[Tensor, ...]):
        for batch, head, *expected in self.parts:
            group = self._group(head)
            for name, result, *known in zip(NAMES, results, *expected, strict=False):
                if name in ("dk", "dv"):
                    got = result[batch : batch + 1, head : head + 1]
                elif name == "dbias":
                    got = result[:, group][:, :, self.rows]
                else:
                    got = result[batch : batch + 1, group][:, :, self.rows]
                yield name, got.detach(), *known

    def _group(self, head: int) -> slice:
        group = self.case.heads // self.case.heads_kv
        return slice(head * group, (head + 1) * group)

    def _part(self, x: Inputs, batch: int, head: int) -> Inputs:
        """One KV head, its query heads and the sampled queries, with the mask written out."""
        case, group, rows = self.case, self._group(head), self.rows
        visible = x.visible
        if visible is not None:
            full = visible.expand(case.batch, 1, case.queries, case.keys)
            visible = full[batch : batch + 1, :, rows]
        return Inputs(
            x.query[batch : batch + 1, group][:, :, rows],
            x.key[batch : batch + 1, head : head + 1],
            x.value[batch : batch + 1, head : head + 1],
            None if x.dout is None else x.dout[batch : batch + 1, group][:, :, rows],
            None if x.bias is None else x.bias[:, group][:, :, rows],
            visible=visible,
        )


def _cast(x: Inputs, dtype: torch.dtype) -> Inputs:
    def cast(tensor: Tensor | None) -> Tensor | None:
        if tensor is None or not tensor.is_floating_point():
            return tensor
        return tensor.detach().to(dtype).requires_grad_(tensor.requires_grad)

    return Inputs(**{name: cast(tensor) for name, tensor in vars(x).items()})


def _results(out: Tensor, x: Inputs) -> list[Tensor]:
    """The output and, where there is a dout, the gradients."""
    return [
        out.detach(),
        *(torch.autograd.grad(out, x.leaves, x.dout) if x.dout is not None else ()),
    ]


@torch.no_grad()
def _magnitudes(x: Inputs, out: Tensor) -> list[float]:
    """For each result, the largest root of the sum of squares of the terms that it adds up."""
    query, key, value, weights = (
        t.square() for t in (x.query, x.key, x.value, peers.naive_weights(x))
    )
    sums = [weights @ value]
    if x.dout is not None:
        dout, scale = x.dout.square(), 1 / x.query.shape[-1]
        deltas = (out.square() * dout).sum(-1, keepdim=True)
        dscores = weights * (dout @ value.transpose(-1, -2) + deltas)
        dk = (dscores.transpose(-1, -2) @ query).sum(1)
        dv = (weights.transpose(-1, -2) @ dout).sum(1)
        sums += [scale * dscores @ key, scale * dk, dv, dscores]
    return [total.max().sqrt().item() for total in sums]
