"""Families that are built from our modules and functions, small: way "nn".

A model has ``fused()``: the same with the same values, on fastattn.
"""

import copy
from typing import Any

import torch
from family_cases import VOCABULARY, Family, padding_mask, randomise, text
from torch import Tensor, nn

import fastattn.nn
from fastattn.functional import attention

WIDTH, HEADS, SEQUENCES = 32, 4, 5


class Outputs(tuple):
    def to_tuple(self) -> tuple[Tensor, ...]:
        return self


class Sinusoids(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        positions = torch.arange(x.shape[1], dtype=torch.float64)[:, None]
        angles = positions / 10000 ** (torch.arange(0, WIDTH, 2, dtype=torch.float64) / WIDTH)
        return x + torch.stack((angles.sin(), angles.cos()), -1).flatten(1).to(x.dtype)


class Translator(nn.Module):
    """The Transformer of 2017, as torch.nn has it: with a norm behind each stack."""

    def __init__(self, library: Any, positions: nn.Module) -> None:
        super().__init__()
        self.source, self.target = (nn.Embedding(VOCABULARY, WIDTH) for _ in range(2))
        self.positions = positions
        self.transformer = library.Transformer(WIDTH, HEADS, 2, 2, 48, batch_first=True)
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def fused(self) -> "Translator":
        model = Translator(fastattn.nn, fastattn.nn.SinusoidalPositions(WIDTH))
        model.load_state_dict(self.state_dict())
        return model.to(self.head.weight.dtype).eval()

    def forward(
        self,
        input_ids: Tensor,
        decoder_input_ids: Tensor,
        attention_mask: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
    ) -> Outputs:
        source, target = (
            self.positions(embedding(ids) * WIDTH**0.5)
            for embedding, ids in ((self.source, input_ids), (self.target, decoder_input_ids))
        )
        hidden, hidden_target = (
            None if mask is None else mask == 0 for mask in (attention_mask, decoder_attention_mask)
        )
        length = target.shape[1]
        later = torch.ones(length, length, dtype=torch.bool).triu(1)
        rows = self.transformer(
            source,
            target,
            tgt_mask=later,
            src_key_padding_mask=hidden,
            tgt_key_padding_mask=hidden_target,
            memory_key_padding_mask=hidden,
        )
        return Outputs((self.head(rows),))


def translator() -> Translator:
    return randomise(Translator(nn, Sinusoids()))


def translations(padding: str) -> dict[str, Any]:
    """A padded text and its translation, which is padded to the right alone: to the left it would
    have rows that see nothing, and they are NaN in torch."""
    inputs = text(padding)
    inputs["decoder_input_ids"] = text("none", length=9)["input_ids"].flip(0)
    mask = padding_mask("right", length=9)
    return inputs | {"decoder_attention_mask": mask} if padding == "right" else inputs


def formula(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, bias: Tensor) -> Tensor:
    scores = query @ key.transpose(-2, -1) / query.shape[-1] ** 0.5 + bias
    return scores.masked_fill(~mask, -torch.inf).softmax(-1) @ value


def fused_formula(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, bias: Tensor) -> Tensor:
    return attention(query, key, value, mask=mask, bias=bias)


class GatedAttention(nn.Module):
    """Attention along the last but one dimension of (batch, rows, columns, width)."""

    def __init__(self, attend: Any) -> None:
        super().__init__()
        self.attend = attend
        self.norm = nn.LayerNorm(WIDTH)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        self.gate, self.out = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, mask: Tensor, bias: Tensor) -> Tensor:
        normed = self.norm(x)
        heads = self.qkv(normed).unflatten(-1, (3, HEADS, -1)).transpose(2, 4)
        query, key, value = heads.unbind(3)  # (batch, rows, heads, columns, width / heads)
        out = self.attend(query, key, value, mask, bias).transpose(2, 3).flatten(3)
        return x + self.out(self.gate(normed).sigmoid() * out)


class PairBiased(nn.Module):
    """A block of the Evoformer without its transitions: attention along the rows of aligned
    sequences with a bias from their pairs of residues, along their columns without one, and over
    the pairs around their starting and their ending nodes (algorithms 7, 8, 13 and 14)."""

    def __init__(self, attend: Any) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, WIDTH)
        self.of_sequence = nn.Parameter(torch.zeros(SEQUENCES, 1, WIDTH))
        self.left, self.right = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.row, self.column, self.starting, self.ending = (
            GatedAttention(attend) for _ in range(4)
        )
        self.row_bias, self.starting_bias, self.ending_bias = (
            nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, HEADS, bias=False))
            for _ in range(3)
        )

    def fused(self) -> "PairBiased":
        model = copy.deepcopy(self)
        for module in model.modules():
            if isinstance(module, GatedAttention):
                module.attend = fused_formula
        return model

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Outputs:
        x = self.tokens(input_ids)
        counts = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        residues, everything = counts.bool()[:, None, None, None], torch.ones(1, 1, 1, 1, 1).bool()

        pairs = self.left(x)[:, :, None] + self.right(x)[:, None]
        rows = x[:, None] + self.of_sequence
        rows = self.row(rows, residues, of_heads(self.row_bias(pairs)))
        columns = self.column(rows.transpose(1, 2), everything, x.new_zeros(1, 1, 1, 1, 1))
        pairs = self.starting(pairs, residues, of_heads(self.starting_bias(pairs)))
        turned = pairs.transpose(1, 2)
        turned = self.ending(turned, residues, of_heads(self.ending_bias(turned)))
        return Outputs((columns, turned))


def of_heads(bias: Tensor) -> Tensor:
    """(batch, queries, keys, heads) to (batch, 1, heads, queries, keys): the same for all rows."""
    return bias.permute(0, 3, 1, 2)[:, None]


def pair_biased() -> PairBiased:
    return randomise(PairBiased(formula))


FAMILIES = (
    Family(
        "Transformer (2017)",
        "encoder-decoder",
        "nn",
        translator,
        translations,
        note="fastattn.nn.Transformer against torch.nn.Transformer",
    ),
    Family(
        "Evoformer (AlphaFold)",
        "science",
        "nn",
        pair_biased,
        text,
        note="fastattn.functional.attention against the formula",
    ),
)
