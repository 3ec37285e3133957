"""Decodes with CausalLM, generate and a KVCache, and with the same model from parts of torch.nn.

    python benchmarks/generate_tokens.py            12 layers, 768 wide, 12 heads, in fp32 and bf16
    python benchmarks/generate_tokens.py --quick    a tiny model: results, not times

The other model has torch's layers, scaled_dot_product_attention, and a cache that torch.cat makes
longer. Both have the same random weights, and generate token by token, in turns in one process.

Right first: each is given the same tokens, and its logits are held against float64 (over the first
row of the table, one request). Then in fp32 both must choose the same greedy tokens in every row.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
from collections.abc import Iterator
from typing import Any

import matplotlib
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

matplotlib.use("agg")
import matplotlib.pyplot as plt
from fastattn import generate
from fastattn.nn import (
    Attention,
    CausalLM,
    FeedForward,
    LayerNorm,
    LearnedPositions,
    TransformerBlock,
)

import whole_models as common

SIZES = {"vocabulary": 50257, "width": 768, "heads": 12, "layers": 12}
QUICK_SIZES = {"vocabulary": 97, "width": 48, "heads": 4, "layers": 2}
ROWS = ((1, 128), (1, 1024), (1, 4096), (8, 128), (8, 1024))  # (batch, prompt)
QUICK_ROWS = ((1, 5), (3, 40))
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
Cache = list[tuple[Tensor, Tensor]]


def our_model(sizes: dict[str, int], length: int) -> CausalLM:
    width, heads = sizes["width"], sizes["heads"]
    blocks = [
        TransformerBlock(
            Attention(width, heads, causal=True, bias=True),
            FeedForward(width, 4 * width),
            norm=LayerNorm,
        )
        for _ in range(sizes["layers"])
    ]
    positions = LearnedPositions(length, width)
    model = CausalLM(sizes["vocabulary"], width, blocks, positions=positions, norm=LayerNorm)
    nn.init.normal_(positions.weight, std=0.02)
    return model.eval()


class TorchBlock(nn.Module):
    """Pre-norm, GELU; its modules are called as those of TransformerBlock are."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        names = ("q_proj", "k_proj", "v_proj", "o_proj")
        self.attention = nn.ModuleDict({name: nn.Linear(width, width) for name in names})
        self.feed_forward = nn.ModuleDict(
            {"up_proj": nn.Linear(width, 4 * width), "down_proj": nn.Linear(4 * width, width)}
        )
        self.attention_norm, self.feed_forward_norm = nn.LayerNorm(width), nn.LayerNorm(width)

    def forward(self, x: Tensor, cache: Cache, layer: int) -> Tensor:
        normalised = self.attention_norm(x)
        query, key, value = (
            self.attention[name](normalised).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for name in ("q_proj", "k_proj", "v_proj")
        )
        if layer == len(cache):
            cache.append((key, value))
        else:
            key = torch.cat((cache[layer][0], key), dim=2)
            value = torch.cat((cache[layer][1], value), dim=2)
            cache[layer] = key, value
        out = scaled_dot_product_attention(query, key, value, is_causal=query.shape[2] > 1)
        x = x + self.attention["o_proj"](out.transpose(1, 2).flatten(-2))
        hidden = self.feed_forward["up_proj"](self.feed_forward_norm(x))
        return x + self.feed_forward["down_proj"](nn.functional.gelu(hidden))


class TorchModel(nn.Module):
    def __init__(self, sizes: dict[str, int], length: int) -> None:
        super().__init__()
        width = sizes["width"]
        self.embedding = nn.Embedding(sizes["vocabulary"], width)
        self.positions = nn.Embedding(length, width)
        self.blocks = nn.ModuleList(
            TorchBlock(width, sizes["heads"]) for _ in range(sizes["layers"])
        )
        self.norm = nn.LayerNorm(width)

    def forward(self, tokens: Tensor, cache: Cache) -> Tensor:
        """The logits behind the last token, (batch, vocabulary)."""
        first = cache[0][0].shape[2] if cache else 0
        x = self.embedding(tokens) + self.positions.weight[first : first + tokens.shape[1]]
        for layer, block in enumerate(self.blocks):
            x = block(x, cache, layer)
        return self.norm(x[:, -1]) @ self.embedding.weight.T


@torch.no_grad()
def torch_greedy(model: TorchModel, tokens: Tensor, max_new_tokens: int) -> Iterator[Tensor]:
    cache: Cache = []
    for _ in range(max_new_tokens):
        new = model(tokens, cache).argmax(-1)
        yield new
        tokens = new.unsqueeze(-1)


def logits_of_ours(model: CausalLM, tokens: Tensor, prompt: int) -> Tensor:
    """Behind the prompt and each token that follows, (batch, tokens, vocabulary)."""
    cache = model.make_cache(len(tokens), tokens.shape[1])
    found = []
    for part in (tokens[:, :prompt], *tokens[:, prompt:].split(1, dim=1)):
        found.append(model(part, cache=cache, rows=-1))
        cache.advance(part.shape[1])
    return torch.stack(found, dim=1)


def logits_of_torch(model: TorchModel, tokens: Tensor, prompt: int) -> Tensor:
    cache: Cache = []
    parts = (tokens[:, :prompt], *tokens[:, prompt:].split(1, dim=1))
    return torch.stack([model(part, cache) for part in parts], dim=1)


