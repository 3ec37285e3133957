"""Layers and a model on the GPU in bfloat16, on fastattn and on torch.

    python benchmarks/cuda_models.py                 an encoder layer, a decoder block, a Llama
    python benchmarks/cuda_models.py --device=cpu    tiny ones: results, no times

encoder layer   fastattn.nn.TransformerEncoderLayer and torch.nn's
decoder block   fastattn.nn.TransformerBlock and the same of torch's functions, with SDPA
Llama           transformers' model, patched, and its default, sdpa; where it is installed

Both have the same weights, which are random, and take turns: a forward pass without gradients (of
the Llama: a prompt, up to the logits of its last token), and a forward pass with all gradients (of
the Llama: of its loss; the optimiser would be the same for both). Times are those between events
around a call, the gaps between its kernels included. Right first: on one short sequence results and
gradients keep the accuracy contract, where torch's layer in bfloat16 is the eager formula and the
same layer in float64 is exact.
"""

from __future__ import annotations

import copy
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import fastattn.nn
import torch
import torch.nn.functional as F
from fastattn.testing import assert_accurate
from torch import Tensor, nn

import whole_models as common

Results = tuple[Tensor, ...]
WARM_CALLS, TIMED_CALLS = 3, 30
CHECKED_TOKENS = 256


@dataclass
class Sizes:
    batch: int
    length: int
    width: int
    hidden: int
    heads: int
    kv_heads: int
    layers: int = 1


ENCODER = Sizes(8, 2048, 1024, 4096, 16, 16)
DECODER = Sizes(2, 4096, 4096, 14336, 32, 8)
LLAMA = Sizes(4, 2048, 2048, 8192, 32, 8, layers=8)
TINY = Sizes(2, 37, 64, 96, 4, 2, layers=2)


@dataclass
class Problem:
    """Two models with the same weights, and what is computed of their inputs."""

    name: str
    models: dict[str, nn.Module]
    inputs: Tensor  # (batch, length) or (batch, length, width)
    forward: Callable[[nn.Module, Tensor], Tensor]
    gradients: Callable[[nn.Module, Tensor], Results]  # after the result

    def calls(self, backward: bool) -> dict[str, Callable[[], Any]]:
        run = self.gradients if backward else torch.no_grad()(self.forward)
        return {name: partial(run, model, self.inputs) for name, model in self.models.items()}

    def check(self) -> float:
        """The largest part of the allowed error that a result uses; AssertionError above 1."""
        sample = self.inputs[:1, :CHECKED_TOKENS]
        exact_model = copy.deepcopy(self.models[common.THEIRS]).double()
        exact = self._results(
            exact_model, sample.double() if sample.is_floating_point() else sample
        )
        eager, got = (
            self._results(self.models[name], sample) for name in (common.THEIRS, common.OURS)
        )
        return max(
            assert_accurate(result, want, plain, f"{self.name}, {name}")
            for name, result, want, plain in zip(self._names(), got, exact, eager)
        )

    def _results(self, model: nn.Module, x: Tensor) -> Results:
        with torch.no_grad():
            out = self.forward(model, x)
        return out, *self.gradients(model, x)

    def _names(self) -> Iterator[str]:
        yield from ("forward pass", "forward pass in training")
        if self.inputs.is_floating_point():
            yield "dinput"
        ours, theirs = (dict(self.models[x].named_parameters()) for x in common.in_turns(0))
        assert list(ours) == list(theirs)
        yield from (f"d{name}" for name in theirs)


def layer_gradients(model: nn.Module, x: Tensor) -> Results:
    """Of the input and the weights. The output's gradient is the input: any numbers will do."""
    leaf = x.detach().requires_grad_()
    out = model(leaf)
    return out.detach(), *torch.autograd.grad(out, (leaf, *model.parameters()), x)


def on_layers(name: str, sizes: Sizes, ours: nn.Module, theirs: nn.Module) -> Problem:
    theirs.load_state_dict(ours.state_dict())
    device = next(ours.parameters()).device
    shape = (sizes.batch, sizes.length, sizes.width)
    inputs = torch.randn(shape, device=device, dtype=torch.bfloat16)
    models = {common.OURS: ours, common.THEIRS: theirs}
    return Problem(name, models, inputs, lambda model, x: model(x), layer_gradients)


def encoder_layer(sizes: Sizes, device: str) -> Problem:
    def make(library: Any) -> nn.Module:
        options = {"batch_first": True, "norm_first": True, "device": device}
        layer: nn.Module = library.TransformerEncoderLayer(
            *(sizes.width, sizes.heads, sizes.hidden, 0.0, "gelu"), dtype=torch.bfloat16, **options
        )
        return layer

    return on_layers("encoder layer", sizes, make(fastattn.nn), make(nn))


