// What a kernel is told: POD structs, one per op. Strides are in elements; no data means absent.
//
// Every tensor has two batch dimensions, so that five-dimensional inputs (AlphaFold's row and
// column attention with a pair bias broadcast over rows) need no copy. The flattened batch index is
// b = b0 * batch1 + b1.
#pragma once

#include "types.h"

namespace fastattn {

// Strides of the dimensions (batch0, batch1, head, row, column); 0 where a dimension is broadcast.
struct ConstTensor {
  const void* data;
  int64_t stride[5];
};

struct MutableTensor {
  void* data;
  int64_t stride[5];
};

// int32 or int64 values, contiguous.
struct IndexArray {
  const void* data;
  bool is_int64;
};

FA_INLINE int64_t index_at(const IndexArray& array, int64_t i) {
  return array.is_int64 ? static_cast<const int64_t*>(array.data)[i]
                        : static_cast<const int32_t*>(array.data)[i];
}

// Where a KV cache keeps row j of sequence b; forward only.
struct CacheView {
  // Paged: in row j % page_rows of entry block_table[b, j / page_rows] of key and value.
  IndexArray block_table;  // (batch0, pages_per_sequence), nullable
  int64_t entries, pages_per_sequence, page_rows;
  int64_t ring_rows;      // ring buffer: in row j % ring_rows of entry b; 0: none
  IndexArray key_starts;  // (batch0) rows before it are hidden, nullable
  bool appended;          // besides key_lengths there is a key for each of the queries
  ConstTensor
      key_scale;  // int8: (entries, -, heads_kv, rows, -) float, what a row is multiplied by
  ConstTensor value_scale;
};

FA_INLINE int64_t offset_of(const int64_t (&stride)[5], int64_t b0, int64_t b1, int64_t head) {
  return b0 * stride[0] + b1 * stride[1] + head * stride[2];
}

constexpr int64_t kUnlimited = -1;

// Scores s = scale * q.k; s = softcap * tanh(s / softcap); s += bias; s -= slope * |p_j - p_i|;
// hidden keys get -inf. Then p = exp(s - lse), lse = log(sum_j exp(s_j) + exp(sink)) and
// out = sum_j p_j v_j.
//
// Key j is visible to query i when -window_left <= p_j - p_i <= window_right (0 when causal),
// mask[i, j] is true, i < query length and j < key length. Positions: p_i = query_offset + i +
// corner, p_j = key_offset + j, with corner = key length - query length, or 0 when top_left.
//
// Packed sequences: cu_seqlens_* are set, batch0 is the number of sequences and batch1 is 1;
// stride[0] of query, key, value, out and lse (and of their gradients) is 0 and the rows of
// sequence b begin at cu_seqlens[b]. seqlen_q and seqlen_k are then the largest lengths. mask and
// bias keep their batch stride. With a cache only the queries can be packed.
struct AttentionParams {
  DType dtype;       // of query, key, value and out (an int8 cache: of query and out)
  DType bias_dtype;  // any
  int64_t batch0, batch1, heads_q, heads_kv;
  int64_t seqlen_q, seqlen_k, head_dim, head_dim_v;

  ConstTensor query;  // (batch0, batch1, heads_q, seqlen_q, head_dim)
  ConstTensor key;    // (batch0, batch1, heads_kv, seqlen_k, head_dim)
  ConstTensor value;  // (batch0, batch1, heads_kv, seqlen_k, head_dim_v)
  MutableTensor out;  // (batch0, batch1, heads_q, seqlen_q, head_dim_v), overwritten
  // (batch0, batch1, heads_q, seqlen_q, -), overwritten. real: float, or double for float64.
  MutableTensor lse;

  ConstTensor mask;          // (batch0, batch1, heads_q, seqlen_q, seqlen_k) bool bytes, nullable
  ConstTensor bias;          // same shape, bias_dtype, nullable
  ConstTensor alibi_slopes;  // (batch0, batch1, heads_q, -, -) real, nullable
  ConstTensor sink;          // (-, -, heads_q, -, -) real, nullable

  IndexArray query_lengths, key_lengths;  // (batch0 * batch1), nullable
  IndexArray cu_seqlens_q, cu_seqlens_k;  // (batch0 + 1), nullable, both or neither
  int64_t total_q, total_k;               // rows of the packed tensors (0 when not packed)
  CacheView cache;                        // all zero: none

  bool top_left;
  bool batch_invariant;  // one schedule for every shape: a row's bits depend on that row alone
  // The backward pass will compute the scores again, so that their rounding has to cancel against
  // that of lse: whole rows of tiles, as it goes through them.
  bool for_backward;
  int64_t window_left, window_right;  // kUnlimited or >= 0
  int64_t query_offset, key_offset;
  double scale;
  double softcap;    // 0: none
  double dropout_p;  // in [0, 1]
  uint64_t philox_seed, philox_offset;
  // (2) int64: seed and offset where only the kernel can read them; nullable, else it replaces the
  // two above. Only csrc/cuda reads it.
  IndexArray philox;
};

// dS = P * (dP - delta), delta_i = sum_d dout * out - dlse. Gradients are overwritten; absent ones
// are not computed.
struct AttentionGradParams {
  AttentionParams forward;  // with out and lse as the forward pass wrote them (read only here)
  ConstTensor dout;         // shape of out
  ConstTensor dlse;         // shape of lse, nullable
  MutableTensor dquery;     // shape of query, nullable
  MutableTensor dkey;       // shape of key; nullable, together with dvalue
  MutableTensor dvalue;     // shape of value
  MutableTensor dbias;      // the bias before broadcasting: stride 0 where it was, nullable
  MutableTensor dsink;      // (-, -, heads_q, -, -) real, nullable
  bool deterministic;       // equal calls give equal bits; those of csrc/cpu always do
};

// Probabilities of chosen rows and heads: weights[b, h, r, j] = exp(s[rows[r], j] - lse[rows[r]]).
struct AttentionWeightsParams {
  AttentionParams forward;  // value and out are absent; lse is read only
  IndexArray rows;          // (num_rows) query rows
  IndexArray heads;         // (num_heads) query heads
  int64_t num_rows, num_heads;
  // One of the two, real, overwritten:
  MutableTensor weights;      // (batch0, batch1, num_heads, num_rows, seqlen_k)
  MutableTensor column_sums;  // (batch0, batch1, heads_q, -, seqlen_k): the sum over all rows
};

}  // namespace fastattn
