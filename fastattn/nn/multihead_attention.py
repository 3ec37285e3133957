"""torch.nn.MultiheadAttention over the fused kernels."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fastattn import functional
from fastattn.functional.weights import require_kernel
from fastattn.nn._nested import is_nested, longest, pack, rows

__all__ = ["MultiheadAttention"]


class MultiheadAttention(torch.nn.MultiheadAttention):
    r"""``torch.nn.MultiheadAttention``, in arguments, parameters and meaning.

    ::

        q, k, v = query W_q + b_q,  key W_k + b_k,  value W_v + b_v
        out     = out_proj(attention(q, k, v))          in heads of embed_dim / num_heads

    The fused kernel computes every output. Weights that are asked for are recomputed from its
    log-sum-exp, so that the output has the same bits with need_weights and without.

    Args:
        embed_dim, num_heads: num_heads divides embed_dim.
        dropout: the probability to drop an attention weight in training.
        bias: whether the projections have one.
        add_bias_kv: whether a learned key and value join those of every sequence.
        add_zero_attn: whether a key and a value of zeros do.
        kdim, vdim: features of key and value; embed_dim by default.
        batch_first: whether batched tensors are (N, L, E) and not (L, N, E).
        device, dtype: of the parameters.

    What differs from torch's class:

    - Weights are those before dropout, and differentiable.
    - A query that sees no key gets zeros from attention (and ``out_proj.bias`` from the module);
      torch gives NaN. Nothing that a key hidden by a boolean mask holds, NaN included, leaks.
    - is_causal needs no attn_mask, and holds for every combination of arguments.
    - ``out_proj`` is called as a module: what wraps it (LoRA, hooks) counts.
    - Jagged nested tensors of any kind are taken, in training too.
    - Wrong arguments raise ValueError or TypeError, which name the argument.

    >>> x, attention = torch.randn(2, 5, 16), MultiheadAttention(16, 4, batch_first=True)
    >>> same = torch.nn.MultiheadAttention(16, 4, batch_first=True)
    >>> _ = same.load_state_dict(attention.state_dict())
    >>> torch.testing.assert_close(attention(x, x, x), same(x, x, x))
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if num_heads < 1:
            raise ValueError(f"num_heads: expected at least 1, got {num_heads}")
        if embed_dim < 1 or embed_dim % num_heads:
            raise ValueError(
                f"embed_dim: expected a positive multiple of num_heads, {num_heads}, "
                f"got {embed_dim}"
            )
        if not 0.0 <= dropout <= 1.0:
            raise ValueError(f"dropout: expected a probability in [0, 1], got {dropout}")
        super().__init__(
            embed_dim,
            num_heads,
            dropout=dropout,
            bias=bias,
            add_bias_kv=add_bias_kv,
            add_zero_attn=add_zero_attn,
            kdim=kdim,
            vdim=vdim,
            batch_first=batch_first,
            device=device,
            dtype=dtype,
        )

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        r"""Attend, and project the result.

        Args:
            query: (N, L, embed_dim) if batch_first, else (L, N, embed_dim); (L, embed_dim) without
                a batch; or a jagged nested tensor (N, ragged, embed_dim), whatever batch_first is.
            key, value: likewise, with S in place of L, and features kdim and vdim. Query, key and
                value that are one tensor are projected in one product.
            key_padding_mask: (N, S), or (S) without a batch. Boolean: True hides the key. Floating:
                added to the scores.
            need_weights: whether to return the weights as well. Not on CUDA in this version.
            attn_mask: (L, S) or (N \* num_heads, L, S). Boolean: True hides the key from the
                query. Floating: added to the scores; differentiable, as a floating key_padding_mask
                is.
            average_attn_weights: whether to return the average over the heads.
            is_causal: query i sees the keys up to i (and those that add_bias_kv and add_zero_attn
                add). An attn_mask beside it is taken to say the same, and is not read.

        Returns:
            (out, weights). out is like query. weights are None without need_weights, else in the
            dtype of the scores (N, L, S), or (N, num_heads, L, S) if not average_attn_weights, and
            without N for tensors without a batch. S counts what add_bias_kv and add_zero_attn add,
            which come last, in this order. For nested tensors L and S are those of the longest
            sequence, and weights behind the end of a shorter one are 0.

        Raises:
            TypeError: for the type or dtype of an argument, ValueError for its shape or device; or
                for a mask together with nested tensors, or need_weights on CUDA. Both name the
                argument.
        """
        nested = is_nested("query", query)
        if need_weights:
            require_kernel("need_weights", query)
        if nested:
            _require_no_mask(key_padding_mask=key_padding_mask, attn_mask=attn_mask)
            return self._forward_nested(
                query, key, value, need_weights, average_attn_weights, is_causal
            )
        batched = self._require_dense(query, key, value)
        q, k, v = (self._batch(x) for x in self._projected(query, key, value))
        masks = _masks(q, k, key_padding_mask, attn_mask, batched, is_causal)
        if self.bias_k is not None and self.bias_v is not None:
            k, v = self._with_first_row(k, self.bias_k), self._with_first_row(v, self.bias_v)
            masks = _with_first_column(masks)
        options = self._causality(is_causal) | masks
        out, lse = functional.attention(
            q, k, v, **options, **self._beside_the_scores(q), layout="bshd", return_lse=True
        )
        weights = None
        if need_weights:
            weights = self._weights(q, k, lse, options, average_attn_weights)
            weights = weights if batched else weights.squeeze(0)
        return self.out_proj(self._unbatch(out.flatten(-2), batched)), weights

    def _forward_nested(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        need_weights: bool,
        average: bool,
        is_causal: bool,
    ) -> tuple[Tensor, Tensor | None]:
        self._require_nested(query, key, value)
        x, bounds_q = rows(query)
        y, bounds_k = (x, bounds_q) if key is query else rows(key)
        z = y if value is key else x if value is query else rows(value)[0]
        q, k, v = self._projected(x, y, z)
        options = self._causality(is_causal)
        if self.bias_k is not None and self.bias_v is not None:
            k, _ = self._with_first_rows(k, bounds_k, self.bias_k)
            v, bounds_k = self._with_first_rows(v, bounds_k, self.bias_v)
        out, lse = functional.attention_varlen(
            q, k, v, bounds_q, bounds_k, **options, **self._beside_the_scores(q), return_lse=True
        )
        weights = None
        if need_weights:
            queries, keys = longest(query), longest(key) + (self.bias_k is not None)
            # Behind the end of a sequence every weight is exp(s - inf).
            lse = _padded(lse.transpose(0, 1), bounds_q, queries, math.inf).transpose(1, 2)
            lengths = {"query_lengths": bounds_q.diff(), "key_lengths": bounds_k.diff()}
            q, k = _padded(q, bounds_q, queries), _padded(k, bounds_k, keys)
            weights = self._weights(q, k, lse, options | lengths, average)
        return pack(self.out_proj(out.flatten(-2)), query), weights

    def _projected(self, query: Tensor, key: Tensor, value: Tensor) -> list[Tensor]:
        """q, k and v in heads: views of as few products as there are different tensors in a row."""
        if self.in_proj_weight is None:
            weights: Sequence[Tensor] = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
            runs, sizes = [[query], [key], [value]], [self.embed_dim] * 3
        else:
            runs = [[query]]
            for x in (key, value):
                if x is runs[-1][0]:
                    runs[-1].append(x)
                else:
                    runs.append([x])
            sizes = [len(run) * self.embed_dim for run in runs]
            weights = torch.split(self.in_proj_weight, sizes)
        biases: Sequence[Tensor | None] = [None] * len(runs)
        if self.in_proj_bias is not None:
            biases = torch.split(self.in_proj_bias, sizes)
        heads: list[Tensor] = []
        for run, weight, bias in zip(runs, weights, biases, strict=True):
            product = F.linear(run[0], weight, bias)
            parts = (len(run), self.num_heads, self.head_dim)
            heads += torch.unflatten(product, -1, parts).unbind(-3)
        return heads

    def _batch(self, x: Tensor) -> Tensor:
        """(N, length, heads, head_dim)"""
        if x.dim() == 3:
            return x.unsqueeze(0)
        return x if self.batch_first else x.transpose(0, 1)

    def _unbatch(self, x: Tensor, batched: bool) -> Tensor:
        """(N, L, embed_dim) in the shape of query."""
        if not batched:
            return x.squeeze(0)
        return x if self.batch_first else x.transpose(0, 1)

    def _causality(self, is_causal: bool) -> dict[str, Any]:
        if not is_causal:
            return {}
        # The row of add_bias_kv, which every query sees, comes before the first key.
        return {"causal": "top_left", "key_offset": 0 if self.bias_k is None else -1}

    def _beside_the_scores(self, q: Tensor) -> dict[str, Any]:
        """The options of attention that attention_weights does not have."""
        options: dict[str, Any] = {"dropout_p": self.dropout if self.training else 0.0}
        if self.add_zero_attn:
            # A key and a value of zeros add exp(0) to the denominator and nothing to the numerator.
            options["sink"] = torch.zeros(self.num_heads, device=q.device)
        return options

    def _with_first_row(self, x: Tensor, row: Tensor) -> Tensor:
        """(N, 1 + S, heads, head_dim)"""
        row = row.to(x.dtype).view(1, 1, self.num_heads, self.head_dim)
        return torch.cat((row.expand(x.shape[0], -1, -1, -1), x), dim=1)

    def _with_first_rows(self, x: Tensor, bounds: Tensor, row: Tensor) -> tuple[Tensor, Tensor]:
        """The rows and bounds of sequences that each begin with this row."""
        sequences = bounds.shape[0] - 1
        old = torch.arange(x.shape[0], device=x.device)
        new = old + 1 + torch.bucketize(old, bounds[1:], right=True)
        bounds = bounds + torch.arange(sequences + 1, device=x.device)
        row = row.to(x.dtype).view(1, self.num_heads, self.head_dim)
        result = x.new_empty((x.shape[0] + sequences, *x.shape[1:]))
        result = result.index_copy(0, new, x)
        return result.index_copy(0, bounds[:-1], row.expand(sequences, -1, -1)), bounds

    def _weights(
        self, q: Tensor, k: Tensor, lse: Tensor, options: dict[str, Any], average: bool
    ) -> Tensor:
        """(N, L, S) or (N, heads, L, S), with the columns of torch in its order."""

        def weights(heads: slice | None = None) -> Tensor:
            return functional.attention_weights(q, k, lse, heads=heads, layout="bshd", **options)

        bias = options.get("bias")
        differentiable = torch.is_grad_enabled() and any(
            x is not None and x.requires_grad for x in (q, k, bias)
        )
        if average and not differentiable:
            result = weights(slice(0, 1))
            for head in range(1, self.num_heads):
                result += weights(slice(head, head + 1))
            result = result.squeeze(1) / self.num_heads
        else:
            result = weights()
            result = result.mean(1) if average else result
        if self.bias_k is not None:
            result = torch.cat((result[..., 1:], result[..., :1]), dim=-1)
        if self.add_zero_attn:
            # A row that sees no other key has lse -inf.
            zero = lse.masked_fill(lse == -math.inf, 0.0).neg().exp()
            zero = zero.mean(1) if average else zero
            result = torch.cat((result, zero.unsqueeze(-1)), dim=-1)
        return result.to(q.dtype)

    def _require_dense(self, query: Tensor, key: Tensor, value: Tensor) -> bool:
        """Whether there is a batch."""
        if query.dim() not in (2, 3):
            raise ValueError(
                "query: expected 3 dimensions, or 2 without a batch, got shape "
                f"{tuple(query.shape)}"
            )
        for name, x in (("key", key), ("value", value)):
            if is_nested(name, x):
                raise TypeError(f"{name}: expected a dense tensor as query is, got a nested one")
            if x.dim() != query.dim():
                raise ValueError(
                    f"{name}: expected {query.dim()} dimensions as query has, got shape "
                    f"{tuple(x.shape)}"
                )
        self._require_features(query=query, key=key, value=value)
        batch = 0 if self.batch_first else 1
        if query.dim() == 3 and key.shape[batch] != query.shape[batch]:
            raise ValueError(
                f"key: expected a batch of {query.shape[batch]} in dimension {batch} as query has, "
                f"got shape {tuple(key.shape)}"
            )
        if value.shape[:-1] != key.shape[:-1]:
            raise ValueError(
                f"value: expected the leading dimensions of key, {tuple(key.shape[:-1])}, "
                f"got shape {tuple(value.shape)}"
            )
        return query.dim() == 3

    def _require_nested(self, query: Tensor, key: Tensor, value: Tensor) -> None:
        for name, x in (("query", query), ("key", key), ("value", value)):
            if not is_nested(name, x):
                raise TypeError(f"{name}: expected a nested tensor as query is, got a dense one")
            if x.dim() != 3 or x.shape[0] != query.shape[0]:
                raise ValueError(
                    f"{name}: expected shape ({query.shape[0]}, ragged length, features), "
                    f"got {tuple(x.shape)}"
                )
        self._require_features(query=query, key=key, value=value)
        # Nested tensors of the same lengths need not know it: then their sizes have other names.
        if value.shape[1] != key.shape[1] and not torch.equal(rows(value)[1], rows(key)[1]):
            raise ValueError("value: expected the lengths of the sequences of key, got others")

    def _require_features(self, **tensors: Tensor) -> None:
        features = {"query": self.embed_dim, "key": self.kdim, "value": self.vdim}
        weight = self.q_proj_weight if self.in_proj_weight is None else self.in_proj_weight
        autocast = torch.is_autocast_enabled("cuda" if weight.is_cuda else "cpu")
        for name, x in tensors.items():
            if x.shape[-1] != features[name]:
                raise ValueError(
                    f"{name}: expected {features[name]} features in the last dimension, got shape "
                    f"{tuple(x.shape)}"
                )
            if x.device != weight.device:
                raise ValueError(
                    f"{name}: expected a tensor on {weight.device} as the parameters are, "
                    f"got {x.device}"
                )
            if x.dtype != weight.dtype and not autocast:
                raise TypeError(
                    f"{name}: expected dtype {weight.dtype} as the parameters have, got {x.dtype}"
                )


