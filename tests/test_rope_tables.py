"""rope_tables: each kind of scaling against its formula, and against transformers where it is."""

import math

import pytest
import torch

import fastattn.functional as fa

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 512,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}
DYNAMIC = {"type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 64}


def frequencies(scaling, dim=32, base=10000.0, length=100):
    """The inverse frequencies and the factor, read back from the first rows of the tables."""
    cos, sin = fa.rope_tables(dim, length, base=base, scaling=scaling, dtype=torch.float64)
    factor = cos[0, 0].item()
    assert torch.allclose(cos[0], torch.full_like(cos[0], factor))
    angles = torch.atan2(sin[1], cos[1])
    turns = torch.arange(length, dtype=torch.float64)[:, None] * angles
    torch.testing.assert_close(cos, factor * turns.cos(), rtol=0, atol=1e-9)
    torch.testing.assert_close(sin, factor * turns.sin(), rtol=0, atol=1e-9)
    return angles, factor


def powers(dim=32, base=10000.0):
    return base ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)


def test_without_scaling():
    for scaling in (None, {"rope_type": "default"}, {"type": "default", "rope_theta": 10000.0}):
        angles, factor = frequencies(scaling)
        torch.testing.assert_close(angles, powers())
        assert factor == 1


def test_linear():
    angles, factor = frequencies({"type": "linear", "factor": 4})
    torch.testing.assert_close(angles, powers() / 4)
    assert factor == 1


def test_ntk():
    angles, _ = frequencies({"rope_type": "ntk", "factor": 3.0})
    torch.testing.assert_close(angles, powers(base=10000.0 * 3.0 ** (32 / 30)))


def test_dynamic_ntk_depends_on_the_length():
    for length, growth in ((40, 1.0), (64, 1.0), (100, 2 * 100 / 64 - 1)):
        angles, _ = frequencies(DYNAMIC, length=length)
        torch.testing.assert_close(angles, powers(base=10000.0 * growth ** (32 / 30)))


def test_llama3_keeps_short_waves_and_stretches_long_ones():
    angles, factor = frequencies(LLAMA3)
    assert factor == 1
    for f, got in zip(powers().tolist(), angles.tolist(), strict=True):
        wave = 2 * math.pi / f
        if wave < 512 / 4:
            want = f
        elif wave > 512:
            want = f / 8
        else:
            smooth = (512 / wave - 1) / 3
            want = (1 - smooth) * f / 8 + smooth * f
        assert got == pytest.approx(want, rel=1e-12)


@pytest.mark.parametrize(
    "options, low, high, factor",
    [
        ({}, 1, 8, 0.1 * math.log(4) + 1),
        ({"beta_fast": 16, "beta_slow": 2}, 2, 7, 0.1 * math.log(4) + 1),
        ({"attention_factor": 0.5}, 1, 8, 0.5),
        ({"mscale": 1.0, "mscale_all_dim": 1.0}, 1, 8, 1.0),
        (
            {"mscale": 0.707, "mscale_all_dim": 1.0},
            1,
            8,
            (0.0707 * math.log(4) + 1) / (0.1 * math.log(4) + 1),
        ),
        ({"truncate": False}, None, None, 0.1 * math.log(4) + 1),
    ],
)
def test_yarn(options, low, high, factor):
    def dimension(turns):
        return 32 * math.log(512 / (turns * 2 * math.pi)) / (2 * math.log(10000.0))

    if low is None:
        low, high = dimension(32), dimension(1)
    else:
        fast, slow = options.get("beta_fast", 32), options.get("beta_slow", 1)
        assert (low, high) == (math.floor(dimension(fast)), math.ceil(dimension(slow)))
    angles, got_factor = frequencies(YARN | options)
    assert got_factor == pytest.approx(factor)
    ramp = ((torch.arange(16, dtype=torch.float64) - low) / (high - low)).clamp(0, 1)
    torch.testing.assert_close(angles, powers() * (ramp / 4 + 1 - ramp))


def test_angles_are_exact_at_far_positions():
    cos, _ = fa.rope_tables(2, 200_001)
    assert cos.dtype == torch.float32
    assert cos[200_000, 0].item() == pytest.approx(math.cos(200_000), abs=6e-8)


def test_dtype_device_and_empty_tables():
    assert fa.rope_tables(8, 3, dtype=torch.bfloat16)[1].dtype == torch.bfloat16
    assert fa.rope_tables(8, 3, device="meta")[0].is_meta
    assert fa.rope_tables(0, 3)[0].shape == (3, 0)
    assert fa.rope_tables(8, 0)[0].shape == (0, 4)
    assert fa.rope_tables(2, 9, scaling={"type": "ntk", "factor": 2.0})[0].shape == (9, 1)


@pytest.mark.parametrize(
    "changed, error, message",
    [
        ({"rotary_dim": 7}, ValueError, "rotary_dim: expected an even number"),
        ({"rotary_dim": 8.0}, TypeError, "rotary_dim: expected an integer"),
        ({"length": -1}, ValueError, "length: expected a number >= 0"),
        ({"base": 0.0}, ValueError, "base: expected a positive number"),
        ({"base": "1e4"}, TypeError, "base: expected a number"),
        ({"dtype": torch.int32}, TypeError, "dtype: expected a floating one"),
        ({"scaling": 2.0}, TypeError, "scaling: expected None or a dictionary"),
        ({"scaling": {"factor": 2.0}}, ValueError, "scaling: expected a 'rope_type' of"),
        ({"scaling": {"type": "longrope"}}, ValueError, "got 'longrope'"),
        ({"scaling": {"type": "linear"}}, ValueError, "'linear' needs the key 'factor'"),
        ({"scaling": {"type": "ntk", "factor": 2.0, "facter": 1}}, ValueError, "got 'facter'"),
        ({"scaling": {"type": "ntk", "factor": "2"}}, TypeError, "a number under 'factor'"),
        ({"scaling": {"type": "ntk", "factor": -2.0}}, ValueError, "a positive number under"),
        (
            {"scaling": {"type": "ntk", "rope_type": "linear", "factor": 2.0}},
            ValueError,
            "one kind",
        ),
        ({"scaling": YARN | {"truncate": 1}}, TypeError, "a bool under 'truncate'"),
        ({"scaling": LLAMA3 | {"high_freq_factor": 1.0}}, ValueError, "'low_freq_factor' below"),
        ({"scaling": LLAMA3 | {"rope_theta": 5e5}}, ValueError, "'rope_theta' to be base"),
    ],
)
def test_bad_arguments_are_named(changed, error, message):
    with pytest.raises(error, match=message):
        fa.rope_tables(**({"rotary_dim": 8, "length": 4} | changed))


@pytest.mark.parametrize("scaling", [{"rope_type": "linear", "factor": 2.0}, DYNAMIC, YARN, LLAMA3])
def test_as_transformers(scaling):
    utils = pytest.importorskip("transformers.modeling_rope_utils")
    from transformers import LlamaConfig

    given = dict(scaling)
    kind = given.setdefault("rope_type", given.get("type"))
    original = given.get("original_max_position_embeddings", 512)
    config = LlamaConfig(
        hidden_size=64,
        num_attention_heads=2,
        max_position_embeddings=original,
        rope_theta=10000.0,
        rope_scaling=given,
    )
    want, factor = utils.ROPE_INIT_FUNCTIONS[kind](config, "cpu", seq_len=100)
    angles, got_factor = frequencies(scaling)
    torch.testing.assert_close(angles.float(), want.float(), rtol=1e-6, atol=0)
    assert got_factor == pytest.approx(factor)
