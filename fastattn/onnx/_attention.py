"""Attention in ONNX: the Attention node, with all that shapes the scores as its mask."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true

from fastattn._ops.attention import OPTIONS
from fastattn.functional._arguments import UNLIMITED
from fastattn.onnx._nodes import node, reordered, wide_dtype
from fastattn.reference.attention import relative_positions, visibility

__all__ = ["attention_column_sums", "attention_forward", "attention_plain", "attention_weights"]

Options = dict[str, Any]

_FLOAT = 1  # as ONNX numbers it


def attention_plain(
    query: Tensor, key: Tensor, value: Tensor, causal: bool, scale: float | None, bshd: bool
) -> Tensor:
    right = 0 if causal else UNLIMITED
    return attention_forward(query, key, value, window_right=right, scale=scale, bshd=bshd)[0]


def attention_forward(
    query: Tensor, key: Tensor, value: Tensor, *given: Any, **named: Any
) -> tuple[Tensor, Tensor]:
    """out by an Attention node; lse by nodes of its own, which are there if somebody reads it."""
    options = _bound(given, named)
    q, k, v = (_heads_first(x, options) for x in (query, key, value))
    out, lse = _attended(q, k, v, options), _log_sum_exp(q, k, options)
    sink = options["sink"]
    if sink is not None:
        sink = sink.to(lse.dtype)[:, None]
        out = (out * torch.sigmoid(lse - sink).unsqueeze(-1)).to(query.dtype)
        lse = torch.where(lse == -torch.inf, lse, torch.logaddexp(lse, sink))
    return _in_order_of(query, _heads_first(out, options)), lse


def attention_weights(
    query: Tensor, key: Tensor, lse: Tensor, rows: Tensor, heads: Tensor, *given: Any, **named: Any
) -> Tensor:
    """exp(s_ij - lse_i), of all rows and heads; then those that are asked for."""
    weights = _weights(query, key, lse, _bound(given, named))
    return weights.index_select(-3, heads).index_select(-2, rows)


def attention_column_sums(
    query: Tensor, key: Tensor, lse: Tensor, *given: Any, **named: Any
) -> Tensor:
    return _weights(query, key, lse, _bound(given, named)).sum(-2)


def _bound(given: tuple[Any, ...], named: Options) -> Options:
    options = OPTIONS | dict(zip(OPTIONS, given)) | named
    if options["dropout_p"] > 0.0:
        raise ValueError(
            f"dropout_p: expected 0 in a model for ONNX, got {options['dropout_p']}: "
            "call model.eval() first"
        )
    if options["cu_seqlens_q"] is not None:
        raise ValueError(
            "cu_seqlens_q: expected None in a model for ONNX, which has no packed sequences: pad "
            "them and pass their lengths, got a tensor"
        )
    return options


def _heads_first(x: Tensor, options: Options) -> Tensor:
    return x.transpose(-3, -2) if options["bshd"] else x


def _in_order_of(query: Tensor, out: Tensor) -> Tensor:
    """The memory of out is in the order of query's, as the op has it."""
    order = list(range(out.dim()))
    if query.stride(-2) > query.stride(-3):
        order[-3:] = [order[-2], order[-3], order[-1]]
    return reordered(out, order)


def _attended(query: Tensor, key: Tensor, value: Tensor, options: Options) -> Tensor:
    batch = query.shape[:-3]
    causal = _is_causal_alone(query, key, options)
    bias, visible = _bias(query, key, options), _visible(query, key, options, causal)
    if bias is not None and visible is not None:
        bias = torch.where(visible, bias, -torch.inf)
    mask = visible if bias is None else bias
    dtype = query.dtype if bias is None else torch.promote_types(query.dtype, bias.dtype)
    scale, softcap = options["scale"], options["softcap"]
    if scale is not None and scale <= 0.0:  # the node takes its root
        query, scale = query * scale, 1.0
    inputs = [x.to(dtype).reshape(-1, *x.shape[-3:]) for x in (query, key, value)]
    if mask is not None:
        inputs.append(_of_scores(mask if bias is None else mask.to(dtype), batch))
    out = node(
        "Attention",
        tuple(inputs),
        (*inputs[0].shape[:-1], value.shape[-1]),
        version=23,
        is_causal=1 if causal else None,
        scale=scale,
        softcap=softcap,
        softmax_precision=_FLOAT if dtype.itemsize < 4 else None,
    )
    return out.to(query.dtype).reshape(*batch, *out.shape[-3:])


