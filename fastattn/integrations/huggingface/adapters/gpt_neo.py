"""GPT-Neo: local windows in turn with global attention, of products that are not scaled."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.gpt_neo.modeling_gpt_neo import (
    GPTNeoFlashAttention2,
    GPTNeoSelfAttention,
)

from fastattn.integrations.huggingface.attention import attend

__all__ = ["REPLACEMENTS"]


class FusedGPTNeoSelfAttention(GPTNeoSelfAttention):
    """softmax(q k) v of the keys up to the query, in a local layer the last window_size of them.

    Positions are those in the cache, whatever its kind; transformers takes the last key of a static
    cache, filled or not, for that of the query.
    """

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        layer_past: Any = None,
        use_cache: bool = False,
        output_attentions: bool = False,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        query, key, value = (
            self._split_heads(project(hidden_states), self.num_heads, self.head_dim)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        first: int | Tensor = 0
        if layer_past is not None:
            first = layer_past.get_seq_length(self.layer_id)
            if isinstance(first, Tensor):
                first = first.clone()  # the cache counts in place
            key, value = layer_past.update(key, value, self.layer_id)
        options: dict[str, Any] = self._visible(first, query, key)
        if attention_mask is not None and attention_mask.dtype == torch.bool:
            seen = options.get("mask")
            options["mask"] = attention_mask if seen is None else attention_mask & seen
        else:
            options["bias"] = attention_mask
        options |= {"scale": 1.0, "dropout_p": self.attn_dropout.p if self.training else 0.0}
        out, weights = attend(query, key, value, output_attentions, options)
        return self.resid_dropout(self.out_proj(out.flatten(2))), weights

    def _visible(self, first: int | Tensor, query: Tensor, key: Tensor) -> dict[str, Any]:
        """What attention is to see, where the first query has position first."""
        window = self.config.window_size if self.attention_type == "local" else None
        if isinstance(first, int):
            reach = None if window is None else (window - 1, None)
            return {"causal": "top_left", "query_offset": first, "window": reach}
        # A static cache counts on the device: a mask instead of waiting for the number.
        positions = first + torch.arange(query.shape[2], device=query.device)
        distance = positions[:, None] - torch.arange(key.shape[2], device=query.device)
        seen = distance >= 0
        return {"mask": seen if window is None else seen & (distance < window)}


class FusedGPTNeoFlashAttention2(FusedGPTNeoSelfAttention, GPTNeoFlashAttention2):
    """The same for a model that was loaded with flash-attn, whose layers have another class."""


REPLACEMENTS: dict[type[nn.Module], type[nn.Module]] = {
    GPTNeoSelfAttention: FusedGPTNeoSelfAttention,
    GPTNeoFlashAttention2: FusedGPTNeoFlashAttention2,
}
