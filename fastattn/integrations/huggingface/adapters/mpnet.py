"""MPNet: the encoder's relative position bias, with its gradient, beside the padding mask."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers.models.mpnet.modeling_mpnet import MPNetSelfAttention

from fastattn.integrations.huggingface.attention import attention_forward

__all__ = ["REPLACEMENTS"]


class FusedMPNetSelfAttention(MPNetSelfAttention):
    """softmax(q k / sqrt(head_dim) + position_bias) v of the visible keys."""

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_bias: Tensor | None = None,
        output_attentions: bool = False,
        **kwargs: Any,
    ) -> tuple[Tensor | None, ...]:
        shape = (*hidden_states.shape[:-1], self.num_attention_heads, self.attention_head_size)
        query, key, value = (
            project(hidden_states).view(shape).transpose(1, 2)
            for project in (self.q, self.k, self.v)
        )
        out, weights = attention_forward(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.dropout.p if self.training else 0.0,
            is_causal=False,
            position_bias=position_bias,
            output_attentions=output_attentions,
        )
        out = self.o(out.flatten(2))
        return (out, weights) if output_attentions else (out,)


REPLACEMENTS: dict[type[nn.Module], type[nn.Module]] = {MPNetSelfAttention: FusedMPNetSelfAttention}
