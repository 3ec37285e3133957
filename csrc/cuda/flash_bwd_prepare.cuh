// What the backward pass computes once per query row, and the gradient of the sinks, which needs
// nothing else.
#pragma once

#include "backward_params.h"
#include "softmax.cuh"

namespace fastattn::cuda {

// 8 lanes share a row, so that a warp's loads are 128 bytes wide.
constexpr int kPrepareThreads = 256, kPrepareLanes = 8, kPrepareRows = 64;

FA_DEVICE float product_of_pair(uint32_t a, uint32_t b, float) {
  return __uint_as_float(a) * __uint_as_float(b);
}
template <typename T>
FA_DEVICE float product_of_pair(uint32_t a, uint32_t b, T) {
  const auto low = [](uint32_t x) { return ptx::to_float(T{static_cast<uint16_t>(x)}); };
  return fmaf(low(a >> 16), low(b >> 16), low(a) * low(b));
}

// This lane's part of sum_d dout * out.
template <typename T>
FA_DEVICE float partial_delta(const BackwardParams& params, const T* dout, const T* out) {
  constexpr int kColumns = 16 / sizeof(T);
  float sum = 0.0f;
  for (int first = ptx::lane_id() % kPrepareLanes * kColumns; first < params.out.columns;
       first += kPrepareLanes * kColumns) {
    const Chunk a = load_chunk(dout, params.dout, first), b = load_chunk(out, params.out, first);
#pragma unroll
    for (int w = 0; w < 4; ++w) sum += product_of_pair(a.word[w], b.word[w], T{});
  }
  return sum;
}

// A block has kPrepareRows rows of one head; all lanes of a warp go all the way.
template <typename T>
FA_KERNEL(kPrepareThreads, 1)
void flash_bwd_prepare(const __grid_constant__ BackwardParams params) {
  const AttentionGradParams& g = params.gradient;
  const AttentionParams& p = g.forward;
  // Divisions are of 32 bits: those of 64 are calls.
  const uint32_t tile = blockIdx.x % params.tiles, at = blockIdx.x / params.tiles;
  const uint32_t heads = static_cast<uint32_t>(p.heads_q), head = at % heads;
  const Sequence seq = sequence_at(p, at / heads);
  const int64_t origin = padded_origin(params, seq, head);
  const int first = static_cast<int>(threadIdx.x) / kPrepareLanes;
#pragma unroll 1
  for (int r = first; r < kPrepareRows; r += kPrepareThreads / kPrepareLanes) {
    const int64_t i = static_cast<int64_t>(tile) * kPrepareRows + r;
    const float* lse = static_cast<const float*>(p.lse.data);
    float row_lse = infinity(), delta = 0.0f;
    const bool is_seen = i < seq.len_q && lse[row_offset(p.lse, seq, head, i)] != -infinity();
    if (is_seen) {
      delta = partial_delta(params,
                            static_cast<const T*>(g.dout.data) + row_offset(g.dout, seq, head, i),
                            static_cast<const T*>(p.out.data) + row_offset(p.out, seq, head, i));
    }
#pragma unroll
    for (int mask = 1; mask < kPrepareLanes; mask *= 2) {
      delta += ptx::shuffle_xor(delta, mask);
    }
    if (ptx::lane_id() % kPrepareLanes != 0 || i >= seq.rows_q) continue;
    if (is_seen) {
      row_lse = lse[row_offset(p.lse, seq, head, i)] * (has_terms(p) ? 1.0f : kLog2e);
      if (g.dlse.data != nullptr) {
        delta -= static_cast<const float*>(g.dlse.data)[row_offset(g.dlse, seq, head, i)];
      }
    }
    params.row_lse[origin + i] = row_lse;
    params.delta[origin + i] = delta;
  }
}

constexpr int kSinkThreads = 256;

// d(sink) = -sum_i exp(sink - lse_i) delta_i over all rows of a head, in a fixed order.
static FA_KERNEL(kSinkThreads,
                 1) void flash_bwd_sink(const __grid_constant__ BackwardParams params) {
  const AttentionParams& p = params.gradient.forward;
  const int64_t head = blockIdx.x;
  const bool is_natural = has_terms(p);
  const float sink = sink_of(p, head) * (is_natural ? 1.0f : kLog2e);
  double sum = 0;
  for (int64_t index = 0; index < p.batch0 * p.batch1; ++index) {
    const Sequence seq = sequence_at(p, index);
    const int64_t origin = padded_origin(params, seq, head);
    for (int64_t i = threadIdx.x; i < seq.len_q; i += kSinkThreads) {
      const float distance = sink - params.row_lse[origin + i];
      const float weight = ptx::exp2(distance * (is_natural ? kLog2e : 1.0f));
      if (weight != 0) sum -= static_cast<double>(weight) * params.delta[origin + i];
    }
  }
#pragma unroll
  for (int mask = 1; mask < ptx::kWarpSize; mask *= 2) sum += ptx::shuffle_xor(sum, mask);
  auto* sums = static_cast<double*>(ptx::shared_memory());
  if (ptx::lane_id() == 0) ptx::store_shared(sums + threadIdx.x / ptx::kWarpSize, sum);
  ptx::sync_block();
  if (threadIdx.x != 0) return;
  for (int warp = 1; warp < kSinkThreads / ptx::kWarpSize; ++warp) {
    sum += ptx::load_shared(sums + warp);
  }
  static_cast<float*>(params.gradient.dsink.data)[head * params.gradient.dsink.stride[2]] =
      static_cast<float>(sum);
}

}  // namespace fastattn::cuda
