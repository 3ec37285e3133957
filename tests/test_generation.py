"""fastattn.generate: with any cache what it gives without one, and what its formulas say."""

import copy
import itertools
import math

import pytest
import torch
from generation_cases import WINDOW, generated, greedy, language_model, markov, prompts
from torch._dynamo.testing import CompileCounterWithBackend

import fastattn
from fastattn import generate
from fastattn.nn import KVCache, PagedKVCache, SlidingWindowKVCache

CACHES = {
    "default": lambda model: None,
    "contiguous": lambda model: model.make_cache(3, 40),
    "bshd": lambda model: model.make_cache(3, 40, layout="bshd"),
    "paged": lambda model: model.make_cache(3, 40, kind=PagedKVCache, page_size=4, pages=90),
    "page of one row": lambda model: model.make_cache(3, 40, PagedKVCache, page_size=1, pages=360),
    "sliding": lambda model: model.make_cache(3, kind=SlidingWindowKVCache, max_chunk=4),
}


def cached_model(kind):
    model = language_model(window=WINDOW if kind == "sliding" else None)
    return model, CACHES[kind](model)


@pytest.mark.parametrize("kind", CACHES)
def test_greedy_with_a_cache_is_greedy_without(kind, level):
    model, cache = cached_model(kind)
    tokens = prompts()
    want = greedy(model, tokens, cache=False)
    assert torch.equal(greedy(model, tokens, cache=cache), want)
    assert len(want.unique()) > 5  # a text that repeats one token would prove little
    if cache is not None:
        assert cache.lengths.tolist() == [6 + 11] * 3


@pytest.mark.parametrize("kind", CACHES)
@pytest.mark.parametrize("stops", [(), (3, 7)], ids=["to the end", "stops"])
def test_beams_with_a_cache_are_beams_without(kind, stops):
    model, cache = cached_model(kind)
    options = {"max_new_tokens": 10, "num_beams": 4, "stop_tokens": stops}
    want = generated(model, prompts(), cache=False, **options)
    assert torch.equal(generated(model, prompts(), cache=cache, **options), want)
    assert not torch.equal(want, greedy(model, prompts(), 10, cache=False)[:, : want.shape[1]])


@pytest.mark.parametrize("positions", ["rope", "learned", "sinusoidal", "alibi"])
@pytest.mark.parametrize("kind", ["default", "paged", "without"])
@pytest.mark.parametrize("side", ["right", "left"])
def test_prompts_of_different_lengths_are_each_as_alone(positions, kind, side):
    model = language_model(positions=positions)
    cache = False if kind == "without" else CACHES[kind](model)
    tokens, lengths = prompts(3, 7), torch.tensor([7, 1, 4])
    alone = [greedy(model, tokens[i : i + 1, :n]) for i, n in enumerate(lengths.tolist())]
    padded = torch.full_like(tokens, 30)  # a token like any other
    for i, n in enumerate(lengths.tolist()):
        padded[i, slice(0, n) if side == "right" else slice(7 - n, 7)] = tokens[i, :n]
    where = {"prompt_lengths": lengths} if side == "right" else {"prompt_starts": 7 - lengths}
    assert torch.equal(greedy(model, padded, cache=cache, **where), torch.cat(alone))


def test_a_sliding_window_takes_prompts_of_different_lengths():
    model, cache = cached_model("sliding")
    lengths = [9, 2, 5]
    where = {"prompt_lengths": lengths}
    want = greedy(model, prompts(3, 9), cache=False, **where)
    assert torch.equal(greedy(model, prompts(3, 9), cache=cache, **where), want)


@torch.no_grad()
def test_a_cache_whose_prompts_are_padded_on_the_left_goes_on():
    model = language_model(positions="learned")
    tokens, starts = prompts(3, 7), [0, 3, 6]
    want = greedy(model, tokens, prompt_starts=starts)
    cache = model.make_cache(3, 20)
    cache.starts = starts
    model(tokens[:, :6], cache=cache)
    cache.advance(6)
    assert torch.equal(greedy(model, tokens[:, 6:], cache=cache), want)


