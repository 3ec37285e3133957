"""Swin-v2: cosine attention in windows, with a continuous relative position bias."""

from __future__ import annotations

import math

from torch import Tensor
from torch.nn.functional import normalize
from transformers.models.swinv2 import modeling_swinv2

from fastattn.functional import attention, attention_weights
from fastattn.functional.weights import require_kernel

__all__ = ["REPLACEMENTS"]

_LARGEST_LOGIT_SCALE = math.log(100.0)


class FusedSwinv2SelfAttention(modeling_swinv2.Swinv2SelfAttention):
    """The learned scale of each head goes into its queries::

        s_ij = exp(min(logit_scale, log 100)) * cos(q_i, k_j) + 16 * sigmoid(mlp_ij) + 2 * mask_ij

    The mask of a shifted window counts twice in transformers, and so here.

    Source: Liu et al., Swin Transformer V2 (2022).
    """

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        output_attentions: bool | None = False,
    ) -> tuple[Tensor, ...]:
        # (images, windows, heads, ...): the masks are those of the windows of one image.
        windows = 1 if attention_mask is None else attention_mask.shape[0]
        heads = (self.num_attention_heads, self.attention_head_size)
        query, key, value = (
            project(hidden_states).unflatten(-1, heads).unflatten(0, (-1, windows)).transpose(2, 3)
            for project in (self.query, self.key, self.value)
        )
        scale = self.logit_scale.clamp(max=_LARGEST_LOGIT_SCALE).exp()
        query, key = normalize(query, dim=-1) * scale, normalize(key, dim=-1)
        bias = self._relative_position_bias()
        if attention_mask is not None:
            bias = bias + 2 * attention_mask.unsqueeze(1)

        if output_attentions:
            require_kernel("output_attentions", query)
        out, lse = attention(
            query,
            key,
            value,
            bias=bias,
            scale=1.0,
            dropout_p=self.dropout.p if self.training else 0.0,
            return_lse=True,
        )
        out = out.transpose(2, 3).reshape(hidden_states.shape)
        if not output_attentions:
            return (out,)
        weights = attention_weights(query, key, lse, bias=bias, scale=1.0)
        return out, weights.flatten(0, 1).to(query.dtype)

    def _relative_position_bias(self) -> Tensor:
        """(heads, positions of a window, positions of a window)"""
        of_offset = self.continuous_position_bias_mlp(self.relative_coords_table)
        of_offset = 16 * of_offset.view(-1, self.num_attention_heads).sigmoid()
        bias: Tensor = of_offset[self.relative_position_index].permute(2, 0, 1)
        return bias


REPLACEMENTS = {modeling_swinv2.Swinv2SelfAttention: FusedSwinv2SelfAttention}
