// Makes one result of those of the parts of a row's keys:
//
//   lse = log sum_s exp(lse_s),  out = sum_s exp(lse_s - lse) out_s
//
// A block has a row; its warps share the parts, which are read once, whole rows at a time.
#pragma once

#include "decode_tiles.h"
#include "fastattn/cuda_api.h"
#include "forward_tile.cuh"

namespace fastattn::cuda {

constexpr int kCombineWarps = 8, kCombineThreads = 32 * kCombineWarps;

struct CombineShared {
  float weight[kMaxSplits];
  float out[kCombineWarps][kMaxHeadDim];
};

template <typename T>
class FlashCombine {
  static constexpr int kColumns = kMaxHeadDim / 32;  // of a lane

 public:
  FA_DEVICE FlashCombine(const ForwardParams& given, CombineShared& memory)
      : params(given),
        p(given.attention),
        shared(memory),
        warp(static_cast<int>(threadIdx.x) / 32),
        lane(static_cast<int>(threadIdx.x) % 32) {}

  FA_DEVICE void run() {
    const uint32_t row = blockIdx.x, rows = static_cast<uint32_t>(p.seqlen_q);
    const uint32_t heads = static_cast<uint32_t>(p.heads_q);
    const int64_t i = row % rows, head = row / rows % heads;
    const Sequence seq = sequence_at(p, row / rows / heads);
    if (i >= seq.rows_q) return;
    first = partial_row(p, seq.index, seq.first_q, head, i);
    RowResult result = {0.0f, -infinity()};
    if (i < seq.len_q) result = weigh(sink_of(p, head));
    ptx::sync_block();  // the weights are there
    if (i < seq.len_q) add_parts();
    ptx::sync_block();
    if (threadIdx.x == 0) *row_of_result<float>(p.lse, seq, head, i) = result.lse;
    store_out(row_of_result<T>(p.out, seq, head, i), result.output_scale);
  }

 private:
  // Each warp sees all parts; one of them writes their weights, relative to the maximum.
  FA_DEVICE RowResult weigh(float sink) {
    float row_max = -infinity(), row_sum = 0.0f;
    for (int s = lane; s < params.splits; s += 32) row_max = fmaxf(row_max, lse_of(s));
    for (int mask = 16; mask > 0; mask /= 2) {
      row_max = fmaxf(row_max, ptx::shuffle_xor(row_max, mask));
    }
    const float reference = row_max == -infinity() ? 0.0f : row_max;
    for (int s = lane; s < params.splits; s += 32) {
      const float weight = ptx::exp2((lse_of(s) - reference) * kLog2e);
      if (warp == 0) ptx::store_shared(&shared.weight[s], weight);
      row_sum += weight;
    }
    for (int mask = 16; mask > 0; mask /= 2) row_sum += ptx::shuffle_xor(row_sum, mask);
    return finalize_row<Maximum::kScore>(row_max, row_sum, sink);
  }

  FA_DEVICE float lse_of(int split) const {
    return params.partial_lse[split * params.partial_rows + first];
  }

  FA_DEVICE void add_parts() {
    float acc[kColumns] = {};
    // Loads of several parts at once: what takes the time is to wait for them.
#pragma unroll 4
    for (int s = warp; s < params.splits; s += kCombineWarps) {
      const float weight = ptx::load_shared(&shared.weight[s]);
      const float* part = params.partial_out + (s * params.partial_rows + first) * p.head_dim_v;
#pragma unroll
      for (int c = 0; c < kColumns; ++c) {
        const int column = c * 32 + lane;
        if (column < p.head_dim_v) acc[c] = fmaf(weight, part[column], acc[c]);
      }
    }
#pragma unroll
    for (int c = 0; c < kColumns; ++c) ptx::store_shared(&shared.out[warp][c * 32 + lane], acc[c]);
  }

  FA_DEVICE void store_out(T* out, float scale) {
    const int column = static_cast<int>(threadIdx.x);
    if (column >= p.head_dim_v) return;
    float sum = 0.0f;
    if (scale != 0) {  // else nothing has been added up
#pragma unroll
      for (int w = 0; w < kCombineWarps; ++w) sum += ptx::load_shared(&shared.out[w][column]);
      sum *= scale;
    }
    store_pair(out, p.out.stride[4], false, column, column + 1, sum, 0.0f);
  }

  const ForwardParams& params;
  const AttentionParams& p;
  CombineShared& shared;
  const int warp, lane;
  int64_t first;  // the row's place among those of a part
};
static_assert(kCombineThreads >= kMaxHeadDim);

template <typename T>
FA_KERNEL(kCombineThreads, 1)
void flash_combine(const __grid_constant__ ForwardParams params) {
  FlashCombine<T>(params, *static_cast<CombineShared*>(ptx::shared_memory())).run();
}

}  // namespace fastattn::cuda
