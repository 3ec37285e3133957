// What TMA knows of a tensor in global memory, and of the boxes that it copies from it.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include "fastattn/types.h"

namespace fastattn::cuda {

// A __grid_constant__ parameter of a kernel, or a member of one.
using TensorMap = CUtensorMap;

struct TensorBox {
  static constexpr int kMaxRank = 5;

  DType dtype;              // kFloat32, kBFloat16, kFloat16
  int rank;                 // 2 to 5
  const void* data;         // a multiple of 16 bytes
  int64_t sizes[kMaxRank];  // the contiguous dimension first; each 1 to 2^32
  // In bytes, of the dimensions after the first: multiples of 16, not 0. Of a dimension of size 1
  // it does not matter.
  int64_t strides[kMaxRank - 1];
  int box[kMaxRank];  // 1 to 256; the first in bytes: a multiple of 16
  // Chunks of 16 bytes are permuted by bits 7 to 9 of their address in shared memory (bits 4 to 6
  // ^= these), as wgmma reads them. The first dimension of the box is then 128 bytes.
  bool swizzled;
};

// What a block of sm_90 may have of shared memory.
constexpr size_t kSharedBytesSm90 = 227 << 10;

cudaError_t encode_tensor_map(TensorMap* map, const TensorBox& tensor);

}  // namespace fastattn::cuda
