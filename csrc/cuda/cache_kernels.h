// Launcher of cache writes (inst/kv_cache_update.cu), and what it is told besides the problem.
#pragma once

#include <cuda_runtime.h>

#include "fastattn/kv_cache_params.h"

namespace fastattn::cuda {

constexpr int kMostCacheThreads = 256;  // of a block

// A row of a head takes a power of two of lanes, at most a warp. Blocks have rows of one token.
struct CacheLaunch {
  CacheWriteParams write;
  int32_t lanes;         // of a row
  int32_t token_blocks;  // that share the rows of a token
};

// By packs: of 16 bytes of key, as all rows are aligned to; else of one column.
// T: float, bf16, f16.
template <typename T>
cudaError_t launch_kv_cache_update(const CacheLaunch& params, bool by_packs, int64_t blocks,
                                   int threads, cudaStream_t stream);

}  // namespace fastattn::cuda
