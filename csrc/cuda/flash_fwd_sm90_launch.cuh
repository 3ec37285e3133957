// Launches the forward kernel of Hopper for a dtype and head dimensions.
#pragma once

#include "device.cuh"
#include "flash_fwd_sm90.cuh"
#include "forward_sm90.h"

namespace fastattn::cuda {

template <typename T, int kHeadDim, int kHeadDimV, bool kTerms>
cudaError_t launch_variant_sm90(const ForwardParamsSm90& params, int most_blocks,
                                cudaStream_t stream) {
  constexpr ForwardTileSm90 kTile = forward_tile_sm90({kHeadDim, kHeadDimV}, kTerms);
  using Config = ForwardConfigSm90<T, kHeadDim, kHeadDimV, kTile, kTerms>;
  constexpr size_t kBytes = sizeof(typename Config::Shared) + ptx::kAlignmentSlack;
  static_assert(kBytes <= kSharedBytesSm90);
  return launch_blocks(flash_fwd_sm90<Config>, min_of<int64_t>(params.schedule.count, most_blocks),
                       Config::kThreads, kBytes, stream, params);
}

template <typename T, int kHeadDim, int kHeadDimV>
cudaError_t launch_flash_fwd_sm90(const ForwardParamsSm90& params, int most_blocks,
                                  cudaStream_t stream) {
  return has_terms(params.base.attention)
             ? launch_variant_sm90<T, kHeadDim, kHeadDimV, true>(params, most_blocks, stream)
             : launch_variant_sm90<T, kHeadDim, kHeadDimV, false>(params, most_blocks, stream);
}

}  // namespace fastattn::cuda
