// Which tile each kernel takes: per dtype and head_dim, with the reason beside it. Pure functions
// of the host, and constants of the kernels.
#pragma once

#include "fastattn/types.h"

namespace fastattn::cuda {

// Head dimensions have kernels of these sizes; one between two takes the larger.
constexpr int kHeadDims[] = {64, 96, 128, 256};

// Of the forward pass: warps, 16-row tiles of a warp, keys of a tile. `has_terms`: scores need more
// than the scale (mask.cuh), which takes registers.
struct ForwardTile {
  int warps, row_tiles, keys;

  constexpr int queries() const {
    return 16 * warps * row_tiles;
  }
};

constexpr ForwardTile forward_tile(bool is_float32, int head_dim, bool has_terms) {
  if (is_float32) {
    // Products by FMA: 64 rows. Keys so that q, k and v fit 100 KB, what the smallest chips have.
    if (head_dim <= 64) return {4, 1, 64};
    if (head_dim <= 128) return {4, 1, 32};
    return {4, 1, 16};
  }
  // 16 rows of out take 128 registers. 96 KB: two blocks share a multiprocessor of an H100.
  if (head_dim > 128) return {4, 1, 64};
  // With terms, 32 rows a warp spill.
  if (has_terms) return {8, 1, 64};
  // Every fragment of k and v serves 32 rows, which halves the traffic of shared memory. At
  // head_dim 128 their part of out takes 128 registers; beside it 64 keys spill.
  return {4, 2, head_dim <= 96 ? 64 : 48};
}

// Parts of the keys that run in parallel, where the tiles of queries do not fill the machine: as
// many as do, but each of at least four tiles of keys, which its start and the merge are worth.
inline int forward_splits(int64_t blocks, int64_t key_tiles, int multiprocessors) {
  constexpr int64_t kLeastTiles = 4, kMostSplits = 128;
  if (2 * blocks > multiprocessors) return 1;
  const int64_t wanted = multiprocessors / max_of<int64_t>(blocks, 1);
  return static_cast<int>(
      max_of<int64_t>(1, min_of(min_of(wanted, key_tiles / kLeastTiles), kMostSplits)));
}

}  // namespace fastattn::cuda
