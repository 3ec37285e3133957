// Rows of a packed tensor that belong to no sequence.
#pragma once

#include <cuda_runtime.h>

#include "fastattn/params.h"

namespace fastattn::cuda {

// Rows from cu_seqlens[last] on of a tensor (heads, total, columns) become `bits`.
struct UnusedRows {
  MutableTensor tensor;
  int32_t element_bytes;  // 2 or 4
  uint32_t bits;
  int64_t heads, total, columns;
  IndexArray cu_seqlens;
  int64_t last;
};

cudaError_t launch_fill_unused_rows(const UnusedRows& params, cudaStream_t stream);

}  // namespace fastattn::cuda
