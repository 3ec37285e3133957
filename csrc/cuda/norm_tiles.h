// How norms share rows among threads. Pure functions of the host, and constants of the kernels. The
// arithmetic behind them: README.md, "Norms".
#pragma once

#include "fastattn/types.h"

namespace fastattn::cuda {

// Runs of 16 bytes that a thread holds of a row. Four: enough bytes in flight per thread, and what
// a row costs whatever its width (its place, its statistics) is shared by few threads. Gradients
// of a wider dtype than the input's take twice the registers: two.
constexpr int kHeldRuns = 4, kWideHeldRuns = 2;

// Threads of a block whose rows are each within a warp.
constexpr int kRowBlockThreads = 128;

// A row per block of that many threads at most, and that many on a multiprocessor, which decides
// their registers. Forward: 80. Backward: 128 for the sums over rows that each thread keeps, and
// 168 where there are twice as many, with those of a bias.
constexpr int kForwardThreads = 768;
constexpr int backward_threads(bool has_bias) {
  return has_bias ? 384 : 512;
}

// Threads of a row that no block can hold, and such blocks on a multiprocessor: what 128 registers
// allow.
constexpr int kWideRowThreads = 256, kWideRowBlocks = 2;

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

// Shared memory of a block: what its warps add up, and of each thread the parameters of its columns
// as floats. (Forward: weight and bias. Backward: the weight, and where a block has several rows
// the sums over them.)
constexpr size_t kRowSumBytes = 1 << 10;
constexpr size_t kStagedPadding = 1;  // float4s of each thread and parameter

inline size_t staged_bytes(const RowTile& tile, int thread_columns) {
  const size_t of_thread =
      static_cast<size_t>(thread_columns) * sizeof(float) + 16 * kStagedPadding;
  return static_cast<size_t>(tile.threads()) * of_thread;
}

inline size_t forward_shared_bytes(const RowTile& tile, int thread_columns, bool has_bias) {
  if (!tile.is_held) return kRowSumBytes;
  return kRowSumBytes + staged_bytes(tile, thread_columns) * (has_bias ? 2 : 1);
}

inline size_t backward_shared_bytes(const RowTile& tile, int thread_columns, size_t sum_bytes) {
  if (!tile.is_held) return kRowSumBytes;
  const size_t sums = tile.rows > 1 ? static_cast<size_t>(thread_columns) * sum_bytes : 0;
  return kRowSumBytes + staged_bytes(tile, thread_columns) +
         static_cast<size_t>(tile.threads()) * sums;
}

// Blocks that fill a device: by their threads, so many on a multiprocessor, and by the memory that
// one block may have there, which is all of it but kReserved.
inline int64_t resident_blocks(const RowTile& tile, int threads, size_t bytes, int multiprocessors,
                               int shared_bytes) {
  constexpr size_t kReserved = 1 << 10;  // of each block, too
  const int by_threads = tile.is_held ? threads / tile.threads() : kWideRowBlocks;
  const auto by_memory =
      static_cast<int>((static_cast<size_t>(shared_bytes) + kReserved) / (bytes + kReserved));
  return int64_t{multiprocessors} * max_of(min_of(by_threads, by_memory), 1);
}

// Of them, those that have work: at least `least_rows` for each row of a block. With sums over rows
// these are four: the sums are written and read again, as much as a third of four rows in 16 bits.
constexpr int64_t kLeastSummedRows = 4;

inline int64_t row_blocks(int64_t rows, const RowTile& tile, int64_t resident, int64_t least_rows) {
  return min_of(resident, ceil_div(rows, tile.rows * least_rows));
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
