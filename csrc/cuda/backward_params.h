// What the kernels of the backward pass are told besides the problem: the host's choices.
#pragma once

#include "forward_params.h"

namespace fastattn::cuda {

struct BackwardParams {
  AttentionGradParams gradient;
  ColumnLayout query, key, value, out, dout;
  bool has_paired_dquery, has_paired_dkey, has_paired_dvalue;  // see ForwardParams
  int32_t tiles;  // of the rows or keys that the blocks of this kernel own, per head
  // Softmax runs on the products with this unit, or, where they have terms, on the scores.
  float unit;
  float scale, inner_scale;  // of the products; the same divided by softcap
  float survivor;            // what dropout multiplies the weights by that it keeps
  // Of each query row, (heads_q, padded_rows), overwritten by flash_bwd_prepare; see padded_row().
  // A row that saw nothing, or takes no part, has row_lse = infinity: its weights are 0.
  float* row_lse;  // lse where scores have terms (see Maximum), else in powers of two
  float* delta;    // sum_d dout * out - dlse
  int64_t padded_rows;
  // (heads_q, padded_rows, head_dim of the kernel) in the order of dq_fragment(), zero at first:
  // where the kernel for dK and dV adds dQ / scale. Null where another kernel owns dQ.
  float* dquery_sums;
  // Where these sums have a fixed order, else null; zero at first. How many blocks have begun, and
  // of each part of the sums that a warp adds to, whose turn it is; see DqTurns.
  uint32_t *begun, *dquery_turns;
};

// The rows of every sequence begin at a multiple of this: those of an accumulator belong to one.
constexpr int64_t kRowAlignment = 16;
// So many rows behind the last one may be read, by tiles that reach beyond their sequence; what
// they hold means nothing.
constexpr int64_t kRowSlack = 128;

// Where row 0 of a sequence lies within the padded rows of a head, and how many rows that makes.
// Packed sequences need no table of their own: each is moved to the right by less than its index
// times kRowAlignment.
FA_INLINE int64_t padded_row(const AttentionParams& p, int64_t index, int64_t first_q) {
  if (p.cu_seqlens_q.data == nullptr) return index * round_up(p.seqlen_q, kRowAlignment);
  return (first_q / kRowAlignment + index) * kRowAlignment;
}
FA_INLINE int64_t padded_rows(const AttentionParams& p) {
  return padded_row(p, p.batch0 * p.batch1, p.total_q);
}
// Where row 0 of a sequence and head lies in row_lse and delta.
FA_INLINE int64_t padded_origin(const BackwardParams& params, const Sequence& seq, int64_t head) {
  return head * params.padded_rows + padded_row(params.gradient.forward, seq.index, seq.first_q);
}

// Row i of a sequence in query, out, lse, or a gradient of theirs.
template <typename View>
FA_INLINE int64_t row_offset(const View& tensor, const Sequence& seq, int64_t head, int64_t i) {
  return offset_of(tensor.stride, seq.b0, seq.b1, head) + (seq.first_q + i) * tensor.stride[3];
}

}  // namespace fastattn::cuda
