// dQ from the sums that tiles of keys have added to.
#pragma once

#include "backward_params.h"
#include "dq_share.cuh"

namespace fastattn::cuda {

constexpr int kConvertWarps = 4;

// A warp has 16 rows of one head.
template <typename T, int kHeadDim>
FA_KERNEL(32 * kConvertWarps, 1)
void flash_bwd_convert_dq(const __grid_constant__ BackwardParams params) {
  const AttentionGradParams& g = params.gradient;
  const AttentionParams& p = g.forward;
  // Divisions are of 32 bits: those of 64 are calls.
  const uint32_t nth = blockIdx.x % params.tiles, index = blockIdx.x / params.tiles;
  const uint32_t heads = static_cast<uint32_t>(p.heads_q), head = index % heads;
  const Sequence seq = sequence_at(p, index / heads);
  const int64_t first = (static_cast<int64_t>(nth) * kConvertWarps + threadIdx.x / 32) * 16;
  const float* sums =
      dq_fragment<kHeadDim>(params.dquery_sums, padded_origin(params, seq, head) + first, 0);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int64_t i = first + row_of(0, 2 * half);
    if (i >= seq.rows_q) continue;
    const bool takes_part = i < seq.len_q;  // else its sums may be another sequence's
    T* row = static_cast<T*>(g.dquery.data) + row_offset(g.dquery, seq, head, i);
#pragma unroll 4
    for (int n = 0; n < kHeadDim / 8; ++n) {
      const float* pair = sums + 128 * n + 64 * half;
      const float low = takes_part ? pair[0] * params.scale : 0.0f;
      const float high = takes_part ? pair[32] * params.scale : 0.0f;
      store_pair(row, g.dquery.stride[4], params.has_paired_dquery, column_of(n, 0), p.head_dim,
                 low, high);
    }
  }
}

}  // namespace fastattn::cuda
