"""WavLM: attention with a relative position bias that each query gates."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.models.wavlm import modeling_wavlm

from fastattn.integrations.huggingface.attention import attention_forward

__all__ = ["REPLACEMENTS"]


class FusedWavLMAttention(modeling_wavlm.WavLMAttention):
    """::

        update_i, reset_i = sigmoid(sums of 4 of linear(x_i))                     for each head
        s_ij = scale * q_i . k_j + (2 + update_i * (reset_i * c - 1)) * bias_ij

    The bias is that of the first layer, which later layers get as position_bias: (heads, frames,
    frames) here, not repeated for each of the batch. The weights, when they are asked for, are the
    mean of the heads, at every head, as transformers has them.

    Source: Chen et al., WavLM (2022).
    """

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_bias: Tensor | None = None,
        index: int = 0,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        frames = hidden_states.shape[1]
        if position_bias is None:
            position_bias = self.compute_bias(frames, frames)
        gate = self._gate(self._heads(hidden_states))
        query, key, value = (
            self._heads(project(hidden_states))
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        out, weights = attention_forward(
            self,
            query,
            key,
            value,
            None if attention_mask is None else attention_mask.eq(1)[:, None, None],
            dropout=self.dropout if self.training else 0.0,
            scaling=self.scaling,
            is_causal=False,
            position_bias=gate * position_bias.view(-1, self.num_heads, frames, frames),
        )
        if weights is not None:
            weights = weights.mean(1, keepdim=True).expand_as(weights)
        return self.out_proj(out.flatten(2)), weights, position_bias

    def _heads(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:2], self.num_heads, self.head_dim).transpose(1, 2)

    def _gate(self, hidden_states: Tensor) -> Tensor:
        """(batch, heads, frames, 1)"""
        sums = self.gru_rel_pos_linear(hidden_states).unflatten(-1, (2, 4)).sum(-1)
        update, reset = sums.sigmoid().chunk(2, dim=-1)
        gate: Tensor = update * (reset * self.gru_rel_pos_const - 1.0) + 2.0
        return gate


REPLACEMENTS = {modeling_wavlm.WavLMAttention: FusedWavLMAttention}
