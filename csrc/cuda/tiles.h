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

// Of the forward kernel of Hopper: warpgroups that compute (64 rows each), keys of a tile, tiles of
// keys (and of values) in shared memory at a time; whether warpgroups take turns at products.
struct ForwardTileSm90 {
  int warpgroups, keys, stages;
  bool takes_turns;

  constexpr int queries() const {
    return 64 * warpgroups;
  }
};

// Head dimensions of queries and values that have a kernel there; others take the next one.
struct HeadDims {
  int of_query, of_value;
};
constexpr HeadDims kHeadDimsSm90[] = {{64, 64},   {96, 96},   {128, 128},
                                      {192, 128}, {192, 192}, {256, 256}};

constexpr ForwardTileSm90 forward_tile_sm90(HeadDims head_dims, bool has_terms) {
  // Scores, the weights of the tile before and out take 3/4 keys + 1/2 of_value registers of the
  // 232 that two warpgroups have each, or of the 152 of three. Far beyond two thirds of them the
  // compiler waits for the products before it computes the softmax that they should hide. What the
  // terms of scores need is taken from the keys. Softmax takes as long as the products at head_dim
  // 64: a third group evens it out. Tiles are small there, so there are more of them, or too few
  // bytes would be under way where few queries read many keys.
  if (head_dims.of_query == 64) return {3, has_terms ? 48 : 96, 4, true};
  if (head_dims.of_query <= 128) return {2, has_terms ? 80 : 128, 2, true};
  // 227 KB hold the queries and two tiles each of keys and values. Turns decide where the compiler
  // waits for the products (check_sass.py): at 192 it computes softmax behind the wait without
  // them, at 256 more of it with them.
  if (head_dims.of_value == 128) return {2, has_terms ? 80 : 128, 2, true};
  if (head_dims.of_value == 192) return {2, has_terms ? 64 : 80, 2, true};
  return {2, has_terms ? 32 : 64, 2, false};
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
