"""Trains a vision transformer on scikit-learn's digits, and draws where its heads look.

    python examples/vit_digits.py            about a minute on two cores: 98 % of new digits right
    python examples/vit_digits.py --quick    a tiny model and two epochs, to see that it runs

The maps are the exact weights of the class token in the last layer, and rollout: how much of each
patch reaches it through all layers. They go to a PNG (--out), and for two digits to the terminal.

Model: Dosovitskiy et al., An Image is Worth 16x16 Words (2021), here 2x2 pixels, overlapping.
Rollout: Abnar and Zuidema, Quantifying Attention Flow in Transformers (2020).
"""

from __future__ import annotations

import argparse
import sys

import torch
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from torch import Tensor, nn

from fastattn.functional import attention, attention_weights
from fastattn.nn import Attention, FeedForward, LayerNorm, LearnedPositions, TransformerBlock

SIZE, PATCH = 8, 2


class VisionTransformer(nn.Module):
    def __init__(self, width: int, heads: int, layers: int) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, width, PATCH)
        self.class_token = nn.Parameter(torch.zeros(width))
        self.positions = LearnedPositions((SIZE - PATCH + 1) ** 2 + 1, width)
        nn.init.normal_(self.positions.weight, std=0.2)
        blocks = []
        for _ in range(layers):
            feed_forward = FeedForward(width, 2 * width, activation="gelu")
            look = Attention(width, heads, bias=True)
            blocks.append(TransformerBlock(look, feed_forward, norm=LayerNorm))
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Sequential(LayerNorm(width), nn.Linear(width, 10))

    def forward(self, images: Tensor) -> Tensor:
        """(images, 8, 8) -> logits (images, 10)."""
        x = self.patches(images[:, None]).flatten(2).mT
        x = torch.cat((self.class_token.expand(len(x), 1, -1), x), dim=1)
        return self.head(self.blocks(self.positions(x))[:, 0])


@torch.no_grad()
def weights_of(model: VisionTransformer, images: Tensor) -> list[Tensor]:
    """Of each layer, (images, heads, tokens, tokens), from what its attention is given."""
    found = []

    def look(module: Attention, inputs: tuple[Tensor]) -> None:
        heads = (module.num_heads, module.head_dim)
        query, key = (f(inputs[0]).unflatten(-1, heads) for f in (module.q_proj, module.k_proj))
        _, lse = attention(query, key, key, layout="bshd", return_lse=True)
        found.append(attention_weights(query, key, lse, layout="bshd"))

    hooks = [block.attention.register_forward_pre_hook(look) for block in model.blocks]
    model(images)
    for hook in hooks:
        hook.remove()
    return found


def rollout(layers: list[Tensor]) -> Tensor:
    """(images, tokens, tokens): each layer is half attention and half residual."""
    one = flow = torch.eye(layers[0].shape[-1])
    for weights in layers:
        flow = (weights.mean(dim=1) + one) / 2 @ flow
    return flow


def on_pixels(weights: Tensor) -> Tensor:
    """(*, tokens) -> (*, 8, 8): the pixels of a patch share its weight."""
    patches = weights[..., 1:].flatten(0, -2)[:, None].expand(-1, PATCH**2, -1) / PATCH**2
    return nn.functional.fold(patches, SIZE, PATCH).view(*weights.shape[:-1], SIZE, SIZE)


def draw(images: Tensor, maps: Tensor, guesses: Tensor, path: str) -> None:
    """maps: (images, heads + 1, 8, 8), the last of them the rollout."""
    figure = Figure(figsize=(1.3 * maps.shape[1] + 1.3, 1.4 * len(images)), layout="constrained")
    names = [f"head {head}" for head in range(1, maps.shape[1])] + ["rollout"]
    grid = figure.subplots(len(images), 1 + len(names))
    for row, image, columns, guess in zip(grid, images.numpy(), maps.numpy(), guesses):
        for axes, title in zip(row, [f"read as {guess}", *names]):
            axes.imshow(image, cmap="gray")
            axes.set_title(title, fontsize=8)
            axes.axis("off")
        for axes, weights in zip(row[1:], columns):
            axes.imshow(weights, cmap="inferno", alpha=0.7, interpolation="bilinear")
    figure.savefig(path, dpi=130)


def as_text(picture: Tensor) -> list[str]:
    """A line for each row of pixels, blank for the least of them and full for the most."""
    shades = ((picture - picture.min()) / (picture.max() - picture.min()) * 4).round().int()
    return ["".join(" ░▒▓█"[shade] * 2 for shade in row) for row in shades.tolist()]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a tiny model and two epochs")
    parser.add_argument("--out", default="vit_digits.png", help="where the drawing goes")
    options = parser.parse_args(argv)
    width, layers, epochs, drawn = (32, 2, 2, range(5)) if options.quick else (64, 3, 30, range(10))

    torch.manual_seed(0)
    digits = load_digits()
    images, labels = torch.tensor(digits.images).float() / 8 - 1, torch.tensor(digits.target)
    test, train = torch.randperm(len(images)).tensor_split([450])
    model = VisionTransformer(width, 4, layers)
    optimiser = torch.optim.AdamW(model.parameters(), weight_decay=0.05)
    steps = epochs * (len(train) // 64)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 4e-3, steps)
    for epoch in range(1, epochs + 1):
        for batch in train[torch.randperm(len(train))].split(64)[: len(train) // 64]:
            row, column = torch.randint(0, 3, (2,)).tolist()  # moved by up to a pixel each way
            padded = nn.functional.pad(images[batch], (1, 1, 1, 1), value=-1.0)
            logits = model(padded[:, row : row + SIZE, column : column + SIZE])
            loss = nn.functional.cross_entropy(logits, labels[batch], label_smoothing=0.1)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
        with torch.no_grad():
            guesses = model(images[test]).argmax(dim=-1)
        right = (guesses == labels[test]).float().mean().item()
        print(f"epoch {epoch:2}  loss {loss:.3f}  right {right:.1%}", flush=True)

    print(f"{right:.1%} of {len(test)} new digits are read right")
    chosen = torch.stack([(labels[test] == digit).int().argmax() for digit in drawn])
    shown, guesses = images[test][chosen], guesses[chosen]
    found = weights_of(model, shown)
    maps = on_pixels(torch.cat((found[-1], rollout(found)[:, None]), dim=1)[:, :, 0])
    for digit in (0, 4):
        print(f"\nA {digit}; where the 4 heads of the last layer look; the rollout:")
        for lines in zip(*map(as_text, (shown[digit], *maps[digit]))):
            print("  ".join(lines))
    draw(shown, maps, guesses, options.out)
    print(f"\n{len(drawn)} digits: {options.out}")
    return int(right < 0.97 and not options.quick)


if __name__ == "__main__":
    sys.exit(main())
