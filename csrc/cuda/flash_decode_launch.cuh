// Launches the decode kernel of a dtype and head_dim: the variant for the cache.
#pragma once

#include "decode_kernels.h"
#include "device.cuh"
#include "flash_decode_sm80.cuh"

namespace fastattn::cuda {

template <typename Config>
cudaError_t launch_decode(ForwardParams params, cudaStream_t stream) {
  const AttentionParams& p = params.attention;
  params.tiles = static_cast<int32_t>(ceil_div(p.seqlen_q * params.pack, Config::kRows));
  const int64_t blocks = p.batch0 * p.batch1 * p.heads_kv * params.splits * params.tiles;
  return launch_blocks(flash_decode_sm80<Config>, blocks, Config::kThreads,
                       sizeof(typename Config::Shared), stream, params);
}

template <typename T, int kHeadDim>
cudaError_t launch_flash_decode_sm80(ForwardParams params, cudaStream_t stream) {
  if (is_int8(params.attention.cache)) {
    return launch_decode<DecodeConfig<T, int8_t, kHeadDim>>(params, stream);
  }
  return launch_decode<DecodeConfig<T, T, kHeadDim>>(params, stream);
}

}  // namespace fastattn::cuda
