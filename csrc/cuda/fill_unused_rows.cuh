// Fills the rows of a packed tensor that belong to no sequence, or lie beyond the longest one that
// the call allows.
#pragma once

#include "fastattn/sequence.h"
#include "ptx.cuh"
#include "unused_rows.h"

namespace fastattn::cuda {

constexpr int kFillThreads = 128, kFillBlocks = 8;  // per head

static FA_KERNEL(kFillThreads, 1) void fill_unused_rows(const __grid_constant__ UnusedRows params) {
  const int64_t head = blockIdx.x / kFillBlocks;
  const int64_t (&stride)[5] = params.tensor.stride;
  const auto begin_of = [&](int64_t index) {
    return clamp_of(index_at(params.cu_seqlens, index), 0, params.total);
  };
  // What lies between the rows of a sequence and those of the next one.
  for (int64_t next = blockIdx.x % kFillBlocks; next <= params.sequences; next += kFillBlocks) {
    int64_t first = 0;
    if (next > 0) first = min_of(begin_of(next), begin_of(next - 1) + params.longest);
    const int64_t last = next == params.sequences ? params.total : begin_of(next);
    for (int64_t n = threadIdx.x; n < (last - first) * params.columns; n += kFillThreads) {
      const int64_t row = first + n / params.columns, column = n % params.columns;
      const int64_t at = head * stride[2] + row * stride[3] + column * stride[4];
      if (params.element_bytes == 2) {
        static_cast<uint16_t*>(params.tensor.data)[at] = static_cast<uint16_t>(params.bits);
      } else {
        static_cast<uint32_t*>(params.tensor.data)[at] = params.bits;
      }
    }
  }
}

}  // namespace fastattn::cuda
