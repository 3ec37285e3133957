"""A module of ours against the torch.nn class: the same parameters, inputs, outputs, gradients."""

import functools
import warnings

import pytest
import torch
from torch import Tensor

from fastattn.testing import assert_accurate, one_thread, randn


def same_parameters(ours, theirs, **options):
    """(our module, theirs) with the same random parameters, which loading each from the other sets.

    Biases and norms begin at 0 and 1: here they are random too.
    """
    a, b = ours(**options), theirs(**options)
    for seed, parameter in enumerate(b.parameters()):
        scale = parameter.shape[-1] ** -0.5 if parameter.dim() > 1 else 0.5
        parameter.data = scale * randn(*parameter.shape, seed=seed, dtype=parameter.dtype)
    a.load_state_dict(b.state_dict(), strict=True)
    b.load_state_dict(a.state_dict(), strict=True)
    return a, b


def tensors_of(outputs):
    return [x for x in (outputs if isinstance(outputs, tuple) else (outputs,)) if x is not None]


def cotangents(outputs, seed=77):
    """Random gradients, of values that every dtype holds exactly."""
    return [
        randn(*x.shape, seed=seed + i, dtype=torch.bfloat16).to(x.dtype)
        for i, x in enumerate(outputs)
    ]


def results(module, call, inputs, dtype=None, seed=77):
    """Outputs and gradients by name of call(module, **inputs), with all tensors in ``dtype``."""
    leaves = {}
    for name, x in inputs.items():
        if isinstance(x, Tensor) and x.is_floating_point():
            leaves[name] = x.detach().to(dtype or x.dtype).requires_grad_()
    with warnings.catch_warnings():  # torch wants masks of one type
        warnings.simplefilter("ignore")
        outputs = tensors_of(call(module, **(inputs | leaves)))
    wrt = leaves | dict(module.named_parameters())
    gradients = torch.autograd.grad(
        outputs, list(wrt.values()), cotangents(outputs, seed), allow_unused=True
    )
    found = {f"output {i}": x for i, x in enumerate(outputs)}
    return found | {f"d{n}": g for n, g in zip(wrt, gradients, strict=True) if g is not None}


def check_module(ours, theirs, call, inputs, *, their_call=None, uncancelled=None):
    """Hold outputs and gradients to the accuracy contract, with gradients recorded and without.

    The oracle is their module in float64, eager their module as it is. ``uncancelled`` computes the
    same without the part of the gradient that a norm subtracts from the other.
    """
    their_call = their_call or call
    dtype = next(x.dtype for x in inputs.values() if x.is_floating_point())
    got = results(ours, call, inputs)
    with torch.no_grad():
        inferred = tensors_of(call(ours, **inputs))
    with one_thread():
        eager = results(theirs, their_call, inputs)
        exact = theirs.double()
        want = results(exact, their_call, inputs, torch.float64)
        sizes = functools.cache(
            lambda: _magnitudes(exact, uncancelled or their_call, inputs, want, dtype)
        )
    assert got.keys() == want.keys()
    for name, x in [*got.items(), *((f"output {i}", x) for i, x in enumerate(inferred))]:
        assert x.dtype == eager[name].dtype, name
        tensors = (x, want[name], eager[name])
        try:
            assert_accurate(*tensors, name, dtype=dtype)
        except AssertionError:
            assert_accurate(*tensors, name, magnitude=sizes()[name], dtype=dtype)


def _magnitudes(module, call, inputs, want, dtype):
    """The rounding that must be expected where terms cancel, in units of eps, in float64.

    It is that of results in which less cancels: the gradient of a softmax subtracts what comes from
    the denominator from what comes from the numerator, and a sum may happen to be small, but not
    for several random cotangents. In float32 and wider a weight exp(s - lse) is off by eps for the
    exponential, and by eps times their size for the roundings of s and of lse.
    """
    softmax, found = _NumeratorAlone(), [want]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.functional, "softmax", softmax)
        patch.setattr(torch.nn.functional, "scaled_dot_product_attention", softmax.attention)
        found += [results(module, call, inputs, torch.float64, seed) for seed in (77, 78, 79)]
    roundings = 1.0 if dtype.itemsize < 4 else 1.0 + 2.0 * softmax.largest
    return {name: roundings * max(_largest(each[name]) for each in found) for name in want}


def _largest(x):
    return x.abs().max().item() if x.numel() else 0.0


class _NumeratorAlone:
    """A softmax whose denominator is a constant."""

    def __init__(self):
        self.largest = 0.0

    def __call__(self, scores, dim):
        lse = scores.logsumexp(dim, keepdim=True).detach()
        for x in (scores, lse):
            self.largest = max(self.largest, _largest(x[x.isfinite()]))
        return torch.exp(scores - lse)

    def attention(self, q, k, v, mask, dropout_p, is_causal):
        assert not is_causal and not dropout_p
        scores = q @ k.mT * q.shape[-1] ** -0.5
        return self(scores if mask is None else scores + mask, -1) @ v
