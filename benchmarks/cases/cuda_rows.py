"""What is done row by row on the GPU: the problems of the CPU, at sizes that fill a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from cases import cuda_rows_peers
from cases.activation import ActivationCase
from cases.base import DTYPES, Case
from cases.cache_write import CacheWriteCase
from cases.norm import NormCase
from cases.rope import RopeCase

TOKENS, WIDTH, HEAD_DIM = 8192, 4096, 128
NORM_SHAPES = ((8192, 1024), (TOKENS, WIDTH), (2048, 8192), (32768, 768))
MORE_SHAPES = ((512, WIDTH), (16384, 5120), (4096, 16384))  # of norms, in the whole grid
FULL, DEFAULT, QUICK = ("full",), ("default", "full"), ("quick",)
TIMES = (
    " Of a backward pass the gradients alone are timed and counted. Times are those of the GPU; "
    "its second-level cache is overwritten before each call."
)


@dataclass(frozen=True, kw_only=True)
class _OnGpu(Case):
    """How rows of a GPU differ from those of the CPU."""

    device: str = field(default="cuda", kw_only=True)

    backward_alone = True
    is_cold = True
    shows_memory = False  # the GPU's allocator tells it of every row
    rivals = ("eager", "compile", "liger")

    @property
    def id(self) -> str:
        return f"cuda-{super().id}"

    @property
    def groups(self) -> tuple[str, ...]:
        return self.family, f"{self.family} {self.dtype} {self.passes}"

    @property
    def work(self) -> float:
        """Of the pass that is timed."""
        whole = super().work
        return whole - replace(self, backward=False).work if self.backward else whole


@dataclass(frozen=True)
class CudaNormCase(_OnGpu, NormCase):
    family = "cuda norm"
    peers = NormCase.peers | cuda_rows_peers.NORM
    note = NormCase.note + TIMES


@dataclass(frozen=True)
class CudaActivationCase(_OnGpu, ActivationCase):
    family = "cuda activation"
    peers = ActivationCase.peers | cuda_rows_peers.ACTIVATION
    note = ActivationCase.note + TIMES


@dataclass(frozen=True)
class CudaRopeCase(_OnGpu, RopeCase):
    family = "cuda rope"
    peers = RopeCase.peers | cuda_rows_peers.ROPE
    note = RopeCase.note + TIMES


@dataclass(frozen=True)
class CudaCacheWriteCase(_OnGpu, CacheWriteCase):
    family = "cuda cache write"
    rivals = CacheWriteCase.rivals
    note = CacheWriteCase.note + TIMES


def _passes(dtype: str, grids: tuple[str, ...], compiled: bool) -> Iterator[dict]:
    """Options of a forward and a backward row."""
    for backward in (False, True):
        yield {"dtype": dtype, "backward": backward, "grids": grids, "compiled": compiled}


def _norms() -> Iterator[CudaNormCase]:
    for op in ("layer_norm", "rms_norm", "add_rms_norm"):
        for rows, width in NORM_SHAPES + MORE_SHAPES:
            usual = (rows, width) == (TOKENS, WIDTH)
            for dtype in DTYPES:
                default = (rows, width) in NORM_SHAPES if dtype == "bf16" else usual
                grids = DEFAULT if default else FULL
                for options in _passes(dtype, grids, usual and dtype == "bf16"):
                    yield CudaNormCase(rows=rows, width=width, op=op, **options)


def _activations() -> Iterator[CudaActivationCase]:
    for op, variant, width in (
        ("gelu", "none", WIDTH),
        ("gelu", "tanh", WIDTH),
        ("bias_gelu", "none", WIDTH),
        ("swiglu", "two", WIDTH),
        ("swiglu", "two", 14336),
        ("swiglu", "packed", 14336),
    ):
        usual = width == WIDTH and variant != "tanh"
        for dtype in DTYPES:
            default = usual and (dtype == "bf16" or op == "swiglu")
            grids = DEFAULT if default else FULL
            compiled = usual and dtype == "bf16" and op != "gelu"  # alone, a GELU has no company
            for options in _passes(dtype, grids, compiled):
                yield CudaActivationCase(
                    rows=TOKENS, width=width, variant=variant, op=op, **options
                )


def _rotations() -> Iterator[CudaRopeCase]:
    """Two sequences of 4096 tokens, and a decode step of 64."""
    heads = WIDTH // HEAD_DIM
    for dtype in DTYPES:
        for interleaved in (False, True):
            shape = {"heads": heads, "heads_kv": 8, "head_dim": HEAD_DIM}
            shape |= {"interleaved": interleaved}
            usual = dtype == "bf16" and not interleaved
            grids = DEFAULT if usual else FULL
            for options in _passes(dtype, grids, usual):
                yield CudaRopeCase(batch=2, length=TOKENS // 2, op="rope", **shape, **options)
            yield CudaRopeCase(batch=64, length=1, op="rope", dtype=dtype, grids=grids, **shape)


def _writes() -> Iterator[CudaCacheWriteCase]:
    """A prompt of 8192 tokens and 32 heads, and a decode step of 64 sequences and 8 heads."""
    for dtype in DTYPES:
        for kind in ("contiguous", "paged16"):
            for batch, heads, length in ((1, WIDTH // HEAD_DIM, TOKENS), (64, 8, 1)):
                yield CudaCacheWriteCase(
                    batch=batch,
                    heads_kv=heads,
                    length=length,
                    head_dim=HEAD_DIM,
                    kind=kind,
                    op="kv_cache_update",
                    dtype=dtype,
                    grids=DEFAULT if dtype == "bf16" else FULL,
                    compiled=dtype == "bf16" and length > 1,
                )


def _tiny() -> Iterator[Case]:
    """Every function, dtype and pass on shapes that no block divides."""
    for dtype in DTYPES:
        for options in _passes(dtype, QUICK, False):
            for op in ("layer_norm", "rms_norm", "add_rms_norm"):
                yield CudaNormCase(rows=77, width=131, op=op, **options)
            for op, variant in (("gelu", "none"), ("bias_gelu", "tanh"), ("swiglu", "two")):
                yield CudaActivationCase(rows=77, width=131, variant=variant, op=op, **options)
            shape = {"batch": 3, "heads": 4, "heads_kv": 2, "length": 37, "head_dim": 40}
            yield CudaRopeCase(op="rope", **shape, **options)
        for kind in ("contiguous", "paged16"):
            shape = {"batch": 3, "heads_kv": 2, "length": 37, "head_dim": 40, "kind": kind}
            yield CudaCacheWriteCase(op="kv_cache_update", dtype=dtype, grids=QUICK, **shape)


ALL: list[Case] = [*_norms(), *_activations(), *_rotations(), *_writes(), *_tiny()]
