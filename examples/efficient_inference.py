"""What caches save: a small language model decoded without one, by hand, and with each kind.

    python examples/efficient_inference.py            about 2 minutes on two cores
    python examples/efficient_inference.py --quick    a tiny model: the tokens, not the times

The model is that of char_gpt.py, trained for a minute; the prompts are text it has not seen. All
continue them greedily, in float32, and must find the tokens that are found without a cache. Only
int8 may differ, and once a token does, so do those behind it. The last two rows are 12 requests of
many lengths with their prompts: one after another, and with continuous_batch.py, where each joins
the batch as soon as there is room in a pool of pages, and leaves its pages to the next.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Iterator
from itertools import pairwise
from typing import Any, NamedTuple

import continuous_batch
import torch
from char_gpt import QUICK_SIZES, SIZES, gpt, train
from python_text import corpus
from torch import Tensor
from torch.nn.functional import linear, scaled_dot_product_attention

from fastattn import generate
from fastattn.nn import CausalLM, PagedKVCache, SlidingWindowKVCache

PLACES, PAGE = 4, 16  # requests at a time; rows of a page


class Row(NamedTuple):
    way: str
    ms: float  # a token
    speed: float  # against no cache
    size: int  # of the cache, bytes
    same: float  # part of the tokens that are found without a cache


@torch.no_grad()
def by_hand(model: CausalLM, tokens: Tensor, count: int) -> Iterator[Tensor]:
    """Keys and values of each layer grow by torch.cat, and torch's attention reads them."""
    cache: dict[int, list[Tensor]] = {}
    for first in [0, *range(tokens.shape[1], tokens.shape[1] + count - 1)]:
        positions, x = torch.arange(first, first + tokens.shape[1]), model.embedding(tokens)
        for layer, block in enumerate(model.blocks):
            part, n = block.attention, block.attention_norm(x)
            projected = (part.q_proj(n), part.k_proj(n), part.v_proj(n))
            query, key, value = (y.unflatten(-1, (-1, part.head_dim)) for y in projected)
            query, key = part.rope(query, key, positions)
            pair = [key.transpose(1, 2), value.transpose(1, 2)]
            if first:
                pair = [torch.cat(rows, dim=2) for rows in zip(cache[layer], pair)]
            cache[layer] = pair
            out = scaled_dot_product_attention(query.transpose(1, 2), *pair, is_causal=not first)
            x = x + part.o_proj(out.transpose(1, 2).flatten(-2))
            x = x + block.feed_forward(block.feed_forward_norm(x))
        found = linear(model.norm(x[:, -1]), model.embedding.weight).argmax(-1)
        yield found
        tokens = found.unsqueeze(-1)


def timed(steps: Iterator[Tensor]) -> tuple[Tensor, float]:
    """Tokens (batch, count), and the median milliseconds of a token behind the first."""
    found, clock = [next(steps)], [time.perf_counter()]
    for tokens in steps:
        found.append(tokens)
        clock.append(time.perf_counter())
    spent = statistics.median(end - start for start, end in pairwise(clock))
    return torch.stack(found, dim=1), 1e3 * spent / len(found[0])


def compare(full: CausalLM, windowed: CausalLM, prompts: Tensor, count: int) -> list[Row]:
    """Each way, in batches of as many requests as there are prompts."""
    greedy = {"max_new_tokens": count, "temperature": 0}

    def cached(model: CausalLM, **options: Any) -> tuple[Iterator[Tensor], int]:
        cache = model.make_cache(len(prompts), prompts.shape[1] + count - 1, **options)
        return generate(model, prompts, cache=cache, **greedy), cache.nbytes

    ways = {
        "no cache": (generate(full, prompts, cache=False, **greedy), 0),
        "torch.cat and SDPA": (by_hand(full, prompts, count), cached(full)[1]),
        "KVCache": cached(full),
        "KVCache, int8": cached(full, dtype=torch.int8),
        "PagedKVCache": cached(full, kind=PagedKVCache, page_size=PAGE),
        "no cache, window": (generate(windowed, prompts, cache=False, **greedy), 0),
        "SlidingWindowKVCache": cached(windowed, kind=SlidingWindowKVCache, max_chunk=PAGE),
    }
    rows = []
    for name, (steps, size) in ways.items():
        found, spent = timed(steps)
        if not size:
            want, none = found, spent
        rows.append(Row(name, spent, none / spent, size, equal(found, want)))
    return rows


def equal(found: Tensor, want: Tensor) -> float:
    return (found == want).float().mean().item()


def show(rows: list[Row]) -> None:
    print(f"\n{'':22}{'ms a token':>12}{'against none':>14}{'cache, KB':>11}{'same':>9}")
    for row in rows:
        print(f"{row.way:22}{row.ms:12.2f}{row.speed:13.1f}x{row.size / 1e3:11.0f}{row.same:9.2%}")
    cat, whole, int8, ring, paged = (rows[i] for i in (1, 2, 3, 6, 8))
    print(
        f"A KVCache makes a token {whole.speed:.1f} times as fast as none does, and "
        f"{cat.ms / whole.ms:.1f} times as fast as torch.cat. Of its bytes int8 needs "
        f"{int8.size / whole.size:.0%}, a window {ring.size / whole.size:.0%}, a pool of pages "
        f"{paged.size / whole.size:.0%}."
    )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a tiny model: tokens, not times")
    quick = parser.parse_args(argv).quick
    sizes, length, steps = (QUICK_SIZES, 64, 10) if quick else (SIZES, 512, 200)
    torch.manual_seed(0)
    text, held_out = corpus()
    full, windowed = (gpt(**sizes | {"window": x}) for x in (None, (length // 4 - 1, 0)))
    train(full, text, steps, length)
    windowed.load_state_dict(full.state_dict())
    pieces = held_out[: 12 * length].view(12, length)
    rows = compare(full, windowed, pieces[:PLACES, : 3 * length // 4], length // 4)
    pages = 5 * PLACES * length // PAGE // 8
    cache = full.make_cache(PLACES, length, kind=PagedKVCache, page_size=PAGE, pages=pages)
    found, want, spent, none = continuous_batch.compare(full, pieces, cache)
    ms = 1e3 / len(want)
    rows.append(Row("requests, no cache", ms * none, 1.0, 0, 1.0))
    rows.append(Row("requests, paged", ms * spent, none / spent, cache.nbytes, equal(found, want)))
    show(rows)
    return int(any(row.same < 1 for row in rows if "int8" not in row.way))


if __name__ == "__main__":
    sys.exit(main())
