"""Generators and comparators of the test suite and of ``python -m fastattn check``.

The accuracy contract, which ``assert_accurate`` implements, for every result of every op:

    max |actual - oracle| <= 2 * max |eager - oracle| + floor
    floor = eps(dtype) * max(max |oracle|, magnitude)

oracle is ``fastattn.reference`` in float64; eager is the same formula in the dtype of the inputs,
on the same inputs; eps is ``torch.finfo(dtype).eps``. magnitude, where an op gives it, is the
largest root of the sum of squares of the terms that a result adds up: it stands for the rounding
that must be expected where these terms cancel. (The oracle of a float64 result is a float64 result
itself, and eager has no error: there the floor is 256 times as large.)

Besides, the root of the mean square error (which bounds the cosine distance) must keep the same
bound with means in place of the first two maxima, and NaN and infinities must be at identical
places.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from fastattn import _C, reference

# Shapes that stress tiles: nothing, one, primes, and a tile with one row less and one row more.
LENGTHS = (0, 1, 2, 3, 5, 7, 13, 17, 31, 64, 65, 127, 128, 129, 257)
HEAD_DIMS = (1, 3, 8, 40, 64, 80, 96, 128, 192, 256, 512)
HEAD_GROUPS = (1, 2, 3, 4, 7)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
STRIDES = ("contiguous", "transposed", "fused", "strided", "columns", "guarded")

Results = dict[str, Tensor]


def default_dtype() -> torch.dtype:
    """float32; on level "sm90", whose own kernels have 16 bits, bfloat16."""
    return torch.bfloat16 if _C.active_cpu_level() == "sm90" else torch.float32


def randn(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Normal numbers that depend on shape and seed alone, rounded to dtype; on torch's default
    device."""
    generator = torch.Generator("cpu").manual_seed(seed)
    drawn = torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu")
    return drawn.to(torch.get_default_device(), dtype)


def restride(x: Tensor, kind: str) -> Tensor:
    """The same numbers with other strides; memory around and between them is NaN (True if boolean).

    transposed: heads and length exchanged in memory, as ``x.transpose(1, 2)`` of a projection does.
    fused: a slice of a last dimension three times as wide, as from a fused QKV projection. strided:
    every second number of the last dimension. columns: the last two dimensions exchanged in memory.
    guarded: rows and columns around every matrix.
    """
    if kind == "contiguous":
        return x.contiguous()
    width = x.shape[-1]
    padding, part = {
        "transposed": ((0, 0), (slice(None), slice(None))),
        "fused": ((0, 2 * width), (slice(None), slice(width, 2 * width))),
        "strided": ((0, width), (slice(None), slice(0, 2 * width, 2))),
        "columns": ((0, 0), (slice(None), slice(None))),
        "guarded": ((5, 3), (slice(2, -3), slice(1, -2))),
    }[kind]
    exchanged = {"transposed": (-3, -2), "columns": (-2, -1)}.get(kind, (-1, -1))
    *leading, rows, columns = x.transpose(*exchanged).shape
    gap = True if x.dtype == torch.bool else math.nan if x.is_floating_point() else 0
    buffer = x.new_full((*leading, rows + padding[0], columns + padding[1]), gap)
    index = (..., *part)
    return buffer.transpose(*exchanged)[index].copy_(x)


def attention_inputs(
    *,
    batch: tuple[int, ...] = (2,),
    heads: int = 2,
    kv_heads: int | None = None,
    queries: int,
    keys: int | None = None,
    head_dim: int = 16,
    head_dim_v: int | None = None,
    dtype: torch.dtype | None = None,
    seed: int = 0,
    layout: str = "bhsd",
) -> Results:
    """Random query, key and value by name; of ``default_dtype()``, if of no other."""
    kv_heads, keys = kv_heads or heads, queries if keys is None else keys
    dtype = dtype or default_dtype()
    shapes = {
        "query": (*batch, heads, queries, head_dim),
        "key": (*batch, kv_heads, keys, head_dim),
        "value": (*batch, kv_heads, keys, head_dim_v or head_dim),
    }
    drawn = {n: randn(*s, seed=seed + i, dtype=dtype) for i, (n, s) in enumerate(shapes.items())}
    if layout == "bshd":
        return {name: x.transpose(-3, -2).contiguous() for name, x in drawn.items()}
    return drawn


