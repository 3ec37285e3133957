"""Encoders that run on the rows of a batch that are not padding."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils.output_capturing import _active_collector

from fastattn._replacement import own_class
from fastattn.functional import cu_seqlens_from_lengths
from fastattn.integrations.huggingface.fused._forms import Fused, derived, known
from fastattn.integrations.huggingface.registration import NAME

__all__ = ["rule"]

# What has rows of its own; cache is past_key_values, from transformers 5.24 on.
_OTHERS = ("encoder_hidden_states", "past_key_values", "cache")


class _Encoder(Fused):
    """An encoder whose layers see packed sequences, without the padding between them.

    In its result the rows of padding are 0. It runs on all rows where the mask is not just padding,
    where layers report what they see (hidden states, weights), and while it is compiled or traced:
    how many rows are left is known from the data alone.
    """

    config: Any

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, *more: Any, **named: Any
    ) -> Any:
        whole = super().forward
        others = [*more, *(named.get(name) for name in _OTHERS)]
        if (
            attention_mask is None
            or any(x is not None for x in others)
            or not _is_padding(attention_mask)
            or self.config._attn_implementation != NAME
            or torch.compiler.is_compiling()
            or _active_collector.get()
        ):
            return whole(hidden_states, attention_mask, *more, **named)
        visible = attention_mask[:, 0, 0]
        rows = visible.flatten().nonzero().squeeze(1)
        bounds = cu_seqlens_from_lengths(visible.sum(1))
        named |= {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds}
        packed = hidden_states.flatten(0, 1).index_select(0, rows).unsqueeze(0)
        result = whole(packed, None, *more, **named)
        out = torch.zeros_like(hidden_states).flatten(0, 1)
        out = out.index_copy(0, rows, result.last_hidden_state.squeeze(0))
        result.last_hidden_state = out.view_as(hidden_states)
        return result


_KNOWN: dict[str, type[Fused]] = {"bert:BertEncoder": _Encoder}


def rule(module: nn.Module) -> type[nn.Module] | str | None:
    cls = own_class(module)
    mixin = known(cls, _KNOWN)
    return None if mixin is None else derived(cls, mixin)


def _is_padding(mask: Tensor) -> bool:
    """Whether it hides the same keys from all queries and heads, as transformers' masks of padding
    do by a stride of 0."""
    one_head = mask.shape[1] == 1 or mask.stride(1) == 0
    return mask.dtype == torch.bool and one_head and mask.stride(2) == 0