def _require_no_mask(**masks: Tensor | None) -> None:
    for name, mask in masks.items():
        if mask is not None:
            raise ValueError(
                f"{name}: expected None for nested tensors, whose sequences have no padding "
                "(is_causal is possible), got a mask"
            )


def _require_mask(name: str, mask: Tensor, shapes: Sequence[tuple[int, ...]], like: Tensor) -> None:
    if not isinstance(mask, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(mask).__name__}")
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise TypeError(f"{name}: expected dtype bool or a floating one, got {mask.dtype}")
    if all(mask.shape != shape for shape in shapes):
        expected = " or ".join([f"{shape}" for shape in shapes])
        raise ValueError(f"{name}: expected shape {expected}, got {tuple(mask.shape)}")
    if mask.device != like.device:
        raise ValueError(f"{name}: expected a tensor on {like.device}, got {mask.device}")


def _masks(
    q: Tensor,
    k: Tensor,
    key_padding_mask: Tensor | None,
    attn_mask: Tensor | None,
    batched: bool,
    is_causal: bool,
) -> dict[str, Any]:
    """mask and bias of attention, each no larger than what it comes from."""
    batch, queries, heads, _ = q.shape
    keys = k.shape[1]
    given = []
    if key_padding_mask is not None:
        shapes: list[tuple[int, ...]] = [(batch, keys) if batched else (keys,)]
        _require_mask("key_padding_mask", key_padding_mask, shapes, q)
        given.append(key_padding_mask.view(batch, 1, 1, keys))
    if attn_mask is not None:
        shapes = [(queries, keys), (batch * heads, queries, keys)]
        _require_mask("attn_mask", attn_mask, shapes, q)
        if not is_causal:
            shared = attn_mask.dim() == 2
            leading = (1, 1) if shared else (batch, heads)
            given.append(attn_mask.reshape(*leading, queries, keys))
    options = {}
    hidden = [mask for mask in given if mask.dtype == torch.bool]
    added = [mask for mask in given if mask.dtype != torch.bool]
    if hidden:
        options["mask"] = ~(hidden[0] if len(hidden) == 1 else hidden[0] | hidden[1])
    if added:
        options["bias"] = added[0] if len(added) == 1 else added[0] + added[1]
    return options


def _with_first_column(masks: dict[str, Any]) -> dict[str, Any]:
    """mask and bias for one more key in front, which all queries see."""
    first = {"mask": True, "bias": 0.0}
    return {name: F.pad(x, (1, 0), value=first[name]) for name, x in masks.items()}


def _padded(x: Tensor, bounds: Tensor, length: int, padding: float = 0.0) -> Tensor:
    """(sequences, length, ...) from rows."""
    nested = torch.nested.nested_tensor_from_jagged(x.contiguous(), bounds, max_seqlen=length)
    dense: Tensor = torch.nested.to_padded_tensor(nested, padding)
    return dense