def test_a_conversation_goes_on_in_its_cache():
    model = language_model()
    cache = model.make_cache(3, 40)
    first = greedy(model, prompts(), 5, cache=cache)
    more = torch.cat((first[:, -1:], prompts(3, 4, seed=1)), dim=1)
    second = greedy(model, more, 5, cache=cache)
    whole = torch.cat((prompts(), first, prompts(3, 4, seed=1)), dim=1)
    assert torch.equal(second, greedy(model, whole, 5, cache=False))


@torch.no_grad()
def test_int8_rows_give_nearly_the_same_logits():
    model = language_model()
    tokens = prompts(3, 12)
    cache = model.make_cache(3, 12, dtype=torch.int8)
    model(tokens[:, :6], cache=cache)
    cache.advance(6)
    logits = model(tokens[:, 6:], cache=cache)
    want = model(tokens)[:, 6:]
    assert (logits - want).abs().max() < 0.05 * want.abs().max()
    cache = model.make_cache(3, 17, dtype=torch.int8)
    assert greedy(model, prompts(), cache=cache).shape == (3, 12)


@pytest.mark.parametrize("seed", range(4))
def test_beams_that_hold_all_sequences_find_the_best(seed):
    vocab, steps = 5, 3
    model = language_model(vocab=vocab, seed=seed)
    torch.nn.init.normal_(model.head.weight, std=0.1)
    tokens = prompts(2, 4, vocab=vocab)
    every = torch.tensor(list(itertools.product(range(vocab), repeat=steps)))
    best = []
    for prompt in tokens:
        whole = torch.cat((prompt.expand(len(every), -1), every), dim=1)
        logp = model(whole)[:, 3:-1].log_softmax(-1).gather(-1, every.unsqueeze(-1)).sum((1, 2))
        best.append(every[logp.argmax()])
    found = generated(model, tokens, max_new_tokens=steps, num_beams=vocab**steps)
    assert torch.equal(found, torch.stack(best))


@pytest.mark.parametrize("penalty", [0.0, 1.0, 2.5])
@pytest.mark.parametrize("seed", range(4))
def test_beams_with_stops_find_the_best_by_the_formula(seed, penalty):
    vocab, steps, stop = 4, 4, 1
    table = 2 * torch.randn(vocab, vocab, generator=torch.Generator().manual_seed(seed))
    tokens = torch.tensor([[0], [2]])

    def score(start, sequence):
        places = [start, *sequence[:-1]]
        return sum(table[a].log_softmax(-1)[b] for a, b in zip(places, sequence)).item()

    every = []
    for sequence in itertools.product(range(vocab), repeat=steps):
        end = sequence.index(stop) + 1 if stop in sequence else steps
        every.append(sequence[:end])
    found = generated(
        markov(table), tokens, cache=False, max_new_tokens=steps, num_beams=vocab**steps,
        length_penalty=penalty, stop_tokens=stop, pad_token=3,
    )  # fmt: skip
    for start, got in zip(tokens[:, 0].tolist(), found.tolist()):
        best = max(set(every), key=lambda s, a=start: score(a, s) / len(s) ** penalty)
        assert got == [*best, *[3] * (len(got) - len(best))]


def test_a_seed_gives_the_same_text_with_a_cache_and_without():
    model = language_model()

    def text(seed, cache=None):
        drawn = torch.Generator().manual_seed(seed)
        options = {"max_new_tokens": 20, "temperature": 1.5, "generator": drawn, "cache": cache}
        return generated(model, prompts(), **options)

    assert torch.equal(text(0), text(0))
    assert torch.equal(text(0), text(0, cache=False))
    assert not torch.equal(text(0), text(1))
    torch.manual_seed(5)
    one = generated(model, prompts(), max_new_tokens=9)
    torch.manual_seed(5)
    assert torch.equal(one, generated(model, prompts(), max_new_tokens=9))


def counting(vocab=20):
    """The next token is one more than the last; the second best one is two more."""
    table = torch.full((vocab, vocab), -20.0)
    table[torch.arange(vocab), (torch.arange(vocab) + 1) % vocab] = 3.0
    table[torch.arange(vocab), (torch.arange(vocab) + 2) % vocab] = 1.0
    return markov(table)


