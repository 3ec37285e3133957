// The forward kernel of Hopper, as the host calls it.
#pragma once

#include <cuda_runtime.h>

#include "device.cuh"
#include "forward_schedule.h"
#include "tiles.h"

namespace fastattn::cuda {

// Why the kernel does not take a problem, or nullptr where it does.
const char* sm90_obstacle(const AttentionParams& params, const DeviceLimits& limits);

// The tile that it takes a problem in.
ForwardTileSm90 sm90_tile(const AttentionParams& params);

// Runs it; `params` without `tiles`.
cudaError_t run_flash_fwd_sm90(ForwardParams params, int multiprocessors, cudaStream_t stream);

// One of kHeadDimsSm90; `params` whole. At most so many blocks, which stay.
template <typename T, int kHeadDim, int kHeadDimV>
cudaError_t launch_flash_fwd_sm90(const ForwardParamsSm90& params, int most_blocks,
                                  cudaStream_t stream);

}  // namespace fastattn::cuda