class TorchBlock(nn.Module):
    """The decoder block by torch's functions; its parameters are those of fastattn's, in order."""

    def __init__(self, sizes: Sizes, **factory: Any) -> None:
        super().__init__()
        width, hidden, self.head_dim = sizes.width, sizes.hidden, sizes.width // sizes.heads
        linear = partial(nn.Linear, bias=False, **factory)
        kv_width = sizes.kv_heads * self.head_dim
        shapes = {"q": (width, width), "k": (width, kv_width), "v": (width, kv_width)}
        self.attention = nn.ModuleDict(
            {
                f"{name}_proj": linear(*shape)
                for name, shape in (shapes | {"o": (width, width)}).items()
            }
        )
        shapes = {"gate": (width, hidden), "up": (width, hidden), "down": (hidden, width)}
        self.feed_forward = nn.ModuleDict(
            {f"{name}_proj": linear(*shape) for name, shape in shapes.items()}
        )
        self.attention_norm, self.feed_forward_norm = (
            nn.RMSNorm(width, 1e-6, **factory) for _ in range(2)
        )
        angles = fastattn.functional.rope_tables(
            self.head_dim, sizes.length, device=factory["device"]
        )
        for name, table in zip(("cos", "sin"), angles):
            self.register_buffer(name, torch.cat((table, table), -1), persistent=False)

    def rotated(self, x: Tensor) -> Tensor:
        first, second = x.chunk(2, -1)
        cos, sin = (table[: x.shape[-2]].to(x.dtype) for table in (self.cos, self.sin))
        return x * cos + torch.cat((-second, first), -1) * sin

    def forward(self, x: Tensor) -> Tensor:
        rows = self.attention_norm(x)
        query, key, value = (
            self.attention[f"{name}_proj"](rows).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for name in "qkv"
        )
        heads = F.scaled_dot_product_attention(
            self.rotated(query), self.rotated(key), value, is_causal=True, enable_gqa=True
        )
        x = x + self.attention["o_proj"](heads.transpose(1, 2).flatten(-2))
        rows, layers = self.feed_forward_norm(x), self.feed_forward
        hidden = F.silu(layers["gate_proj"](rows)) * layers["up_proj"](rows)
        out: Tensor = x + layers["down_proj"](hidden)
        return out


def decoder_block(sizes: Sizes, device: str) -> Problem:
    factory: dict[str, Any] = {"device": device, "dtype": torch.bfloat16}
    rope = fastattn.nn.RotaryEmbedding(sizes.width // sizes.heads, sizes.length, device=device)
    attention = fastattn.nn.Attention(
        *(sizes.width, sizes.heads), num_kv_heads=sizes.kv_heads, causal=True, rope=rope, **factory
    )
    feed_forward = fastattn.nn.GatedFeedForward(sizes.width, sizes.hidden, **factory)
    ours = fastattn.nn.TransformerBlock(attention, feed_forward)
    return on_layers("decoder block", sizes, ours, TorchBlock(sizes, **factory))


def llama(sizes: Sizes, device: str) -> Problem:
    import transformers
    from fastattn.integrations import huggingface

    config = transformers.LlamaConfig(
        vocab_size=32000 if device == "cuda" else 997,
        hidden_size=sizes.width,
        intermediate_size=sizes.hidden,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads,
        num_key_value_heads=sizes.kv_heads,
    )

    def make(attention: str) -> Any:
        # NOTE: a model keeps the config itself, which holds its attention: each needs its own.
        own, options = copy.deepcopy(config), {"attn_implementation": attention}
        return transformers.AutoModelForCausalLM.from_config(
            own, dtype=torch.bfloat16, **options
        ).to(device)

    ours, theirs = make("eager"), make("sdpa")
    ours.load_state_dict(theirs.state_dict())
    ours, _ = huggingface.patch(ours, norms=True, activations=True, rotary=True)
    tokens = torch.randint(3, config.vocab_size, (sizes.batch, sizes.length), device=device)

    def forward(model: Any, x: Tensor) -> Tensor:
        logits: Tensor = model(x, logits_to_keep=1).logits
        return logits

    def gradients(model: Any, x: Tensor) -> Results:
        # The logits are compared: the error of one loss, a mean, is small or large by chance.
        out = model(x, labels=x, use_cache=False)
        return out.logits.detach(), *torch.autograd.grad(out.loss, tuple(model.parameters()))

    return Problem("Llama", {common.OURS: ours, common.THEIRS: theirs}, tokens, forward, gradients)


def timed_in_turns(calls: dict[str, Callable[[], Any]]) -> dict[str, float]:
    """Medians in ms, and the ratio. Calls are queued, and nobody waits between them."""
    spans: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {n: [] for n in calls}
    for number in range(WARM_CALLS + TIMED_CALLS):
        for name in common.in_turns(number):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            calls[name]()
            end.record()
            spans[name].append((start, end))
    torch.cuda.synchronize()
    return common.summary(
        {
            name: [1e-3 * start.elapsed_time(end) for start, end in taken[WARM_CALLS:]]
            for name, taken in spans.items()
        }
    )


PROBLEMS: dict[str, tuple[Callable[[Sizes, str], Problem], Sizes]] = {
    "encoder layer": (encoder_layer, ENCODER),
    "decoder block": (decoder_block, DECODER),
    "Llama": (llama, LLAMA),
}


def rows(device: str) -> Iterator[dict[str, Any]]:
    for name, (make, full) in PROBLEMS.items():
        sizes = full if device == "cuda" else TINY
        torch.manual_seed(0)
        try:
            problem = make(sizes, device)
        except ModuleNotFoundError as error:
            print(f"{name}: left out, {error.name} is not installed", flush=True)
            continue
        used = problem.check()
        row: dict[str, Any] = {"problem": name, "sizes": vars(sizes), "error_used": used}
        if device != "cuda":
            print(f"{name}: right", flush=True)
            yield row
            continue
        for backward in (False, True):
            times = timed_in_turns(problem.calls(backward))
            passes = "fwd+bwd" if backward else "fwd"
            print(
                f"{name}, {passes}: {times['fastattn_ms']:.2f} ms, torch {times['torch_ms']:.2f} "
                f"ms: {times['ratio']:.2f}x",
                flush=True,
            )
            yield row | {"passes": passes} | times


def main(argv: list[str] | None = None) -> int:
    options = common.gpu_parser(__doc__ or "").parse_args(argv)
    done = list(rows(options.device))
    common.write_of_gpu("models.json", options, {"rows": done})
    if ratios := [row["ratio"] for row in done if "ratio" in row]:
        print(f"geometric mean {statistics.geometric_mean(ratios):.2f}x")
    return 0


if __name__ == "__main__":
    sys.exit(main())
