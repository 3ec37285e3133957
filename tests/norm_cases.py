"""What the tests of norms share: the norms by name, and the accuracy contract for one of them."""

import torch

import fastattn.functional as fa
from fastattn import reference
from fastattn.testing import assert_accurate, one_thread, randn

# (function, options, the tensors that it takes besides input), alone and with a residual.
ALONE = {
    "layer": ("layer_norm", {}, ("weight", "bias")),
    "rms": ("rms_norm", {"eps": 1e-6}, ("weight",)),
    "llama": ("rms_norm", {"eps": 1e-6, "casting": "llama"}, ("weight",)),
    "gemma": ("rms_norm", {"eps": 1e-6, "casting": "gemma"}, ("weight",)),
}
ADDED = {
    f"add {name}": (f"add_{function}", options, ("residual", *tensors))
    for name, (function, options, tensors) in ALONE.items()
}
NORMS = ALONE | ADDED


def norm_inputs(norm, leading, width, dtype=torch.float32, weight_dtype=None, seed=0):
    """Random tensors by name for one of NORMS; the row is ``width`` or a tuple of sizes."""
    row = (width,) if isinstance(width, int) else tuple(width)
    drawn = {"input": randn(*leading, *row, seed=seed, dtype=dtype)}
    for i, name in enumerate(NORMS[norm][2], 1):
        if name == "residual":
            drawn[name] = randn(*leading, *row, seed=seed + i, dtype=dtype)
        else:
            drawn[name] = randn(*row, seed=seed + i, dtype=weight_dtype or dtype)
    return drawn


def call(module, norm, inputs, **more):
    """(normalised,) or (normalised, summed)"""
    name, options, _ = NORMS[norm]
    options = options | more
    tensors = dict(inputs)
    x = tensors.pop("input")
    if not name.startswith("add_"):
        weight = tensors.get("weight")
        shape = x.shape[-1:] if weight is None else weight.shape
        return (getattr(module, name)(x, shape, **tensors, **options),)
    return getattr(module, name)(x, **tensors, **options)


def cotangents(outputs, seed=99):
    """Random gradients, of values that every dtype holds exactly."""
    return [
        randn(*x.shape, seed=seed + i, dtype=torch.bfloat16).to(x.dtype)
        for i, x in enumerate(outputs)
    ]


def results(module, norm, inputs, seen=(0, 1), **more):
    """Outputs and gradients by name, from a loss on the outputs numbered in ``seen``."""
    leaves = {n: x.detach().requires_grad_() for n, x in inputs.items()}
    outputs = call(module, norm, leaves, **more)
    gradients = cotangents(outputs)
    chosen = [i for i in seen if i < len(outputs)]
    found = torch.autograd.grad(
        [outputs[i] for i in chosen],
        list(leaves.values()),
        [gradients[i] for i in chosen],
        allow_unused=True,
    )
    named = dict(zip(("normalised", "summed"), outputs, strict=False))
    return named | {f"d{n}": g for n, g in zip(leaves, found, strict=True) if g is not None}


def check_norm(norm, inputs, seen=(0, 1), what="", given=None, **more):
    """Hold one of NORMS to the accuracy contract, forward, backward and in inference.

    ``given`` computes the results that are checked, where it is not the public function.
    """
    exact = {n: x.double() for n, x in inputs.items()}
    got = given or results(fa, norm, inputs, seen, **more)
    with torch.no_grad():
        inferred = call(fa, norm, inputs, **more) if given is None else ()
    with one_thread():
        plain = results(reference, norm, inputs, seen, **more)
        want = results(reference, norm, exact, seen, **more)
    for x, name in zip(inferred, ("normalised", "summed"), strict=False):
        assert torch.equal(torch.nan_to_num(x), torch.nan_to_num(got[name])), f"{name}: inference"
    assert got.keys() == want.keys()
    magnitudes = _magnitudes(norm, exact, want, more)
    for name, x in got.items():
        assert x.dtype == plain[name].dtype, f"{what} {name}: {x.dtype}"
        assert_accurate(
            *(x, want[name], plain[name], f"{what} {norm} {name}"),
            magnitude=magnitudes.get(name, 0.0),
            dtype=inputs["input"].dtype,
        )


def _magnitudes(norm, exact, want, more):
    """The largest root of the sum of squares of the terms that a gradient adds up."""
    if want["normalised"].numel() == 0:
        return {}
    x = want.get("summed", exact["input"]).detach()
    weight = exact.get("weight", torch.ones(x.shape[-1:], dtype=torch.float64))
    dims = tuple(range(-weight.dim(), 0))
    rows = tuple(range(x.dim() - weight.dim()))
    mean = x.mean(dims, keepdim=True) if "layer" in norm else 0.0
    eps = 1e-5 if "layer" in norm else 1e-6
    rstd = ((x - mean).square().mean(dims, keepdim=True) + eps).rsqrt()
    n = (x - mean) * rstd
    dy = cotangents((want["normalised"],))[0].double()
    g = dy * (1.0 + weight if "gemma" in norm else weight)
    spread = rstd * (g.square() + (n * (g * n).mean(dims, keepdim=True)).square()).sqrt()
    factor = 1.0 / (1.0 - more.get("dropout_p", 0.0)) if more.get("dropout_p", 0.0) < 1 else 1.0
    largest = torch.nan_to_num(spread, 0.0, 0.0, 0.0).max().item() * factor
    products = torch.nan_to_num((dy * n).square().sum(rows).sqrt(), 0.0, 0.0, 0.0)
    return {
        "dinput": largest,
        "dresidual": largest,
        "dweight": products.max().item(),
        "dbias": dy.square().sum(rows).sqrt().max().item(),
    }
