// Fills the rows of a packed tensor that belong to no sequence.
#pragma once

#include "fastattn/sequence.h"
#include "ptx.cuh"
#include "unused_rows.h"

namespace fastattn::cuda {

constexpr int kFillThreads = 128, kFillBlocks = 8;  // per head

static FA_KERNEL(kFillThreads, 1) void fill_unused_rows(const __grid_constant__ UnusedRows params) {
  const int64_t head = blockIdx.x / kFillBlocks, share = blockIdx.x % kFillBlocks;
  const int64_t first = clamp_of(index_at(params.cu_seqlens, params.last), 0, params.total);
  const int64_t (&stride)[5] = params.tensor.stride;
  const int64_t count = (params.total - first) * params.columns;
  for (int64_t n = share * kFillThreads + threadIdx.x; n < count; n += kFillBlocks * kFillThreads) {
    const int64_t row = first + n / params.columns, column = n % params.columns;
    const int64_t at = head * stride[2] + row * stride[3] + column * stride[4];
    if (params.element_bytes == 2) {
      static_cast<uint16_t*>(params.tensor.data)[at] = static_cast<uint16_t>(params.bits);
    } else {
      static_cast<uint32_t*>(params.tensor.data)[at] = params.bits;
    }
  }
}

}  // namespace fastattn::cuda
