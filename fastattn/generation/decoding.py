"""The public function: its checks, and sampling; beams are next door."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastattn.generation.beam_search import search
from fastattn.generation.sampling import draw
from fastattn.generation.steps import Cache, CachedSteps, Model, Steps, WholeSteps
from fastattn.nn.cache import SlidingWindowKVCache
from fastattn.nn.cache.base import integers, require, require_sizes

__all__ = ["generate"]


def generate(
    model: Model,
    tokens: Tensor,
    *,
    max_new_tokens: int,
    cache: Cache | bool | None = None,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    num_beams: int = 1,
    length_penalty: float = 1.0,
    stop_tokens: int | Sequence[int] | Tensor = (),
    pad_token: int | None = None,
    generator: torch.Generator | None = None,
    prompt_lengths: Sequence[int] | Tensor | None = None,
    prompt_starts: Sequence[int] | Tensor | None = None,
    **model_inputs: Any,
) -> Iterator[Tensor]:
    r"""Continues prompts: an iterator of the next token of every request, (batch,) int64.

    ::

        p(t)     = softmax(logits / temperature)_t           logits and all that follows in float32
        top_k    = the k most probable tokens alone
        top_p    = of these, the fewest that together have a probability >= top_p; at least one
        token    ~ p over what is left, renormalised

        beams    : sum of log p(t) over the new tokens, divided by their number ** length_penalty

    Tokens come as soon as they are known. Where some are equally probable, the lower ones count as
    the more probable. Gradients are not recorded. Dropout is as the model has it: ``model.eval()``
    is the caller's.

    With beams, each step keeps the num_beams best sequences that go on; of those among the best
    that ended, the best one is remembered. A token is yielded once it is settled, which is when all
    sequences that can still win have it: often in groups, some steps after it was first considered.

    On CUDA the host waits for the GPU once a token where there are stop_tokens, top_p or beams, and
    never else once the prompts are read.

    Args:
        model: a :class:`fastattn.nn.CausalLM`, also compiled, or what is called like it:
            ``model(tokens, cache=cache, rows=rows, **model_inputs)`` gives logits (batch,
            vocabulary) behind the row ``rows``, -1 or (batch,), of each request. With
            ``prompt_lengths`` or ``prompt_starts`` a cached call for the prompts also has
            ``query_lengths``. Without a cache it is ``model(tokens, rows=rows, **model_inputs)``.
        tokens: the prompts, (batch, length), at least one token each.
        max_new_tokens: the most tokens to yield.
        cache: None makes a KVCache with just the rows that are needed, by ``model.make_cache``. Any
            other cache for as many requests may be given; the prompts continue what it holds, and
            afterwards it holds everything but the last token. With beams it has batch * num_beams
            requests from the first step on (``select``). False: without a cache, the whole
            sequences in each step.
        temperature: 0 takes the most probable token.
        top_k: how many tokens may be drawn from; None: all.
        top_p: the probability that those which may be drawn from must have; None: 1.
        num_beams: the width of a beam search, in which nothing is drawn.
        length_penalty: of beams, >= 0. With 0 the most probable sequence wins; the larger, the more
            long ones are favoured.
        stop_tokens: a request is finished when it has yielded one of these. From then on it yields
            pad_token; when all are finished, nothing more.
        pad_token: by default the first of stop_tokens.
        generator: what random numbers are taken from, one for each request and step.
        prompt_lengths: (batch,), of prompts that are padded on the right.
        prompt_starts: (batch,), the first token of prompts that are padded on the left.
        model_inputs: for every call of the model. Tensors with ``batch`` rows are repeated for
            beams. ``context`` and ``context_lengths`` are given once: with a cache, the keys and
            values that cross-attention makes of them are kept in one too.

    Raises:
        TypeError, ValueError: naming the argument; here, and not when the first token is asked for.
        OutOfPages: while tokens are taken, by a paged cache whose pool is too small.

    Sources: Holtzman et al., The Curious Case of Neural Text Degeneration (2020), for top_p; Fan et
    al., Hierarchical Neural Story Generation (2018), for top_k.

    A model of random weights, greedily and by lot; :class:`fastattn.nn.CausalLM` has the model:

    >>> def model(tokens, rows):  # the next token is one more than the last, or two
    ...     last = tokens.gather(1, torch.as_tensor(rows).view(-1, 1)).squeeze(1)
    ...     one = torch.nn.functional.one_hot((last + 1) % 10, 10)
    ...     return 2.0 * one + torch.nn.functional.one_hot((last + 2) % 10, 10) - 50.0 * (one == 0)
    >>> prompts = torch.tensor([[3], [7]])
    >>> steps = generate(model, prompts, cache=False, max_new_tokens=4, temperature=0)
    >>> torch.stack(list(steps), dim=1)
    tensor([[4, 5, 6, 7],
            [8, 9, 0, 1]])
    >>> greedy = {"cache": False, "temperature": 0, "stop_tokens": 9}
    >>> steps = generate(model, prompts, max_new_tokens=9, **greedy)
    >>> torch.stack(list(steps), dim=1)
    tensor([[4, 5, 6, 7, 8, 9],
            [8, 9, 9, 9, 9, 9]])
    """
    _check_tokens(tokens)
    _check_choice(temperature, top_k, top_p, num_beams, length_penalty)
    require_sizes(max_new_tokens=max_new_tokens)
    batch, device = len(tokens), tokens.device
    stops = integers("stop_tokens", stop_tokens, device).to(torch.int64).reshape(-1)
    require((stops >= 0).all(), "stop_tokens: expected numbers >= 0")
    if pad_token is None:
        pad_token = int(stops[0]) if len(stops) else 0
    require_sizes(pad_token=pad_token, least=0)
    tokens, lengths = _prompts(tokens.long(), prompt_lengths, prompt_starts)
    steps: Steps
    if cache is False:
        steps = WholeSteps(model, tokens, lengths, model_inputs)
    else:
        rows = max_new_tokens - 1 + (tokens.shape[1] if lengths is None else lengths)
        used = _cache_for(model, cache, batch, rows)
        steps = CachedSteps(model, used, tokens, lengths, model_inputs)
    if num_beams > 1:
        return search(
            steps,
            batch=batch,
            num_beams=num_beams,
            max_new_tokens=max_new_tokens,
            length_penalty=length_penalty,
            stop_tokens=stops,
            pad_token=pad_token,
        )
    choose = partial(draw, temperature=temperature, top_k=top_k, top_p=top_p, generator=generator)
    return _single(steps, choose, max_new_tokens, stops, pad_token)


@torch.no_grad()
def _single(
    steps: Steps,
    choose: Callable[[Tensor], Tensor],
    max_new_tokens: int,
    stop_tokens: Tensor,
    pad_token: int,
) -> Iterator[Tensor]:
    tokens = choose(steps.prompt())
    finished = torch.zeros_like(tokens, dtype=torch.bool)
    for left in range(max_new_tokens, 0, -1):
        yield tokens
        if len(stop_tokens):
            finished |= torch.isin(tokens, stop_tokens)
            if bool(finished.all()):
                return
        if left > 1:
            tokens = choose(steps.step(tokens)).masked_fill(finished, pad_token)


def _prompts(
    tokens: Tensor,
    lengths: Sequence[int] | Tensor | None,
    starts: Sequence[int] | Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """The prompts as they are or padded on the right, then with their lengths."""
    batch, longest = tokens.shape
    if lengths is not None and starts is not None:
        raise ValueError("prompt_starts: expected None where prompt_lengths are given")
    if lengths is None and starts is None:
        return tokens, None
    name, given = ("prompt_starts", starts) if lengths is None else ("prompt_lengths", lengths)
    assert given is not None
    numbers = integers(name, given, tokens.device)
    if numbers.shape != (batch,):
        raise ValueError(f"{name}: expected shape ({batch},), got {tuple(numbers.shape)}")
    least, most = (0, longest - 1) if lengths is None else (1, longest)
    inside = ((numbers >= least) & (numbers <= most)).all()
    require(inside, f"{name}: expected numbers from {least} to {most}")
    if lengths is not None:
        return tokens, numbers
    places = torch.arange(longest, device=tokens.device) + numbers.unsqueeze(-1)
    return tokens.gather(1, places.clamp(max=longest - 1)), longest - numbers


def _cache_for(model: Any, cache: Cache | bool | None, batch: int, rows: int | Tensor) -> Cache:
    """The cache for so many more rows of each request, checked."""
    if cache is None:
        capacity = rows if isinstance(rows, int) else int(rows.max())
        made: Cache = model.make_cache(batch, capacity)
        return made
    if not isinstance(cache, Cache):
        raise TypeError(
            "cache: expected a KVCache, a SlidingWindowKVCache, a PagedKVCache, False or None, got "
            f"{cache!r}"
        )
    if cache.batch != batch:
        raise ValueError(f"cache: expected one for {batch} requests, got {cache.batch}")
    if not isinstance(cache, SlidingWindowKVCache):
        _check_capacity(cache, rows)
    return cache


def _check_capacity(cache: Any, rows: int | Tensor) -> None:
    needed = int((cache.lengths + rows).max()) if cache.batch else 0
    if needed > cache.capacity:
        raise ValueError(
            f"cache: expected a capacity of at least {needed} rows for what it holds, the prompts "
            f"and max_new_tokens - 1 tokens, got {cache.capacity} (grow)"
        )


def _check_tokens(tokens: Tensor) -> None:
    if not isinstance(tokens, Tensor) or tokens.dtype not in (torch.int32, torch.int64):
        given = tokens.dtype if isinstance(tokens, Tensor) else type(tokens).__name__
        raise TypeError(f"tokens: expected a tensor of dtype int32 or int64, got {given}")
    if tokens.dim() != 2 or tokens.shape[1] == 0:
        raise ValueError(
            f"tokens: expected shape (batch, length) with length >= 1, got {tuple(tokens.shape)}"
        )


def _check_choice(
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    num_beams: int,
    length_penalty: float,
) -> None:
    if not 0 <= temperature < math.inf:
        raise ValueError(f"temperature: expected a number >= 0, got {temperature}")
    if top_k is not None:
        require_sizes(top_k=top_k)
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p: expected a number > 0 and <= 1, got {top_p}")
    require_sizes(num_beams=num_beams)
    if not 0 <= length_penalty < math.inf:
        raise ValueError(f"length_penalty: expected a number >= 0, got {length_penalty}")
    if num_beams > 1 and (temperature != 1 or top_k is not None or top_p not in (None, 1)):
        raise ValueError(
            "num_beams: expected 1 with temperature, top_k or top_p (with beams nothing is drawn), "
            f"got {num_beams}"
        )
