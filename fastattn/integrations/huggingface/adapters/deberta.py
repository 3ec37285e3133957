"""DeBERTa: its scores between content and position, as a bias with gradient."""

from __future__ import annotations

import math

from torch import Tensor, nn
from transformers.models.deberta.modeling_deberta import DisentangledSelfAttention

from fastattn.integrations.huggingface.attention import attention_forward

__all__ = ["REPLACEMENTS"]


class FusedDisentangledSelfAttention(DisentangledSelfAttention):
    """softmax(q k / s + content-to-position + position-to-content) v of the visible keys, where s =
    sqrt(head_dim * (1 + number of the relative kinds)).

    Raises:
        ValueError: for talking heads, whose scores depend on all heads at once.

    Source: He et al., DeBERTa: Decoding-enhanced BERT with Disentangled Attention (2021).
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
        if self.talking_head:
            raise ValueError(
                "talking_head: expected False (fused attention never holds the scores of all heads "
                "at once, to mix them), got True"
            )
        query, key, value = self._split(hidden_states)
        if query_states is not None:
            query, _, _ = self._split(query_states)
        query = query + self.q_bias.view(self.num_attention_heads, 1, -1)
        value = value + self.v_bias.view(self.num_attention_heads, 1, -1)

        terms = 1 + len(self.pos_att_type)
        scale = 1.0 / math.sqrt(self.attention_head_size * terms)
        bias = None
        if self.relative_attention and rel_embeddings is not None and relative_pos is not None:
            positions = self.pos_dropout(rel_embeddings)
            bias = self.disentangled_att_bias(query * scale, key, relative_pos, positions, terms)
        out, weights = attention_forward(
            self,
            query,
            key,
            value,
            attention_mask.bool(),
            dropout=self.dropout.p if self.training else 0.0,
            scaling=scale,
            is_causal=False,
            position_bias=bias if isinstance(bias, Tensor) else None,  # 0 without relative kinds
            output_attentions=output_attentions,
        )
        return out.flatten(2), weights

    def _split(self, states: Tensor) -> tuple[Tensor, ...]:
        fused: Tensor = self.transpose_for_scores(self.in_proj(states))
        return fused.chunk(3, dim=-1)


REPLACEMENTS: dict[type[nn.Module], type[nn.Module]] = {
    DisentangledSelfAttention: FusedDisentangledSelfAttention
}
