"""The attention function that transformers' models call."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils.output_capturing import _active_collector

from fastattn.functional import attention, attention_varlen, attention_weights
from fastattn.functional.weights import require_kernel

__all__ = ["attend", "attention_forward"]

# What changes which keys are seen and is not in the mask: sparse selections, paged caches.
_UNSUPPORTED = ("indices", "block_indices", "block_table", "cache")


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    sliding_window: int | None = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    max_length_q: int | None = None,
    max_length_k: int | None = None,
    output_attentions: bool = False,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """The attention of one layer, as transformers' ``AttentionInterface`` defines it.

    Which keys are seen is what attention_mask says, and windows are in it. Without a mask, a module
    that is causal (by is_causal, or its own attribute) sees the keys up to its query, counted from
    the first: the rest of a static cache is not filled yet. A single query sees all keys.

    Args:
        module: the layer that attends; ``is_causal`` is read from it.
        query: (batch, heads, queries, head_dim).
        key, value: (batch, kv_heads, keys, ...), not repeated. A batch of 1 on either side counts
            for every entry of the other.
        attention_mask: None, boolean (True = attend) or added to the scores; broadcasts to (batch,
            heads, queries, keys).
        dropout: the probability, 0 outside of training.
        scaling: of the products; 1 / sqrt(head_dim) by default.
        position_bias: added to the scores beside the mask. Differentiable, as a floating mask is.
        softcap, s_aux: softcap and sink of :func:`fastattn.functional.attention`.
        sliding_window: what the mask was made with; read where packed rows have no mask.
        cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k: the bounds of the sequences that
            are packed in a batch of 1. Beside a mask, both count.
        output_attentions: return the weights too. So does an active collector of transformers. Not
            on CUDA in this version.

    Returns:
        (batch, queries, heads, value_head_dim); and None or the weights, (batch, heads, queries,
        keys), exact and before dropout, in the dtype of query.

    Raises:
        TypeError, ValueError: as attention does; ValueError also for a choice of keys that is not
            in the mask (the ``indices`` of sparse attention, a paged cache), which would be lost,
            and for output_attentions on CUDA.

    Source: https://huggingface.co/docs/transformers/attention_interface
    """
    for name in _UNSUPPORTED:
        if kwargs.get(name) is not None:
            raise ValueError(
                f"{name}: expected None (fastattn takes the visible keys from attention_mask), got "
                f"{type(kwargs[name]).__name__} from {type(module).__name__}"
            )
    options: dict[str, Any] = {"scale": scaling, "softcap": softcap, "dropout_p": dropout}
    if s_aux is not None:
        options["sink"] = s_aux
    causal = _is_causal(module) if is_causal is None else is_causal
    wants_weights = output_attentions or _captures_attentions()
    if cu_seq_lens_q is not None:
        bounds = (cu_seq_lens_q, cu_seq_lens_q if cu_seq_lens_k is None else cu_seq_lens_k)
        if attention_mask is None and position_bias is None and not wants_weights:
            q, k, v = (x.squeeze(0).transpose(0, 1) for x in (query, key, value))
            options |= {"causal": causal, "window": _window(sliding_window, causal)}
            out = attention_varlen(q, k, v, *bounds, max_length_q, max_length_k, **options)
            assert isinstance(out, Tensor)
            return out.unsqueeze(0), None
        options["mask"] = _same_sequence(query.shape[2], key.shape[2], bounds)
    if attention_mask is None:
        options["causal"] = "top_left" if causal and query.shape[2] > 1 else False
        options["bias"] = position_bias
        if "mask" in options:
            options["window"] = _window(sliding_window, causal)
    elif attention_mask.dtype == torch.bool:
        seen = options.get("mask")
        options["mask"] = attention_mask if seen is None else attention_mask & seen
        options["bias"] = position_bias
    elif position_bias is None:
        options["bias"] = attention_mask
    else:
        options["bias"] = attention_mask + position_bias
    return attend(query, key, value, wants_weights, options)


def attend(
    query: Tensor, key: Tensor, value: Tensor, wants_weights: bool, options: dict[str, Any]
) -> tuple[Tensor, Tensor | None]:
    """out and weights as attention_forward returns them; options are those of attention."""
    batch = max(query.shape[0], key.shape[0])
    if query.shape[0] != key.shape[0]:
        query, key, value = (x.expand(batch, -1, -1, -1) for x in (query, key, value))
    if not wants_weights:
        out = attention(query, key, value, **options)
        assert isinstance(out, Tensor)
        return out.transpose(1, 2), None
    require_kernel("output_attentions", query)
    out, lse = attention(query, key, value, return_lse=True, **options)
    for name in ("sink", "dropout_p"):  # the first is in the lse, and weights are before the second
        options.pop(name, None)
    weights = attention_weights(query, key, lse, **options)
    return out.transpose(1, 2), weights.to(query.dtype)


def _is_causal(module: nn.Module) -> bool:
    """What a module says; without a word, classes of transformers are not (cross-attention of
    Mllama, some encoders), and for others it is as in "sdpa"."""
    found = getattr(module, "is_causal", None)
    if found is None:
        return not type(module).__module__.startswith("transformers.models.")
    return bool(found)


def _captures_attentions() -> bool:
    """Whether a model that is running was called with output_attentions=True."""
    if torch.compiler.is_compiling() and not _active_collector.compiling:
        return False  # dynamo cannot read a context variable
    collected = _active_collector.get()
    return collected is not None and any("attentions" in name for name in collected)


def _window(sliding_window: int | None, causal: bool) -> tuple[int, int] | None:
    """sliding_window counts the diagonal, and stands for either side where nothing is causal."""
    if sliding_window is None:
        return None
    return sliding_window - 1, 0 if causal else sliding_window - 1


def _same_sequence(queries: int, keys: int, bounds: tuple[Tensor, Tensor]) -> Tensor:
    """(queries, keys): whether both stand between the same bounds of packed sequences."""
    of_query, of_key = (
        torch.bucketize(torch.arange(n, device=ends.device), ends[1:], right=True)
        for n, ends in zip((queries, keys), bounds, strict=True)
    )
    return of_query[:, None] == of_key
