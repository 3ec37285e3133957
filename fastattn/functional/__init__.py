"""The functions: each one checks its arguments, and is differentiable where its docs say so."""

from fastattn.functional.activation import (
    bias_gelu,
    bias_relu,
    bias_silu,
    geglu,
    gelu,
    reglu,
    relu,
    silu,
    swiglu,
)
from fastattn.functional.attention import (
    attention,
    attention_varlen,
    merge_attention,
)
from fastattn.functional.helpers import (
    alibi_slopes,
    cu_seqlens_from_document_ids,
    cu_seqlens_from_lengths,
    cu_seqlens_from_position_ids,
    window_from_hf,
)
from fastattn.functional.kv_cache import attention_with_cache, kv_cache_update
from fastattn.functional.linear import linear
from fastattn.functional.norm import (
    add_layer_norm,
    add_rms_norm,
    layer_norm,
    qk_rms_norm,
    rms_norm,
)
from fastattn.functional.rope import (
    apply_rope,
    apply_rope_,
    apply_rope_qk,
    apply_rope_qk_,
    rope_tables,
)
from fastattn.functional.sdpa import scaled_dot_product_attention
from fastattn.functional.weights import attention_column_sums, attention_weights

__all__ = [
    "add_layer_norm",
    "add_rms_norm",
    "alibi_slopes",
    "apply_rope",
    "apply_rope_",
    "apply_rope_qk",
    "apply_rope_qk_",
    "attention",
    "attention_column_sums",
    "attention_varlen",
    "attention_weights",
    "attention_with_cache",
    "bias_gelu",
    "bias_relu",
    "bias_silu",
    "cu_seqlens_from_document_ids",
    "cu_seqlens_from_lengths",
    "cu_seqlens_from_position_ids",
    "geglu",
    "gelu",
    "kv_cache_update",
    "layer_norm",
    "linear",
    "merge_attention",
    "qk_rms_norm",
    "reglu",
    "relu",
    "rms_norm",
    "rope_tables",
    "scaled_dot_product_attention",
    "silu",
    "swiglu",
    "window_from_hf",
]
