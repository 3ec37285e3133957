"""The mask function that transformers' models call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from transformers.masking_utils import bidirectional_mask_function, prepare_padding_mask, sdpa_mask
from transformers.utils.import_utils import is_tracing

__all__ = ["attention_mask"]


def attention_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    *,
    kv_offset: int = 0,
    mask_function: Callable[..., Any],
    attention_mask: Tensor | None = None,
    allow_is_bidirectional_skip: bool = False,
    **more: Any,
) -> Tensor | None:
    """What the queries of a layer may see, as transformers' ``AttentionMaskInterface`` defines it.

    Masks are those of "sdpa", boolean (batch, 1, q_length, kv_length), or None where
    ``attention_forward`` knows what is visible. Padding alone is one row for all queries, by a
    stride of 0: it is not written out, and is known for what it is.
    """
    if mask_function is not bidirectional_mask_function or attention_mask is None:
        mask: Tensor | None = sdpa_mask(
            batch_size,
            q_length,
            kv_length,
            kv_offset=kv_offset,
            mask_function=mask_function,
            attention_mask=attention_mask,
            allow_is_bidirectional_skip=allow_is_bidirectional_skip,
            **more,
        )
        return mask
    padding = prepare_padding_mask(attention_mask, kv_length, kv_offset)
    visible = padding[:, kv_offset : kv_offset + kv_length]
    if allow_is_bidirectional_skip and not is_tracing(visible) and visible.all():
        return None
    return visible[:, None, None].expand(batch_size, 1, q_length, kv_length)  # type: ignore[no-any-return]
