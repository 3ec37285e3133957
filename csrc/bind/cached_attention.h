// Attention over a KV cache, as the ops are given it.
#pragma once

#include "cache_args.h"

namespace fastattn::bind {

// Attention of queries over a cache, after new keys and values were written to it where there are
// any. On a device lengths, starts and pages are not read: kernels guard against what they hold.
class CachedAttention {
 public:
  // Checks everything; nothing is written. The arguments must outlive the object.
  CachedAttention(const Tensor& query, const CacheTensors& cache, const Tensor& cache_lengths,
                  const OptionalTensor& key_starts, const RotaryTables& tables,
                  const AttentionOptions& options, const Tensor* key, const Tensor* value);

  // Writes the new rows and attends: (out, lse).
  std::pair<Tensor, Tensor> run();

  // What schedule_of says of it, or "none".
  std::string schedule();

 private:
  void set_shapes();
  void set_lengths(const Tensor& cache_lengths);
  void set_starts(const OptionalTensor& key_starts);
  void refuse_options() const;
  void set_cache();
  void check_pages() const;
  void place_queries();
  NewRows new_rows() const;
  const Tensor& memory_for_rotated();
  void rotate_query(const Tensor& rotated);

  int64_t queries_of(int64_t b) const {
    if (p_.query_lengths.data != nullptr) return index_at(p_.query_lengths, b);
    if (!problem_.packed) return p_.seqlen_q;
    return index_at(p_.cu_seqlens_q, b + 1) - index_at(p_.cu_seqlens_q, b);
  }

  int64_t total_of(int64_t b) const {
    return index_at(p_.key_lengths, b) + (key_ != nullptr ? queries_of(b) : 0);
  }

  const Tensor& query_;
  const RotaryTables& tables_;
  const AttentionOptions& options_;
  const Tensor *key_, *value_;
  AttentionProblem problem_;
  AttentionParams& p_;
  CacheStorage storage_;
  std::vector<int64_t> query_positions_;  // of every row of query in the tables, for csrc/cpu
  CacheTokens tokens_;
};

// Fails unless the cache has rows for `batch` sequences; `argument` is what has so many.
void require_batch(const CacheStorage& storage, const char* argument, int64_t batch);

}  // namespace fastattn::bind
