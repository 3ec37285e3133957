// Launches the backward kernel of Hopper for a dtype and head_dim.
#pragma once

#include "device.cuh"
#include "flash_bwd_sm90.cuh"

namespace fastattn::cuda {

template <typename T, int kHeadDim>
cudaError_t launch_flash_bwd_sm90(const BackwardParamsSm90& params, cudaStream_t stream) {
  using Config = BackwardConfigSm90<T, kHeadDim, backward_tile_sm90(kHeadDim)>;
  constexpr size_t kBytes = sizeof(typename Config::Shared) + ptx::kAlignmentSlack;
  static_assert(kBytes <= kSharedBytesSm90);
  const AttentionParams& p = params.base.gradient.forward;
  return launch_blocks(flash_bwd_sm90<Config>, p.batch0 * p.batch1 * p.heads_kv * params.base.tiles,
                       Config::kThreads, kBytes, stream, params);
}

}  // namespace fastattn::cuda
