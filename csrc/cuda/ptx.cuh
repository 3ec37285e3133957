// The only CUDA file with asm: one function per instruction. The plain C++ bodies say what the
// instruction does, and are what a compiler without a device pass gets (g++ reads every kernel).
#pragma once

#include <cuda_runtime.h>
#include <stdint.h>

namespace fastattn::cuda::ptx {

constexpr uint32_t kWarpSize = 32;

// The architecture that this code was compiled for: 800, 900, ...; 0 without a device pass.
__device__ inline uint32_t compiled_arch() {
#ifdef __CUDA_ARCH__
  return __CUDA_ARCH__;
#else
  return 0;
#endif
}

// This thread's place in its warp.
__device__ inline uint32_t lane_id() {
#ifdef __CUDA_ARCH__
  uint32_t lane;
  asm("mov.u32 %0, %%laneid;" : "=r"(lane));
  return lane;
#else
  const uint32_t thread =
      threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * static_cast<uint32_t>(threadIdx.z));
  return thread % kWarpSize;
#endif
}

}  // namespace fastattn::cuda::ptx
