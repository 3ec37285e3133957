"""Caches with guard bands, of every kind of storage, and the calls that fit them."""

import copy
import random

import torch

from fastattn.testing import randn

BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
SENTINEL = 77  # of int8, where floating-point memory is NaN


def guarded(*shape, dtype, columns=1):
    """(buffer, view of the shape): the view has a band around it in every dimension, one wide, but
    for the last one, where it has ``columns``."""
    bands = [1] * (len(shape) - 1) + [columns]
    sentinel = torch.nan if dtype.is_floating_point else SENTINEL
    sizes = [n + 2 * band for n, band in zip(shape, bands, strict=True)]
    view = buffer = torch.full(sizes, sentinel, dtype=dtype)
    for dim, size in enumerate(shape):
        view = view.narrow(dim, bands[dim], size)
    return buffer, view


def same_bytes(a, b):
    """Also where both are the same NaN."""
    bits = BITS[a.element_size()]
    return a.dtype == b.dtype and torch.equal(a.view(bits), b.view(bits))


class Caches:
    """k_cache, v_cache and what goes with them, in memory whose every byte can be compared.

    storage: "contiguous", "ring" or "paged". With ``quantized`` they are int8 with scales, else
    they have ``dtype``. Pages of a request are drawn at random, and so do not lie in order. With
    ``aligned`` the bands leave rows of a multiple of 16 bytes at such an address.
    """

    def __init__(
        self,
        storage="contiguous",
        *,
        batch=2,
        kv_heads=2,
        capacity=32,
        head_dim=8,
        value_dim=None,
        dtype=torch.float32,
        quantized=False,
        page_size=4,
        layout="bhsd",
        aligned=False,
        seed=0,
    ):
        self.storage, self.layout, self.dtype, self.quantized = storage, layout, dtype, quantized
        self.batch, self.kv_heads = batch, kv_heads
        self.head_dim, self.value_dim = head_dim, value_dim or head_dim
        self.block_table = None
        entries, self.rows = batch, capacity
        if storage == "paged":
            per_request = -(-capacity // page_size)
            entries, self.rows = batch * per_request + 3, page_size
            generator = torch.Generator("cpu").manual_seed(seed)
            pages = torch.randperm(entries, generator=generator, device="cpu")
            self.block_table = (
                pages[: batch * per_request]
                .reshape(batch, per_request)
                .to(
                    torch.get_default_device(),
                    random.Random(seed).choice([torch.int32, torch.int64]),
                )
            )
            capacity = per_request * page_size
        self.capacity = capacity
        inner = (kv_heads, self.rows) if layout == "bhsd" else (self.rows, kv_heads)
        stored = torch.int8 if quantized else dtype
        self.buffers, self.views = {}, {}
        shapes = {
            "k_cache": (entries, *inner, head_dim),
            "v_cache": (entries, *inner, self.value_dim),
        }
        if quantized:
            shapes |= {"k_scale": (entries, *inner), "v_scale": (entries, *inner)}
        for name, shape in shapes.items():
            kind = torch.float32 if "scale" in name else stored
            columns = 16 if aligned and "cache" in name else 1
            self.buffers[name], self.views[name] = guarded(*shape, dtype=kind, columns=columns)

    def copy(self):
        return copy.deepcopy(self)

    def __deepcopy__(self, memo):
        other = copy.copy(self)
        other.buffers = {name: x.clone() for name, x in self.buffers.items()}
        other.views = {
            name: other.buffers[name].as_strided(x.shape, x.stride(), x.storage_offset())
            for name, x in self.views.items()
        }
        return other

    def tensors(self):
        """The two caches, which are positional arguments."""
        return self.views["k_cache"], self.views["v_cache"]

    def options(self):
        """The arguments that say how the rows are stored."""
        options = {n: x for n, x in self.views.items() if "scale" in n}
        options |= {} if self.block_table is None else {"block_table": self.block_table}
        options |= {"ring": True} if self.storage == "ring" else {}
        return options | {"layout": self.layout}

    def same_bytes_as(self, other):
        return all(same_bytes(x, other.buffers[name]) for name, x in self.buffers.items())

    def rows_of(self, new, *, seed, packed=False):
        """key and value of ``new`` rows of each request, or of ``new`` packed rows."""
        pair = []
        for i, dim in enumerate((self.head_dim, self.value_dim)):
            if packed:
                shape = (new, self.kv_heads, dim)
            elif self.layout == "bhsd":
                shape = (self.batch, self.kv_heads, new, dim)
            else:
                shape = (self.batch, new, self.kv_heads, dim)
            pair.append(randn(*shape, seed=seed + i, dtype=self.dtype))
        return tuple(pair)


def rope_tables(positions, rotary_dim, *, dtype=torch.float32):
    """(cos, sin) of (positions, rotary_dim / 2)."""
    frequencies = 100.0 ** (-torch.arange(rotary_dim // 2, dtype=torch.float64) / rotary_dim * 2)
    angles = torch.arange(positions, dtype=torch.float64).unsqueeze(-1) * frequencies
    return angles.cos().to(dtype), angles.sin().to(dtype)
