"""GPT-J before transformers 5.24: rotary embedding of the first columns of a head, in pairs."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers.models.gptj.modeling_gptj import GPTJAttention, GPTJFlashAttention2

from fastattn.functional import apply_rope_qk
from fastattn.integrations.huggingface.attention import attention_forward

__all__ = ["REPLACEMENTS"]


class FusedGPTJAttention(GPTJAttention):
    """Query and key are rotated in one pass, from the layer's tables."""

    def forward(
        self,
        hidden_states: Tensor,
        layer_past: Any = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        use_cache: bool | None = False,
        output_attentions: bool | None = False,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        if position_ids is None:
            raise ValueError("position_ids: expected (batch, length) or (1, length), got None")
        batch, length, _ = hidden_states.shape
        query, key, value = (
            project(hidden_states).view(batch, length, self.num_attention_heads, self.head_dim)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        sin, cos = self.embed_positions.to(query.device).chunk(2, dim=-1)
        query, key = apply_rope_qk(
            query,
            key,
            cos,
            sin,
            interleaved=True,
            positions=position_ids.expand(batch, -1),
            layout="bshd",
        )
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))
        if layer_past is not None:
            key, value = layer_past.update(key, value, self.layer_idx)
        out, weights = attention_forward(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.attn_dropout.p if self.training else 0.0,
            output_attentions=bool(output_attentions),
        )
        return self.resid_dropout(self.out_proj(out.flatten(2))), weights


class FusedGPTJFlashAttention2(FusedGPTJAttention, GPTJFlashAttention2):
    """The same for a model that was loaded with flash-attn, whose layers have another class."""


REPLACEMENTS: dict[type[nn.Module], type[nn.Module]] = {
    GPTJAttention: FusedGPTJAttention,
    GPTJFlashAttention2: FusedGPTJFlashAttention2,
}
