// Rows of a packed tensor that no kernel computes.
#pragma once

#include <cuda_runtime.h>

#include "fastattn/params.h"

namespace fastattn::cuda {

// Of a tensor (heads, total, columns), the rows behind the last sequence, and those of each
// sequence from its row `longest` on, become `bits`.
struct UnusedRows {
  MutableTensor tensor;
  int32_t element_bytes;  // 2 or 4
  uint32_t bits;
  int64_t heads, total, columns;
  IndexArray cu_seqlens;
  int64_t sequences, longest;
};

cudaError_t launch_fill_unused_rows(const UnusedRows& params, cudaStream_t stream);

}  // namespace fastattn::cuda
