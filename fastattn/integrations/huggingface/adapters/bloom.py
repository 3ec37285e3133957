"""BLOOM: ALiBi as the model makes it, a row of biases over the keys of each sequence and head."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F
from transformers.models.bloom.modeling_bloom import BloomAttention

from fastattn.integrations.huggingface.attention import attention_forward

__all__ = ["REPLACEMENTS"]


class FusedBloomAttention(BloomAttention):
    """softmax(q k / sqrt(head_dim) + alibi) v of the visible keys.

    alibi counts the keys that are no padding, and so it is slopes only without padding. As a bias
    it is a row for all queries, never expanded.
    """

    def forward(
        self,
        hidden_states: Tensor,
        residual: Tensor,
        alibi: Tensor,
        attention_mask: Tensor | None,
        layer_past: Any = None,
        use_cache: bool = False,
        output_attentions: bool = False,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        query, key, value = self._reshape(self.query_key_value(hidden_states))
        if layer_past is not None:
            key, value = layer_past.update(key, value, self.layer_idx)
        out, weights = attention_forward(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.attention_dropout.p if self.training else 0.0,
            scaling=self.inv_norm_factor,
            is_causal=True,
            position_bias=alibi.view(len(query), self.num_heads, 1, -1),
            output_attentions=output_attentions,
        )
        out = self._project(out.flatten(2))
        return residual + F.dropout(out, self.hidden_dropout, self.training), weights

    def _project(self, context: Tensor) -> Tensor:
        if self.pretraining_tp <= 1 or not self.slow_but_exact:
            out: Tensor = self.dense(context)
            return out
        # The parts of tensor parallelism, summed in their order and without the bias, as trained.
        width = self.hidden_size / self.pretraining_tp
        out = context.new_zeros(())
        for i in range(self.pretraining_tp):
            part = slice(int(i * width), int((i + 1) * width))
            out = out + F.linear(context[..., part], self.dense.weight[:, part])
        return out


REPLACEMENTS: dict[type[nn.Module], type[nn.Module]] = {BloomAttention: FusedBloomAttention}
