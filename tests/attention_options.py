"""Random arguments of attention, one feature at a time or several together."""

import random

import pytest
import torch

from fastattn import _C
from fastattn.testing import randn

# Which of (batch, heads, queries, keys) a mask or a bias has; the others are broadcast.
BROADCASTS = ("bhqk", "bh1k", "1hqk", "b11k", "11qk", "b1q1", "1h11", "qk", "k", "1111", "bhq1")


class Place:
    """What the options of one call must fit."""

    def __init__(self, inputs, layout="bhsd", seed=0):
        length, head = (-3, -2) if layout == "bshd" else (-2, -3)
        query, key = inputs["query"], inputs["key"]
        self.batch = tuple(query.shape[:-3])
        self.heads = query.shape[head]
        self.queries, self.keys = query.shape[length], key.shape[length]
        self.dtype, self.seed = query.dtype, seed
        self.random = random.Random(seed)

    def broadcast_shape(self):
        pattern = self.random.choice(BROADCASTS)
        if self.batch == ():
            pattern = pattern[-3:]
        full = {"h": (self.heads,), "q": (self.queries,), "k": (self.keys,), "1": (1,)}
        one = {"b": self.batch}
        return tuple(n for letter in pattern for n in one.get(letter, full.get(letter, ())))

    def lengths(self, most):
        count = torch.Size(self.batch).numel()
        drawn = [self.random.randint(0, most) for _ in range(count)]
        dtype = self.random.choice([torch.int32, torch.int64])
        return torch.tensor(drawn, dtype=dtype).reshape(self.batch)

    def span(self):
        return self.random.choice([None, 0, 1, 3, self.keys // 2, self.keys + 5])


def _mask(place):
    mask = randn(*place.broadcast_shape(), seed=place.seed + 50) < 0.7
    if mask.dim() > 1 and mask.shape[-2] > 2:
        mask[..., 1, :] = False
    return {"mask": mask}


def _bias(place):
    dtype = place.random.choice([place.dtype, torch.float32, torch.bfloat16])
    return {"bias": randn(*place.broadcast_shape(), seed=place.seed + 51, dtype=dtype)}


def _alibi(place):
    shape = place.random.choice([(place.heads,), (*place.batch, place.heads)])
    return {"alibi_slopes": randn(*shape, seed=place.seed + 52).abs() * 0.2}


def _corner(place):
    return {"causal": place.random.choice([True, "top_left", "bottom_right"])}


def _offsets(place):
    a, b = (place.random.randint(-9, 9) for _ in range(2))
    return {"query_offset": 20 + a, "key_offset": 20 + b, "causal": "top_left", "window": (12, 4)}


FEATURES = {
    "causal": _corner,
    "window": lambda place: {"window": (place.span(), place.span())},
    "mask": _mask,
    "bias": _bias,
    "query_lengths": lambda place: {"query_lengths": place.lengths(place.queries)},
    "key_lengths": lambda place: {"key_lengths": place.lengths(place.keys)},
    "alibi": _alibi,
    "sink": lambda place: {"sink": randn(place.heads, seed=place.seed + 53)},
    "softcap": lambda place: {"softcap": place.random.choice([0.5, 3.0, 30.0])},
    "scale": lambda place: {"scale": place.random.choice([0.0, 0.11, 0.6, -0.3])},
    "offsets": _offsets,
}


def with_features(names, inputs, *, layout="bhsd", seed=0):
    """(inputs, options): the inputs, joined by bias and sink, and the other arguments."""
    place = Place(inputs, layout, seed)
    chosen = {"layout": layout}
    for name in sorted(names):
        chosen |= FEATURES[name](place)
    extra = {name: chosen.pop(name) for name in ("bias", "sink") if name in chosen}
    return inputs | extra, chosen


def on_gpu():
    return torch.get_default_device().type == "cuda"


def is_on_cuda(level):
    return level == "cuda" or level in _C.emulated_levels


def on_cuda():
    """Whether CUDA's kernels run: on a GPU or on an emulated one."""
    return on_gpu() or is_on_cuda(_C.active_cpu_level())


def skip_without_kernels(dtype=torch.float32, *head_dims):
    """Skips what CUDA has no kernels for, where these would run."""
    if not on_cuda():
        return
    if dtype == torch.float64:
        pytest.skip("CUDA has no kernels of float64")
    if max(head_dims, default=0) > 256:
        pytest.skip("CUDA has kernels up to head_dim 256")


def skip_on_gpu(reason):
    if on_gpu():
        pytest.skip(f"cuda: {reason}")


def skip_on_sm90(reason):
    """Skips at the emulated level what was tried at sm80."""
    if _C.active_cpu_level() == "sm90":
        pytest.skip(f"sm90: {reason}")


def here(options):
    """Options that were made when the module was loaded, on the default device of now."""
    device = torch.get_default_device()

    def moved(x):
        if isinstance(x, tuple):
            return tuple(map(moved, x))
        return x.to(device) if isinstance(x, torch.Tensor) else x

    return {name: moved(x) for name, x in options.items()}
