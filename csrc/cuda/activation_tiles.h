// How the work of the activations is cut: pure functions of the host, and constants of the kernels.
#pragma once

#include "fastattn/types.h"

namespace fastattn::cuda {

constexpr int kActivationThreads = 128;

// Blocks on a multiprocessor, at least. An H200 is busy with 33 KB under way to each, by the chunks
// below: seven blocks have 57 KB or more, in 72 registers a thread. Kernels that would spill those
// have fewer blocks: five beside a bias, 41 KB.
constexpr int kActivationBlocks = 7, kBiasBlocks = 5;

// 16-byte chunks of each tensor that a thread asks for at once: four in all, or six.
template <int kTensorsRead>
constexpr int kActivationSteps = kTensorsRead == 1 ? 4 : 2;

// Which chunks a block has: `lanes` threads, a power of two, lie beside each other in a row, the
// others in the rows below. The steps of a thread go on along the row, or down the rows.
struct ActivationTile {
  int32_t lanes, log2_lanes, rows_at_once;
  bool along;
  int32_t width, rows;  // of a block, in chunks and rows
  int32_t strips;       // blocks beside each other in a row
};

// `row_chunks`: of a row, 16 bytes each.
inline ActivationTile activation_tile(int64_t rows, int64_t row_chunks, int steps) {
  ActivationTile tile = {};
  tile.lanes = kActivationThreads;
  tile.along = rows < steps;
  // Where rows are enough, down: then rows of any length fill the lanes, and a thread reads its
  // part of a bias once.
  if (!tile.along) {
    // The number of lanes that leaves the fewest idle; among those the largest. From 256 bytes on
    // it does not matter to memory where a row ends.
    constexpr int kLeastLanes = 16;
    int64_t least = INT64_MAX;
    for (int lanes = kActivationThreads; lanes >= kLeastLanes; lanes /= 2) {
      if (round_up(row_chunks, lanes) >= least) continue;
      least = round_up(row_chunks, lanes);
      tile.lanes = lanes;
    }
    while (tile.lanes > 1 && tile.lanes / 2 >= row_chunks) tile.lanes /= 2;
  }
  while (1 << tile.log2_lanes < tile.lanes) ++tile.log2_lanes;
  tile.rows_at_once = kActivationThreads / tile.lanes;
  tile.width = tile.along ? tile.lanes * steps : tile.lanes;
  tile.rows = tile.along ? 1 : tile.rows_at_once * steps;
  tile.strips = static_cast<int32_t>(ceil_div(row_chunks, tile.width));
  return tile;
}

// Where a bias has a gradient, a block goes on down a slice of the rows.
struct BiasGradSlices {
  int64_t count, rows;  // of each, the last one may have fewer
};

inline BiasGradSlices bias_grad_slices(int64_t rows, const ActivationTile& tile,
                                       int multiprocessors) {
  // Of all numbers of slices the one whose estimated time is least: waves of blocks, times the
  // steps that a thread goes through and what a block's start and its sums cost, about as much as 4
  // more. A slice has 4 of them at least: with fewer, its sums are too many.
  constexpr int64_t kBlockCost = 4, kLeastSteps = 4;
  const int64_t resident = int64_t{kBiasBlocks} * multiprocessors;
  const int64_t most = min_of(max_of<int64_t>(1, rows / (tile.rows * kLeastSteps)), resident);
  int64_t best = INT64_MAX, count = 1;
  for (int64_t slices = 1; slices <= most; ++slices) {
    const int64_t waves = ceil_div(tile.strips * slices, resident);
    const int64_t time = waves * (ceil_div(ceil_div(rows, slices), tile.rows) + kBlockCost);
    if (time >= best) continue;
    best = time;
    count = slices;
  }
  const int64_t each = max_of<int64_t>(1, ceil_div(rows, count));
  return {ceil_div(rows, each), each};
}

}  // namespace fastattn::cuda
