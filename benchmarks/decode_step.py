"""A decode step of a Llama-like model, captured in a CUDA graph: tokens a second, beside the time
that it takes to read the weights and the cache once.

    python benchmarks/decode_step.py                 32 layers, 4096 wide, 32 heads on 8, bfloat16
    python benchmarks/decode_step.py --device=cpu    a tiny model, not captured: no times

The model has random weights and a cache of random rows. A step is all of its layers, the head, the
greedy choice of the next token of every request, and the cache's advance by a row. Right first: the
captured step must give the tokens and logits of the one that is not.
"""

from __future__ import annotations

import itertools
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from fastattn.nn import (
    Attention,
    CausalLM,
    GatedFeedForward,
    KVCache,
    RMSNorm,
    RotaryEmbedding,
    TransformerBlock,
)
from torch import Tensor

import cuda_ceilings
import whole_models as common

CHECKED_STEPS, TIMED_STEPS = 8, 32
CEILING_SECONDS = 1.0


@dataclass
class Sizes:
    vocabulary: int = 128256
    width: int = 4096
    hidden: int = 14336
    heads: int = 32
    kv_heads: int = 8
    layers: int = 32
    rows: tuple[tuple[int, int], ...] = ((1, 128), (1, 8192), (8, 4096), (32, 4096))  # batch, cache


TINY = Sizes(97, 64, 96, 4, 2, 2, ((1, 5), (3, 40)))


def make_model(sizes: Sizes, device: str, capacity: int) -> CausalLM:
    factory: dict[str, Any] = {"device": device, "dtype": torch.bfloat16}
    rope = RotaryEmbedding(
        sizes.width // sizes.heads, capacity, base=500000.0, device=device
    )  # one for all layers

    def norm(size: int) -> RMSNorm:
        return RMSNorm(size, eps=1e-5, **factory)

    shape = {"num_kv_heads": sizes.kv_heads, "causal": True, "rope": rope}
    blocks = [
        TransformerBlock(
            Attention(sizes.width, sizes.heads, **shape, **factory),
            GatedFeedForward(sizes.width, sizes.hidden, **factory),
            norm=norm,
        )
        for _ in range(sizes.layers)
    ]
    model = CausalLM(sizes.vocabulary, sizes.width, blocks, norm=norm, tied=False, **factory)
    return model.eval()


def weight_bytes(model: CausalLM) -> int:
    """What a step reads of the weights: all but the embedding, of which it takes a row a token."""
    return sum(x.nbytes for x in model.parameters()) - model.embedding.weight.nbytes


class Decoding:
    """The state of a batch that is decoded, and its step."""

    def __init__(self, model: CausalLM, batch: int, length: int, capacity: int) -> None:
        self.model, self.length = model, length
        self.cache: KVCache = model.make_cache(batch, capacity)
        for x in (*self.cache.keys, *self.cache.values):
            x.normal_()
        device = self.cache.device
        self.first = torch.arange(batch, device=device).unsqueeze(-1)
        self.tokens = self.first.clone()
        self.logits = torch.zeros(batch, model.vocab_size, dtype=torch.bfloat16, device=device)
        self.begin()

    def begin(self) -> None:
        self.tokens.copy_(self.first)
        self.cache.lengths.fill_(self.length)

    def step(self) -> None:
        self.logits.copy_(self.model(self.tokens, cache=self.cache, rows=-1))
        self.tokens.copy_(self.logits.argmax(-1, keepdim=True))
        self.cache.advance(1)

    def cache_bytes(self, steps: int) -> float:
        """What one of so many steps reads of the cache, on average."""
        rows = self.length + (steps + 1) / 2
        batch, kv_heads, _, head_dim = self.cache.keys[0].shape
        return 2.0 * self.cache.num_layers * batch * kv_heads * rows * head_dim * 2


def captured(decoding: Decoding) -> Callable[[], None]:
    """The step as a graph. The rows that it writes meanwhile are written again later."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            decoding.step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        decoding.step()
    replay: Callable[[], None] = graph.replay
    return replay


def results_of(decoding: Decoding, step: Callable[[], None]) -> tuple[Tensor, Tensor]:
    """The tokens of every step, and the logits of the last."""
    decoding.begin()
    tokens = []
    for _ in range(CHECKED_STEPS):
        step()
        tokens.append(decoding.tokens.clone())
    return torch.cat(tokens, dim=1), decoding.logits.clone()


def check(decoding: Decoding, step: Callable[[], None]) -> None:
    """AssertionError unless both steps give the same."""
    tokens, logits = results_of(decoding, step)
    meant_tokens, meant = results_of(decoding, decoding.step)
    assert logits.isfinite().all()
    assert torch.equal(tokens, meant_tokens), "the captured step chose other tokens"
    torch.testing.assert_close(logits, meant)


def median_ms(decoding: Decoding, step: Callable[[], None]) -> float:
    """Of single steps; nobody waits between them."""
    decoding.begin()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(TIMED_STEPS + 1)]
    events[0].record()
    for event in events[1:]:
        step()
        event.record()
    torch.cuda.synchronize()
    return statistics.median(a.elapsed_time(b) for a, b in itertools.pairwise(events))


@torch.no_grad()
def rows(sizes: Sizes, device: str) -> Iterator[dict[str, Any]]:
    capacity = max(length for _, length in sizes.rows) + max(CHECKED_STEPS, TIMED_STEPS)
    model = make_model(sizes, device, capacity)
    rate = cuda_ceilings.read_rate(CEILING_SECONDS) if device == "cuda" else 0.0
    for batch, length in sizes.rows:
        decoding = Decoding(model, batch, length, length + max(CHECKED_STEPS, TIMED_STEPS))
        row: dict[str, Any] = {"batch": batch, "length": length}
        if device != "cuda":
            check(decoding, decoding.step)
            print(f"batch {batch}, {length} rows: right")
            yield row
            continue
        step = captured(decoding)
        check(decoding, step)
        ms, eager_ms = median_ms(decoding, step), median_ms(decoding, decoding.step)
        read = weight_bytes(model) + decoding.cache_bytes(TIMED_STEPS)
        floor_ms = 1e3 * read / rate
        row |= {"ms": ms, "eager_ms": eager_ms, "read_bytes": read, "floor_ms": floor_ms}
        row |= {"tokens_per_second": 1e3 * batch / ms, "share_of_floor": floor_ms / ms}
        print(
            f"batch {batch}, {length} rows: {row['tokens_per_second']:.0f} tokens/s, {ms:.2f} ms a "
            f"step (not captured: {eager_ms:.2f}); reading {read / 1e9:.1f} GB at "
            f"{rate / 1e9:.0f} GB/s takes {100 * row['share_of_floor']:.0f} % of it",
            flush=True,
        )
        yield row | {"read_bytes_per_second": rate}


def main(argv: list[str] | None = None) -> int:
    options = common.gpu_parser(__doc__).parse_args(argv)
    sizes = Sizes() if options.device == "cuda" else TINY
    done = list(rows(sizes, options.device))
    common.write_of_gpu("decode_step.json", options, {"sizes": asdict(sizes), "rows": done})
    return 0


if __name__ == "__main__":
    sys.exit(main())
