"""Trains a decoder on text with fastattn.nn and with torch.nn, and compares losses and step times.

    python benchmarks/train_decoder.py            300 steps in fp32 and in bf16
    python benchmarks/train_decoder.py --quick    a tiny model for a few steps: results, not times

The text is Python's own documentation (pydoc_data.topics), byte by byte. Both models are one class
over two libraries; they begin with the same weights, see the same batches, and take their steps in
turns in one process. bf16 is autocast, with float32 weights. Losses are plotted; the last one, on
text that was held out, must agree within 1 %.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from typing import Any

import matplotlib
import torch
from torch import Tensor, nn

matplotlib.use("agg")
import fastattn.nn
import matplotlib.pyplot as plt

import whole_models as common

LIBRARIES = {common.OURS: fastattn.nn, common.THEIRS: torch.nn}
WIDTH, HEADS, LAYERS, LENGTH, BATCH = 256, 4, 4, 512, 8
TOLERANCE = 0.01  # of the last losses, relative


def text() -> Tensor:
    """The documentation as bytes, (characters,)."""
    from pydoc_data.topics import topics

    return torch.tensor(list("".join(topics[name] for name in sorted(topics)).encode()))


class Decoder(nn.Module):
    """Pre-norm decoder over the 256 bytes, with learned positions and a tied head."""

    def __init__(self, library: Any, width: int, heads: int, layers: int, length: int) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(256, width), nn.Embedding(length, width)
        for embedding in (self.tokens, self.positions):
            nn.init.normal_(embedding.weight, std=0.02)
        layer = library.TransformerEncoderLayer(
            width, heads, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True
        )
        self.blocks = library.TransformerEncoder(
            layer, layers, norm=library.LayerNorm(width), enable_nested_tensor=False
        )
        mask = nn.Transformer.generate_square_subsequent_mask(length)
        self.register_buffer("mask", mask, persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens) + self.positions.weight
        return self.blocks(x, mask=self.mask, is_causal=True) @ self.tokens.weight.T

    def loss(self, rows: Tensor, precision: str) -> Tensor:
        """Mean over rows (batch, length + 1) of what each byte says of the next, in nats."""
        with autocast(precision):
            logits = self(rows[:, :-1])
        return nn.functional.cross_entropy(logits.float().flatten(0, 1), rows[:, 1:].flatten())


def autocast(precision: str) -> contextlib.AbstractContextManager[Any]:
    return torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16")


class Training:
    """One library's model, its optimiser, and what they have shown so far."""

    def __init__(self, library: Any, precision: str, options: argparse.Namespace) -> None:
        torch.manual_seed(0)
        sizes = (options.width, options.heads, options.layers, options.length)
        self.model, self.precision = Decoder(library, *sizes), precision
        self.optimiser = torch.optim.AdamW(self.model.parameters(), lr=1e-3, fused=True)
        warmup, steps = max(1, options.steps // 10), options.steps
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(
            self.optimiser,
            1e-3,
            total_steps=steps + 1,
            pct_start=warmup / steps,
            cycle_momentum=False,
        )
        self.losses: list[float] = []
        self.seconds: list[float] = []

    def step(self, rows: Tensor) -> None:
        def run() -> float:
            self.optimiser.zero_grad()
            loss = self.model.loss(rows, self.precision)
            loss.backward()
            self.optimiser.step()
            return loss.item()

        seconds, loss = common.timed(run)
        self.schedule.step()
        self.losses.append(loss)
        self.seconds.append(seconds)

    @torch.no_grad()
    def held_out_loss(self, batches: list[Tensor]) -> float:
        return sum(self.model.loss(rows, self.precision).item() for rows in batches) / len(batches)


def compare(precision: str, options: argparse.Namespace) -> dict[str, Any]:
    """Trains with both libraries, a step each in turns."""
    data = text()
    train, held_out = data[: int(0.95 * len(data))], data[int(0.95 * len(data)) :]
    generator = torch.Generator().manual_seed(0)

    def batch(source: Tensor) -> Tensor:
        starts = torch.randint(
            len(source) - options.length, (options.batch, 1), generator=generator
        )
        return source[starts + torch.arange(options.length + 1)]

    runs = {name: Training(library, precision, options) for name, library in LIBRARIES.items()}
    first, second = (run.model.state_dict() for run in runs.values())
    assert all(torch.equal(first[key], second[key]) for key in first | second)
    with common.quiet_process():
        for step in range(options.steps):
            rows = batch(train)
            for name in common.in_turns(step):
                runs[name].step(rows)
            if (step + 1) % max(1, options.steps // 10) == 0:
                said = ", ".join(f"{name} {run.losses[-1]:.4f}" for name, run in runs.items())
                print(f"{precision} step {step + 1}: loss {said}", flush=True)
    batches = [batch(held_out) for _ in range(2 if options.quick else 16)]
    last = {name: run.held_out_loss(batches) for name, run in runs.items()}
    ours, theirs = last.values()
    times = common.summary({name: run.seconds for name, run in runs.items()})
    return {
        **times,
        "held_out_loss": last,
        "difference": ours / theirs - 1,
        "losses": {name: run.losses for name, run in runs.items()},
    }


def plot(results: dict[str, dict[str, Any]], path: Any) -> None:
    figure, axes = plt.subplots(1, len(results), figsize=(6 * len(results), 4), squeeze=False)
    for axis, (precision, result) in zip(axes[0], results.items()):
        for (name, losses), style in zip(result["losses"].items(), ("-", "--")):
            axis.plot(losses, style, label=f"{name}, {result[f'{name}_ms']:.0f} ms a step")
        axis.set_title(
            f"{precision}: held-out loss differs by {result['difference']:+.2%}", fontsize=10
        )
        axis.set_xlabel("step")
        axis.set_ylabel("loss, nats per byte")
        axis.grid(True, alpha=0.3)
        axis.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(argv: list[str] | None = None) -> int:
    """Exit status 1 where the losses differ."""
    parser = common.parser(__doc__)
    parser.add_argument("--steps", type=int, default=300)
    options = parser.parse_args(argv)
    sizes = {"width": WIDTH, "heads": HEADS, "layers": LAYERS, "length": LENGTH, "batch": BATCH}
    if options.quick:
        sizes = {"width": 64, "heads": 2, "layers": 2, "length": 40, "batch": 4}
        options.steps = min(options.steps, 10)
    vars(options).update(sizes)
    folder = common.folder(options)
    results = {precision: compare(precision, options) for precision in options.precisions}
    plot(results, folder / "train_decoder.png")
    common.write(
        folder / "train_decoder.json", options, {"sizes": sizes, "steps": options.steps} | results
    )
    for precision, result in results.items():
        ours, theirs = result["fastattn_ms"], result["torch_ms"]
        print(
            f"{precision}: {ours:.1f} ms a step, torch.nn {theirs:.1f} ms: {result['ratio']:.2f}x; "
            f"held-out loss {result['difference']:+.2%}"
        )
    return int(any(abs(result["difference"]) > TOLERANCE for result in results.values()))


if __name__ == "__main__":
    sys.exit(main())
