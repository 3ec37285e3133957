// What the kernels of the forward pass are told besides the problem: the host's choices.
#pragma once

#include "column_layout.h"
#include "fastattn/sequence.h"

namespace fastattn::cuda {

struct ForwardParams {
  AttentionParams attention;
  ColumnLayout query, key, value, out;
  bool has_paired_out;  // out takes two columns with one store
  int32_t pack;         // heads of a KV head whose rows share a tile: all of the group, or 1
  int32_t splits;       // parts of the keys that run in parallel; > 1: out and lse are partial
  int32_t tiles;        // of query rows, per head (packed: per KV head)
  // Where splits > 1, (splits, rows, head_dim_v) and (splits, rows), overwritten; rows in the order
  // of lse, contiguous. A part that saw nothing writes 0 and -inf.
  float* partial_out;
  float* partial_lse;
  int64_t partial_rows;
};

// Of the pages, or the rings, of a cache; 0: the rows of a sequence follow one another to the end.
FA_INLINE int64_t rows_of_entry(const CacheView& cache) {
  return max_of(cache.page_rows, cache.ring_rows);
}

// Row (sequence, head, i) of the partial results.
FA_INLINE int64_t partial_row(const AttentionParams& p, int64_t sequence, int64_t first_q,
                              int64_t head, int64_t i) {
  return p.cu_seqlens_q.data != nullptr ? head * p.total_q + first_q + i
                                        : (sequence * p.heads_q + head) * p.seqlen_q + i;
}

// Whether scores, or weights, need more than the products, the scale and positions. (A scale <= 0
// would turn the order round.)
FA_INLINE bool has_terms(const AttentionParams& p) {
  return p.softcap != 0 || p.bias.data != nullptr || p.alibi_slopes.data != nullptr ||
         p.mask.data != nullptr || p.dropout_p != 0 || !(p.scale > 1e-30);
}

}  // namespace fastattn::cuda
