// What the kernel of rotary embedding is told, the choices of its host, and its launcher.
#pragma once

#include <cuda_runtime.h>

#include "division.h"
#include "fastattn/rope_params.h"

namespace fastattn::cuda {

constexpr int kRopeThreads = 128;

// Heads whose chunks a thread asks for at once, two of each.
constexpr int kRopeHeads = 4;

// Blocks on a multiprocessor, at least: 64 KB are under way to it then, twice what keeps an H200
// busy. More blocks, of 2 heads at a time, have 40 KB under way.
constexpr int kRopeBlocks = 4;

// The heads of a token are cut into groups, of which each reads the angles again: into as many as
// fill the machine twice over, where tokens are few, but hardly any of fewer heads than a thread
// takes at once. `tiles`: blocks for one head of all tokens.
inline int64_t rope_heads_of_group(int64_t tiles, int64_t heads, int multiprocessors) {
  const int64_t wanted = ceil_div(2 * kRopeBlocks * int64_t{multiprocessors}, tiles);
  const int64_t groups = min_of(wanted, ceil_div(heads, kRopeHeads));
  return ceil_div(heads, groups);
}

// How 16-byte chunks are loaded and stored: whether rows begin at a multiple of 16 bytes, and lie
// contiguous.
struct RopeChunks {
  bool x[2], out[2];  // of each operand
  bool halves;        // the second half of the rotated columns begins at a multiple of chunks
  bool rest;          // so does what is behind them
  bool cos, sin;
};

struct RopeTask {
  RopeParams params;
  RopeChunks chunked;
  int64_t tokens;         // of all batch entries
  int64_t rotated_units;  // pairs of chunks that are rotated
  int64_t units;          // and those that are copied, of the widest operand
  int64_t heads_of_group;
  Divisor groups;
};

template <typename T>
cudaError_t launch_rope(const RopeTask& task, cudaStream_t stream);

}  // namespace fastattn::cuda
