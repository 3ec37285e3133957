// What the kernels of norms are told, and their launchers, which inst/norm_*.cu hold.
#pragma once

#include <cuda_runtime.h>

#include "fastattn/norm_params.h"
#include "norm_tiles.h"

namespace fastattn::cuda {

// Of which tensors a run of columns, 16 bytes of the input, is loaded and stored at once.
struct WholeRuns {
  bool input, residual, summed, normalised, weight, bias;
  bool dnormalised, dsummed, dresidual, dinput;
};

struct NormForwardParams {
  NormParams norm;
  RowTile tile;
  WholeRuns whole;
  double inverse_width;
  int64_t blocks;
  size_t shared_bytes;
};

// Sums over rows of dnormalised * n and of dnormalised: `count` partial sums of each, of `stride`
// columns. float, or double for a float32 input: there may be a million rows, and float32's own
// rounding would show.
struct PartialSums {
  void *weight, *bias;  // null: not wanted
  int64_t count, stride;
};

struct NormBackwardParams {
  NormGradParams gradient;
  RowTile tile;
  WholeRuns whole;
  double inverse_width;
  PartialSums sums;
  int64_t blocks;       // of norm_backward, and
  size_t shared_bytes;  // what each of them has
};

// T: float, bf16, f16, of the input. O: of normalised, T or float.
template <typename T, typename O>
cudaError_t launch_norm_forward(const NormForwardParams& params, cudaStream_t stream);

// The gradients of input and residual, and the partial sums where rows are held.
template <typename T, typename O>
cudaError_t launch_norm_backward(const NormBackwardParams& params, cudaStream_t stream);

// The partial sums alone.
template <typename T, typename O>
cudaError_t launch_norm_column_sums(const NormBackwardParams& params, cudaStream_t stream);

// dweight and dbias of the partial sums. Sum: float or double.
template <typename Sum>
cudaError_t launch_norm_add_partials(const NormBackwardParams& params, cudaStream_t stream);

}  // namespace fastattn::cuda
