"""The frequencies of rope_tables, whose docstring has the formulas."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

Scaled = tuple[list[float], float]  # inverse frequencies, factor of cos and sin


def inverse_frequencies(
    rotary_dim: int, length: int, base: float, scaling: Mapping[str, Any] | None
) -> Scaled:
    """The inverse frequencies, and what cos and sin are multiplied by."""
    if not isinstance(base, int | float) or isinstance(base, bool):
        raise TypeError(f"base: expected a number, got {type(base).__name__}")
    if not base > 0:
        raise ValueError(f"base: expected a positive number, got {base}")
    if scaling is None:
        return _powers(rotary_dim, base), 1.0
    if not isinstance(scaling, Mapping):
        raise TypeError(f"scaling: expected None or a dictionary, got {type(scaling).__name__}")
    keys = dict(scaling)
    kind = keys.pop("rope_type", None)
    alias = keys.pop("type", kind)
    kind = alias if kind is None else kind
    if alias != kind:
        raise ValueError(f"scaling: expected one kind, got rope_type {kind!r} and type {alias!r}")
    if kind not in _KINDS:
        raise ValueError(
            f"scaling: expected a 'rope_type' of {', '.join(map(repr, _KINDS))}, got {kind!r}"
        )
    if keys.pop("rope_theta", base) != base:
        raise ValueError(
            f"scaling: expected 'rope_theta' to be base, {base}, got {scaling['rope_theta']}"
        )
    function, required, optional = _KINDS[kind]
    for key in required:
        if keys.get(key) is None:
            raise ValueError(f"scaling: {kind!r} needs the key {key!r}, got {sorted(scaling)}")
    for key, value in keys.items():
        if key not in required and key not in optional:
            known = ", ".join(map(repr, (*required, *optional))) or "none"
            raise ValueError(f"scaling: expected the keys of {kind!r}, {known}; got {key!r}")
        _check_value(key, value)
    given = {key: value for key, value in keys.items() if value is not None}
    return function(rotary_dim, length, base, given)


def _check_value(key: str, value: Any) -> None:
    if key == "truncate":
        if not isinstance(value, bool | None):
            raise TypeError(f"scaling: expected a bool under {key!r}, got {type(value).__name__}")
    elif value is not None:
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise TypeError(f"scaling: expected a number under {key!r}, got {type(value).__name__}")
        if not (math.isfinite(value) and value > 0):
            raise ValueError(f"scaling: expected a positive number under {key!r}, got {value}")


def _powers(rotary_dim: int, base: float) -> list[float]:
    return [float(base) ** (-2.0 * n / rotary_dim) for n in range(rotary_dim // 2)]


def _default(rotary_dim: int, length: int, base: float, given: dict[str, Any]) -> Scaled:
    return _powers(rotary_dim, base), 1.0


def _linear(rotary_dim: int, length: int, base: float, given: dict[str, Any]) -> Scaled:
    return [f / given["factor"] for f in _powers(rotary_dim, base)], 1.0


def _with_larger_base(rotary_dim: int, base: float, growth: float) -> Scaled:
    if rotary_dim <= 2:  # the one frequency is 1, whatever the base
        return _powers(rotary_dim, base), 1.0
    return _powers(rotary_dim, base * growth ** (rotary_dim / (rotary_dim - 2))), 1.0


def _ntk(rotary_dim: int, length: int, base: float, given: dict[str, Any]) -> Scaled:
    return _with_larger_base(rotary_dim, base, given["factor"])


def _dynamic(rotary_dim: int, length: int, base: float, given: dict[str, Any]) -> Scaled:
    factor, original = given["factor"], given["original_max_position_embeddings"]
    growth = factor * max(length, original) / original - (factor - 1)
    return _with_larger_base(rotary_dim, base, growth)


def _yarn(rotary_dim: int, length: int, base: float, given: dict[str, Any]) -> Scaled:
    factor, original = given["factor"], given["original_max_position_embeddings"]
    if base == 1:
        raise ValueError("base: expected another number than 1 with 'yarn', got 1")

    def mscale(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    def dimension(rotations: float) -> float:
        turns = original / (rotations * 2 * math.pi)
        return rotary_dim * math.log(turns) / (2 * math.log(base))

    attention_factor = given.get("attention_factor")
    if attention_factor is None and "mscale" in given and "mscale_all_dim" in given:
        attention_factor = mscale(given["mscale"]) / mscale(given["mscale_all_dim"])
    elif attention_factor is None:
        attention_factor = mscale(1.0)
    low, high = dimension(given.get("beta_fast", 32)), dimension(given.get("beta_slow", 1))
    if given.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rotary_dim - 1)
    if low == high:
        high += 0.001  # as everybody does: a step
    ramp = [min(max((n - low) / (high - low), 0.0), 1.0) for n in range(rotary_dim // 2)]
    powers = _powers(rotary_dim, base)
    return [r * f / factor + (1 - r) * f for r, f in zip(ramp, powers)], float(attention_factor)


def _llama3(rotary_dim: int, length: int, base: float, given: dict[str, Any]) -> Scaled:
    factor, original = given["factor"], given["original_max_position_embeddings"]
    low, high = given["low_freq_factor"], given["high_freq_factor"]
    if not low < high:
        raise ValueError(
            f"scaling: expected 'low_freq_factor' below 'high_freq_factor', got {low} and {high}"
        )

    def scaled(f: float) -> float:
        t = min(max((original * f / (2 * math.pi) - low) / (high - low), 0.0), 1.0)
        result: float = (1 - t) * f / factor + t * f
        return result

    return [scaled(f) for f in _powers(rotary_dim, base)], 1.0


# kind: function, keys that must be there, keys that may be there
_KINDS: dict[str, tuple[Callable[..., Scaled], tuple[str, ...], tuple[str, ...]]] = {
    "default": (_default, (), ()),
    "linear": (_linear, ("factor",), ()),
    "ntk": (_ntk, ("factor",), ()),
    "dynamic": (_dynamic, ("factor", "original_max_position_embeddings"), ()),
    "yarn": (
        _yarn,
        ("factor", "original_max_position_embeddings"),
        ("beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim", "truncate"),
    ),
    "llama3": (
        _llama3,
        (
            "factor",
            "original_max_position_embeddings",
            "low_freq_factor",
            "high_freq_factor",
        ),
        (),
    ),
}