@pytest.mark.parametrize("beams", [1, 3])
def test_who_has_stopped_yields_padding_until_all_have(beams):
    tokens = torch.tensor([[3], [6], [1]])
    options = {"cache": False, "max_new_tokens": 30, "num_beams": beams, "stop_tokens": [8, 5]}
    if beams == 1:
        options["temperature"] = 0
    found = generated(counting(), tokens, **options, pad_token=19)
    assert found.tolist() == [[4, 5, 19, 19], [7, 8, 19, 19], [2, 3, 4, 5]]
    assert generated(counting(), tokens, **options)[0].tolist() == [4, 5, 8, 8]


@pytest.mark.parametrize("beams", [1, 3])
def test_tokens_come_before_the_end(beams):
    calls = []
    model = counting()
    if beams > 1:
        model = markov(3 * torch.randn(20, 20, generator=torch.Generator().manual_seed(1)))

    def counted(tokens, *, rows):
        calls.append(len(tokens))
        return model(tokens, rows=rows)

    options = {"cache": False, "max_new_tokens": 15, "num_beams": beams}
    if beams == 1:
        options["temperature"] = 0
    steps = generate(counted, torch.tensor([[0]]), **options)
    assert calls == []
    waited = [len(calls) for _ in steps]
    assert len(waited) == 15
    assert waited == sorted(waited)
    assert waited[0] < 8 and waited[7] < 15
    if beams == 1:
        assert waited == list(range(1, 16))


def test_gradients_are_not_recorded_and_their_mode_is_the_callers():
    model = language_model()
    steps = generate(model, prompts(), max_new_tokens=3)
    for _ in steps:
        assert torch.is_grad_enabled()
    assert model(prompts()).requires_grad


@pytest.mark.parametrize("kind", ["contiguous", "paged", "sliding"])
def test_a_compiled_step_is_compiled_once_for_all_lengths(kind):
    torch._dynamo.reset()
    model, cache = cached_model(kind)
    want = greedy(model, prompts(), 24, cache=copy.deepcopy(cache))
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    steps = generate(compiled, prompts(), max_new_tokens=24, temperature=0, cache=cache)
    first = [next(steps), next(steps)]
    compiles = counter.frame_count
    assert compiles == 2  # the prompts, and a token
    tokens = torch.stack(first + list(steps), dim=1)
    assert counter.frame_count == compiles
    assert torch.equal(tokens, want)


def test_a_compiled_step_of_beams_too():
    torch._dynamo.reset()
    model, cache = cached_model("paged")
    options = {"max_new_tokens": 16, "num_beams": 3}
    want = generated(model, prompts(), **options)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    assert torch.equal(generated(compiled, prompts(), cache=cache, **options), want)
    assert counter.frame_count == 2


@pytest.mark.parametrize("lengths", [None, (9, 3, 5)])
def test_an_encoder_decoder_reads_its_context_once(lengths):
    model = language_model(cross=True)
    context = torch.randn(3, 9, 24, generator=torch.Generator().manual_seed(0))
    inputs = {"context": context}
    if lengths is not None:
        inputs["context_lengths"] = torch.tensor(lengths)
    want = greedy(model, prompts(), cache=False, **inputs)
    seen = []
    hook = model.blocks[0].cross_attention.k_proj.register_forward_hook(
        lambda module, args, out: seen.append(args[0].shape)
    )
    assert torch.equal(greedy(model, prompts(), **inputs), want)
    assert seen == [context.shape]
    hook.remove()
    other = greedy(model, prompts(), context=-context)
    assert not torch.equal(other, want)
    options = {"max_new_tokens": 8, "num_beams": 3} | inputs
    beams = generated(model, prompts(), cache=False, **options)
    assert torch.equal(generated(model, prompts(), **options), beams)
    if lengths is not None:  # a row behind the end of a context is not read
        context[1, 3:] = torch.nan
        assert torch.equal(greedy(model, prompts(), **inputs), want)


