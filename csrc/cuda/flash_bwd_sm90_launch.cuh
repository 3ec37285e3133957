// Launches the backward kernels of Hopper for a dtype and head_dim.
#pragma once

#include "device.cuh"
#include "flash_bwd_roles_sm90.cuh"
#include "flash_bwd_sm90.cuh"

namespace fastattn::cuda {

template <typename Config>
cudaError_t launch_backward(const BackwardParamsSm90& params, cudaStream_t stream) {
  constexpr size_t kBytes = sizeof(typename Config::Shared) + ptx::kAlignmentSlack;
  static_assert(kBytes <= kSharedBytesSm90);
  const AttentionParams& p = params.base.gradient.forward;
  return launch_blocks(flash_bwd_sm90<Config>, p.batch0 * p.batch1 * p.heads_kv * params.base.tiles,
                       Config::kThreads, kBytes, stream, params);
}

template <typename T, int kHeadDim, int kHeadDimV, bool kTerms>
cudaError_t launch_flash_bwd_sm90(const BackwardParamsSm90& params, cudaStream_t stream) {
  if constexpr (has_roles_sm90(kHeadDim, kTerms)) {
    return launch_backward<BackwardRolesSm90<T, kHeadDim, kHeadDimV, kTerms>>(params, stream);
  } else {
    return launch_backward<BackwardConfigSm90<T, kHeadDim, backward_tile_sm90(kHeadDim, false)>>(
        params, stream);
  }
}

}  // namespace fastattn::cuda
