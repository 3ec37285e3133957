// What the kernels of the activations are told, and their launchers.
#pragma once

#include <cuda_runtime.h>

#include "activation_tiles.h"
#include "division.h"
#include "fastattn/activation_params.h"

namespace fastattn::cuda {

struct ChunkView : ActivationView {
  bool is_chunked;  // contiguous, and every row begins at a multiple of 16 bytes
  int64_t step;     // from a thread's chunk to its next one, as far as rows are at equal distances
};

// See ActivationParams.
struct ActivationTask {
  Activation kind;
  DType bias_dtype;
  int32_t outer_dims;
  int64_t outer_size[kActivationDims];
  int64_t rows, columns;
  ChunkView input, up, bias, out, dout, dinput, dup;
  void* dbias;

  ActivationTile tile;
  Divisor strips;         // tile.strips
  BiasGradSlices slices;  // where dbias is given
  float* sums;            // (slices.count, columns) of dbias, overwritten
};

// T: float, bf16, f16; of which there is at least one element. Backward where dout is given; where
// dbias is as well, launch_activation_dbias comes after it.
template <typename T>
cudaError_t launch_activation(const ActivationTask& task, cudaStream_t stream);

// Adds up the slices, which may be none.
cudaError_t launch_activation_dbias(const ActivationTask& task, cudaStream_t stream);

}  // namespace fastattn::cuda
