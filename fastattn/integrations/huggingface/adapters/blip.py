"""BLIP: attention of its vision encoder, and self- and cross-attention of its text model."""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor
from transformers.cache_utils import Cache, EncoderDecoderCache
from transformers.models.blip import modeling_blip, modeling_blip_text

from fastattn.integrations.huggingface.attention import attention_forward

__all__ = ["REPLACEMENTS"]

# The text model is an encoder or a decoder by an argument of its forward, which its attention does
# not get: only the mask says it. A causal mask that is left out would be lost.
modeling_blip_text.create_causal_mask = functools.partial(
    modeling_blip_text.create_causal_mask, allow_is_causal_skip=False
)


class FusedBlipAttention(modeling_blip.BlipAttention):
    """Attention over the patches of an image.

    Source: Li et al., BLIP (2022).
    """

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        qkv = self.qkv(hidden_states).unflatten(-1, (3, self.num_heads, self.head_dim))
        query, key, value = (x.transpose(1, 2) for x in qkv.unbind(2))
        out, weights = attention_forward(
            self,
            query,
            key,
            value,
            None,
            dropout=self.dropout.p if self.training else 0.0,
            scaling=self.scale,
            is_causal=False,
        )
        return self.projection(out.flatten(2)), weights


class FusedBlipTextSelfAttention(modeling_blip_text.BlipTextSelfAttention):
    """Attention of a text to itself, or with encoder_hidden_states to an image or a question.

    Without a mask every key is seen. cache is past_key_values, from transformers 5.24 on.
    """

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        held = past_key_values if cache is None else cache
        key, value = self._keys_and_values(hidden_states, encoder_hidden_states, held)
        out, weights = attention_forward(
            self,
            self._heads(self.query(hidden_states)),
            key,
            value,
            attention_mask if encoder_hidden_states is None else encoder_attention_mask,
            dropout=self.dropout.p if self.training else 0.0,
            is_causal=False,
        )
        return out.flatten(2), weights

    def _keys_and_values(
        self, hidden_states: Tensor, encoder_hidden_states: Tensor | None, cache: Any
    ) -> tuple[Tensor, Tensor]:
        """Those of all that was seen; those of encoder_hidden_states are computed once."""
        crosses = encoder_hidden_states is not None
        by_kind = isinstance(cache, EncoderDecoderCache)
        if by_kind and crosses and cache.is_updated.get(self.layer_idx):
            layer = cache.cross_attention_cache.layers[self.layer_idx]
            return layer.keys, layer.values
        states = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        key, value = self._heads(self.key(states)), self._heads(self.value(states))
        if by_kind and crosses:
            cache.is_updated[self.layer_idx] = True
        if by_kind:
            cache = cache.cross_attention_cache if crosses else cache.self_attention_cache
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx)
        return key, value

    def _heads(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:-1], -1, self.attention_head_size).transpose(1, 2)


REPLACEMENTS = {
    modeling_blip.BlipAttention: FusedBlipAttention,
    modeling_blip_text.BlipTextSelfAttention: FusedBlipTextSelfAttention,
}