def covering_sample(
    axes: Mapping[str, Sequence[Any]], count: int, seed: int, fits: Callable[[Any], bool]
) -> list[dict[str, Any]]:
    """``count`` random points of the grid of ``axes``, with every value about equally often."""
    generator, uses, chosen = random.Random(seed), Counter[tuple[str, Any]](), []
    for _ in range(count):
        drawn = ({n: generator.choice(v) for n, v in axes.items()} for _ in range(200))
        point = min(filter(fits, drawn), key=lambda case: sum(uses[use] for use in case.items()))
        uses.update(point.items())
        chosen.append(point)
    return chosen


def assert_accurate(
    actual: Tensor,
    oracle: Tensor,
    eager: Tensor,
    name: str,
    *,
    magnitude: float = 0.0,
    dtype: torch.dtype | None = None,
) -> float:
    """Raise AssertionError unless ``actual`` keeps the accuracy contract (at the top of this file).

    ``dtype`` is that of the inputs, where a result is wider than what it comes from. Returns the
    part of the allowed error that is used; the message of the error says where it is largest.
    """
    if actual.shape != oracle.shape:
        raise AssertionError(f"{name}: shape {tuple(actual.shape)}, expected {tuple(oracle.shape)}")
    got, want, plain = (x.detach().double() for x in (actual, oracle, eager))
    for test in (torch.isnan, torch.isposinf, torch.isneginf):
        differ = test(got) != test(want)
        if differ.any():
            where = tuple(differ.nonzero()[0].tolist())
            raise AssertionError(f"{name}{list(where)}: got {got[where]}, expected {want[where]}")
    compared = torch.isfinite(want)
    if not compared.any():
        return 0.0
    error = torch.where(compared, got - want, 0.0).abs()
    allowed_by_eager = torch.where(compared & torch.isfinite(plain), plain - want, 0.0).abs()
    largest = max(torch.where(compared, want, 0.0).abs().max().item(), magnitude)
    eps = max(torch.finfo(x).eps for x in (actual.dtype, dtype or actual.dtype))
    floor = eps * largest * (256 if actual.dtype == torch.float64 else 1)
    budget = 2.0 * allowed_by_eager.max().item() + floor
    mean_budget = 2.0 * _root_mean_square(allowed_by_eager) + floor
    worst = tuple(int(i) for i in torch.unravel_index(error.argmax(), error.shape))
    used = max(_ratio(error.max().item(), budget), _ratio(_root_mean_square(error), mean_budget))
    if not used <= 1.0:
        raise AssertionError(
            f"{name}{list(worst)}: got {got[worst].item():.9g}, expected {want[worst].item():.9g}; "
            f"{100 * used:.0f}% of the budget {budget:.3g} (eager's error is "
            f"{allowed_by_eager.max().item():.3g}, the floor {floor:.3g})"
        )
    return used


def attention_results(
    function: Callable[..., Any],
    inputs: Mapping[str, Tensor],
    options: Mapping[str, Any],
    *,
    seed: int = 1234,
    wrt: tuple[str, ...] | None = None,
    packed: tuple[Tensor, Tensor] | None = None,
) -> Results:
    """out, lse and "d" + name for every input (or those in ``wrt``), for random dout and dlse.

    The strides of the inputs are kept. ``packed`` is the pair of cu_seqlens of a varlen function.
    """
    wrt = tuple(inputs) if wrt is None else wrt
    leaves = {n: x.detach().requires_grad_(n in wrt) for n, x in inputs.items()}
    named = {n: x for n, x in leaves.items() if n not in ("query", "key", "value")}
    positional = [leaves[n] for n in ("query", "key", "value")]
    out, lse = function(*positional, *(packed or ()), **named, **options, return_lse=True)
    dout, dlse = cotangents(out, lse, seed)
    grads = torch.autograd.grad((out, lse), [leaves[n] for n in wrt], (dout, dlse))
    return {"out": out, "lse": lse} | {f"d{n}": g for n, g in zip(wrt, grads, strict=True)}


