// The tile of the decode kernel, and how many parts the keys are cut into. Pure functions of the
// host, and constants of the kernels. The arithmetic behind them: README.md, "Decode".
#pragma once

#include "fastattn/types.h"

namespace fastattn::cuda {

// Rows of a block: what one product of the matrix units has.
constexpr int kDecodeRows = 16;
constexpr int kMaxSplits = 256;

// Rows of queries (of all heads of a group) up to which a problem is one of decode: reading keys
// and values takes the time, so the keys are cut as decode_splits says.
//
// The decode kernel reads them once per 16 rows. Up to 16 nothing is faster. Up to 32 it still
// is better than the tile kernel of sm_80, most of whose rows would be empty. The one of Hopper
// reads them once for 64 rows, and the products, in one warpgroup, hide under that.
constexpr int kMostDecodeRows = 2 * kDecodeRows, kMostDecodeRowsSm90 = 64;

constexpr bool is_decode(int64_t rows, bool takes_sm90) {
  return rows <= (takes_sm90 ? kMostDecodeRowsSm90 : kMostDecodeRows);
}

// Whether decode runs on the kernel of Hopper.
constexpr bool decodes_on_sm90(int64_t rows, bool takes_sm90) {
  return takes_sm90 && rows > kDecodeRows;
}

// Warps of a block, and for each of them the keys of a tile and the tiles in its ring, each of K
// and V.
struct DecodeTile {
  int warps, keys, stages;

  // Keys that the warps of a block take in turn.
  constexpr int round_keys() const {
    return warps * keys;
  }

  // Blocks that the registers of a multiprocessor are enough for: the kernel is compiled for that.
  constexpr int most_blocks() const {
    return warps == 4 ? 3 : 4;
  }

  // Of a block: queries, rings, of int8 also the tile that is widened and its scales, and at most
  // 512 bytes for its plan.
  constexpr int shared_bytes(int element_bytes, int stored_bytes, int head_dim) const {
    const int tile = keys * head_dim, tiles = 2 * stages;
    int warp = tiles * tile * stored_bytes;
    if (stored_bytes < element_bytes) warp += tile * element_bytes + tiles * keys * 4 + 128;
    return 512 + kDecodeRows * head_dim * element_bytes + warps * warp;
  }
};

// By the bytes of a row of keys, so that a tile is 4 KB: large enough to be copied by whole
// instructions of a warp, small enough for many to be under way. Wider rows have fewer warps, and
// the widest (float32 at head_dim 256) one stage, so that a block fits 99 KB, what the smallest
// chips have. Tiles of int8 are smaller: there are more.
constexpr DecodeTile decode_tile(int element_bytes, int stored_bytes, int head_dim) {
  const int row_bytes = element_bytes * head_dim;
  const bool is_int8 = stored_bytes < element_bytes;
  if (row_bytes <= 128) return {4, 32, is_int8 ? 3 : 2};
  if (row_bytes <= 256) return {4, 16, is_int8 ? 3 : 2};
  return {2, 16, is_int8 ? 3 : (row_bytes <= 512 ? 2 : 1)};
}

// Blocks of the kernel for these that share a multiprocessor; `shared_bytes`: what one block may
// have there at most.
inline int decode_blocks(int element_bytes, int stored_bytes, int head_dim, int shared_bytes) {
  constexpr int kReserved = 1 << 10;  // of each block, and beside what one block may have
  const DecodeTile tile = decode_tile(element_bytes, stored_bytes, head_dim);
  const int bytes = tile.shared_bytes(element_bytes, stored_bytes, head_dim);
  const int blocks = (shared_bytes + kReserved) / (bytes + kReserved);
  return max_of(min_of(blocks, tile.most_blocks()), 1);
}

// What decode is to do: tiles of queries, of all KV heads and sequences, and for each of them
// rounds of keys, of the longest sequence.
struct DecodeProblem {
  int64_t tiles, rounds;
};

// What it runs on.
struct DecodeMachine {
  int multiprocessors, blocks_per_multiprocessor;
};

// How long a number of splits takes, in rounds of keys of a full machine. A part costs its rounds
// and kPartCost for its start and its result; what is merged afterwards costs kMergeCost. Blocks
// come in waves. In the last one, half as many as fit already take all of the bandwidth that there
// is, so they are faster, but not more than twice.
inline double decode_cost(const DecodeProblem& problem, const DecodeMachine& machine,
                          int64_t splits) {
  constexpr double kPartCost = 2, kMergeCost = 1;
  const int64_t blocks = problem.tiles * splits;
  const int64_t most = int64_t{machine.multiprocessors} * machine.blocks_per_multiprocessor;
  const double least = machine.blocks_per_multiprocessor > 1 ? 0.5 : 1.0;
  const double rest = static_cast<double>(blocks % most) / static_cast<double>(most);
  const double last_wave = rest == 0 ? 0.0 : max_of(rest, least);
  const double waves = static_cast<double>(blocks / most) + last_wave;
  const double part = static_cast<double>(ceil_div(problem.rounds, splits)) + kPartCost;
  return waves * part + (splits > 1 ? kMergeCost : 0.0);
}

// The number of splits that takes the least time, and of those the smallest.
inline int decode_splits(const DecodeProblem& problem, const DecodeMachine& machine) {
  const int64_t rounds = problem.rounds;
  int64_t best = 1;
  double least = decode_cost(problem, machine, 1);
  // Of the numbers that give parts of the same length the smallest will do: few are left to try.
  for (int64_t share = rounds; share > 1;) {
    const int64_t splits = ceil_div(rounds, share - 1);
    if (splits > kMaxSplits) break;
    share = ceil_div(rounds, splits);
    const double cost = decode_cost(problem, machine, splits);
    if (cost < least) {
      least = cost;
      best = splits;
    }
  }
  return static_cast<int>(best);
}

}  // namespace fastattn::cuda
