"""Beam search, which gives out tokens as soon as they are settled."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from fastattn.generation.steps import Steps

__all__ = ["search"]


class _Finished:
    """The best finished sequence of each request so far."""

    def __init__(self, batch: int, length: int, pad_token: int, device: torch.device) -> None:
        self.scores = torch.full((batch,), -math.inf, device=device)
        self.lengths = torch.zeros(batch, dtype=torch.int64, device=device)
        self.tokens = torch.full((batch, length), pad_token, device=device)
        self._pad_token = pad_token

    def consider(self, scores: Tensor, sequences: Tensor) -> None:
        """scores (batch, n) of the finished ones among sequences (batch, n, length), or -inf."""
        score, number = scores.max(-1)
        length = sequences.shape[-1]
        chosen = sequences[torch.arange(len(number), device=number.device), number]
        chosen = torch.nn.functional.pad(
            chosen, (0, self.tokens.shape[1] - length), value=self._pad_token
        )
        better = score > self.scores
        self.scores = torch.where(better, score, self.scores)
        self.lengths = torch.where(better, length, self.lengths)
        self.tokens = torch.where(better.unsqueeze(-1), chosen, self.tokens)


@torch.no_grad()
def search(
    steps: Steps,
    *,
    batch: int,
    num_beams: int,
    max_new_tokens: int,
    length_penalty: float,
    stop_tokens: Tensor,
    pad_token: int,
) -> Iterator[Tensor]:
    """The tokens (batch,) of the best sequence found of each request; see ``generate``."""
    logits = steps.prompt()
    device = logits.device
    stop_tokens = stop_tokens[stop_tokens < logits.shape[-1]]
    first = torch.arange(batch, device=device).unsqueeze(-1) * num_beams
    copies = torch.arange(batch, device=device).repeat_interleave(num_beams)
    steps.choose(copies)
    logits = logits[copies]
    scores = torch.full((batch, num_beams), -math.inf, device=device)
    scores[:, 0] = 0.0
    sequences = torch.empty((batch, num_beams, 0), dtype=torch.int64, device=device)
    finished = _Finished(batch, max_new_tokens, pad_token, device)
    given = 0
    for length in range(1, max_new_tokens + 1):
        sums = scores.unsqueeze(-1) + logits.float().log_softmax(-1).view(batch, num_beams, -1)
        if len(stop_tokens):
            best, parents, tokens = _best(sums, num_beams)
            stopped = torch.isin(tokens, stop_tokens)
            final = torch.where(stopped, best / length**length_penalty, -math.inf)
            finished.consider(final, _extended(sequences, parents, tokens))
            sums[:, :, stop_tokens] = -math.inf
        scores, parents, tokens = _best(sums, num_beams)
        sequences = _extended(sequences, parents, tokens)
        if length == max_new_tokens:
            finished.consider(scores / length**length_penalty, sequences)
            break
        # No sum ever grows: this is the best that a beam can still come to.
        bound = scores / max_new_tokens**length_penalty
        scores = scores.masked_fill(bound <= finished.scores.unsqueeze(-1), -math.inf)
        if bool((scores == -math.inf).all()):
            break
        while given < length and _is_settled(given, sequences, scores, finished):
            yield _leaders(given, sequences, scores, finished)
            given += 1
        index = (first + parents).flatten()
        if not torch.equal(parents, torch.arange(num_beams, device=device).expand_as(parents)):
            steps.choose(index)
        logits = steps.step(tokens.flatten())
    longest = int(finished.lengths.max()) if batch else 0
    yield from finished.tokens[:, given:longest].unbind(-1)


def _best(sums: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """The largest of sums (batch, beams, vocabulary): they, their beams and their tokens."""
    best, index = sums.flatten(1).topk(count)
    vocabulary = sums.shape[-1]
    return best, index // vocabulary, index % vocabulary


def _extended(sequences: Tensor, parents: Tensor, tokens: Tensor) -> Tensor:
    parents = parents.unsqueeze(-1).expand(-1, -1, sequences.shape[-1])
    return torch.cat((sequences.gather(1, parents), tokens.unsqueeze(-1)), -1)


def _leaders(place: int, sequences: Tensor, scores: Tensor, finished: _Finished) -> Tensor:
    """The token at this place in the best beam of each request, or else in what is finished."""
    alive = scores[:, 0] > -math.inf
    return torch.where(alive, sequences[:, 0, place], finished.tokens[:, place])


def _is_settled(place: int, sequences: Tensor, scores: Tensor, finished: _Finished) -> bool:
    """Whether all sequences of a request that can still win have the same token at this place."""
    leader = _leaders(place, sequences, scores, finished)
    agree = (sequences[:, :, place] == leader.unsqueeze(-1)) | (scores == -math.inf)
    also = (finished.tokens[:, place] == leader) | (finished.scores == -math.inf)
    return bool((agree.all(-1) & also).all())
