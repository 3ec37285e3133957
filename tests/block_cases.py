"""The modules of fastattn.nn in plain torch operations, and how a module is held to them."""

import copy
import math

import torch
from torch.nn.functional import layer_norm, linear

from fastattn.testing import assert_accurate, one_thread, randn


class Rounding:
    """Relative errors that the formulas make where a module rounds, to see what becomes of them.

    A gradient may be a difference of large numbers, or exactly 0 in the eager formula: what must be
    expected there is not eager's error but what one rounding of each intermediate result does.
    """

    unit, size = 1e-7, 0.0

    def __init__(self, dtype):
        self.dtype = dtype

    def __enter__(self):
        Rounding.size = self.unit
        self.generator = torch.Generator().manual_seed(0)
        Rounding.active = self
        return self

    def __exit__(self, *_):
        Rounding.size = 0.0

    def of(self, x, factor=1.0):
        noise = torch.randn(x.shape, generator=self.generator, dtype=x.dtype)
        return x * (1 + self.size * factor * noise)


class _Rounded(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return Rounding.active.of(x)

    @staticmethod
    def backward(ctx, gradient):
        return Rounding.active.of(gradient)


class _RoundedTanh(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x.tanh())
        return Rounding.active.of(x.tanh())

    @staticmethod
    def backward(ctx, gradient):
        (tanh,) = ctx.saved_tensors
        return gradient * (1 - Rounding.active.of(tanh).square())


class _RoundedAttention(torch.autograd.Function):
    """Softmax and product with the values, with the backward pass as kernels do it: out * dout is
    summed by itself, and weights come from stored sums, whose logarithm was rounded too."""

    @staticmethod
    def forward(ctx, scores, v, visible):
        lse = scores.logsumexp(-1, keepdim=True)
        factor = 1.0
        if Rounding.active.dtype == torch.float32:  # in 16 bits they are rounded last, and most
            factor = (4 + 2 * lse.masked_fill(~visible.any(-1, keepdim=True), 0.0).square()).sqrt()
        weights = Rounding.active.of((scores - lse).exp(), factor)
        keys = v.shape[-2]
        out = (weights[..., :keys] * visible) @ v
        ctx.save_for_backward(weights, v, visible, out)
        return out

    @staticmethod
    def backward(ctx, gradient):
        weights, v, visible, out = ctx.saved_tensors
        keys = v.shape[-2]
        wide = Rounding.active.dtype in (torch.float32, torch.float64)
        added = math.sqrt(1 + v.shape[-1] / 2) if wide else 1.0  # one after another
        dweights = gradient @ Rounding.active.of(v, added).mT * visible
        dweights = torch.nn.functional.pad(dweights, (0, weights.shape[-1] - keys))
        delta = (Rounding.active.of(out, added) * gradient).sum(-1, keepdim=True)
        dvalue = Rounding.active.of(weights[..., :keys] * visible).mT @ gradient
        return weights * (dweights - delta), dvalue, None


def rounded(x):
    return _Rounded.apply(x) if Rounding.size else x


def tanh(x):
    return _RoundedTanh.apply(x) if Rounding.size else x.tanh()


def attend(scores, v, visible):
    """softmax(scores) @ v; columns behind those of v are sinks."""
    if Rounding.size:
        return _RoundedAttention.apply(scores, v, visible)
    return (scores.softmax(-1)[..., : v.shape[-2]] * visible) @ v


def eager_rms_norm(norm, x):
    wide = x.float() if x.dtype != torch.float64 else x
    normalised = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + norm.eps)
    if getattr(norm, "casting", "fp32") == "gemma":
        return (normalised * (1 + norm.weight)).to(x.dtype)
    return (normalised * norm.weight).to(x.dtype)


def eager_norm(norm, x):
    if norm is None:
        return x
    if isinstance(norm, torch.nn.RMSNorm):
        return eager_rms_norm(norm, x)
    return layer_norm(x, norm.normalized_shape, norm.weight, norm.bias, norm.eps)


def eager_rope(rope, x, positions):
    """x (*, length, heads, head_dim), positions (*, length)"""
    d = rope.rotary_dim
    frequencies = rope.base ** (-torch.arange(0, d, 2, dtype=torch.float64) / d)
    angles = positions.double().unsqueeze(-1) * frequencies
    cos, sin = (f.to(x.dtype).unsqueeze(-2) for f in (angles.cos(), angles.sin()))
    turned, rest = x[..., :d], x[..., d:]
    if rope.interleaved:
        a, b = turned[..., ::2], turned[..., 1::2]
        turned = torch.stack((a * cos - b * sin, b * cos + a * sin), dim=-1).flatten(-2)
    else:
        a, b = turned.chunk(2, dim=-1)
        turned = torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)
    return torch.cat((turned, rest), dim=-1)


