// Launchers of decode (inst/flash_decode_*.cu, inst/flash_combine.cu).
#pragma once

#include <cuda_runtime.h>

#include "forward_params.h"

namespace fastattn::cuda {

// The decode kernel; `params` without `tiles`, and with all heads of a group packed. T: float,
// bf16, f16; kHeadDim: one of kHeadDims.
template <typename T, int kHeadDim>
cudaError_t launch_flash_decode_sm80(ForwardParams params, cudaStream_t stream);

// From the partial results of any kernel, where params.splits > 1, to out and lse. Rows that belong
// to no sequence are not written.
template <typename T>
cudaError_t launch_flash_combine(const ForwardParams& params, cudaStream_t stream);

}  // namespace fastattn::cuda
