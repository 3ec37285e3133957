"""An encoder that reads the digits 0 to 4 learns 5 to 9 by LoRA, and forgets nothing.

    python examples/classify_lora.py            about a minute on two cores
    python examples/classify_lora.py --quick    few digits, to see that it runs

The digits are scikit-learn's; each row of pixels is a token. PEFT wraps the projections of
fastattn's layers as it wraps any others. Beside LoRA stands what a new head alone achieves.

Source: Hu et al., LoRA: Low-Rank Adaptation of Large Language Models (2021).
"""

from __future__ import annotations

import argparse
import copy
import sys

import torch
from peft import LoraConfig, get_peft_model
from sklearn.datasets import load_digits
from torch import Tensor, nn

from fastattn.nn import Attention, FeedForward, LayerNorm, LearnedPositions, TransformerBlock

Task = tuple[Tensor, Tensor]  # images (n, 8, 8) and labels from 0 to 4


class Encoder(nn.Module):
    def __init__(self, width: int = 64, heads: int = 4, layers: int = 3) -> None:
        super().__init__()
        self.rows = nn.Linear(8, width)
        self.positions = LearnedPositions(8, width)
        blocks = []
        for _ in range(layers):
            feed_forward = FeedForward(width, 4 * width, activation="gelu")
            blocks.append(TransformerBlock(Attention(width, heads), feed_forward, norm=LayerNorm))
        self.blocks, self.norm = nn.Sequential(*blocks), LayerNorm(width)
        self.head = nn.Linear(width, 5)

    def forward(self, images: Tensor) -> Tensor:
        """(images, 8, 8) -> logits (images, 5)."""
        x = self.blocks(self.positions(self.rows(images)))
        return self.head(self.norm(x).mean(dim=1))


def train(model: nn.Module, task: Task, epochs: int, rate: float) -> None:
    """All parameters that need a gradient."""
    images, labels = task
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(parameters, weight_decay=0.05)
    steps = epochs * -(-len(images) // 32)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, rate, steps)
    for _ in range(epochs):
        for batch in torch.randperm(len(images)).split(32):
            loss = nn.functional.cross_entropy(
                model(images[batch]), labels[batch], label_smoothing=0.1
            )
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()


@torch.no_grad()
def right(model: nn.Module, task: Task) -> float:
    images, labels = task
    return (model(images).argmax(dim=-1) == labels).float().mean().item()


def trainable(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def tasks(digits: range) -> tuple[Task, Task]:
    """Three quarters of the images of these digits to train on, and the others."""
    data = load_digits()
    chosen = [i for i, digit in enumerate(data.target) if digit in digits]
    order = torch.tensor(chosen)[torch.randperm(len(chosen))]
    images, labels = torch.tensor(data.images).float() / 8 - 1, torch.tensor(data.target)
    test, rest = order.tensor_split([len(order) // 4])
    return tuple((images[part], labels[part] - digits.start) for part in (rest, test))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="few digits, each seen once")
    parser.add_argument("--rank", type=int, default=4)
    options = parser.parse_args(argv)
    epochs = 1 if options.quick else 30

    torch.manual_seed(0)
    (old_train, old_test), (new_train, new_test) = tasks(range(5)), tasks(range(5, 10))
    if options.quick:
        old_train, new_train = ([x[:96] for x in task] for task in (old_train, new_train))
    encoder = Encoder()
    print(f"{'':32}{'trained':>10}{'0 to 4':>9}{'5 to 9':>9}")

    def report(name: str, count: int, old: float | None, new: float | None) -> None:
        shares = ["" if share is None else f"{share:.1%}" for share in (old, new)]
        print(f"{name:32}{count:10,}{shares[0]:>9}{shares[1]:>9}", flush=True)

    train(encoder, old_train, epochs, 3e-3)
    report("encoder, on 0 to 4", trainable(encoder), right(encoder, old_test), None)

    frozen = copy.deepcopy(encoder).requires_grad_(False)
    frozen.head = nn.Linear(64, 5)
    report("a new head, untrained", 0, None, right(frozen, new_test))
    train(frozen, new_train, epochs, 1e-2)
    head_alone = right(frozen, new_test)
    report("a new head alone, on 5 to 9", trainable(frozen), None, head_alone)

    config = LoraConfig(
        r=options.rank,
        lora_alpha=2 * options.rank,
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"],
        modules_to_save=["head"],
    )
    adapted = get_peft_model(copy.deepcopy(encoder), config)
    train(adapted, new_train, epochs, 1e-2)
    adapted.eval()
    after = right(adapted, new_test)
    report(f"LoRA of rank {options.rank}, on 5 to 9", trainable(adapted), None, after)
    with adapted.disable_adapter(), torch.no_grad():
        report("the same with LoRA switched off", 0, right(adapted, old_test), None)
        unchanged = torch.equal(adapted(old_test[0]), encoder(old_test[0]))
    print(f"Switched off, its logits are {'' if unchanged else 'not '}those of the first encoder.")

    images, labels = new_test
    with torch.no_grad():
        guesses = adapted(images).argmax(dim=-1)
    counts = torch.zeros(5, 5, dtype=torch.int64)
    counts.index_put_((labels, guesses), torch.ones(1, dtype=torch.int64), accumulate=True)
    print(f"\nWhat {len(labels)} new digits are (rows), and are read as by LoRA (columns)")
    print("".join(f"{digit:>5}" for digit in ("", *range(5, 10))))
    for digit, row in zip(range(5, 10), counts.tolist()):
        print("".join(f"{count or '.':>5}" for count in (digit, *row)))
    return int(not unchanged or (not options.quick and after < max(0.95, head_alone)))


if __name__ == "__main__":
    sys.exit(main())