def inference_results(
    function: Callable[..., Any],
    inputs: Mapping[str, Tensor],
    options: Mapping[str, Any],
    packed: tuple[Tensor, Tensor] | None = None,
) -> Results:
    """out and lse where no gradient is recorded, which other kernels may compute."""
    named = {n: x for n, x in inputs.items() if n not in ("query", "key", "value")}
    positional = [inputs[n] for n in ("query", "key", "value")]
    with torch.no_grad():
        out, lse = function(*positional, *(packed or ()), **named, **options, return_lse=True)
    return {"out": out, "lse": lse}


def cotangents(out: Tensor, lse: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Random gradients of out and lse; values that every floating dtype holds exactly."""
    dout = randn(*out.shape, seed=seed, dtype=torch.bfloat16).to(out)
    return dout, randn(*lse.shape, seed=seed + 1, dtype=torch.bfloat16).to(lse)


def to_float64(value: Any) -> Any:
    """A floating-point tensor in float64; anything else as it is."""
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def check_attention(
    function: Callable[..., Any],
    inputs: Mapping[str, Tensor],
    *,
    oracle: Callable[..., Any] = reference.attention,
    packed: tuple[Tensor, Tensor] | None = None,
    wrt: tuple[str, ...] | None = None,
    what: str = "",
    **options: Any,
) -> float:
    """Hold ``function`` to the accuracy contract: forward, backward, and forward in inference.

    Returns the part of the allowed error that is used by the worst of all results.
    """
    exact = {n: to_float64(x) for n, x in inputs.items()}
    exact_options = {n: to_float64(x) for n, x in options.items()}
    dtype = inputs["query"].dtype
    got = attention_results(function, inputs, options, wrt=wrt, packed=packed)
    inferred = inference_results(function, inputs, options, packed)
    with one_thread():
        plain = attention_results(oracle, inputs, options, wrt=wrt, packed=packed)
        want = attention_results(oracle, exact, exact_options, wrt=wrt, packed=packed)
        about = (exact, exact_options, want, cotangents(want["out"], want["lse"], 1234), dtype)
        magnitudes = _packed_magnitudes(packed, *about) if packed else _magnitudes(*about)
        used, failures = 0.0, []
        training = [(name, name, x) for name, x in got.items()]
        for name, label, x in training + [(n, f"{n} in inference", x) for n, x in inferred.items()]:
            if x.dtype != plain[name].dtype:
                failures.append(f"{label}: {x.dtype}, expected {plain[name].dtype}")
            tensors = (x, want[name], plain[name])
            source = None if name == "lse" else dtype
            try:
                part = assert_accurate(*tensors, label, magnitude=magnitudes[name], dtype=source)
                used = max(used, part)
            except AssertionError as error:
                failures.append(str(error))
    if failures:
        raise AssertionError("\n".join([what or str(dict(options)), *failures]))
    return used


def _magnitudes(
    inputs: Mapping[str, Tensor],
    options: Mapping[str, Any],
    want: Results,
    cotangent: tuple[Tensor, Tensor],
    dtype: torch.dtype,
) -> dict[str, float]:
    """For each result of attention, the largest root of the sum of squares of the terms it adds.

    A weight exp(s - lse), of float32 numbers or wider whatever the dtype of the result, is off by 2
    eps for the exponential, and by the rounding of s and lse: each is stored, and then scaled to
    the base of the exponential. (In the forward pass no lse is there yet.) The n products of two
    rows are added one after another, and what is rounded is the growing sum.
    """
    bshd = options.get("layout") == "bshd"
    tensors = (*(inputs[n] for n in ("query", "key", "value")), want["out"], cotangent[0])
    q, k, v, out, dout = (x.detach().transpose(-3, -2) if bshd else x.detach() for x in tensors)
    q, k, v = (torch.nan_to_num(x, 0.0, 0.0, 0.0) for x in (q, k, v))
    kv_heads, group = k.shape[-3], q.shape[-3] // max(k.shape[-3], 1)
    k, v = (x.repeat_interleave(group, dim=-3) for x in (k, v))
    lse = torch.nan_to_num(want["lse"].detach(), 0.0, 0.0, 0.0).unsqueeze(-1)
    dlse = cotangent[1].unsqueeze(-1)
    bias, dropout_p = inputs.get("bias", options.get("bias")), options.get("dropout_p", 0.0)
    unused = ("bias", "dropout_p", "philox", "deterministic", "batch_invariant")
    weights = reference.attention_weights(
        inputs["query"],
        inputs["key"],
        want["lse"],
        bias=bias,
        **{n: x for n, x in options.items() if n not in unused},
    ).detach()
    kept = weights.new_ones(())
    if dropout_p:
        kept = reference.dropout_mask(weights.shape, dropout_p, options["philox"]) / (1 - dropout_p)
    scale = options.get("scale")
    scale2 = 1.0 / q.shape[-1] if scale is None else scale * scale
    finer = torch.finfo(torch.promote_types(dtype, torch.float32)).eps / torch.finfo(dtype).eps
    score_error = scale2 * (q.square() @ k.square().mT) * (1.0 + q.shape[-1] / 2)
    forward_error = finer**2 * (4.0 + 2.0 * score_error)
    backward_error = forward_error + finer**2 * 2.0 * lse.square()
    delta, delta_error = (dout * out).sum(-1, True), (dout * out).square().sum(-1, True)
    dweights = kept * (dout @ v.mT) - delta + dlse
    dweights_error = kept.square() * (dout.square() @ v.square().mT) + delta_error
    dweights_error = dweights_error * (1.0 + finer**2 * v.shape[-1] / 2) + dlse.square()
    dscores = weights.square() * (dweights_error + backward_error * dweights.square())
    weights = (weights * kept).square()

    def shared(x: Tensor) -> Tensor:
        return x.reshape(*x.shape[:-3], kv_heads, group, *x.shape[-2:]).sum(-3)

    sums = {
        "out": weights * (1.0 + forward_error) @ v.square(),
        "lse": 1.0 + (weights * score_error).sum(-1),
        "dquery": scale2 * dscores @ k.square(),
        "dkey": scale2 * shared(dscores.mT @ q.square()),
        "dvalue": shared((weights * (1.0 + backward_error)).mT @ dout.square()),
        "dsink": delta_error,
    }
    if "bias" in inputs:
        sums["dbias"] = dscores.sum_to_size(inputs["bias"].shape)
    return {n: x.max().sqrt().item() if x.numel() else 0.0 for n, x in sums.items()}


def _packed_magnitudes(
    packed: tuple[Tensor, Tensor],
    inputs: Mapping[str, Tensor],
    options: Mapping[str, Any],
    want: Results,
    cotangent: tuple[Tensor, Tensor],
    dtype: torch.dtype,
) -> dict[str, float]:
    """The largest magnitudes over all sequences."""
    sliced = ("mask", "query_lengths", "key_lengths", "alibi_slopes")
    tensors = {n: x for n, x in {**inputs, **options}.items() if n in (*inputs, *sliced)}
    tensors.pop("sink", None)
    numbers = {n: x for n, x in options.items() if n not in tensors and "seqlen" not in n}
    largest: dict[str, float] = dict.fromkeys(want, 0.0)
    first = 0
    for part in reference.sequences(*packed, tensors):
        last = first + part["query"].shape[0]
        rows, first = slice(first, last), last
        part_inputs = {n: part.pop(n) for n in inputs if n in part}
        part_want = {"out": want["out"][rows], "lse": want["lse"][:, rows]}
        part_cotangent = cotangent[0][rows], cotangent[1][:, rows]
        part_options = part | numbers | {"layout": "bshd"}
        found = _magnitudes(part_inputs, part_options, part_want, part_cotangent, dtype)
        largest = {n: max(x, found.get(n, 0.0)) for n, x in largest.items()}
    return largest


def _root_mean_square(x: Tensor) -> float:
    return x.square().mean().sqrt().item()


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole > 0.0 else 0.0 if part == 0.0 else math.inf


@contextmanager
def one_thread() -> Iterator[None]:
    """Run the block without torch's other threads: many small eager ops only wait for them."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def running_on(level: str) -> Iterator[None]:
    """Run the block on one CPU level; or on "sm80" or "sm90", the CUDA kernels over an emulated
    GPU (in a build that has it); or with tensors made on "cuda"."""
    if level == "cuda":
        with torch.device("cuda"):
            yield
        return
    before = _C.active_cpu_level()
    _C.set_cpu_level(level)
    try:
        yield
    finally:
        _C.set_cpu_level(before)
