// Launches the tile kernel of a dtype and head_dim: the variant for the scores and the cache.
#pragma once

#include "device.cuh"
#include "flash_fwd_sm80.cuh"
#include "kernels.h"
#include "tiles.h"

namespace fastattn::cuda {

template <typename T, typename C, int kHeadDim, bool kTerms>
cudaError_t launch_variant(ForwardParams params, cudaStream_t stream) {
  constexpr ForwardTile kTile = forward_tile(sizeof(T) == 4, kHeadDim, kTerms);
  using Config = ForwardConfig<T, C, kHeadDim, kTile.warps, kTile.row_tiles, kTile.keys, kTerms>;
  const AttentionParams& p = params.attention;
  params.tiles = static_cast<int32_t>(ceil_div(p.seqlen_q * params.pack, Config::kQueries));
  const int64_t blocks =
      p.batch0 * p.batch1 * (p.heads_q / params.pack) * params.splits * params.tiles;
  return launch_blocks(flash_fwd_sm80<Config>, blocks, Config::kThreads,
                       sizeof(typename Config::Shared), stream, params);
}

// An int8 cache has the variant with terms alone: it takes any scores.
template <typename T, int kHeadDim>
cudaError_t launch_flash_fwd_sm80(ForwardParams params, cudaStream_t stream) {
  const AttentionParams& p = params.attention;
  if (is_int8(p.cache)) return launch_variant<T, int8_t, kHeadDim, true>(params, stream);
  if (has_terms(p)) return launch_variant<T, T, kHeadDim, true>(params, stream);
  return launch_variant<T, T, kHeadDim, false>(params, stream);
}

}  // namespace fastattn::cuda
