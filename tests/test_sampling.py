"""The drawing of tokens against its formula, and against brute force."""

import itertools
import math

import pytest
import torch
from generation_cases import greedy, language_model, prompts

from fastattn.generation.sampling import candidates, draw


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.5},
        {"temperature": 3.0},
        {"top_k": 3},
        {"top_p": 0.7},
        {"top_k": 4, "top_p": 0.6, "temperature": 2.0},
    ],
    ids=str,
)
def test_tokens_are_drawn_with_the_probabilities_of_the_formula(options):
    logits = torch.tensor([2.0, -1.0, 0.5, 0.5, 1.0, -0.3])
    want = probabilities(logits, **options)
    count = 60_000
    generator = torch.Generator().manual_seed(1)
    tokens = draw(logits.expand(count, -1), generator=generator, **options)
    seen = torch.bincount(tokens, minlength=6).double()
    assert seen[want == 0].sum() == 0
    inside = want > 0
    chi_square = ((seen - count * want)[inside] ** 2 / (count * want)[inside]).sum()
    assert chi_square < 30  # of at most 5 degrees of freedom: once in 10^5 draws


def probabilities(logits, temperature=1.0, top_k=None, top_p=None):
    """By the book, in float64."""
    logits = logits.double() / temperature
    order = sorted(range(len(logits)), key=lambda t: (-logits[t].item(), t))[:top_k]
    mass = (logits[order] - logits[order].logsumexp(0)).exp()
    kept = len(order)
    if top_p is not None:
        kept = 1 + sum(mass[:n].sum().item() < top_p for n in range(1, len(order)))
    result = torch.zeros_like(logits)
    result[order[:kept]] = mass[:kept] / mass[:kept].sum()
    return result


@pytest.mark.parametrize("vocab", [1, 7, 300, 1000])
@pytest.mark.parametrize("ties", [False, True])
def test_candidates_are_those_of_brute_force(vocab, ties):
    generator = torch.Generator().manual_seed(vocab)
    logits = torch.randn(4, vocab, generator=generator)
    if ties:
        logits = (2 * logits).round() / 2
    logits[1] = 0.0
    for top_k, top_p in itertools.product(
        [None, 1, 3, vocab, 2 * vocab], [None, 1e-6, 0.3, 0.95, 0.9999, 1.0]
    ):
        kept = candidates(logits, top_k, top_p)
        kept = torch.ones_like(logits, dtype=torch.bool) if kept is None else kept
        limit = None if top_p == 1.0 else top_p
        want = torch.stack([probabilities(row, 1.0, top_k, limit) > 0 for row in logits])
        unequal = 0 if limit is None else 1  # sums of equal numbers may round to above top_p
        assert ((kept != want).sum(-1) <= torch.tensor([ties, True, ties, ties]) * unequal).all()
        assert kept.any(-1).all()


def test_equal_logits_count_as_the_lower_token():
    logits = torch.tensor([[1.0, 2.0, 2.0, 0.0, 2.0]])
    assert candidates(logits, 2, None).tolist() == [[False, True, True, False, False]]
    assert candidates(logits, None, 0.3).tolist() == [[False, True, True, False, False]]
    assert draw(logits, temperature=0).tolist() == [1]


def test_hidden_tokens_and_tiny_temperatures():
    logits = torch.full((2, 9), -math.inf)
    logits[:, 4], logits[:, 8] = 1.0, 0.9
    for options in ({}, {"top_k": 5}, {"top_p": 0.9}, {"temperature": 1e-30}):
        for _ in range(50):
            assert set(draw(logits, **options).tolist()) <= {4, 8}
    assert draw(logits, temperature=1e-30).tolist() == [4, 4]


def test_the_last_token_is_drawn_at_the_end_of_the_mass(monkeypatch):
    monkeypatch.setattr(torch, "rand", lambda shape, **options: torch.ones(shape).double())
    assert draw(torch.tensor([[0.0, 0.0, -math.inf]])).tolist() == [1]
    monkeypatch.setattr(torch, "rand", lambda shape, **options: torch.zeros(shape).double())
    assert draw(torch.tensor([[-math.inf, 0.0, 0.0]])).tolist() == [1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_models_choose_in_float32(dtype):
    model = language_model().to(dtype)
    tokens = prompts()
    logits = model(tokens, rows=-1)
    assert logits.dtype == dtype
    options = {"temperature": 0.7, "top_p": 0.9}
    drawn = draw(logits, generator=torch.Generator().manual_seed(0), **options)
    wide = draw(logits.float(), generator=torch.Generator().manual_seed(0), **options)
    assert torch.equal(drawn, wide)
    assert greedy(model, tokens).shape == (3, 12)