def _of_scores(mask: Tensor, batch: torch.Size) -> Tensor:
    """(batch, heads, queries, keys), with sizes of 1 where the mask broadcasts."""
    mask = mask[(None,) * (3 + len(batch) - mask.dim())]
    if len(batch) > 1:
        mask = mask.expand(*batch, *mask.shape[-3:])
    return mask.reshape(-1, *mask.shape[-3:])


def _is_causal_alone(query: Tensor, key: Tensor, options: Options) -> bool:
    """Whether positions do no more than what is_causal says: key j is visible if j <= i."""
    queries, keys = query.shape[-2], key.shape[-2]
    return (
        options["window_right"] == 0
        and options["window_left"] == UNLIMITED
        and options["query_lengths"] is None
        and options["key_lengths"] is None
        and statically_known_true(options["query_offset"] == options["key_offset"])
        and (options["top_left"] or statically_known_true(queries == keys))
    )


def _relative(query: Tensor, key: Tensor, options: Options) -> Tensor:
    """p_j - p_i"""
    return relative_positions(
        query.shape[-2],
        key.shape[-2],
        causal="top_left" if options["top_left"] else False,
        query_lengths=options["query_lengths"],
        key_lengths=options["key_lengths"],
        query_offset=options["query_offset"],
        key_offset=options["key_offset"],
    ).to(query.device)


def _visible(query: Tensor, key: Tensor, options: Options, causal: bool) -> Tensor | None:
    """What mask, lengths, window and causality leave visible, without what is_causal says."""
    left, right, mask = options["window_left"], options["window_right"], options["mask"]
    query_lengths, key_lengths = options["query_lengths"], options["key_lengths"]
    unlimited = left == UNLIMITED and right == UNLIMITED
    if causal or (unlimited and query_lengths is None and key_lengths is None):
        return mask  # type: ignore[no-any-return]
    return visibility(
        _relative(query, key, options),
        window=(None if left == UNLIMITED else left, None if right == UNLIMITED else right),
        mask=mask,
        query_lengths=query_lengths,
        key_lengths=key_lengths,
    )


def _bias(query: Tensor, key: Tensor, options: Options) -> Tensor | None:
    """bias and alibi: in float32, or the dtype of a bias alone."""
    bias: Tensor | None = options["bias"]
    slopes: Tensor | None = options["alibi_slopes"]
    if slopes is None:
        return bias
    linear = -slopes[..., None, None] * _relative(query, key, options).abs()
    return linear if bias is None else linear + bias


def _scores(query: Tensor, key: Tensor, options: Options) -> tuple[Tensor, Tensor | None]:
    """The scores in float32, -inf where hidden; and what is visible, None for everything."""
    q, k = query.to(wide_dtype(query)), key.to(wide_dtype(key))
    groups = query.shape[-3] // key.shape[-3]
    if groups > 1:
        k = k.repeat_interleave(groups, dim=-3)
    scale, softcap = options["scale"], options["softcap"]
    scores = (q * (query.shape[-1] ** -0.5 if scale is None else scale)) @ k.mT
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    bias, visible = _bias(query, key, options), _visible(query, key, options, False)
    if bias is not None:
        scores = scores + bias
    return scores if visible is None else torch.where(visible, scores, -torch.inf), visible


def _log_sum_exp(query: Tensor, key: Tensor, options: Options) -> Tensor:
    """Of a row that sees no key: -inf."""
    scores, _ = _scores(query, key, options)
    largest = scores.amax(-1, keepdim=True).clamp(min=torch.finfo(scores.dtype).min)
    return (scores - largest).exp().sum(-1).log() + largest.squeeze(-1)


def _weights(query: Tensor, key: Tensor, lse: Tensor, options: Options) -> Tensor:
    query, key = _heads_first(query, options), _heads_first(key, options)
    scores, _ = _scores(query, key, options)
    unseen = (lse == -torch.inf).unsqueeze(-1)
    return torch.where(unseen, 0.0, torch.exp(scores - lse.unsqueeze(-1)))
