// What inst/*.cu hold for dispatch.cpp: one launcher per kernel, and its parameters.
#pragma once

#include <cuda_runtime.h>
#include <stdint.h>

namespace fastattn::cuda {

struct ProbeParams {
  uint32_t* arch;   // (1), overwritten: __CUDA_ARCH__ of the code that runs
  uint32_t* lanes;  // (32), overwritten: each lane its own number
};

cudaError_t launch_probe(const ProbeParams& params, cudaStream_t stream);

}  // namespace fastattn::cuda
