// How norms share rows among threads. Pure functions of the host, and constants of the kernels. The
// arithmetic behind them: README.md, "Norms".
#pragma once

#include "fastattn/types.h"

namespace fastattn::cuda {

// Runs of 16 bytes that a thread holds of a row. Four: enough bytes in flight per thread, and what
// a row costs whatever its width (its place, its statistics) is shared by few threads. Gradients
// of a wider dtype than the input's take twice the registers: two.
constexpr int kHeldRuns = 4, kWideHeldRuns = 2;

// Threads of a block whose rows are each within a warp: 16 of them fill an A100 and an H100.
constexpr int kRowBlockThreads = 128;

// A row per block of that many threads at most, which decides their registers. Forward: what a
// block can have, at 64 registers. Backward: at 128 for the sums over rows that each thread keeps,
// and at 168 where there are twice as many, with those of a bias.
constexpr int kForwardThreads = 1024;
constexpr int backward_threads(bool has_bias) {
  return has_bias ? 384 : 512;
}

// Threads of a row that no block can hold.
constexpr int kWideRowThreads = 512;

// Threads of a row, and rows of a block. Rows that are not held are read again in every pass.
struct RowTile {
  int row_threads, rows;
  bool is_held;

  int threads() const {
    return row_threads * rows;
  }
};

inline int64_t power_of_two_from(int64_t n) {
  int64_t power = 1;
  while (power < n) power *= 2;
  return power;
}

// By the width alone: the bits of a row must not depend on how many others there are.
inline RowTile row_tile(int64_t width, int run_columns, int held_runs, int most_threads) {
  constexpr int kWarp = 32;
  // Four lanes beside each other read 64 bytes, whole sectors of memory.
  constexpr int64_t kLeastLanes = 4;
  const int64_t runs = ceil_div(width, run_columns);
  const int64_t threads = ceil_div(runs, held_runs);
  if (threads > most_threads) return {kWideRowThreads, 1, false};
  if (threads > kWarp) return {static_cast<int>(round_up(threads, kWarp)), 1, true};
  const int64_t least = min_of(power_of_two_from(runs), kLeastLanes);
  const int lanes = static_cast<int>(max_of(power_of_two_from(threads), least));
  return {lanes, kRowBlockThreads / lanes, true};
}

// Blocks of the backward pass, which go through the rows together. All that are resident, but at
// least kLeastRows rows for each row of a block: its sums over rows are written
// and read again, as much as a third of four rows in 16 bits.
inline int64_t backward_blocks(int64_t rows, const RowTile& tile, bool has_bias,
                               int multiprocessors) {
  constexpr int64_t kLeastRows = 4;
  const int64_t resident = int64_t{multiprocessors} * (backward_threads(has_bias) / tile.threads());
  return min_of(resident, ceil_div(rows, tile.rows * kLeastRows));
}

// The sums over rows on their own: threads of a block, each with a run of columns.
constexpr int kColumnThreads = 128;

// Parts of the rows: eight blocks a multiprocessor, each with at least 16 rows.
inline int64_t column_slices(int64_t rows, int64_t strips, int multiprocessors) {
  constexpr int64_t kBlocks = 8, kLeastRows = 16;
  const int64_t wanted = ceil_div(multiprocessors * kBlocks, strips);
  return min_of(wanted, ceil_div(rows, kLeastRows));
}

// The last step, from partial sums to a gradient: threads of a block, 32 columns wide, so that each
// adds up a 16th of some 500 of them.
constexpr int kAddThreads = 512;

}  // namespace fastattn::cuda
