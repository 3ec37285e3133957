"""Small language models, and what they generate."""

import torch

from fastattn import generate
from fastattn.nn import (
    Attention,
    CausalLM,
    GatedFeedForward,
    LearnedPositions,
    RotaryEmbedding,
    SinusoidalPositions,
    TransformerBlock,
)

VOCAB, DIM, LAYERS = 31, 32, 2
WINDOW = 5


def language_model(
    *, window=None, positions="rope", cross=False, vocab=VOCAB, seed=0, tied=False, **options
):
    """A small decoder with weights so large that its texts vary."""
    torch.manual_seed(seed)
    rope = RotaryEmbedding(8) if positions == "rope" else None
    attention = {"num_kv_heads": 2, "causal": True, "rope": rope}
    if window is not None:
        attention["window"] = (window, 0)
    blocks = [
        TransformerBlock(
            Attention(DIM, 4, alibi=positions == "alibi", **attention),
            GatedFeedForward(DIM, 48),
            cross_attention=Attention(DIM, 4, context_dim=24) if cross else None,
        )
        for _ in range(LAYERS)
    ]
    added = {"learned": LearnedPositions(64, DIM), "sinusoidal": SinusoidalPositions(DIM)}
    model = CausalLM(vocab, DIM, blocks, positions=added.get(positions), tied=tied, **options)
    for part in (model.embedding, model.head):
        if part is not None:
            torch.nn.init.normal_(part.weight, std=0.5)
    return model.eval()


def prompts(batch=3, length=6, seed=0, vocab=VOCAB):
    drawn = torch.Generator("cpu").manual_seed(seed)
    tokens = torch.randint(vocab, (batch, length), generator=drawn, device="cpu")
    return tokens.to(torch.get_default_device())


def generated(model, tokens, **options):
    """(batch, new)."""
    return torch.stack(list(generate(model, tokens, **options)), dim=1)


def greedy(model, tokens, count=12, **options):
    return generated(model, tokens, max_new_tokens=count, temperature=0, **options)


def markov(table):
    """A model whose logits depend on the last token alone."""

    def model(tokens, *, rows):
        return table[tokens[torch.arange(len(tokens)), rows]]

    return model
