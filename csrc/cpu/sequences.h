// The entries of a batch, with their lengths.
#pragma once

#include <vector>

#include "attention_kernels.h"

namespace fastattn::cpu {

inline std::vector<Sequence> all_sequences(const AttentionParams& p) {
  std::vector<Sequence> sequences;
  sequences.reserve(static_cast<size_t>(p.batch0 * p.batch1));
  for (int64_t i = 0; i < p.batch0 * p.batch1; ++i) sequences.push_back(sequence_at(p, i));
  return sequences;
}

// Blocks [first, last) that hold keys seen by any row of the sequence.
inline Range blocks_seen(const AttentionParams& p, const Sequence& s, Range rows, int64_t k_block) {
  if (is_empty(rows)) return {0, 0};
  const Range keys = keys_seen_by_any(p, s, rows);
  if (is_empty(keys)) return {0, 0};
  return {keys.first / k_block, ceil_div(keys.last, k_block)};
}

// Waking a thread takes longer than this much work: such calls stay in the calling thread.
constexpr double kSerialFlops = 1 << 19;

inline Threads threads_for(const AttentionParams& p, Threads threads) {
  const double scores = static_cast<double>(p.batch0 * p.batch1 * p.heads_q) *
                        static_cast<double>(p.seqlen_q) * static_cast<double>(p.seqlen_k);
  if (2 * scores * static_cast<double>(p.head_dim + p.head_dim_v) < kSerialFlops) threads.count = 1;
  return threads;
}

// How the heads of a batch are spread over threads. Private: a thread does one KV head from packing
// to the last tile, with everything in its own cache. Shared: all threads pack a few KV heads, then
// all take tiles of them; for batches that have too few heads to fill the threads evenly. Both give
// the same bits.
inline bool heads_fill_threads(int64_t heads, int64_t threads, double least_efficiency) {
  const int64_t rounds = ceil_div(heads, threads);
  return static_cast<double>(heads) >= least_efficiency * static_cast<double>(rounds * threads);
}

}  // namespace fastattn::cpu
