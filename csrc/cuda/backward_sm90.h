// The backward kernel of Hopper, as the host calls it.
#pragma once

#include <cuda_runtime.h>

#include "backward_params.h"
#include "backward_tiles.h"
#include "device.cuh"
#include "tensor_map.h"

namespace fastattn::cuda {

struct BackwardParamsSm90 {
  BackwardParams base;
  // (column, head, row, batch1, batch0) of queries and dout; (column, row, head, batch1, batch0) of
  // keys and values.
  TensorMap query_map, dout_map, key_map, value_map;
};

// Why the kernel for dK, dV and dQ does not take a problem, or nullptr where it does.
const char* backward_sm90_obstacle(const AttentionGradParams& gradient, const DeviceLimits& limits);

// dK, dV and, into zeroed dquery_sums, dQ, in a fixed order by way of zeroed dquery_turns; `params`
// without `tiles`.
cudaError_t run_flash_bwd_sm90(BackwardParams params, cudaStream_t stream);

// `params` whole. kHeadDim, kHeadDimV: without terms of scores 64, 96, 128, 192 and 128, 192, 256;
// with them the same but for 192.
template <typename T, int kHeadDim, int kHeadDimV, bool kTerms>
cudaError_t launch_flash_bwd_sm90(const BackwardParamsSm90& params, cudaStream_t stream);

}  // namespace fastattn::cuda
