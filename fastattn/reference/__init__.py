"""The normative semantics of every op: eager, differentiable PyTorch, one function per op.

These functions say what the kernels must compute. They build whole matrices of scores, take any
floating dtype and any number of leading batch dimensions, and in float64 they are the oracle of
every test.

Products of matrices have the dtype of the inputs and are summed in float32, as matrix units do;
softmax, statistics and elementary functions are in float32 or wider. Run on bfloat16 inputs this is
the eager formula as a PyTorch user writes it, against which the accuracy contract measures the
kernels.
"""

from fastattn.reference.activation import (
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
from fastattn.reference.attention import (
    attention,
    attention_column_sums,
    attention_varlen,
    attention_weights,
    merge_attention,
    relative_positions,
    scaled_dot_product_attention,
    sequences,
    visibility,
)
from fastattn.reference.kv_cache import (
    attention_with_cache,
    cached_rows,
    kv_cache_update,
    quantize_rows,
)
from fastattn.reference.norm import (
    add_layer_norm,
    add_rms_norm,
    layer_norm,
    qk_rms_norm,
    rms_norm,
)
from fastattn.reference.philox import dropout_mask, philox_4x32
from fastattn.reference.rope import apply_rope, apply_rope_qk

__all__ = [
    "add_layer_norm",
    "add_rms_norm",
    "apply_rope",
    "apply_rope_qk",
    "attention",
    "attention_column_sums",
    "attention_varlen",
    "attention_weights",
    "attention_with_cache",
    "bias_gelu",
    "bias_relu",
    "bias_silu",
    "cached_rows",
    "dropout_mask",
    "geglu",
    "gelu",
    "kv_cache_update",
    "layer_norm",
    "merge_attention",
    "philox_4x32",
    "qk_rms_norm",
    "quantize_rows",
    "reglu",
    "relative_positions",
    "relu",
    "rms_norm",
    "scaled_dot_product_attention",
    "sequences",
    "silu",
    "swiglu",
    "visibility",
]