@torch.no_grad()
def test_a_cross_cache_may_be_the_callers():
    model = language_model(cross=True)
    context = torch.randn(3, 9, 24)
    cross_cache = model.make_cache(3, 9, cross=True)
    model(prompts(), context=context, cross_cache=cross_cache)
    cross_cache.advance(9)
    want = greedy(model, prompts(), context=context)
    assert torch.equal(greedy(model, prompts(), cross_cache=cross_cache), want)
    options = {"max_new_tokens": 8, "num_beams": 3}
    beams = generated(model, prompts(), context=context, **options)
    assert torch.equal(generated(model, prompts(), cross_cache=cross_cache, **options), beams)


def test_a_paged_cache_with_too_few_pages_says_so():
    model = language_model()
    cache = model.make_cache(3, 40, kind=PagedKVCache, page_size=4, pages=7)
    steps = generate(model, prompts(), max_new_tokens=20, cache=cache)
    with pytest.raises(fastattn.nn.OutOfPages, match="free pages"):
        list(steps)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"tokens": [[1, 2]]}, TypeError, "tokens: expected a tensor of dtype int32 or int64"),
        ({"tokens": torch.ones(2, 3)}, TypeError, "tokens: .* got torch.float32"),
        ({"tokens": torch.ones(3, dtype=torch.int64)}, ValueError, "tokens: expected shape"),
        ({"tokens": torch.ones(3, 0, dtype=torch.int64)}, ValueError, "tokens: .* length >= 1"),
        ({"max_new_tokens": 0}, ValueError, "max_new_tokens: .* got 0"),
        ({"max_new_tokens": 2.0}, TypeError, "max_new_tokens: expected an int"),
        ({"temperature": -0.1}, ValueError, "temperature: expected a number >= 0, got -0.1"),
        ({"temperature": math.nan}, ValueError, "temperature"),
        ({"top_k": 0}, ValueError, "top_k: .* got 0"),
        ({"top_p": 0.0}, ValueError, "top_p: expected a number > 0 and <= 1, got 0.0"),
        ({"top_p": 1.1}, ValueError, "top_p"),
        ({"num_beams": 0}, ValueError, "num_beams: .* got 0"),
        ({"num_beams": 2, "temperature": 0}, ValueError, "num_beams: expected 1 with temperature"),
        ({"num_beams": 2, "top_k": 5}, ValueError, "num_beams: expected 1 with"),
        ({"num_beams": 2, "top_p": 0.5}, ValueError, "num_beams: expected 1 with"),
        ({"num_beams": 2, "length_penalty": -1.0}, ValueError, "length_penalty"),
        ({"stop_tokens": [1.5]}, TypeError, "stop_tokens: .*float"),
        ({"stop_tokens": [3, -1]}, ValueError, "stop_tokens: expected numbers >= 0"),
        ({"pad_token": -1}, ValueError, "pad_token: expected a number >= 0, got -1"),
        ({"prompt_lengths": [1, 2]}, ValueError, r"prompt_lengths: expected shape \(3,\)"),
        ({"prompt_lengths": [0, 1, 1]}, ValueError, "prompt_lengths: expected numbers from 1 to 6"),
        ({"prompt_lengths": [7, 1, 1]}, ValueError, "prompt_lengths: expected numbers from 1 to 6"),
        ({"prompt_starts": [6, 0, 0]}, ValueError, "prompt_starts: expected numbers from 0 to 5"),
        ({"prompt_starts": [0] * 3, "prompt_lengths": [1] * 3}, ValueError, "prompt_starts"),
        ({"cache": True}, TypeError, "cache: expected a KVCache, .* got True"),
        ({"cache": KVCache(2, 2, 2, 40, 8)}, ValueError, "cache: expected one for 3 requests, "),
        ({"cache": KVCache(2, 3, 2, 14, 8)}, ValueError, "cache: .* at least 15 rows.* got 14"),
        (
            {"cache": KVCache(2, 3, 2, 13, 8), "prompt_lengths": [5, 1, 2]},
            ValueError,
            "cache: .* at least 14 rows",
        ),
    ],
    ids=str,
)
def test_errors_come_at_once_and_name_the_argument(options, error, message):
    given = {"tokens": prompts(), "max_new_tokens": 10} | options
    with pytest.raises(error, match=message):
        generate(language_model(), **given)
