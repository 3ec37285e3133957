"""Falcon: rotary embedding or ALiBi, and as many heads of keys as the model has, never repeated."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.falcon.modeling_falcon import FalconAttention, FalconFlashAttention2

from fastattn.functional import apply_rope_qk
from fastattn.integrations.huggingface.attention import attention_forward

__all__ = ["REPLACEMENTS"]


class FusedFalconAttention(FalconAttention):
    """Grouped-query attention (new_decoder_architecture), multi-query or multi-head attention.

    Keys and values go into the cache with the heads that they have. transformers repeats them for
    every query head of the new architecture: its caches are larger, and no cache can pass from one
    to the other.

    ALiBi is alibi / sqrt(head_dim), a row for all queries, as under transformers' own default,
    "sdpa"; its "eager" adds the row twice.
    """

    def forward(
        self,
        hidden_states: Tensor,
        alibi: Tensor | None,
        attention_mask: Tensor | None,
        position_ids: Tensor | None = None,
        layer_past: Any = None,
        use_cache: bool = False,
        output_attentions: bool = False,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        query, key, value = self._split(self.query_key_value(hidden_states))
        if alibi is None:
            if position_embeddings is None:
                raise ValueError("position_embeddings: expected (cos, sin) without alibi, got None")
            half = self.head_dim // 2  # the tables hold every column twice
            cos, sin = (x[..., :half] for x in position_embeddings)
            query, key = apply_rope_qk(query, key, cos, sin)
        if layer_past is not None:
            key, value = layer_past.update(key, value, self.layer_idx)
        bias = None
        if alibi is not None:
            bias = alibi.view(len(query), self.num_heads, 1, -1) * self.inv_norm_factor
            attention_mask = _visible(attention_mask)
        # As in transformers: beside rotary embedding no weight is dropped.
        drops = self.training and alibi is not None
        out, weights = attention_forward(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.attention_dropout.p if drops else 0.0,
            position_bias=bias,
            output_attentions=output_attentions,
        )
        return self.dense(out.flatten(2)), weights

    def _split(self, fused: Tensor) -> tuple[Tensor, ...]:
        """query, key, value: (batch, heads or kv_heads, length, head_dim).

        A group is the query heads of a kv_head, then its key, then its value. Without groups that
        is a head of each, and multi_query is a single group.
        """
        group = self.num_heads // self.num_kv_heads
        parts = fused.view(*fused.shape[:-1], self.num_kv_heads, group + 2, self.head_dim)
        split = parts[..., :group, :], parts[..., group:-1, :], parts[..., -1:, :]
        return tuple(x.flatten(2, 3).transpose(1, 2) for x in split)


def _visible(mask: Tensor | None) -> Tensor | None:
    """(batch, 1, queries, keys), True = attend, from what the model made of mask and ALiBi: each
    head's biases, and the least number where a key is hidden."""
    if mask is None or mask.dtype == torch.bool:
        return mask
    return mask[:, :1] > torch.finfo(mask.dtype).min


class FusedFalconFlashAttention2(FusedFalconAttention, FalconFlashAttention2):
    """The same for a model that was loaded with flash-attn, whose layers have another class."""


REPLACEMENTS: dict[type[nn.Module], type[nn.Module]] = {
    FalconAttention: FusedFalconAttention,
    FalconFlashAttention2: FusedFalconFlashAttention2,
}
