"""Rotary position embedding: apply it, in place or not, and make its tables."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastattn._ops import rope as _ops
from fastattn.functional import _arguments
from fastattn.functional._rope_scaling import inverse_frequencies

__all__ = ["apply_rope", "apply_rope_", "apply_rope_qk", "apply_rope_qk_", "rope_tables"]


def apply_rope(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    interleaved: bool = False,
    positions: Tensor | None = None,
    offset: int | Tensor = 0,
    layout: str = "bhsd",
) -> Tensor:
    r"""Rotary position embedding of queries or keys.

    ::

        p_i   = positions_i + offset                     i + offset without positions
        out_a = x_a cos[p_i, n] - x_b sin[p_i, n]        n = 0 .. rotary_dim / 2 - 1
        out_b = x_b cos[p_i, n] + x_a sin[p_i, n]

        pairs (a, b) of head_dim 8, rotary_dim 6:        column  0  1  2  3  4  5  6  7
          half (default; NeoX, Llama)                    pair    0  1  2  0  1  2  -  -
          interleaved=True (GPT-J, RoFormer)             pair    0  0  1  1  2  2  -  -

    Columns from rotary_dim = 2 \* cos.shape[-1] on are copied. The arithmetic is in float32 for
    16-bit inputs, with one rounding at the end, whatever the dtype of the tables.

    Args:
        x: (\*batch, heads, length, head_dim), any strides; float32, bfloat16, float16 or, on the
            CPU, float64. Up to 6 batch dimensions, or none.
        cos, sin: tables (positions, rotary_dim / 2), as :func:`rope_tables` makes them; or a row
            for each token, (\*batch, length, rotary_dim / 2), where sizes of 1 broadcast. Any of
            the four dtypes, read as they are. (Hugging Face's models hand over every column twice:
            pass ``cos[..., : cos.shape[-1] // 2]``.)
        interleaved: which columns make a pair, as above.
        positions: int32 or int64, (length,) or (\*batch, length): the row of the tables for each
            token.
        offset: what is added to every position: an integer, or an integer tensor of shape () or
            (\*batch), for instance the cache length of each request when decoding.
        layout: "bhsd" as above, or "bshd": (\*batch, length, heads, head_dim), which without a
            batch is the packed (tokens, heads, head_dim).

    Returns:
        A tensor of x's shape and dtype, its memory in the order of x's.

    Raises:
        TypeError: for the type or dtype of an argument. ValueError: for its device, shape or value,
            a position outside of the tables, or cos or sin that require a gradient (there is none).

    The gradient is the inverse rotation, differentiable in turn. On CUDA nothing waits for the GPU,
    and so positions and offsets that lie there are not checked: a token whose position is outside
    of the tables becomes NaN, as far as it is rotated.

    Source: Su et al., RoFormer: Enhanced Transformer with Rotary Position Embedding (2021).

    >>> cos, sin = rope_tables(8, 16)
    >>> x = torch.randn(2, 4, 5, 8)
    >>> out = apply_rope(x, cos, sin, offset=3)
    >>> a, b = x.chunk(2, dim=-1)
    >>> c, s = cos[3:8], sin[3:8]
    >>> torch.testing.assert_close(out, torch.cat((a * c - b * s, b * c + a * s), dim=-1))
    """
    if not type(x) is type(cos) is type(sin) is Tensor:
        _arguments.require_tensors(x=x, cos=cos, sin=sin)
    options = _options(cos, sin, interleaved, positions, offset, layout)
    return _ops.rotate(x, cos, sin, options)


def apply_rope_(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    interleaved: bool = False,
    positions: Tensor | None = None,
    offset: int | Tensor = 0,
    layout: str = "bhsd",
) -> Tensor:
    """:func:`apply_rope` in place: x, which may be a slice of a fused projection, is overwritten.

    Returns:
        x itself.

    Raises:
        TypeError, ValueError: as apply_rope does, and for an x whose elements share memory or that
            autograd does not let be written; x is then unchanged.

    >>> cos, sin = rope_tables(8, 16)
    >>> qkv = torch.randn(2, 5, 3, 4, 8)
    >>> key = qkv[:, :, 1]
    >>> expected = apply_rope(key, cos, sin, layout="bshd")
    >>> apply_rope_(key, cos, sin, layout="bshd") is key
    True
    >>> torch.equal(qkv[:, :, 1], expected)
    True
    """
    if not type(x) is type(cos) is type(sin) is Tensor:
        _arguments.require_tensors(x=x, cos=cos, sin=sin)
    options = _options(cos, sin, interleaved, positions, offset, layout)
    return _ops.rotate_in_place(x, cos, sin, options)


def apply_rope_qk(
    query: Tensor,
    key: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    interleaved: bool = False,
    positions: Tensor | None = None,
    offset: int | Tensor = 0,
    layout: str = "bhsd",
) -> tuple[Tensor, Tensor]:
    """:func:`apply_rope` of query and key in one call, which prepares the angles once.

    Heads and head_dim of the two may differ; batch, length and dtype are the same.

    Returns:
        (query, key), rotated.

    Raises:
        TypeError, ValueError: as apply_rope does.

    >>> cos, sin = rope_tables(8, 16)
    >>> q, k = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 5, 8)
    >>> q_out, k_out = apply_rope_qk(q, k, cos, sin)
    >>> torch.equal(q_out, apply_rope(q, cos, sin)) and torch.equal(k_out, apply_rope(k, cos, sin))
    True
    """
    if not type(query) is type(key) is type(cos) is type(sin) is Tensor:
        _arguments.require_tensors(query=query, key=key, cos=cos, sin=sin)
    options = _options(cos, sin, interleaved, positions, offset, layout)
    return _ops.rotate_qk(query, key, cos, sin, options)


def apply_rope_qk_(
    query: Tensor,
    key: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    interleaved: bool = False,
    positions: Tensor | None = None,
    offset: int | Tensor = 0,
    layout: str = "bhsd",
) -> tuple[Tensor, Tensor]:
    """:func:`apply_rope_qk` in place: query and key are overwritten.

    Returns:
        (query, key), the arguments themselves.

    Raises:
        TypeError, ValueError: as apply_rope_ does.

    >>> cos, sin = rope_tables(8, 16)
    >>> q, k = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 5, 8)
    >>> expected = apply_rope(k, cos, sin)
    >>> _ = apply_rope_qk_(q, k, cos, sin)
    >>> torch.equal(k, expected)
    True
    """
    if not type(query) is type(key) is type(cos) is type(sin) is Tensor:
        _arguments.require_tensors(query=query, key=key, cos=cos, sin=sin)
    options = _options(cos, sin, interleaved, positions, offset, layout)
    return _ops.rotate_qk_in_place(query, key, cos, sin, options)


def _options(
    cos: Tensor,
    sin: Tensor,
    interleaved: bool,
    positions: Tensor | None,
    offset: int | Tensor,
    layout: str,
) -> dict[str, Any]:
    """The options of an op that are not at their defaults."""
    if (cos.requires_grad or sin.requires_grad) and torch.is_grad_enabled():
        raise ValueError(
            f"{'cos' if cos.requires_grad else 'sin'}: expected a tensor that requires no gradient "
            "(tables have none): detach it"
        )
    given: dict[str, Any] = {}
    if positions is not None:
        _arguments.require_tensors(positions=positions)
        given["positions"] = positions
    if isinstance(offset, Tensor):
        given["offsets"] = offset
    elif isinstance(offset, bool) or not isinstance(offset, int | torch.SymInt):
        raise TypeError(f"offset: expected an integer or a tensor, got {type(offset).__name__}")
    elif offset != 0:
        given["offset"] = offset
    if interleaved:
        given["interleaved"] = True
    if _arguments.is_bshd(layout):
        given["bshd"] = True
    return given


def rope_tables(
    rotary_dim: int,
    length: int,
    *,
    base: float = 10000.0,
    scaling: dict[str, Any] | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> tuple[Tensor, Tensor]:
    r"""The tables of :func:`apply_rope`, computed in float64 and then rounded.

    ::

        f_n       = base^(-2 n / d)                      n = 0 .. d / 2 - 1, d = rotary_dim
        cos[p, n] = m cos(p g_n)                         g = f and m = 1 without scaling
        sin[p, n] = m sin(p g_n)

    ``scaling`` is None or a dictionary as Hugging Face's ``rope_scaling``: its kind under
    "rope_type" (or "type"), and the keys below. Here s is "factor" and L is
    "original_max_position_embeddings"::

        "default"   g = f
        "linear"    s           g = f / s
        "ntk"       s           g = f with base s^(d / (d - 2)) times as large
        "dynamic"   s, L        g = f with base (s N / L - (s - 1))^(d / (d - 2)) times as large,
                                N = max(length, L)
        "yarn"      s, L; "beta_fast" (32), "beta_slow" (1), "attention_factor", "mscale",
                    "mscale_all_dim", "truncate" (True)
                                g = r f / s + (1 - r) f,
                                r_n = clamp((n - low) / (high - low), 0, 1)
                                low, high = dim(beta_fast), dim(beta_slow)
                                dim(t) = d ln(L / (2 pi t)) / (2 ln base), rounded outwards where
                                "truncate", and kept within 0 .. d - 1
                                m = attention_factor, or M(mscale) / M(mscale_all_dim) where both
                                are given, or M(1), with M(t) = 0.1 t ln(s) + 1 (1 where s <= 1)
        "llama3"    s, L, "low_freq_factor" (a), "high_freq_factor" (b)
                                g = (1 - t) f / s + t f,
                                t_n = clamp((L f_n / (2 pi) - a) / (b - a), 0, 1)

    Every key named above without a default must be there; "rope_theta" may be, if it is base; any
    other one raises.

    Args:
        rotary_dim: d, even.
        length: the number of positions.
        base: the base of the frequencies, Hugging Face's rope_theta.
        dtype: of the tables. float32, unless there is a reason: in bfloat16 far positions coincide.

    Returns:
        (cos, sin), each (length, rotary_dim / 2).

    Raises:
        TypeError, ValueError: naming the argument or the key.

    Source: Su et al., RoFormer (2021); Chen et al., Extending Context Window of Large Language
    Models via Positional Interpolation (2023), "linear"; bloc97, NTK-Aware Scaled RoPE (2023) and
    emozilla, Dynamically Scaled RoPE (2023), "ntk" and "dynamic"; Peng et al., YaRN (2023); Llama
    3.1 (2024).

    >>> cos, sin = rope_tables(64, 4096, scaling={"rope_type": "linear", "factor": 4.0})
    >>> cos.shape
    torch.Size([4096, 32])
    >>> round(sin[4, 0].item(), 6) == round(math.sin(1.0), 6)
    True
    """
    for name, value in (("rotary_dim", rotary_dim), ("length", length)):
        if isinstance(value, bool) or not isinstance(value, int | torch.SymInt):
            raise TypeError(f"{name}: expected an integer, got {type(value).__name__}")
    if rotary_dim < 0 or rotary_dim % 2:
        raise ValueError(f"rotary_dim: expected an even number >= 0, got {rotary_dim}")
    if length < 0:
        raise ValueError(f"length: expected a number >= 0, got {length}")
    if not dtype.is_floating_point:
        raise TypeError(f"dtype: expected a floating one, got {dtype}")
    frequencies, attention_factor = inverse_frequencies(rotary_dim, length, base, scaling)
    positions = torch.arange(length, dtype=torch.float64)
    angles = positions[:, None] * torch.tensor(frequencies, dtype=torch.float64)
    cos, sin = angles.cos() * attention_factor, angles.sin() * attention_factor
    return cos.to(device=device, dtype=dtype), sin.to(device=device, dtype=dtype)
