"""The functions: each one checks its arguments, and is differentiable where its docs say so."""

from fastattn.functional.attention import (
    attention,
    attention_varlen,
    merge_attention,
    scaled_dot_product_attention,
)
from fastattn.functional.helpers import (
    alibi_slopes,
    cu_seqlens_from_document_ids,
    cu_seqlens_from_lengths,
    cu_seqlens_from_position_ids,
    window_from_hf,
)
from fastattn.functional.norm import (
    add_layer_norm,
    add_rms_norm,
    layer_norm,
    qk_rms_norm,
    rms_norm,
)
from fastattn.functional.weights import attention_column_sums, attention_weights

__all__ = [
    "add_layer_norm",
    "add_rms_norm",
    "alibi_slopes",
    "attention",
    "attention_column_sums",
    "attention_varlen",
    "attention_weights",
    "cu_seqlens_from_document_ids",
    "cu_seqlens_from_lengths",
    "cu_seqlens_from_position_ids",
    "layer_norm",
    "merge_attention",
    "qk_rms_norm",
    "rms_norm",
    "scaled_dot_product_attention",
    "window_from_hf",
]
