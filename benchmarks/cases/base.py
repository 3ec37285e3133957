"""What all rows have in common, whatever family of functions they are of.

A row is a `Case`: it makes its `Inputs`, names the peers that compute the same function of them,
knows what is right (`oracle`) and how much must at least be computed or moved (`work`). All else
(timing, ceilings, memory, report) is done alike for every family, through this interface alone.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from checks import Oracle

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
GRIDS = ("quick", "default", "full")
DEVICES = ("cpu", "cuda")
COMPILING = ("compile", "flex")  # peers that compile anew for every row


class Unavailable(Exception):
    """This peer takes no part in this row; the message says why."""


@dataclass
class Inputs:
    """The tensors of a row; a family adds its own: tensors, tuples of tensors, None."""

    douts: tuple[Tensor, ...] = field(default=(), kw_only=True)  # where the pass goes backward

    @property
    def device(self) -> torch.device:
        return next(v.device for v in vars(self).values() if isinstance(v, Tensor))

    @property
    def leaves(self) -> dict[str, Tensor]:
        """What the backward pass differentiates."""
        return {
            name: value
            for name, value in vars(self).items()
            if isinstance(value, Tensor) and value.requires_grad
        }

    def copy(self) -> Inputs:
        """The same values at other addresses."""
        return self.map(lambda t: t.detach().clone().requires_grad_(t.requires_grad))

    def cast(self, dtype: torch.dtype) -> Inputs:
        """Floating-point tensors in another dtype, as leaves of another graph."""

        def cast(tensor: Tensor) -> Tensor:
            if not tensor.is_floating_point():
                return tensor
            return tensor.detach().to(dtype).requires_grad_(tensor.requires_grad)

        return self.map(cast)

    def map(self, function: Callable[[Tensor], Tensor]) -> Inputs:
        def mapped(value: Any) -> Any:
            if isinstance(value, tuple):
                return tuple(mapped(item) for item in value)
            return function(value) if isinstance(value, Tensor) else value

        return replace(self, **{name: mapped(value) for name, value in vars(self).items()})


Forward = Callable[[Any], "Tensor | tuple[Tensor, ...]"]


@dataclass(frozen=True)
class Peer:
    """One more implementation. `build(case)` returns a function from `Inputs` to the output (or
    the outputs); it raises, then or when it is first called, for whatever it cannot do, and the
    text of that exception is what the report shows in its place."""

    name: str
    title: str  # of its column
    build: Callable[[Any], Forward]
    description: str
    # Brings a thread pool of its own, which competes with torch's for the cores.
    own_threads: bool = False


def table(*peers: Peer) -> dict[str, Peer]:
    return {peer.name: peer for peer in peers}


@dataclass(frozen=True, kw_only=True)
class Case:
    """One row: a problem, a dtype and a pass."""

    op: str
    dtype: str = "fp32"
    backward: bool = False
    grids: tuple[str, ...] = ("full",)
    compiled: bool = False  # torch.compile takes part by default: it costs seconds per shape
    device: str = "cpu"

    family: ClassVar[str]
    peers: ClassVar[dict[str, Peer]]  # fastattn first
    rivals: ClassVar[tuple[str, ...]]  # means are taken against these; the first is the main one
    # The ceiling: the arithmetic ("flops"), reading ("read"), or reading and writing ("copy").
    bound: ClassVar[str] = "copy"
    axis: ClassVar[str] = "length"  # what `size` is, in plots
    note: ClassVar[str]  # what the table of the family is read with
    is_cold: ClassVar[bool] = False  # inputs come from memory even without --cold
    # Only the gradients are timed where the pass goes backward: forward has a row of its own.
    backward_alone: ClassVar[bool] = False

    @property
    def shape(self) -> str:
        raise NotImplementedError

    @property
    def details(self) -> dict[str, str]:
        """What else tells this row from others, by the name of a column."""
        return {}

    @property
    def work(self) -> float:
        """FLOPs, or bytes, that the row takes at least: those that `bound` is about."""
        raise NotImplementedError

    @property
    def input_bytes(self) -> int:
        """Size of the inputs, about."""
        raise NotImplementedError

    def generator(self) -> torch.Generator:
        """Of random numbers, in a state that depends on the row alone."""
        return torch.Generator(self.device).manual_seed(zlib.crc32(self.id.encode()))

    def inputs(self) -> Inputs:
        """The tensors; the same for a given case in every process."""
        raise NotImplementedError

    def oracle(self, inputs: Inputs) -> Oracle:
        """What the results are held to."""
        raise NotImplementedError

    def tiny(self) -> Case:
        """The same functions on a shape that takes neither time nor memory."""
        raise NotImplementedError

    @property
    def passes(self) -> str:
        if not self.backward:
            return "fwd"
        return "bwd" if self.backward_alone else "fwd+bwd"

    @property
    def id(self) -> str:
        words = (self.op, self.shape, *self.details.values(), self.dtype, self.passes)
        return "-".join(word for word in words if word)

    @property
    def groups(self) -> tuple[str, ...]:
        """The groups of rows, by name, in whose means this row counts."""
        return (f"{self.family} {self.dtype} {self.passes}",)

    @property
    def series(self) -> str:
        """Rows of one series differ in `size` only, and are drawn as one panel."""
        return " ".join((self.op, *self.details.values(), self.dtype, self.passes))

    @property
    def size(self) -> int:
        raise NotImplementedError

    @property
    def shows_memory(self) -> bool:
        """Whether peak memory is measured: where outputs and temporaries are large enough."""
        return False


def normal(
    generator: torch.Generator,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    *,
    mean: float = 0.0,
    grad: bool = False,
) -> Tensor:
    """Normally distributed numbers. Large tensors repeat those of a block, which takes less time
    than to draw them all, and whose odd size makes the rows differ all the same."""
    count = math.prod(shape)
    drawn = min(count, (1 << 22) - 3)
    block = torch.randn(drawn, generator=generator, device=generator.device).add_(mean).to(dtype)
    repeated = block.repeat(-(-count // max(len(block), 1)))[:count]
    return repeated.view(shape).requires_grad_(grad)


def compiled(function: Forward) -> Forward:
    """`function` under torch.compile: a program of its own for each row, no dynamic shapes."""
    torch._dynamo.reset()
    return torch.compile(function, dynamic=False, fullgraph=True)


def available_memory() -> int:
    """Bytes that can be allocated without swapping (what Linux calls MemAvailable)."""
    with open("/proc/meminfo") as file:
        kibibytes = next(line.split()[1] for line in file if line.startswith("MemAvailable"))
    return int(kibibytes) * 1024
