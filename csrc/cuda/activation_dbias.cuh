// The gradient of a bias from the sums of its slices of rows.
#pragma once

#include "activation_kernels.h"
#include "chunk.cuh"

namespace fastattn::cuda {

// 32 columns a block, in each of which every 8th slice is one thread's.
constexpr int kSumColumns = 32, kSumLanes = 8;

static FA_KERNEL(kSumColumns* kSumLanes,
                 1) void activation_dbias(const __grid_constant__ ActivationTask task) {
  const int lane = static_cast<int>(threadIdx.x) / kSumColumns;
  const int beside = static_cast<int>(threadIdx.x) % kSumColumns;
  const int64_t column = static_cast<int64_t>(blockIdx.x) * kSumColumns + beside;
  float sum = 0.0f;
  if (column < task.columns) {
    // Loads of several slices at once: what takes the time is to wait for them.
#pragma unroll 8
    for (int64_t slice = lane; slice < task.slices.count; slice += kSumLanes) {
      sum += task.sums[slice * task.columns + column];
    }
  }
  float* shared = static_cast<float*>(ptx::shared_memory());
  ptx::store_shared(shared + threadIdx.x, sum);
  ptx::sync_block();
  if (lane > 0 || column >= task.columns) return;
  for (int y = 1; y < kSumLanes; ++y) {
    sum += ptx::load_shared(shared + y * kSumColumns + beside);
  }
  with_dtype(task.bias_dtype, [&]<typename B>() {
    B* dbias = static_cast<B*>(task.dbias) + column;
    if constexpr (sizeof(B) == 2) {
      dbias->bits = static_cast<uint16_t>(ptx::pack(sum, 0.0f, B{}));
    } else {
      *dbias = sum;
    }
  });
}

}  // namespace fastattn::cuda
