"""The name "fastattn" among transformers' attention implementations."""

from __future__ import annotations

import functools
from typing import Any

from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from fastattn.integrations.huggingface.adapters import ADAPTERS
from fastattn.integrations.huggingface.attention import attention_forward
from fastattn.integrations.huggingface.masks import attention_mask

__all__ = ["NAME", "register"]

NAME = "fastattn"


def register() -> None:
    """Makes "fastattn" a value of ``attn_implementation``; a second call changes nothing.

    The mask function is registered with the attention function: without it transformers makes no
    masks, and causality and padding would be lost. Its masks are those of "sdpa": boolean, or None
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
    AttentionMaskInterface.register(NAME, attention_mask)
    for name in ("get_correct_attn_implementation", "set_attn_implementation"):
        method = getattr(PreTrainedModel, name)
        if not hasattr(method, "__wrapped__"):
            setattr(PreTrainedModel, name, _refusing_to_be_ignored(method))


def _refusing_to_be_ignored(method: Any) -> Any:
    """The method, but for models that would accept the name and not heed it."""

    @functools.wraps(method)
    def checked(self: PreTrainedModel, requested: Any, *more: Any, **named: Any) -> Any:
        if requested == NAME:
            for part in self.modules():
                if isinstance(part, PreTrainedModel) and not _heeds_names(type(part)):
                    raise ValueError(
                        f'attn_implementation: "{NAME}" would be ignored by {type(part).__name__}, '
                        "whose attention does not go through transformers' interface; keep the one "
                        "that it has and call fastattn.integrations.huggingface.patch(model)"
                    )
        return method(self, requested, *more, **named)

    return checked


def _heeds_names(cls: type[PreTrainedModel]) -> bool:
    heeds: bool = cls._can_set_attn_implementation()
    return heeds and cls.__module__ not in ADAPTERS
