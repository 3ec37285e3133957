"""Continuous batching: requests join the batch when there is room, and leave it when they end."""

from __future__ import annotations

import random
import time

import torch
from torch import Tensor
from torch.nn.functional import pad

from fastattn import generate
from fastattn.nn import CausalLM, PagedKVCache

Request = tuple[Tensor, int]  # a prompt, and how many tokens are to follow


def rows_of(request: Request) -> int:
    """The rows that a request has in a cache at its end: the last token is never fed back."""
    prompt, count = request
    return len(prompt) + count - 1


@torch.no_grad()
def serve(model: CausalLM, requests: list[Request], cache: PagedKVCache) -> list[Tensor]:
    """The greedy tokens of each request, (count,).

    In turn, a request takes a free place of the cache when the pool has the pages for all that it
    and those which run will need. Each call of the model is packed: the whole prompts of the new
    requests and one token of the others, without padding.
    """
    needed = [-(-rows_of(request) // cache.page_size) for request in requests]
    most = max(needed, default=0)
    if most > cache.pages:
        raise ValueError(f"requests: expected a need of at most {cache.pages} pages, got {most}")
    answers: list[list[int]] = [[] for _ in requests]
    waiting, running = [*range(len(requests))], {}  # numbers of requests, and these by places
    nothing = torch.zeros(0, dtype=torch.int64)
    new = [nothing] * cache.batch
    while waiting or running:
        for place in range(cache.batch):
            taken = sum(needed[number] for number in running.values())
            if waiting and place not in running and taken + needed[waiting[0]] <= cache.pages:
                running[place] = waiting.pop(0)
                new[place] = requests[running[place]][0]
        places = sorted(running)
        counts = torch.tensor([len(tokens) for tokens in new])
        bounds = pad(counts.cumsum(0), (1, 0))
        last = bounds[1:][places] - 1
        logits = model(torch.cat(new), cache=cache, cu_seqlens=bounds, rows=last)
        cache.advance(counts)
        for place, token in zip(places, logits.argmax(-1)):
            answer, count = answers[running[place]], requests[running[place]][1]
            answer.append(token.item())
            new[place] = token.view(1)
            if len(answer) == count:
                cache.free(place)
                del running[place]
                new[place] = nothing
    return [torch.tensor(answer) for answer in answers]


def alone(model: CausalLM, requests: list[Request]) -> list[Tensor]:
    """The same tokens, of one request after another, without a cache."""
    options = {"cache": False, "temperature": 0}
    return [
        torch.cat([*generate(model, prompt.unsqueeze(0), max_new_tokens=count, **options)])
        for prompt, count in requests
    ]


def compare(
    model: CausalLM, pieces: Tensor, cache: PagedKVCache
) -> tuple[Tensor, Tensor, float, float]:
    """The tokens of requests of many lengths, in pages and alone, and the seconds of both."""
    rng, length = random.Random(0), pieces.shape[1]
    requests = [
        (piece[: rng.randrange(length // 8, 3 * length // 4)], rng.randrange(4, length // 4))
        for piece in pieces
    ]
    start = time.perf_counter()
    found = torch.cat(serve(model, requests, cache))
    middle = time.perf_counter()
    want = torch.cat(alone(model, requests))
    return found, want, middle - start, time.perf_counter() - middle
