"""DeBERTa-v2 and v3: their scores between content and position, as a bias with gradient."""

from __future__ import annotations

import math

from torch import Tensor, nn
from transformers.models.deberta_v2.modeling_deberta_v2 import DisentangledSelfAttention

from fastattn.integrations.huggingface.attention import attention_forward

__all__ = ["REPLACEMENTS"]


class FusedDisentangledSelfAttention(DisentangledSelfAttention):
    """softmax(q k / s + content-to-position + position-to-content) v of the visible keys, where s =
    sqrt(head_dim * (1 + number of the relative kinds)).

    Positions are in logarithmic buckets, with projections of their own or those of the content, as
    the layer is configured.

    Source: He et al., DeBERTaV3 (2021).
    """

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor,
        output_attentions: bool = False,
        query_states: Tensor | None = None,
        relative_pos: Tensor | None = None,
        rel_embeddings: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        heads = self.num_attention_heads
        # (batch * heads, length, head_dim), as the bias is computed.
        query = self.transpose_for_scores(
            self.query_proj(hidden_states if query_states is None else query_states), heads
        )
        key = self.transpose_for_scores(self.key_proj(hidden_states), heads)
        value = self.value_proj(hidden_states).unflatten(-1, (heads, -1)).transpose(1, 2)

        terms = 1 + sum(kind in self.pos_att_type for kind in ("c2p", "p2c"))
        bias = None
        if self.relative_attention and terms > 1:
            positions = self.pos_dropout(rel_embeddings)
            bias = self.disentangled_attention_bias(query, key, relative_pos, positions, terms)
            bias = bias.view(-1, heads, *bias.shape[1:])
        query, key = (x.view(-1, heads, *x.shape[1:]) for x in (query, key))
        out, weights = attention_forward(
            self,
            query,
            key,
            value,
            attention_mask.bool(),
            dropout=self.dropout.p if self.training else 0.0,
            scaling=1.0 / math.sqrt(self.attention_head_size * terms),
            is_causal=False,
            position_bias=bias,
            output_attentions=output_attentions,
        )
        return out.flatten(2), weights


REPLACEMENTS: dict[type[nn.Module], type[nn.Module]] = {
    DisentangledSelfAttention: FusedDisentangledSelfAttention
}
