"""A decoder with its embedding and its head."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from fastattn import functional
from fastattn.nn._nested import is_nested, pack, rows
from fastattn.nn.cache import KVCache, SlidingWindowKVCache
from fastattn.nn.cache.base import BaseCache, require_sizes
from fastattn.nn.linear import Linear
from fastattn.nn.norm import RMSNorm
from fastattn.nn.positions import packed_positions

__all__ = ["CausalLM"]

_Cache = TypeVar("_Cache", bound=BaseCache)
_Rows = int | Tensor


class CausalLM(nn.Module):
    r"""Token embedding, blocks, final norm and head: a language model, or a translator's decoder.

    ::

        x      = dropout(positions(embedding_scale * E[tokens]))
        x      = block(x)                            for each block
        logits = norm(x) W^T                         W = E where they are tied
        logits = logit_softcap * tanh(logits / logit_softcap)           where there is one

    Args:
        vocab_size, embed_dim: the sizes of the embedding E.
        blocks: :class:`TransformerBlock`, or modules called like it, whose attention is causal.
            With ``cross_attention`` they make the decoder of an encoder-decoder model.
        positions: a module that adds positions to the embeddings: :class:`LearnedPositions`,
            :class:`SinusoidalPositions`. None where the attention knows them: RoPE, ALiBi, a bias.
        norm: makes the final norm from embed_dim; RMSNorm by default. ``torch.nn.Identity`` for
            none, as behind blocks with placement "post".
        tied: the head has the weights of the embedding (and no bias).
        head_bias: of a head of its own.
        embedding_scale: sqrt(embed_dim) in the original Transformer and in Gemma.
        logit_softcap: keeps logits between its negative and itself, as Gemma 2.
        dropout: of the embeddings with their positions, in training.

    E, and a head of its own, begin as normal numbers with a standard deviation of 0.02.

    Sources: Vaswani et al., Attention Is All You Need (2017); Press and Wolf, Using the Output
    Embedding to Improve Language Models (2017), for ``tied``.

    >>> from fastattn.nn import Attention, GatedFeedForward, RotaryEmbedding, TransformerBlock
    >>> rope = RotaryEmbedding(16)
    >>> model = CausalLM(
    ...     100,
    ...     64,
    ...     [
    ...         TransformerBlock(
    ...             Attention(64, 4, num_kv_heads=2, causal=True, rope=rope),
    ...             GatedFeedForward(64, 128),
    ...         )
    ...         for _ in range(2)
    ...     ],
    ... )
    >>> tokens = torch.randint(100, (3, 10))
    >>> loss = torch.nn.functional.cross_entropy(model(tokens)[:, :-1].mT, tokens[:, 1:])
    >>> loss.backward()

    and to generate from it, with a cache of its own or with another:

    >>> from fastattn import generate
    >>> from fastattn.nn import PagedKVCache
    >>> new = torch.stack(list(generate(model, tokens, max_new_tokens=5, temperature=0)), dim=1)
    >>> cache = model.make_cache(3, 14, kind=PagedKVCache, page_size=4)
    >>> paged = generate(model, tokens, max_new_tokens=5, temperature=0, cache=cache)
    >>> torch.equal(torch.stack(list(paged), dim=1), new)
    True
    """

    def __init__(
        self,
        vocab_size: int,
        embed_dim: int,
        blocks: Iterable[nn.Module],
        *,
        positions: nn.Module | None = None,
        norm: Callable[[int], nn.Module] | None = None,
        tied: bool = True,
        head_bias: bool = False,
        embedding_scale: float = 1.0,
        logit_softcap: float | None = None,
        dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        require_sizes(vocab_size=vocab_size, embed_dim=embed_dim)
        if tied and head_bias:
            raise ValueError("head_bias: expected False where the head is tied to the embedding")
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.vocab_size = vocab_size
        self.embed_dim = embed_dim
        self.embedding_scale = embedding_scale
        self.logit_softcap = logit_softcap
        self.embedding = nn.Embedding(vocab_size, embed_dim, **factory)
        self.positions = positions
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(blocks)
        self.norm = RMSNorm(embed_dim, eps=1e-6, **factory) if norm is None else norm(embed_dim)
        self.head = None if tied else Linear(embed_dim, vocab_size, bias=head_bias, **factory)
        if not len(self.blocks):
            raise ValueError("blocks: expected at least one")
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Embedding and head anew; the other modules have their own."""
        nn.init.normal_(self.embedding.weight, std=0.02)
        if self.head is not None:
            nn.init.normal_(self.head.weight, std=0.02)
            if self.head.bias is not None:
                nn.init.zeros_(self.head.bias)

    def forward(
        self,
        tokens: Tensor,
        *,
        cache: BaseCache | None = None,
        positions: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        context: Tensor | None = None,
        rows: _Rows | None = None,
        **block_options: Any,
    ) -> Tensor:
        r"""The logits of the next token.

        Args:
            tokens: (batch, length); packed (total) with cu_seqlens; or jagged nested.
            cache: holds what came before the tokens, and gets their keys and values. Its lengths
                stay as they are: ``cache.advance`` is the caller's, once behind each call.
            positions: (batch, length) or (length), packed (total); by default they count from 0, or
                from the lengths of the cache.
            cu_seqlens: (batch + 1), the bounds of packed sequences.
            context: (batch, context length, context_dim), what cross-attention reads. With
                ``cross_cache`` it is given once, and kept there; its ``advance`` is the caller's.
            rows: the only rows whose logits are wanted, as the head is dear for a whole prompt: one
                of each request, an integer (-1: the last) or (batch,); packed, any, (n,).
            block_options: of every block: ``query_lengths``, ``mask``, ``context_lengths``,
                ``context_mask``, ``cross_cache``, ...

        Returns:
            (batch, length, vocab_size), packed (total, vocab_size), nested as tokens are; with rows
            (batch, vocab_size), packed (n, vocab_size).
        """
        if is_nested("tokens", tokens):
            unwanted = {
                "cache": cache,
                "positions": positions,
                "cu_seqlens": cu_seqlens,
                "rows": rows,
            }
            return self._of_nested(tokens, context, unwanted | block_options)
        dims = 1 if cu_seqlens is not None else 2
        if tokens.dim() != dims:
            shape = "(total,) with cu_seqlens" if dims == 1 else "(batch, length)"
            raise ValueError(f"tokens: expected shape {shape}, got {tuple(tokens.shape)}")
        x = self.embedding(tokens)
        if self.embedding_scale != 1.0:
            x = x * self.embedding_scale
        if self.positions is not None:
            if positions is None:
                positions = _default_positions(tokens, cache, cu_seqlens)
            x = self.positions(x, positions=positions)
        x = self.dropout(x)
        for layer, block in enumerate(self.blocks):
            x = block(
                *(x, context),
                cache=cache,
                layer=layer,
                positions=positions if self.positions is None else None,
                cu_seqlens=cu_seqlens,
                **block_options,
            )
        if rows is not None:
            x = _chosen(x, rows)
        return self._logits(self.norm(x))

    def make_cache(
        self,
        batch: int,
        capacity: int | None = None,
        kind: Callable[..., _Cache] = KVCache,  # type: ignore[assignment]
        *,
        cross: bool = False,
        **options: Any,
    ) -> _Cache:
        """An empty cache for all blocks, in the dtype and on the device of their keys.

        Args:
            capacity: the most rows of a request; a SlidingWindowKVCache has its window instead.
            kind: KVCache, SlidingWindowKVCache or PagedKVCache.
            cross: for ``cross_cache``.
            options: further arguments of ``kind``, such as dtype=torch.int8 or page_size.
        """
        name = "cross_attention" if cross else "attention"
        layers = [getattr(block, name, None) for block in self.blocks]
        attention: Any = next((x for x in layers if x is not None), None)
        if attention is None:
            raise ValueError(f"cross: expected blocks with {name}, got none")
        shapes = {(x.num_kv_heads, x.head_dim, x.value_head_dim) for x in layers if x is not None}
        if len(shapes) > 1:
            raise ValueError(f"blocks: expected the same heads in all for one cache, got {shapes}")
        weight = attention.k_proj.weight
        options = {
            "head_dim": attention.head_dim,
            "value_head_dim": attention.value_head_dim,
            "dtype": weight.dtype,
            "device": weight.device,
        } | options
        if kind is SlidingWindowKVCache:
            options.setdefault("window", attention.window and attention.window[0])
        else:
            options["capacity"] = capacity
        return kind(len(layers), batch, attention.num_kv_heads, **options)

    def extra_repr(self) -> str:
        given = "" if self.head is not None else "tied=True"
        if self.embedding_scale != 1.0:
            given += f", embedding_scale={self.embedding_scale}"
        if self.logit_softcap is not None:
            given += f", logit_softcap={self.logit_softcap}"
        return given.removeprefix(", ")

    def _logits(self, x: Tensor) -> Tensor:
        if self.head is None:
            logits = functional.linear(x, self.embedding.weight)
        else:
            logits = self.head(x)
        if self.logit_softcap is None:
            return logits
        return self.logit_softcap * torch.tanh(logits / self.logit_softcap)

    def _of_nested(
        self, tokens: Tensor, context: Tensor | None, unwanted: dict[str, Any]
    ) -> Tensor:
        """On packed rows, so that nothing is ever padded."""
        for name, value in unwanted.items():
            if value is not None:
                raise ValueError(f"{name}: expected None with nested tokens, got another")
        packed, bounds = rows(tokens)
        options: dict[str, Any] = {"cu_seqlens": bounds}
        if context is not None:
            if not is_nested("context", context):
                raise ValueError(
                    "context: expected a nested tensor, as tokens are, got a dense one"
                )
            options["context"], options["context_cu_seqlens"] = rows(context)
        return pack(self(packed, **options), like=tokens)


def _default_positions(
    tokens: Tensor, cache: BaseCache | None, cu_seqlens: Tensor | None
) -> Tensor | None:
    """Counted from the lengths of the cache, less what pads its prompts on the left."""
    if cache is None:
        return None if cu_seqlens is None else packed_positions(cu_seqlens, len(tokens))
    before = cache.lengths if cache.starts is None else cache.lengths - cache.starts
    row = torch.arange(tokens.shape[-1], device=tokens.device)
    if cu_seqlens is None:
        counted = before.unsqueeze(-1) + row
    else:
        request = torch.searchsorted(cu_seqlens[1:], row, right=True)
        counted = before[request.clamp(max=cache.batch - 1)] + packed_positions(
            cu_seqlens, len(row)
        )
    return counted.clamp(min=0)


def _chosen(x: Tensor, rows: _Rows) -> Tensor:
    if isinstance(rows, int):
        return x[..., rows, :]
    if x.dim() == 2:
        return x[rows]
    return x[torch.arange(len(x), device=x.device), rows]
