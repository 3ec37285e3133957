"""fastattn.nn.Attention against the formula in plain torch operations."""

import torch
import pytest
from block_cases import check_module, eager_attention, randomised

from fastattn import nn
from fastattn.testing import DTYPES, covering_sample, randn

POSITIONS = ("none", "rope", "partial", "interleaved", "alibi", "t5")
AXES = {
    "dtype": DTYPES,
    "batch": ((2,), (1,), (3, 2), (2, 1, 3), ()),
    "length": (1, 2, 7, 16, 33, 65),
    "context": (None, None, 5, 40),
    "heads": ((4, 4, 8, 8), (4, 2, 16, 16), (4, 1, 40, 24), (2, 2, 80, 80), (8, 4, 8, 16)),
    "causal": (False, True),
    "window": (None, None, (3, 2), (0, None), (None, 4)),
    "positions": POSITIONS,
    "qk_norm": (None, None, "rms", "layer"),
    "qk_norm_over": ("head", "projection"),
    "softcap": (None, 2.0),
    "sinks": (False, True),
    "gate": (False, False, True),
    "scale": (None, 1.0, 0.2),
    "bias": (False, True, (True, False, True)),
    "out_bias": (None, True, False),
    "call": ("plain", "plain", "mask", "bias", "pair", "key_lengths", "both_lengths", "positions"),
}


def fits(case):
    crossing = case["context"] is not None
    rotary = case["positions"] in ("rope", "partial", "interleaved")
    return not (
        (crossing and (rotary or case["causal"] or case["window"] or case["positions"] == "alibi"))
        or (case["call"] == "positions" and not rotary)
        or (case["qk_norm"] is None and case["qk_norm_over"] == "projection")
        or (case["call"].endswith("lengths") and case["batch"] == ())
    )


def make(case, embed_dim=24, **more):
    heads, kv_heads, head_dim, value_head_dim = case["heads"]
    positions = case["positions"]
    rotary_dim = head_dim // 2 if positions == "partial" else head_dim
    rope, relative = None, None
    if positions in ("rope", "partial", "interleaved"):
        rope = nn.RotaryEmbedding(rotary_dim, 128, interleaved=positions == "interleaved")
    if positions == "t5":
        relative = nn.T5RelativeBias(
            heads, num_buckets=8, max_distance=20, bidirectional=not case["causal"]
        )
    names = ("causal", "window", "qk_norm", "qk_norm_over", "softcap", "sinks", "gate", "scale")
    options = {n: case[n] for n in (*names, "bias", "out_bias") if n in case}
    module = nn.Attention(
        *(embed_dim, heads),
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        value_head_dim=value_head_dim,
        context_dim=None if case.get("context") is None else 20,
        rope=rope,
        alibi=positions == "alibi",
        relative_bias=relative,
        **options | more,
    )
    return randomised(module, dtype=case["dtype"])


def lengths(batch, most, seed):
    drawn = randn(*batch, seed=seed).abs() * most
    return drawn.to(torch.int32).clamp(max=most)


def call_inputs(case):
    batch, length, dtype = case["batch"], case["length"], case["dtype"]
    heads = case["heads"][0]
    keys = case["context"] or length
    inputs = {"x": randn(*batch, length, 24, seed=3, dtype=dtype)}
    if case["context"] is not None:
        inputs["context"] = randn(*batch, keys, 20, seed=4, dtype=dtype)
    call = case["call"]
    if call == "mask":
        inputs["mask"] = randn(*batch, 1, length, keys, seed=5) < 0.7
    elif call == "bias":
        inputs["bias"] = randn(heads, length, keys, seed=6, dtype=dtype)
    elif call == "pair":  # one for all but the first of the leading dimensions, as in AlphaFold
        leading = (*batch[:1], *(1 for _ in batch[1:]))
        inputs["bias"] = randn(*leading, heads, length, keys, seed=6, dtype=dtype)
    elif call == "key_lengths":
        inputs["key_lengths"] = lengths(batch, keys, 7)
    elif call == "both_lengths":
        inputs["query_lengths"] = lengths(batch, length, 8)
        inputs["key_lengths"] = lengths(batch, keys, 9)
    elif call == "positions":
        inputs["positions"] = (torch.arange(length) * 3 + 5) % 128
    return inputs


CASES = covering_sample(AXES, 120, 0, fits)


@pytest.mark.parametrize("part", range(10))
def test_the_formula_forward_and_backward(level, part):
    for case in CASES[part::10]:
        check_module(make(case), eager_attention, call_inputs(case), what=case)
