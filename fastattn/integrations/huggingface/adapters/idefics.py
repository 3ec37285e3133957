"""IDEFICS: the resampler, whose latents attend to an image and to themselves."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers.models.idefics import perceiver

from fastattn.functional import attention

__all__ = ["REPLACEMENTS"]


class FusedIdeficsPerceiverAttention(perceiver.IdeficsPerceiverAttention):
    """Queries are the latents; keys and values the context with the latents behind it."""

    def forward(self, context: Tensor, latents: Tensor) -> Tensor:
        latents = self.latents_layer_norm(latents)
        seen = torch.cat((self.context_layer_norm(context), latents), dim=-2)
        query, key, value = (
            project(x).view(*x.shape[:-1], self.n_heads, self.head_dim)
            for project, x in ((self.q_proj, latents), (self.k_proj, seen), (self.v_proj, seen))
        )
        if self.qk_layer_norms:
            query, key = self.q_layer_norm(query), self.k_layer_norm(key)
        out = attention(query, key, value, scale=self.qk_scale, layout="bshd")
        assert isinstance(out, Tensor)
        result: Tensor = self.output_proj(out.flatten(-2))
        return result


REPLACEMENTS: dict[type[nn.Module], type[nn.Module]] = {
    perceiver.IdeficsPerceiverAttention: FusedIdeficsPerceiverAttention
}
