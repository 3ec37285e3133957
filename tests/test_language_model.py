"""fastattn.nn.CausalLM: what its arguments mean."""

import copy
import pickle

import pytest
import torch
from generation_cases import DIM, VOCAB, greedy, language_model, prompts

from fastattn.nn import Attention, CausalLM, FeedForward, SinusoidalPositions, TransformerBlock


def test_rows_packed_and_nested_tokens_give_the_same_logits():
    for positions in ("rope", "learned"):
        model = language_model(positions=positions, head_bias=True, logit_softcap=5.0)
        tokens, lengths = prompts(3, 7), [7, 2, 4]
        logits = model(tokens)
        assert logits.shape == (3, 7, VOCAB) and logits.abs().max() < 5.0
        close = torch.testing.assert_close
        close(model(tokens, rows=-1), logits[:, -1])
        last = torch.tensor(lengths) - 1
        close(model(tokens, rows=last), logits[torch.arange(3), last])
        packed = torch.cat([row[:n] for row, n in zip(tokens, lengths)])
        bounds = torch.tensor([0, 7, 9, 13])
        want = torch.cat([row[:n] for row, n in zip(logits, lengths)])
        close(model(packed, cu_seqlens=bounds), want)
        close(model(packed, cu_seqlens=bounds, rows=bounds[1:] - 1), want[bounds[1:] - 1])
        nested = torch.nested.nested_tensor_from_jagged(packed, bounds)
        close(model(nested).values(), want)
        with pytest.raises(ValueError, match="rows"):
            model(nested, rows=-1)


@torch.no_grad()
def test_packed_tokens_go_behind_what_a_cache_holds():
    for positions in ("rope", "learned"):
        model = language_model(positions=positions)
        tokens = prompts(3, 7)
        cache = model.make_cache(3, 7)
        model(tokens[:, :3], cache=cache, query_lengths=torch.tensor([3, 0, 2]))
        cache.advance([3, 0, 2])
        packed = torch.cat((tokens[0, 3:5], tokens[1, :4], tokens[2, 2:3]))
        bounds = torch.tensor([0, 2, 6, 7])
        logits = model(packed, cache=cache, cu_seqlens=bounds, max_seqlen=4)
        want = model(tokens)
        want = torch.cat((want[0, 3:5], want[1, :4], want[2, 2:3]))
        torch.testing.assert_close(logits, want)


def test_a_model_of_other_parts():
    """The original decoder layer: post-norm, ReLU, scaled embeddings, no final norm."""
    torch.manual_seed(0)
    blocks = [
        TransformerBlock(
            Attention(DIM, 4, causal=True, bias=True),
            FeedForward(DIM, 64, activation="relu"),
            norm=torch.nn.LayerNorm,
            placement="post",
        )
    ]
    positions = SinusoidalPositions(DIM)
    scale = DIM**0.5
    model = CausalLM(
        VOCAB, DIM, blocks, positions=positions, norm=torch.nn.Identity, embedding_scale=scale
    )
    tokens = prompts()
    x = positions(scale * model.embedding.weight[tokens])
    torch.testing.assert_close(model(tokens), blocks[0](x) @ model.embedding.weight.T)
    assert torch.equal(greedy(model, tokens), greedy(model, tokens, cache=False))
    assert set(dict(model.named_parameters())) == set(model.state_dict())


def test_models_are_copied_pickled_and_made_without_memory():
    model = language_model(positions="sinusoidal")
    want = greedy(model, prompts())
    assert torch.equal(greedy(copy.deepcopy(model), prompts()), want)
    assert torch.equal(greedy(pickle.loads(pickle.dumps(model)), prompts()), want)
    with torch.device("meta"):
        empty = language_model(positions="sinusoidal")
    empty = empty.to_empty(device="cpu")
    empty.load_state_dict(model.state_dict())
    assert torch.equal(greedy(empty, prompts()), want)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: CausalLM(VOCAB, DIM, []), "blocks: expected at least one"),
        (lambda: CausalLM(0, DIM, []), "vocab_size"),
        (lambda: language_model(tied=True, head_bias=True), "head_bias"),
        (lambda: language_model()(prompts()[0]), r"tokens: expected shape \(batch, length\)"),
        (
            lambda: language_model()(prompts(), cu_seqlens=torch.tensor([0, 6])),
            r"tokens: expected shape \(total,\)",
        ),
        (lambda: language_model().make_cache(2, 9, cross=True), "cross: expected blocks with"),
    ],
)
def test_errors_of_the_model(call, message):
    with pytest.raises(ValueError, match=message):
        call()
