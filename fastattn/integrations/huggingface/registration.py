"""The name "fastattn" among transformers' attention implementations."""

from __future__ import annotations

import functools
from typing import Any

from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import sdpa_mask

from fastattn.integrations.huggingface.adapters import ADAPTERS
from fastattn.integrations.huggingface.attention import attention_forward

__all__ = ["NAME", "register"]

NAME = "fastattn"


def register() -> None:
    """Makes "fastattn" a value of ``attn_implementation``; a second call changes nothing.

    The mask function is registered with the attention function: without it transformers makes no
    masks, and causality and padding would be lost. It is that of "sdpa": boolean masks, or None
    where the attention function knows what is visible.

    A model whose attention does not go through the interface accepts any name and ignores it. With
    this name it raises, and :func:`patch` does what a name cannot.

    >>> from transformers import AutoModelForCausalLM, LlamaConfig
    >>> register()
    >>> config = LlamaConfig(vocab_size=99, hidden_size=32, intermediate_size=48,
    ...                      num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
    >>> model = AutoModelForCausalLM.from_config(config, attn_implementation="fastattn")
    >>> model.set_attn_implementation("sdpa")
    >>> model.set_attn_implementation("fastattn")
    """
    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    check = PreTrainedModel.get_correct_attn_implementation
    if not hasattr(check, "__wrapped__"):
        PreTrainedModel.get_correct_attn_implementation = _refusing_to_be_ignored(check)


def _refusing_to_be_ignored(check: Any) -> Any:
    @functools.wraps(check)
    def checked(self: PreTrainedModel, requested_attention: str | None, *more: Any) -> Any:
        if requested_attention == NAME:
            adapted = type(self).__module__ in ADAPTERS
            if adapted or not self._can_set_attn_implementation():
                raise ValueError(
                    f'attn_implementation: "{NAME}" would be ignored by {type(self).__name__}, '
                    "whose attention does not go through transformers' interface; load the model "
                    "with another one and call fastattn.integrations.huggingface.patch(model)"
                )
        return check(self, requested_attention, *more)

    return checked
