"""The ops of KV caches as Python sees them: shapes without data and FLOPs. None has a gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from fastattn._ops.attention import _empty_in_order_of, _lse_shape
from fastattn._ops.common import real_dtype, register_fake

kv_cache_update = torch.ops.fastattn.kv_cache_update.default
attention_with_cache = torch.ops.fastattn.attention_with_cache.default
attention_with_cache_ = torch.ops.fastattn.attention_with_cache_.default
attention_with_cache_schedule = torch.ops.fastattn.attention_with_cache_schedule.default


@register_fake("fastattn::kv_cache_update")
def _update_fake(
    k_cache: Tensor, v_cache: Tensor, key: Tensor, value: Tensor, *given: Any, **named: Any
) -> None:
    pass


def _outputs(query: Tensor, v_cache: Tensor, op: Any, given: Any, named: Any) -> Any:
    arguments = _bind(op, given, named)
    packed = arguments["cu_seqlens_q"] is not None
    out = _empty_in_order_of(query, v_cache.shape[-1], packed)
    shape = _lse_shape(query, packed, arguments["bshd"])
    return out, query.new_empty(shape, dtype=real_dtype(query))


def _bind(op: Any, given: Any, named: Any) -> dict[str, Any]:
    """All arguments by name: torch leaves out what is at its default at the end."""
    schema = op._schema.arguments
    defaults: dict[str, Any] = {a.name: a.default_value for a in schema if a.has_default_value()}
    positional: dict[str, Any] = dict(zip((a.name for a in schema), given, strict=False))
    return {**defaults, **positional, **named}


@register_fake("fastattn::attention_with_cache")
def attention_with_cache_fake(
    query: Tensor, k_cache: Tensor, v_cache: Tensor, *rest: Any, **named: Any
) -> Any:
    given = (query, k_cache, v_cache, *rest)
    return _outputs(query, v_cache, attention_with_cache, given, named)


@register_fake("fastattn::attention_with_cache_")
def attention_with_cache_writing_fake(
    query: Tensor, k_cache: Tensor, v_cache: Tensor, *rest: Any, **named: Any
) -> Any:
    given = (query, k_cache, v_cache, *rest)
    return _outputs(query, v_cache, attention_with_cache_, given, named)


def _flops(op: Any, given: Any, named: Any) -> int:
    """Four for each query, visible row of the cache and channel, as attention counts them."""
    a = _bind(op, given, named)
    query, k_cache, v_cache, lengths = a["query"], a["k_cache"], a["v_cache"], a["cache_lengths"]
    packed = a["cu_seqlens_q"] is not None
    heads, queries = _lse_shape(query, packed, a["bshd"])[-2:]
    queries = queries if not packed else queries / max(lengths.shape[0], 1)
    rows = k_cache.shape[-3 if a["bshd"] else -2]
    capacity = rows if a["block_table"] is None else rows * a["block_table"].shape[1]
    try:
        keys = lengths.sum().item() + (lengths.shape[0] * queries if "key" in a else 0)
    except RuntimeError:  # without data: as if every sequence filled its cache
        keys = lengths.shape[0] * capacity
    return int(2 * heads * queries * keys * (query.shape[-1] + v_cache.shape[-1]))


@register_flop_formula(torch.ops.fastattn.attention_with_cache, get_raw=True)
def _attention_flops(*given: Any, out_val: Any = None, **named: Any) -> int:
    return _flops(attention_with_cache, given, named)


@register_flop_formula(torch.ops.fastattn.attention_with_cache_, get_raw=True)
def _writing_attention_flops(*given: Any, out_val: Any = None, **named: Any) -> int:
    return _flops(attention_with_cache_, given, named)
