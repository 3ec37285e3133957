"""Attention is compared on the first and the last (sequence, KV head), and there on a sample of the
queries."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from fastattn import reference
from torch import Tensor

from cases import attention_peers
from checks import WHOLE, Compared, Oracle, evaluate, sampled_rows, zero_elsewhere

if TYPE_CHECKING:
    from cases.attention import AttentionCase, AttentionInputs

NAMES = ("out", "dq", "dk", "dv", "dbias")


class AttentionOracle(Oracle):
    """What is right for the sample of one case, and what the eager formula makes of it."""

    def __init__(self, case: AttentionCase, inputs: AttentionInputs):
        self.case = case
        self.rows = sampled_rows(case.queries).to(case.device)
        self.checked = inputs
        if case.queries > WHOLE:
            douts = tuple(zero_elsewhere(dout, 2, self.rows) for dout in inputs.douts)
            self.checked = replace(inputs, douts=douts)
        self.parts = []
        for batch, head in sorted({(0, 0), (case.batch - 1, case.heads_kv - 1)}):
            part = self._part(inputs, batch, head)
            wide = part.cast(torch.float64)
            exact = [result.detach() for result in evaluate(_reference, wide)]
            eager = [result.detach() for result in evaluate(attention_peers.naive, part)]
            self.parts.append((batch, head, exact, eager, _magnitudes(wide, exact[0])))

    def check_rest(self, results: tuple[Tensor, ...]) -> None:
        if len(results) > 1 and self.case.queries > WHOLE:
            others = torch.ones(self.case.queries, dtype=torch.bool, device=self.case.device)
            others[self.rows] = False
            assert not results[1][:, :, others].count_nonzero(), "dq is not zero where dout is"

    def compared(self, results: tuple[Tensor, ...]) -> Compared:
        for batch, head, *expected in self.parts:
            group = self._group(head)
            for name, result, *known in zip(NAMES, results, *expected, strict=False):
                if name in ("dk", "dv"):
                    got = result[batch : batch + 1, head : head + 1]
                elif name == "dbias":
                    got = result[:, group][:, :, self.rows]
                else:
                    got = result[batch : batch + 1, group][:, :, self.rows]
                yield name, got, *known

    def _group(self, head: int) -> slice:
        group = self.case.heads // self.case.heads_kv
        return slice(head * group, (head + 1) * group)

    def _part(self, x: AttentionInputs, batch: int, head: int) -> AttentionInputs:
        """One KV head, its query heads and the sampled queries, with the mask written out."""
        case, group, rows = self.case, self._group(head), self.rows
        visible = x.visible
        if visible is not None:
            full = visible.expand(case.batch, 1, case.queries, case.keys)
            visible = full[batch : batch + 1, :, rows]
        return replace(
            x,
            query=x.query[batch : batch + 1, group][:, :, rows],
            key=x.key[batch : batch + 1, head : head + 1],
            value=x.value[batch : batch + 1, head : head + 1],
            bias=None if x.bias is None else x.bias[:, group][:, :, rows],
            key_lengths=None,
            visible=visible,
            douts=tuple(dout[batch : batch + 1, group][:, :, rows] for dout in x.douts),
        )


def _reference(x: AttentionInputs) -> Tensor:
    return reference.attention(x.query, x.key, x.value, mask=x.visible, bias=x.bias)


@torch.no_grad()
def _magnitudes(x: AttentionInputs, out: Tensor) -> list[float]:
    """For each result, the largest root of the sum of squares of the terms that it adds up."""
    query, key, value, weights = (
        t.square() for t in (x.query, x.key, x.value, attention_peers.naive_weights(x))
    )
    sums = [weights @ value]
    if x.douts:
        dout, scale = x.douts[0].square(), 1 / x.query.shape[-1]
        deltas = (out.square() * dout).sum(-1, keepdim=True)
        dscores = weights * (dout @ value.transpose(-1, -2) + deltas)
        dk = (dscores.transpose(-1, -2) @ query).sum(1)
        dv = (weights.transpose(-1, -2) @ dout).sum(1)
        sums += [scale * dscores @ key, scale * dk, dv, dscores]
    return [total.max().sqrt().item() for total in sums]
