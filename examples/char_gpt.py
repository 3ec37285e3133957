"""Trains a GPT on characters, from the documentation of Python, and talks with it.

    python examples/char_gpt.py --save gpt.pt    about 3 minutes on two cores, then samples
    python examples/char_gpt.py --load gpt.pt --chat --top-p 0.9
    echo "The function returns" | python examples/char_gpt.py --load gpt.pt --chat
    python examples/char_gpt.py --quick          a tiny model and a few steps, to see that it runs

The text is that of python_text.py. The model is a small Llama (RMSNorm, rotary positions, SwiGLU)
that attends to a window, as Mistral does: a chat of any length needs one ring of keys and values.
It continues what you type, up to the end of a paragraph, and has no idea of what it says.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from python_text import CHARACTERS, corpus, decode, encode
from torch import Tensor, nn

from fastattn import generate
from fastattn.nn import Attention, CausalLM, GatedFeedForward, RotaryEmbedding, TransformerBlock
from fastattn.nn import SlidingWindowKVCache as Ring

SIZES: dict[str, Any] = {"width": 192, "heads": 3, "layers": 4, "window": (127, 0)}
QUICK_SIZES = {"width": 32, "heads": 2, "layers": 2, "window": (31, 0)}
BATCH, POSITIONS, ANSWER = 8, 1 << 16, 300  # POSITIONS: the rows of the rotary table
PROMPT = "The function returns"
SAMPLES = ({"temperature": 1.0}, {"temperature": 0.8, "top_k": 10}, {"top_p": 0.9})


def gpt(width: int, heads: int, layers: int, window: tuple[int, int] | None) -> CausalLM:
    rope = RotaryEmbedding(width // heads, max_length=POSITIONS)
    blocks = [
        TransformerBlock(
            Attention(width, heads, causal=True, rope=rope, window=window),
            GatedFeedForward(width, 8 * width // 3),
        )
        for _ in range(layers)
    ]
    return CausalLM(len(CHARACTERS), width, blocks)


def loss_of(model: CausalLM, text: Tensor, length: int, generator: torch.Generator) -> Tensor:
    """Mean over some pieces of what each character says of the next, in nats."""
    starts = torch.randint(len(text) - length, (BATCH, 1), generator=generator)
    rows = text[starts + torch.arange(length + 1)]
    return nn.functional.cross_entropy(model(rows[:, :-1]).float().mT, rows[:, 1:])


def train(model: CausalLM, text: Tensor, steps: int, length: int, bf16: bool = False) -> None:
    generator = torch.Generator().manual_seed(0)
    optimiser = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimiser, 3e-3, total_steps=steps + 1, pct_start=0.1, cycle_momentum=False
    )
    start = time.perf_counter()
    for step in range(1, steps + 1):
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = loss_of(model, text, length, generator)
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        if step % max(1, steps // 20) == 0:
            spent = time.perf_counter() - start
            print(f"step {step:4}  loss {loss.item():.4f}  {spent:.0f} s", flush=True)


def stream(model: CausalLM, text: str, cache: Ring, **choice: Any) -> Iterator[str]:
    """The characters that continue a text, as they come."""
    tokens = encode(text).unsqueeze(0)
    return map(decode, generate(model, tokens, cache=cache, max_new_tokens=ANSWER, **choice))


def chat(model: CausalLM, **choice: Any) -> None:
    """Continues each line of stdin, with all before it in the cache."""
    cache, before = model.make_cache(1, kind=Ring), "\n"
    for line in iter(lambda: input("> "), ""):
        if cache.lengths.item() + len(before + line) + ANSWER > POSITIONS:
            cache.reset()
        answer = ""
        for character in stream(model, before + line, cache, **choice):
            print(character, end="", flush=True)
            answer += character
            if answer.endswith("\n\n") and answer.strip():
                break
        print()
        # The cache has all but the last character; an answer that was cut ends here.
        before = answer[-1] if answer.endswith("\n\n") else answer[-1] + "\n\n"


def trained(options: argparse.Namespace) -> CausalLM:
    """A new model, or with --load another's."""
    if options.load:
        saved = torch.load(options.load, weights_only=True)
        model = gpt(**saved["sizes"])
        model.load_state_dict(saved["weights"])
        return model.eval()
    sizes, length = (QUICK_SIZES, 64) if options.quick else (SIZES, 256)
    text, held_out = corpus()
    model = gpt(**sizes)
    train(model, text, options.steps, length, options.bf16)
    model.eval()
    seeds = (torch.Generator().manual_seed(seed) for seed in range(16))
    with torch.no_grad():
        losses = [loss_of(model, held_out, length, seed) for seed in seeds]
    print(f"held-out loss {torch.stack(losses).mean():.4f} nats a character")
    if options.save:
        torch.save({"sizes": sizes, "weights": model.state_dict()}, options.save)
    return model


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a tiny model and a few steps")
    parser.add_argument("--steps", type=int, default=1400)
    parser.add_argument("--bf16", action="store_true", help="autocast: faster with AMX")
    files = parser.add_mutually_exclusive_group()
    files.add_argument("--save", type=Path, help="where to write the trained model")
    files.add_argument("--load", type=Path, help="a model that was saved: no training")
    parser.add_argument("--chat", action="store_true", help="until an empty line, or the end")
    parser.add_argument("--temperature", type=float, default=0.8, help="of the chat; 0: greedy")
    parser.add_argument("--top-k", type=int, help="of the chat")
    parser.add_argument("--top-p", type=float, help="of the chat")
    options = parser.parse_args(argv)
    options.steps = min(options.steps, 20) if options.quick else options.steps
    torch.manual_seed(0)
    model = trained(options)
    if options.chat:
        with contextlib.suppress(EOFError, KeyboardInterrupt):
            chat(model, **{x: getattr(options, x) for x in ("temperature", "top_k", "top_p")})
        return 0
    for choice in SAMPLES:
        cache = model.make_cache(1, kind=Ring)
        said = ", ".join(f"{name} {value}" for name, value in choice.items())
        print(f"--- {said}\n{PROMPT}{''.join(stream(model, PROMPT, cache, **choice))}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
