"""The calls of a model that generation makes: the prompts once, and then a token at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from fastattn.nn.cache import PagedKVCache
from fastattn.nn.cache.contiguous import ContiguousCache

__all__ = ["Cache", "CachedSteps", "Model", "Steps", "WholeSteps"]

Inputs = dict[str, Any]
Model = Callable[..., Tensor]
Cache = ContiguousCache | PagedKVCache


class Steps(Protocol):
    """Logits (requests, vocabulary) behind the tokens of each request."""

    def prompt(self) -> Tensor:
        """Behind the prompts."""
        ...

    def step(self, tokens: Tensor) -> Tensor:
        """Behind one more token of each request, (requests,)."""
        ...

    def choose(self, index: Tensor) -> None:
        """Request i becomes what index[i] was; there may be more of them than before."""
        ...


class WholeSteps:
    """Without a cache: all tokens, each time."""

    def __init__(
        self, model: Model, tokens: Tensor, lengths: Tensor | None, inputs: Inputs
    ) -> None:
        batch, length = tokens.shape
        self._model, self._tokens, self._inputs = model, tokens, inputs
        self._lengths = tokens.new_full((batch,), length) if lengths is None else lengths

    def prompt(self) -> Tensor:
        return self._model(self._tokens, rows=self._lengths - 1, **self._inputs)

    def step(self, tokens: Tensor) -> Tensor:
        self._tokens = torch.nn.functional.pad(self._tokens, (0, 1))
        self._tokens[torch.arange(len(tokens), device=tokens.device), self._lengths] = tokens
        self._lengths = self._lengths + 1
        return self.prompt()

    def choose(self, index: Tensor) -> None:
        if len(index) != len(self._tokens):
            self._inputs = _chosen(self._inputs, index, len(self._tokens))
        self._tokens, self._lengths = self._tokens[index], self._lengths[index]


class CachedSteps:
    """With a cache: each token once, and the keys and values of a context once."""

    def __init__(
        self,
        model: Model,
        cache: Cache,
        tokens: Tensor,
        lengths: Tensor | None,
        inputs: Inputs,
    ) -> None:
        self._model, self._cache = model, cache
        self._tokens, self._lengths = tokens, lengths
        self._inputs = dict(inputs)

    def prompt(self) -> Tensor:
        context, context_lengths = (
            self._inputs.pop(name, None) for name in ("context", "context_lengths")
        )
        options: Inputs = {"rows": -1}
        if self._lengths is not None:
            options = {"rows": self._lengths - 1, "query_lengths": self._lengths}
        if context is not None:
            model: Any = self._model
            cross_cache = model.make_cache(len(context), context.shape[1], cross=True)
            self._inputs["cross_cache"] = cross_cache
            options |= {"context": context, "context_lengths": context_lengths}
        rows = self._tokens.shape[1] if self._lengths is None else self._lengths
        logits = self._run(self._tokens, rows, options)
        if context is not None:
            cross_cache.advance(context.shape[1] if context_lengths is None else context_lengths)
        return logits

    def step(self, tokens: Tensor) -> Tensor:
        return self._run(tokens.unsqueeze(1), 1, {"rows": -1})

    def choose(self, index: Tensor) -> None:
        if len(index) == self._cache.batch:
            self._cache.reorder(index)  # the others are the same for all beams of a request
            return
        self._inputs = _chosen(self._inputs, index, self._cache.batch)
        self._cache.select(index)

    def _run(self, tokens: Tensor, rows: int | Tensor, options: Inputs) -> Tensor:
        if isinstance(self._cache, PagedKVCache):
            self._cache.reserve(rows)  # a compiled model cannot
        logits = self._model(tokens, cache=self._cache, **options, **self._inputs)
        self._cache.advance(rows)
        return logits


def _chosen(inputs: Inputs, index: Tensor, batch: int) -> Inputs:
    """The inputs of these requests."""

    def chosen(value: Any) -> Any:
        if isinstance(value, Cache):
            value.select(index)
        elif isinstance(value, Tensor) and value.dim() and value.shape[0] == batch:
            return value[index]
        return value

    return {name: chosen(value) for name, value in inputs.items()}
