// KV caches as the ops are given them: checked, and resolved to places.
#pragma once

#include <vector>

#include "attention_args.h"
#include "fastattn/kv_cache_params.h"

namespace fastattn::bind {

// What every op over a cache takes. The caches are (entries, heads_kv, rows, head_dim), or
// (entries, rows, heads_kv, head_dim) with bshd; an entry is a sequence, or a page.
struct CacheTensors {
  Tensor k_cache, v_cache;
  OptionalTensor block_table, k_scale, v_scale;
  bool ring, bshd;
};

// The same, checked.
struct CacheStorage {
  ConstTensor key{}, value{}, key_scale{}, value_scale{};
  int64_t entries = 0, heads = 0, rows = 0, head_dim = 0, head_dim_v = 0;
  bool paged = false, ring = false, is_int8 = false;
  IndexArray block_table{};
  int64_t table_rows = 0, pages_per_sequence = 0;
  int32_t dtype = 0;         // of k_cache
  std::vector<Tensor> held;  // contiguous copies

  // Rows that a sequence can hold; a ring never fills.
  int64_t capacity() const;

  // Sequences that have rows here.
  int64_t sequences() const {
    return paged ? table_rows : entries;
  }

  // Fails where the block table sends row `position` of sequence b outside the pool.
  void check_page(int64_t b, int64_t page) const;

  // Where row `position` of sequence b lies. Its page has been checked.
  void locate(int64_t b, int64_t position, CacheToken* token) const;
};

// Throws unless these fit each other, and `like` (named so) in device and dtype.
CacheStorage check_storage(const CacheTensors& tensors, const char* like_argument,
                           const Tensor& like);

// Throws where two elements of a cache are one in memory.
void require_writable(const CacheTensors& tensors);

// (entry, row) strides of a tensor laid out as a cache is; `bshd` exchanges heads and rows.
template <typename View>
View cache_view(const Tensor& tensor, bool bshd) {
  const Sizes strides = tensor.strides();
  const bool has_columns = strides.size() == 4;
  return {
      tensor.data_ptr(),
      {strides[0], 0, strides[bshd ? 2 : 1], strides[bshd ? 1 : 2], has_columns ? strides[3] : 0}};
}

// cos and sin, (positions, rotary_dim / 2).
struct RotaryTables {
  OptionalTensor cos, sin;
  bool interleaved;

  bool present() const {
    return cos.has_value();
  }
  int64_t positions() const {
    return cos->sizes()[0];
  }
};

void check_tables(const RotaryTables& tables, const char* like_argument, const Tensor& like,
                  int64_t head_dim);

// Fails unless the tables reach `position`; `argument` is what it comes from.
void check_table_position(const RotaryTables& tables, const char* argument, int64_t position);

// The places of new rows, where the host can read them.
struct CacheTokens {
  std::vector<CacheToken> tokens;
  bool distinct = false;
};

// Those of PositionsOf::kSequences. All checked, naming `argument`.
CacheTokens tokens_of_sequences(const CacheStorage& storage, const RotaryTables& tables,
                                const char* argument, const NewRows& rows);

// The write of checked rows. key and value may be null: then there is nothing to write. What it
// points to must outlive it.
CacheWriteParams write_params(const CacheStorage& storage, const RotaryTables& tables,
                              const NewRows& rows, const CacheTokens& tokens, const Tensor* key,
                              const Tensor* value, bool bshd);

// Shapes, dtypes and devices of new keys and values.
void check_new_rows(const CacheStorage& storage, const Tensor& key, const Tensor& value, bool bshd);

}  // namespace fastattn::bind
