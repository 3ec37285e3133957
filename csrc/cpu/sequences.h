// The entries of a batch, with their lengths.
#pragma once

#include <vector>

#include "attention_kernels.h"

namespace fastattn::cpu {

inline Sequence sequence_at(const AttentionParams& p, int64_t index) {
  Sequence s = {};
  s.index = index;
  s.b0 = index / p.batch1;
  s.b1 = index % p.batch1;
  s.rows_q = p.seqlen_q;
  s.rows_k = p.seqlen_k;
  if (p.cu_seqlens_q.data != nullptr) {
    s.first_q = index_at(p.cu_seqlens_q, index);
    s.rows_q = index_at(p.cu_seqlens_q, index + 1) - s.first_q;
  }
  if (p.cu_seqlens_k.data != nullptr) {
    s.first_k = index_at(p.cu_seqlens_k, index);
    s.rows_k = index_at(p.cu_seqlens_k, index + 1) - s.first_k;
  }
  s.len_q = p.query_lengths.data != nullptr ? index_at(p.query_lengths, index) : s.rows_q;
  s.len_k = p.key_lengths.data != nullptr ? index_at(p.key_lengths, index) : s.rows_k;
  if (p.cache.key_starts.data != nullptr) {
    // Counting keys from the first visible one gives a left-padded sequence the tiles, and so the
    // bits, that it has alone.
    s.first_k = s.first_column = index_at(p.cache.key_starts, index);
    s.len_k = max_of<int64_t>(s.len_k - s.first_k, 0);
  }
  const int64_t corner = p.top_left ? 0 : s.len_k - s.len_q;
  s.diagonal = p.key_offset - p.query_offset - corner;
  const Range seen = s.len_q > 0 ? keys_seen_by_any(p, s, {0, s.len_q}) : Range{0, 0};
  s.first_seen = is_empty(seen) ? 0 : seen.first;
  return s;
}

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
