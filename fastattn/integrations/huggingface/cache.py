"""A dynamic cache of transformers whose layers grow in place."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import DynamicLayer

__all__ = ["GrowingLayer", "growing_cache"]


def growing_cache(config: PreTrainedConfig) -> DynamicCache:
    """A ``DynamicCache`` for a model of this configuration that writes new tokens where there is
    room for them, instead of copying all that it holds for each.

    Layers with a sliding window, and others that are not plain, stay transformers' own.

    >>> from fastattn.integrations import huggingface
    >>> from transformers import AutoModelForCausalLM, LlamaConfig
    >>> config = LlamaConfig(vocab_size=99, hidden_size=32, intermediate_size=48,
    ...                      num_hidden_layers=2, num_attention_heads=4, pad_token_id=0)
    >>> model, _ = huggingface.patch(AutoModelForCausalLM.from_config(config))
    >>> prompt = torch.tensor([[5, 6, 7]])
    >>> tokens = model.generate(prompt, past_key_values=growing_cache(config), max_new_tokens=4)
    """
    cache = DynamicCache(config=config)
    if cache.layer_class_to_replicate is DynamicLayer:
        cache.layer_class_to_replicate = GrowingLayer
    cache.layers = [GrowingLayer() if type(x) is DynamicLayer else x for x in cache.layers]
    return cache


class GrowingLayer(DynamicLayer):
    """keys and values are the front of buffers with room behind them: half of their length more
    when they are moved, so that the copies of a whole generation are three times its tokens at
    most."""

    keys: Any
    values: Any
    _buffers: tuple[Tensor, Tensor] | None = None

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        differentiable = key_states.requires_grad or value_states.requires_grad
        if differentiable and torch.is_grad_enabled():  # what is saved must not be written to
            updated: tuple[Tensor, Tensor] = super().update(key_states, value_states)
            return updated
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        before = self.get_seq_length()
        total = before + key_states.shape[-2]
        if self._buffers is None or not self._has_room(total):
            room = total + max(total // 2, 64)
            self._buffers = (
                _moved(self.keys, key_states, room),
                _moved(self.values, value_states, room),
            )
        for buffer, new in zip(self._buffers, (key_states, value_states), strict=True):
            buffer[..., before:total, :].copy_(new)
        self.keys, self.values = (buffer[..., :total, :] for buffer in self._buffers)
        return self.keys, self.values

    def _has_room(self, total: int) -> bool:
        """Whether keys and values are still the front of the buffers (transformers may have put
        others in their place, for beams for example), and more fits."""
        assert self._buffers is not None
        held = zip(self._buffers, (self.keys, self.values), strict=True)
        return all(
            x.data_ptr() == buffer.data_ptr()
            and x.shape[:-2] == buffer.shape[:-2]
            and x.stride() == buffer.stride()
            and buffer.shape[-2] >= total
            for buffer, x in held
        )


def _moved(held: Tensor, new: Tensor, room: int) -> Tensor:
    buffer = new.new_empty((*new.shape[:-2], room, new.shape[-1]))
    if held.numel() > 0:
        buffer[..., : held.shape[-2], :].copy_(held)
    return buffer