@torch.no_grad()
def check(ours: CausalLM, theirs: TorchModel, tokens: Tensor, prompt: int) -> dict[str, float]:
    """The largest error of the logits of both; AssertionError where ours is beyond the contract."""
    oracle = logits_of_torch(copy.deepcopy(theirs).double(), tokens, prompt)
    errors = {
        common.OURS: (logits_of_ours(ours, tokens, prompt) - oracle).abs().max().item(),
        common.THEIRS: (logits_of_torch(theirs, tokens, prompt) - oracle).abs().max().item(),
    }
    floor = torch.finfo(theirs.norm.weight.dtype).eps * oracle.abs().max().item()
    assert errors[common.OURS] <= 2 * errors[common.THEIRS] + floor, errors
    return errors


def decode(ours: CausalLM, theirs: TorchModel, tokens: Tensor, count: int) -> dict[str, Any]:
    """Times the prompt and ``count`` more tokens of both, in turns."""
    streams = {
        common.OURS: generate(ours, tokens, max_new_tokens=count + 1, temperature=0),
        common.THEIRS: torch_greedy(theirs, tokens, count + 1),
    }
    seconds: dict[str, list[float]] = {name: [] for name in streams}
    found: dict[str, list[Tensor]] = {name: [] for name in streams}
    with common.quiet_process():
        for step in range(count + 1):
            for name in common.in_turns(step):
                spent, new = common.timed(lambda name=name: next(streams[name]))
                seconds[name].append(spent)
                found[name].append(new)
    prompts = {f"{name}_prompt_ms": 1e3 * samples.pop(0) for name, samples in seconds.items()}
    result = prompts | common.summary(seconds)
    for name in streams:
        result[f"{name}_tokens_per_second"] = 1e3 * len(tokens) / result[f"{name}_ms"]
    ours_found, theirs_found = (torch.stack(new) for new in found.values())
    return result | {"same_tokens": (ours_found == theirs_found).float().mean().item()}


def compare(precision: str, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    sizes, rows = (QUICK_SIZES, QUICK_ROWS) if options.quick else (SIZES, ROWS)
    length = max(prompt for _, prompt in rows) + options.tokens + 1
    torch.manual_seed(0)
    ours, theirs = our_model(sizes, length), TorchModel(sizes, length)
    theirs.load_state_dict(ours.state_dict())
    for model in (ours, theirs):
        model.to(DTYPES[precision]).eval()
    generator = torch.Generator().manual_seed(0)
    for number, (batch, prompt) in enumerate(rows):
        tokens = torch.randint(sizes["vocabulary"], (batch, prompt + 4), generator=generator)
        errors = check(ours, theirs, tokens, prompt) if number == 0 else None
        result = decode(ours, theirs, tokens[:, :prompt], options.tokens)
        row = {"precision": precision, "batch": batch, "prompt": prompt, **result}
        print(
            f"{precision}, batch {batch}, prompt {prompt}: "
            f"{result['fastattn_tokens_per_second']:.1f} tokens/s, torch.nn "
            f"{result['torch_tokens_per_second']:.1f}: {result['ratio']:.2f}x",
            flush=True,
        )
        yield row if errors is None else row | {"errors": errors}


def plot(rows: list[dict[str, Any]], path: Any) -> None:
    names = [f"{row['precision']}, {row['batch']} x {row['prompt']}" for row in rows]
    figure, axis = plt.subplots(figsize=(8, 1.2 + 0.4 * len(rows)))
    for offset, name in ((-0.2, common.OURS), (0.2, common.THEIRS)):
        places = [number + offset for number in range(len(rows))]
        axis.barh(places, [row[f"{name}_tokens_per_second"] for row in rows], 0.4, label=name)
    for number, row in enumerate(rows):
        widest = max(row[f"{name}_tokens_per_second"] for name in (common.OURS, common.THEIRS))
        axis.annotate(f" {row['ratio']:.2f}x", (widest, number), va="center", fontsize=8)
    axis.set_yticks(range(len(rows)), names, fontsize=8)
    axis.invert_yaxis()
    axis.set_xlabel("tokens per second, all requests (precision, requests x prompt)")
    axis.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(argv: list[str] | None = None) -> int:
    """Exit status 1 where both do not choose the same tokens in fp32."""
    parser = common.parser(__doc__)
    parser.add_argument("--tokens", type=int, default=32, help="how many to generate")
    options = parser.parse_args(argv)
    options.tokens = min(options.tokens, 6) if options.quick else options.tokens
    folder = common.folder(options)
    rows = [row for precision in options.precisions for row in compare(precision, options)]
    plot(rows, folder / "generate_tokens.png")
    mean = statistics.geometric_mean(row["ratio"] for row in rows)
    sizes = QUICK_SIZES if options.quick else SIZES
    results = {"sizes": sizes, "tokens": options.tokens, "mean_ratio": mean, "rows": rows}
    common.write(folder / "generate_tokens.json", options, results)
    print(f"geometric mean {mean:.2f}x, worst {min(row['ratio'] for row in rows):.2f}x")
    return int(any(row["same_tokens"] < 1 for row in rows if row["precision"] == "fp32"))


if __name__ == "__main__":
    sys.exit(main())
