// What inst/*.cu hold: one launcher per kernel, with its parameters.
#pragma once

#include <cuda_runtime.h>
#include <stdint.h>

#include "forward_params.h"

namespace fastattn::cuda {

struct ProbeParams {
  uint32_t* arch;   // (1), overwritten: __CUDA_ARCH__ of the code that runs
  uint32_t* lanes;  // (32), overwritten: each lane its own number
};

cudaError_t launch_probe(const ProbeParams& params, cudaStream_t stream);

// The tile kernel; `params` without `tiles`. T: float, bf16, f16; kHeadDim: one of kHeadDims.
template <typename T, int kHeadDim>
cudaError_t launch_flash_fwd_sm80(ForwardParams params, cudaStream_t stream);

}  // namespace fastattn::cuda