def eager_attention(
    m,
    x,
    context=None,
    *,
    mask=None,
    bias=None,
    query_lengths=None,
    key_lengths=None,
    positions=None,
):
    """What fastattn.nn.Attention computes of dense x (*batch, length, embed_dim)."""
    source = x if context is None else context

    def heads(projection, norm, rows, count, dim):
        projected = rounded(linear(rows, projection.weight, projection.bias))
        if m.qk_norm_over == "projection":
            return eager_norm(norm, projected).unflatten(-1, (count, dim))
        return eager_norm(norm, projected.unflatten(-1, (count, dim)))

    q = heads(m.q_proj, m.q_norm, x, m.num_heads, m.head_dim)
    k = heads(m.k_proj, m.k_norm, source, m.num_kv_heads, m.head_dim)
    v = heads(m.v_proj, None, source, m.num_kv_heads, m.value_head_dim)
    if m.rope is not None:
        positions = torch.arange(x.shape[-2]) if positions is None else positions
        q, k = eager_rope(m.rope, q, positions), eager_rope(m.rope, k, positions)
    group = m.num_heads // m.num_kv_heads
    q, k, v = (t.transpose(-3, -2) for t in (q, k, v))
    k, v = k.repeat_interleave(group, dim=-3), v.repeat_interleave(group, dim=-3)
    q, k = rounded(q), rounded(k)
    scores = q @ k.mT * (1 / math.sqrt(m.head_dim) if m.scale is None else m.scale)
    scores = rounded(scores)
    if m.softcap is not None:
        scores = m.softcap * tanh(scores / m.softcap)
    queries, keys = scores.shape[-2:]
    distance = torch.arange(keys) - torch.arange(queries).unsqueeze(-1) - (keys - queries)
    if m.alibi is not None:
        exponents = torch.arange(1, m.num_heads + 1) * (8 / m.num_heads)  # a power of two
        slopes = (2.0**-exponents).to(x.dtype).view(-1, 1, 1)
        scores = scores - slopes * distance.abs()
    if m.relative_bias is not None:
        relative = m.relative_bias(queries, keys, query_offset=keys - queries)
        scores = scores + (relative if x.dim() > 2 else relative[0])
    if bias is not None:
        scores = scores + bias
    scores = rounded(scores)
    visible = torch.ones_like(distance, dtype=torch.bool)
    if m.causal:
        visible = distance <= 0
    if m.window is not None:
        left, right = (math.inf if n is None else n for n in m.window)
        visible = visible & (distance >= -left) & (distance <= right)
    if mask is not None:
        visible = visible & mask
    for lengths, size, dim in ((query_lengths, queries, -1), (key_lengths, keys, -2)):
        if lengths is not None:
            inside = torch.arange(size) < lengths.unsqueeze(-1)
            visible = visible & inside.unsqueeze(dim).unsqueeze(-3)
    scores = scores.masked_fill(~visible, torch.finfo(scores.dtype).min)
    if m.sinks is not None:
        sinks = m.sinks.view(-1, 1, 1).expand(*scores.shape[:-1], 1)
        scores = torch.cat((scores, sinks.to(scores.dtype)), dim=-1)
    out = rounded(attend(scores, v, visible)).transpose(-3, -2).flatten(-2)
    if m.gate_proj is not None:
        out = out * rounded(linear(x, m.gate_proj.weight, m.gate_proj.bias)).sigmoid()
    return linear(out, m.o_proj.weight, m.o_proj.bias)


def randomised(module, seed=0, dtype=torch.float32):
    """The module with parameters that are all random: also those that begin as 0 or 1."""
    for i, parameter in enumerate(module.parameters()):
        fan_in = parameter.shape[-1] if parameter.dim() > 1 else 4
        drawn = randn(*parameter.shape, seed=seed + i) / math.sqrt(fan_in)
        parameter.data = drawn + (0.5 if parameter.dim() == 1 else 0.0)
    return module.to(dtype)


def results(function, module, inputs):
    """out and the gradients of all parameters and floating inputs, for a random cotangent."""
    leaves = {
        n: t.detach().clone().requires_grad_() if t is not None and t.is_floating_point() else t
        for n, t in inputs.items()
    }
    out = function(module, **leaves)
    module.zero_grad()
    out.backward(randn(*out.shape, seed=77, dtype=torch.bfloat16).to(out.dtype))
    gradients = {f"d{n}": t.grad for n, t in leaves.items() if t is not None and t.requires_grad}
    gradients |= {f"d{n}": p.grad for n, p in module.named_parameters()}
    return {"out": out.detach()} | gradients


def double(value):
    if isinstance(value, torch.Tensor) and value.is_floating_point():
        return value.double()
    return value


def check_module(module, eager, inputs, *, function=None, what=""):
    """Hold a module, outputs and all gradients, to the accuracy contract.

    eager is the same in plain operations: a function of a module and the inputs by name. function
    calls the module, where it is not just module(**inputs).
    """
    got = results(function or (lambda m, **given: m(**given)), copy.deepcopy(module), inputs)
    exact = {n: double(t) for n, t in inputs.items()}

    def oracle():
        return results(eager, copy.deepcopy(module).double(), exact)

    with one_thread():
        plain, want = results(eager, copy.deepcopy(module), inputs), oracle()
    assert got.keys() == want.keys()
    failures = _failures(got, want, plain, dict.fromkeys(want, 0.0))
    if failures:
        with one_thread(), Rounding(got["out"].dtype):
            moved = [oracle() for _ in range(3)]
        changes = {n: max((m[n] - x).abs().max().item() for m in moved) for n, x in want.items()}
        assert all(math.isfinite(change) for change in changes.values())
        magnitudes = {n: change / Rounding.unit for n, change in changes.items()}
        failures = _failures(got, want, plain, magnitudes)
    if failures:
        raise AssertionError("\n".join([str(what), *failures]))


def _failures(got, want, plain, magnitudes):
    failures = []
    for name, x in got.items():
        assert x.dtype == plain[name].dtype, f"{name}: {x.dtype}"
        try:
            assert_accurate(x, want[name], plain[name], name, magnitude=magnitudes[name])
        except AssertionError as error:
            failures.append(str(error))
    return failures
