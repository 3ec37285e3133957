"""Liger's kernels (Triton), beside torch's functions, in what is done row by row on the GPU."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cases.base import Forward, Peer, Unavailable
from cases.norm import EPS

if TYPE_CHECKING:
    from cases.activation import ActivationCase
    from cases.norm import NormCase
    from cases.rope import RopeCase


def _norm(case: NormCase) -> Forward:
    from liger_kernel.ops.layer_norm import LigerLayerNormFunction
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction

    if case.op == "layer_norm":
        return lambda x: LigerLayerNormFunction.apply(x.input, x.weight, x.bias, EPS)
    # NOTE: by default its backward pass overwrites the gradient that it is given.
    options = (EPS, 0.0, "llama", False)
    if case.op == "rms_norm":
        return lambda x: LigerRMSNormFunction.apply(x.input, x.weight, *options)
    if case.op == "add_rms_norm":
        from liger_kernel.ops.fused_add_rms_norm import LigerFusedAddRMSNormFunction

        return lambda x: LigerFusedAddRMSNormFunction.apply(x.input, x.residual, x.weight, *options)
    raise Unavailable(f"has no {case.op}")


def _activation(case: ActivationCase) -> Forward:
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction

    if (case.op, case.variant) != ("swiglu", "two"):
        raise Unavailable(f"has no {case.op} of these inputs")
    if case.backward:
        raise Unavailable("its backward pass overwrites its inputs, and cannot be repeated")
    return lambda x: LigerSiLUMulFunction.apply(x.input, x.up)


def _rope(case: RopeCase) -> Forward:
    from liger_kernel.ops.rope import LigerRopeFunction

    if case.interleaved:
        raise Unavailable("rotates halves only")
    if case.length == 1:
        raise Unavailable("overwrites its inputs where one token is rotated")
    return lambda x: LigerRopeFunction.apply(x.query, x.key, x.cos_wide[:, 0], x.sin_wide[:, 0])[:2]


def _peer(build) -> dict[str, Peer]:
    return {"liger": Peer("liger", "liger", build, "liger_kernel.ops, in Triton")}


NORM, ACTIVATION, ROPE = _peer(_norm), _peer(_activation), _peer(_rope)
