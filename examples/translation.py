"""Trains the original Transformer (base size) to translate a small part of English into French.

    python examples/translation.py            < 3 minutes on two cores
    python examples/translation.py --quick    a tiny model and a few steps, to see that it runs

The sentences are those of english_french.py. It is tested on some that do not occur in training.

Model: Vaswani et al., Attention Is All You Need (2017), table 3, "base".
"""

from __future__ import annotations

import argparse
import random
import sys
import time

import torch
from english_french import BEGIN, END, PAD, Vocabulary, sentence
from torch import Tensor, nn

from fastattn import generate
from fastattn.nn import SinusoidalPositions, Transformer


class Translator(nn.Module):
    def __init__(self, sources: int, targets: int, width: int, heads: int, layers: int) -> None:
        super().__init__()
        self.transformer = Transformer(
            width, heads, layers, layers, 4 * width, dropout=0.0, batch_first=True
        )
        self.source, self.target = nn.Embedding(sources, width), nn.Embedding(targets, width)
        self.positions = SinusoidalPositions(width, max_length=64)
        for embedding in (self.source, self.target):
            nn.init.normal_(embedding.weight, std=width**-0.5)

    def encode(self, sources: Tensor) -> dict[str, Tensor]:
        x, padding = self._embedded(self.source, sources), sources == PAD
        memory = self.transformer.encoder(x, src_key_padding_mask=padding)
        return {"memory": memory, "padding": padding}

    def forward(
        self, targets: Tensor, memory: Tensor, padding: Tensor, rows: Tensor | None = None
    ) -> Tensor:
        """Logits of the word behind each of targets, or behind one of each sentence (``rows``)."""
        x = self.transformer.decoder(
            self._embedded(self.target, targets),
            memory,
            tgt_mask=nn.Transformer.generate_square_subsequent_mask(targets.shape[1]),
            tgt_is_causal=True,
            memory_key_padding_mask=padding,
        )
        if rows is not None:
            x = x[torch.arange(len(x)), rows]
        return x @ self.target.weight.T

    @torch.no_grad()
    def translate(self, sources: Tensor, length: int) -> Tensor:
        """Greedily: (sentences, length)."""
        begin, inputs = torch.full((len(sources), 1), BEGIN), self.encode(sources)
        options = {"cache": False, "max_new_tokens": length, "temperature": 0, "stop_tokens": END}
        tokens = torch.stack(list(generate(self, begin, **options, **inputs)), dim=1)
        return nn.functional.pad(tokens, (0, length - tokens.shape[1]))

    def _embedded(self, embedding: nn.Embedding, tokens: Tensor) -> Tensor:
        return self.positions(embedding(tokens) * embedding.embedding_dim**0.5)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a tiny model and a few steps")
    parser.add_argument("--steps", type=int, default=360)
    parser.add_argument("--bf16", action="store_true", help="autocast: faster with AMX")
    options = parser.parse_args(argv)
    size, sentences = {"width": 512, "heads": 8, "layers": 6}, 20_000
    if options.quick:
        size, sentences = {"width": 32, "heads": 2, "layers": 2}, 2_000
        options.steps = min(options.steps, 12)

    torch.manual_seed(0)
    rng = random.Random(0)
    pairs = sorted({sentence(rng) for _ in range(sentences)})
    rng.shuffle(pairs)
    test, train = pairs[:500], pairs[500:]
    english, french = (Vocabulary([*texts]) for texts in zip(*pairs))
    model = Translator(len(english.words), len(french.words), **size)
    optimiser = torch.optim.Adam(
        model.parameters(), lr=2e-4, betas=(0.9, 0.98), eps=1e-9, fused=True
    )
    warm_up, decay = options.steps // 6, options.steps // 2
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda step: min((step + 1) / warm_up, 1, (options.steps - step) / decay)
    )
    start = time.perf_counter()
    for step in range(1, options.steps + 1):
        texts, translations = zip(*rng.sample(train, 16))
        sources, targets = english.encode([*texts]), french.encode([*translations])
        with torch.autocast("cpu", torch.bfloat16, enabled=options.bf16):
            logits = model(targets[:, :-1], **model.encode(sources))
        loss = nn.functional.cross_entropy(
            logits.float().flatten(0, 1), targets[:, 1:].flatten(), ignore_index=PAD
        )
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
        if step % max(1, options.steps // 20) == 0:
            spent = time.perf_counter() - start
            print(f"step {step:3}  loss {loss.item():.4f}  {spent:.0f} s", flush=True)

    model.eval()
    texts, translations = zip(*test)
    wanted = french.encode([*translations])[:, 1:]
    found = model.translate(english.encode([*texts]), wanted.shape[1])
    right = (found == wanted)[wanted != PAD].float().mean().item()
    print(f"{right:.2%} of the words of {len(test)} new sentences are right, translated greedily")
    for text, tokens in zip(texts[:5], found):
        print(f"  {text}\n  -> {french.decode(tokens)}")
    return int(right < 0.99 and not options.quick)


if __name__ == "__main__":
    sys.exit(main())
