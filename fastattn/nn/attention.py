"""The attention sublayer of any transformer: projections, positions, caches."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastattn import functional
from fastattn.functional._arguments import Window
from fastattn.nn._attention_call import (
    Cache,
    Given,
    QKNorm,
    as_in,
    default_head_dim,
    layer_in,
    longest,
    make_norm,
    masked_to_lengths,
    require_rows,
)
from fastattn.nn._nested import is_nested, pack, rows
from fastattn.nn.cache import SlidingWindowKVCache
from fastattn.nn.cache.base import require_sizes
from fastattn.nn.linear import Linear
from fastattn.nn.positions import ALiBi, RotaryEmbedding, packed_positions

__all__ = ["Attention"]


class Attention(nn.Module):
    r"""The attention sublayer of most transformers, dense, packed, nested or with a cache.

    ::

        q, k, v = q_norm(q_proj(x)), k_norm(k_proj(context)), v_proj(context)    context: x if None
        q, k    = rope(q), rope(k)
        a       = attention(q, k, v, causal, window, mask, bias, ...)
        out     = o_proj(a)                        o_proj(a * sigmoid(gate_proj(x))) with gate

    with :func:`fastattn.functional.attention` over heads that are views of the projections. Which
    family needs what::

        Llama, Mistral, Qwen 2      num_kv_heads, causal, rope, window, bias=True, out_bias=False
        Qwen 3, Gemma 3, OLMo 2     qk_norm="rms"; qk_norm_over="projection" for OLMo 2
        Gemma 2, gpt-oss            head_dim, softcap, scale; sinks
        BLOOM, MPT                  alibi
        T5                          relative_bias=T5RelativeBias(...), scale=1.0
        Swin, BEiT                  relative_bias=RelativeBias2d(...), windows as a batch dimension
        AlphaFold                   bias= of the call, (batch, 1, heads, n, n); gate, out_bias=True

    Args:
        embed_dim: of x, and of out.
        num_heads, num_kv_heads: num_kv_heads divides num_heads, and is num_heads by default.
        head_dim, value_head_dim: embed_dim / num_heads, and head_dim, by default.
        context_dim: of the context, by default embed_dim.
        causal: whether a query sees no key behind its own position.
        window: (left, right), how many keys besides its own a query sees; None is unlimited.
        rope: a :class:`RotaryEmbedding`, which may be shared by all layers.
        alibi: whether the scores have linear biases.
        relative_bias: a module called with (query_length, key_length, query_offset=...), whose
            result, (1, heads, queries, keys), is added to the scores.
        qk_norm: "rms" (RMSNorm), "layer" (LayerNorm), or a function from the size to a module.
        qk_norm_over: "head": of each head over head_dim. "projection": of all heads together.
        softcap: of the scores: softcap * tanh(scores / softcap).
        sinks: whether each head has a learned logit that joins the softmax and no value
            (parameter ``sinks``, (num_heads), zeros at first).
        gate: whether the output of each head is gated by the sigmoid of a projection of x.
        scale: of the scores, 1 / sqrt(head_dim) by default.
        dropout: of the attention weights, in training.
        bias: of q_proj, k_proj and v_proj: one bool, or three.
        out_bias: of o_proj and gate_proj; by default as q_proj.

    Source: Vaswani et al., Attention Is All You Need (2017); Ainslie et al., GQA (2023).

    >>> rope = RotaryEmbedding(8)
    >>> attention = Attention(32, 4, num_kv_heads=2, causal=True, rope=rope)
    >>> x = torch.randn(2, 6, 32)
    >>> out = attention(x)

    The same with a cache, a prompt of five rows and then one more:

    >>> from fastattn.nn import KVCache
    >>> cache = KVCache(num_layers=1, batch=2, kv_heads=2, capacity=16, head_dim=8)
    >>> with torch.no_grad():
    ...     prompt = attention(x[:, :5], cache=cache)
    ...     cache.advance(5)
    ...     step = attention(x[:, 5:], cache=cache)
    >>> torch.testing.assert_close(torch.cat((prompt, step), dim=1), out)
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        value_head_dim: int | None = None,
        context_dim: int | None = None,
        causal: bool = False,
        window: Window | None = None,
        rope: RotaryEmbedding | None = None,
        alibi: bool = False,
        relative_bias: nn.Module | None = None,
        qk_norm: QKNorm | None = None,
        qk_norm_over: str = "head",
        softcap: float | None = None,
        sinks: bool = False,
        gate: bool = False,
        scale: float | None = None,
        dropout: float = 0.0,
        bias: bool | tuple[bool, bool, bool] = False,
        out_bias: bool | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        require_sizes(embed_dim=embed_dim, num_heads=num_heads)
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        head_dim = default_head_dim(embed_dim, num_heads) if head_dim is None else head_dim
        value_head_dim = head_dim if value_head_dim is None else value_head_dim
        context_dim = embed_dim if context_dim is None else context_dim
        require_sizes(
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            value_head_dim=value_head_dim,
            context_dim=context_dim,
        )
        if num_heads % num_kv_heads:
            raise ValueError(f"num_kv_heads: expected a divisor of {num_heads}, got {num_kv_heads}")
        if not isinstance(causal, bool):
            raise TypeError(f"causal: expected a bool, got {type(causal).__name__}")
        if not 0.0 <= dropout <= 1.0:
            raise ValueError(f"dropout: expected a probability from 0 to 1, got {dropout}")
        if rope is not None and rope.rotary_dim > head_dim:
            raise ValueError(
                f"rope: expected a rotary_dim of at most head_dim, {head_dim}, got "
                f"{rope.rotary_dim}"
            )
        if qk_norm_over not in ("head", "projection"):
            raise ValueError(f"qk_norm_over: expected 'head' or 'projection', got {qk_norm_over!r}")
        q_bias, k_bias, v_bias = (bias,) * 3 if isinstance(bias, bool) else bias
        out_bias = q_bias if out_bias is None else out_bias

        self.embed_dim = embed_dim
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads
        self.head_dim = head_dim
        self.value_head_dim = value_head_dim
        self.context_dim = context_dim
        self.causal = causal
        self.window = window
        self.softcap = softcap
        self.scale = scale
        self.dropout = dropout
        self.qk_norm_over = qk_norm_over

        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        q_dim, k_dim = num_heads * head_dim, num_kv_heads * head_dim
        out_dim = num_heads * value_head_dim
        self.q_proj = Linear(embed_dim, q_dim, bias=q_bias, **factory)
        self.k_proj = Linear(context_dim, k_dim, bias=k_bias, **factory)
        self.v_proj = Linear(context_dim, num_kv_heads * value_head_dim, bias=v_bias, **factory)
        self.o_proj = Linear(out_dim, embed_dim, bias=out_bias, **factory)
        self.gate_proj = Linear(embed_dim, out_dim, bias=out_bias, **factory) if gate else None
        per_head = qk_norm_over == "head"
        self.q_norm = make_norm(qk_norm, head_dim if per_head else q_dim, factory)
        self.k_norm = make_norm(qk_norm, head_dim if per_head else k_dim, factory)
        self.rope = rope
        self.relative_bias = relative_bias
        self.alibi = ALiBi(num_heads, device=device) if alibi else None
        self.sinks = nn.Parameter(torch.zeros(num_heads, **factory)) if sinks else None

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        *,
        mask: Tensor | None = None,
        bias: Tensor | None = None,
        query_lengths: Tensor | None = None,
        key_lengths: Tensor | None = None,
        positions: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        context_cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        cache: Cache | None = None,
        layer: int | None = None,
    ) -> Tensor:
        r"""
        Args:
            x: (\*batch, length, embed_dim), any leading dimensions; or packed, (rows, embed_dim),
                beside cu_seqlens; or a jagged nested tensor.
            context: the rows that keys and values come from, for cross-attention; in the form of
                x: (\*batch, context length, context_dim), packed or nested.
            mask: boolean, True = attend; broadcasts to (\*batch, heads, length, keys).
            bias: added to the scores; broadcasts as mask does; differentiable.
            query_lengths, key_lengths: (\*batch), the valid rows of x and of the keys.
            positions: of the rows of x, for rope: (length) or (\*batch, length); (rows) if packed.
                By default they count from 0 in each sequence, or from where its cache stands.
            cu_seqlens: (sequences + 1), the bounds of packed rows.
            context_cu_seqlens: those of a packed context.
            max_seqlen: at least the longest packed sequence, of x and of context. It spares the
                host a look at cu_seqlens, which only some options need.
            cache: a :class:`KVCache` or another. Keys and values of x are written behind its rows,
                and x attends to all of them; advance it when all layers have done so. mask and bias
                then have a column for each row of its capacity, and key_lengths is for a context.

                Where context is given, its keys and values go into the cache, and are attended as
                ever: advance the cache by their number, and in later calls leave context out. An
                attention that is not causal reads its cache and writes nothing when there is no
                context.
            layer: the place of this layer in the cache.

        Returns:
            The shape of x. A row that sees no key gives o_proj of zeros.

        Raises:
            TypeError, ValueError: naming the argument.
        """
        given = Given(
            *(mask, bias, query_lengths, key_lengths),
            *(positions, cu_seqlens, context_cu_seqlens, max_seqlen),
        )
        if is_nested("x", x):
            return self._of_nested(x, context, given, cache)
        self._require(x, context, given)
        query = self._heads(self.q_proj(x), self.num_heads, self.head_dim, self.q_norm)
        if cache is not None and context is None:
            attended = self._attend_cache(x, query, given, cache, layer_in(cache, layer))
        else:
            key, value = self._keys_and_values(x if context is None else context)
            if self.rope is not None:
                query, key = self._rotated(query, key, given)
            if cache is not None:
                self._fill(cache, layer_in(cache, layer), key, value, given)
            attended = self._attend(query, key, value, given, crossing=context is not None)
        out = attended.flatten(-2)
        if self.gate_proj is not None:
            out = out * self.gate_proj(x).sigmoid()
        projected: Tensor = self.o_proj(out)
        return projected

    def _keys_and_values(self, source: Tensor) -> tuple[Tensor, Tensor]:
        key = self._heads(self.k_proj(source), self.num_kv_heads, self.head_dim, self.k_norm)
        value = self._heads(self.v_proj(source), self.num_kv_heads, self.value_head_dim)
        return key, value

    def _heads(
        self, projected: Tensor, heads: int, head_dim: int, norm: nn.Module | None = None
    ) -> Tensor:
        """(*, length, heads, head_dim): a view of the projection, or what the norm makes of it."""
        if norm is not None and self.qk_norm_over == "projection":
            projected = norm(projected)
        parts = projected.view(*projected.shape[:-1], heads, head_dim)
        if norm is not None and self.qk_norm_over == "head":
            parts = norm(parts)
        return parts

    def _rotated(self, query: Tensor, key: Tensor, given: Given) -> tuple[Tensor, Tensor]:
        rope, positions, length = self.rope, given.positions, query.shape[-3]
        assert rope is not None
        if given.cu_seqlens is not None:
            if positions is None:
                positions = packed_positions(given.cu_seqlens, length)
            if given.max_seqlen is not None or not rope.covers(length):
                length = longest(given)
        rotated: tuple[Tensor, Tensor] = rope(query, key, positions, length=length)
        return rotated

    def _score_options(self) -> dict[str, Any]:
        return {
            "causal": self.causal,
            "window": self.window,
            "alibi_slopes": None if self.alibi is None else self.alibi(),
            "sink": self.sinks,
            "softcap": self.softcap,
            "scale": self.scale,
        }

    def _attend(
        self, query: Tensor, key: Tensor, value: Tensor, given: Given, *, crossing: bool
    ) -> Tensor:
        options = self._score_options()
        options["dropout_p"] = self.dropout if self.training else 0.0
        if given.cu_seqlens is None:
            queries, keys = query.shape[-3], key.shape[-3]
            options |= self._visibility(given, queries, keys, crossing)
            options["bias"] = self._bias(given, queries, keys, keys - queries)
            out = functional.attention(query, key, value, layout="bshd", **options)
        else:
            options["mask"] = given.mask
            query_bounds, key_bounds = given.cu_seqlens, given.cu_seqlens
            offset: int | Tensor = 0
            if given.context_cu_seqlens is not None:
                key_bounds = given.context_cu_seqlens
                offset = key_bounds.diff() - query_bounds.diff()
            most = given.max_seqlen if self.relative_bias is None else longest(given)
            options["bias"] = self._bias(given, most, most, offset)
            bounds = (query_bounds, key_bounds, most, most)
            out = functional.attention_varlen(query, key, value, *bounds, **options)
        assert isinstance(out, Tensor)
        return out

    def _visibility(self, given: Given, queries: int, keys: int, crossing: bool) -> dict[str, Any]:
        """Lengths and mask. The kernel counts positions back from the ends that lengths give; those
        of a sequence that attends to itself are counted from its first row."""
        lengths = {"query_lengths": given.query_lengths, "key_lengths": given.key_lengths}
        options = {"mask": given.mask, **lengths}
        if crossing or given.query_lengths is given.key_lengths:
            return options
        if self.causal:
            return options | {"causal": "top_left"}
        if self.window is None and self.alibi is None:
            return options
        return {"mask": masked_to_lengths(given, queries, keys)}

    def _bias(
        self, given: Given, queries: int | None, keys: int | None, offset: int | Tensor
    ) -> Tensor | None:
        """What is added to the scores: bias, relative_bias, or their sum."""
        if self.relative_bias is None:
            return given.bias
        relative: Tensor = self.relative_bias(queries, keys, query_offset=offset)
        return relative if given.bias is None else given.bias + relative

    def _attend_cache(
        self, x: Tensor, query: Tensor, given: Given, cache: Cache, layer: int
    ) -> Tensor:
        """Writes x behind the rows of the cache if causal, and attends to all of them."""
        self._require_cache(given, cache)
        options = self._score_options()
        key = value = None
        if self.causal:
            key, value = self._keys_and_values(x)
            if self.rope is not None and given.positions is not None:
                query, key = self.rope(query, key, given.positions, length=cache.capacity)
            elif self.rope is not None:
                options["rope"] = self.rope.tables(cache.capacity)
                options["interleaved"] = self.rope.interleaved
        if isinstance(cache, SlidingWindowKVCache):
            options["window"] = None  # it has its own, the same
        queries = x.shape[-2] if given.max_seqlen is None else given.max_seqlen
        out = cache.attend(
            layer,
            as_in(cache, query),
            None if key is None else as_in(cache, key),
            None if value is None else as_in(cache, value),
            mask=given.mask,
            bias=self._bias(given, queries, cache.capacity, cache.lengths),
            query_lengths=given.query_lengths,
            cu_seqlens_q=given.cu_seqlens,
            max_seqlen_q=None if given.cu_seqlens is None else given.max_seqlen,
            **options,
        )
        return as_in(cache, out)

    def _fill(self, cache: Cache, layer: int, key: Tensor, value: Tensor, given: Given) -> None:
        """Writes the keys and values of a context, for the calls that come without it."""
        cache.update(
            *(layer, as_in(cache, key), as_in(cache, value)),
            lengths=given.key_lengths,
            cu_seqlens=given.context_cu_seqlens,
        )

    def _of_nested(
        self, x: Tensor, context: Tensor | None, given: Given, cache: Cache | None
    ) -> Tensor:
        for name in ("mask", "bias", "query_lengths", "key_lengths", "cu_seqlens"):
            if getattr(given, name) is not None:
                raise ValueError(f"{name}: expected None with nested sequences, got another")
        if cache is not None:
            raise ValueError("cache: expected None with nested sequences, got another")
        packed, bounds = rows(x)
        context_bounds = None
        if context is not None:
            if not is_nested("context", context):
                raise ValueError("context: expected nested sequences, as x is, got a dense tensor")
            context, context_bounds = rows(context)
        out = self(
            *(packed, context),
            positions=given.positions,
            cu_seqlens=bounds,
            context_cu_seqlens=context_bounds,
            max_seqlen=given.max_seqlen,
        )
        return pack(out, like=x)

    def _require(self, x: Tensor, context: Tensor | None, given: Given) -> None:
        packed = given.cu_seqlens is not None
        require_rows("x", x, self.embed_dim, packed)
        if context is not None:
            require_rows("context", context, self.context_dim, packed)
            if self.rope is not None:
                raise ValueError(
                    "context: expected None with rope, which compares positions in one sequence, "
                    "got a tensor"
                )
        if packed and not (given.query_lengths is None and given.key_lengths is None):
            name = "key_lengths" if given.query_lengths is None else "query_lengths"
            raise ValueError(f"{name}: expected None with cu_seqlens, got a tensor")
        if packed and (context is None) != (given.context_cu_seqlens is None):
            raise ValueError("context_cu_seqlens: expected together with cu_seqlens and context")

    def _require_cache(self, given: Given, cache: Cache) -> None:
        if given.key_lengths is not None:
            raise ValueError(
                "key_lengths: expected None with a cache, whose lengths count the keys "
                "(query_lengths tells how many rows of x are new), got a tensor"
            )
        if self.training and self.dropout > 0.0:
            raise ValueError("cache: expected None in training with dropout, got a cache")
        if self.rope is not None and not self.causal:
            raise ValueError("cache: expected None with rope unless causal, got a cache")
        if isinstance(cache, SlidingWindowKVCache):
            window = None if self.window is None else self.window[0]
            if window != cache.window:
                raise ValueError(
                    f"cache: expected the window of this module, {self.window}, got one of "
                    f"({cache.window}, 0)"
                )

    def extra_repr(self) -> str:
        given = f"{self.embed_dim}, {self.num_heads}"
        defaults = {
            "num_kv_heads": self.num_heads,
            "head_dim": self.embed_dim / self.num_heads,
            "value_head_dim": self.head_dim,
            "context_dim": self.embed_dim,
            "causal": False,
            "window": None,
            "qk_norm_over": "head",
            "softcap": None,
            "scale": None,
            "dropout": 0.0,
        }
        for name, default in defaults.items():
            value = getattr(self, name)
            given += "" if value == default else f", {name}={value}"
        return given + ("" if self.sinks is None else ", sinks=True")
