"""Memory and time of attention over long contexts: by hand, and fused.

    python examples/long_context.py            lengths 512 .. 16384, into long_context.png
    python examples/long_context.py --quick    two short lengths, to see that it runs

Causal self-attention of 8 heads of 64 columns, forward and with backward: float32 on a CPU,
bfloat16 on a GPU. By hand, the scores are a matrix of length x length: its line ends where the next
length, with four times the memory, would exceed --budget. Needs matplotlib, and on a CPU Linux.

Memory is the growth above the inputs, at its peak, with results and gradients. On a CPU each
figure is that of a new process, whose high-water mark is reset before the call that it measures.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path

import torch
from peak_memory import growth, in_new_process
from torch import Tensor

import fastattn
from fastattn.functional import attention

HEADS, HEAD_DIM = 8, 64
Figures = dict[tuple[str, bool], dict[int, tuple[int, float]]]  # bytes, seconds, by length


def by_hand(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    length = query.shape[-2]
    hidden = torch.ones(length, length, dtype=torch.bool, device=query.device).triu(1)
    scores = query @ key.mT * HEAD_DIM**-0.5
    return scores.masked_fill_(hidden, -torch.inf).softmax(-1) @ value


WAYS = {"by hand": by_hand, "fused": partial(attention, causal=True)}


def caller(way: str, length: int, backward: bool, device: str) -> Callable[[], list[Tensor]]:
    """A call that gives all that is kept: the result, and with backward the gradients."""
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    x = torch.randn(4, 1, HEADS, length, HEAD_DIM, dtype=dtype, device=device)
    *inputs, gradient = (part.requires_grad_(backward) for part in x.unbind())

    def call() -> list[Tensor]:
        out = WAYS[way](*inputs)
        return [out, *torch.autograd.grad(out, inputs, gradient)] if backward else [out]

    return call


def measure(way: str, length: int, backward: bool, device: str, calls: int) -> tuple[int, float]:
    """The peak, and the median seconds of some calls."""
    caller(way, 16, backward, device)()  # what is loaded once is not this call's
    call, seconds = caller(way, length, backward, device), []
    memory = growth(call, device)
    for _ in range(calls):
        start = time.perf_counter()
        call()
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return memory, statistics.median(seconds)


def sweep(lengths: list[int], device: str, budget: float, calls: int) -> Figures:
    figures: Figures = {}
    for way, backward in product(WAYS, (False, True)):
        found = figures[way, backward] = {}
        for length in lengths:
            arguments = (way, length, backward, device, calls)
            new = device == "cpu"
            found[length] = in_new_process(measure, *arguments) if new else measure(*arguments)
            if way == "by hand" and 4 * found[length][0] > budget:
                break
    return figures


def show(figures: Figures, lengths: list[int]) -> None:
    print("length" + "".join(f"{way + ', backward' * back:>23}" for way, back in figures))
    for length in lengths:
        cells = (found.get(length) for found in figures.values())
        texts = (f"{c[0] / 1e6:.1f} MB{1e3 * c[1]:10.1f} ms" if c else "-" for c in cells)
        print(f"{length:6}" + "".join(f"{text:>23}" for text in texts))
    naive, fused = (figures[way, True] for way in WAYS)
    last = max(naive)
    memory, seconds = (a / b for a, b in zip(naive[last], fused[last]))
    print(
        f"By hand, {last} rows with backward need {memory:.1f} times the memory and "
        f"{seconds:.1f} times the time."
    )


def plot(figures: Figures, path: Path) -> None:
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2))
    for number, (axis, label) in enumerate(zip(axes, ("memory at its peak, MB", "time, ms"))):
        for (way, backward), found in figures.items():
            values = [both[number] * (1e-6, 1e3)[number] for both in found.values()]
            style = f"{'o' if way == 'fused' else 's'}{'--' if backward else '-'}"
            colour = "tab:blue" if way == "fused" else "tab:red"
            name = f"{way}, with backward" if backward else way
            axis.plot([*found], values, style, color=colour, label=name)
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.xaxis.set_major_formatter("{x:.0f}")
        axis.yaxis.set_major_formatter("{x:g}")
        axis.set(xlabel="length", ylabel=label)
        axis.grid(True, alpha=0.3)
        axis.legend()
    figure.suptitle(f"causal attention, {HEADS} heads of {HEAD_DIM}")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
    print(path)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="two short lengths")
    parser.add_argument("--budget", type=float, default=4.0, help="GB, of a call by hand")
    parser.add_argument("--out", type=Path, default=Path("long_context.png"))
    options = parser.parse_args(argv)
    lengths = [128, 256] if options.quick else [2**n for n in range(9, 15)]
    on_gpu = torch.cuda.is_available() and fastattn.info().cuda_archs
    device, calls = "cuda" if on_gpu else "cpu", 1 if options.quick else 3
    figures = sweep(lengths, device, 1e9 * options.budget, calls)
    show(figures, lengths)
    plot(figures, options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
