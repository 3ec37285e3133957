// What a cache write is told. Strides are in elements; no data means absent.
#pragma once

#include "params.h"

namespace fastattn {

// A new token: where it comes from and where it goes.
struct CacheToken {
  int64_t batch, row;        // of key and value
  int64_t entry, cache_row;  // of the caches
  int64_t position;          // row of the rotary tables; unused without them
};

// cache[entry, h, cache_row] = row of head h, for every token and head. With an int8 cache,
// scale = max |row| / 127 and cache = round(row / scale); a row of zeros has scale 0, one that is
// not finite has scale NaN.
struct CacheUpdateParams {
  DType dtype;  // of key, value and, unless int8, the caches
  int64_t heads_kv, head_dim, head_dim_v;

  ConstTensor key;    // (batch, -, heads_kv, rows, head_dim)
  ConstTensor value;  // (batch, -, heads_kv, rows, head_dim_v)
  MutableTensor
      k_cache;  // (entries, -, heads_kv, cache rows, head_dim), rows of tokens overwritten
  MutableTensor v_cache;
  MutableTensor k_scale;  // (entries, -, heads_kv, cache rows, -) float, nullable: not int8
  MutableTensor v_scale;

  const CacheToken* tokens;  // only csrc/cpu is told them
  int64_t num_tokens;
  bool distinct;  // no two tokens go to the same place; else the later one stays

  // Key rows are rotated before they are written, as in RopeParams.
  ConstTensor cos, sin;  // (-, -, -, positions, rotary_dim / 2), nullable
  DType table_dtype;
  int64_t rotary_dim;
  bool interleaved;
};

// What the positions of new rows are given for. Negative ones of rows and slots are not written.
enum class PositionsOf : int32_t {
  kSequences,  // row i of sequence b goes to position positions[b] + i
  kRows,       // row i of sequence b goes to position positions[b, i]
  kSlots       // row i goes to row positions[i] of the cache, counted over its entries
};

// New rows as the caller says where they go, and how many there are.
struct NewRows {
  PositionsOf positions_of;
  IndexArray positions;       // (batch), (batch, rows) or, for slots, (rows)
  IndexArray rope_positions;  // of rows and slots: rows of the tables instead, nullable
  IndexArray lengths;         // (batch), nullable: so many rows of each sequence
  IndexArray cu_seqlens;      // (batch + 1), nullable: packed, sequence b begins at cu_seqlens[b]
  IndexArray key_starts;      // (batch), nullable: where the tables begin; rows before it take
                              // their first row
  int64_t batch, rows;        // rows of a sequence; packed, or for slots, of all
  bool stored;                // the sequences end at their positions, instead of beginning there
};

FA_INLINE bool is_packed(const NewRows& rows) {
  return rows.cu_seqlens.data != nullptr || rows.positions_of == PositionsOf::kSlots;
}

// A cache write whose places only the kernel can read. A row that has no place, or that a later one
// of its sequence (of all slots) replaces, is not written. What stands outside of the tables is
// NaN once it is rotated.
struct CacheWriteParams {
  CacheUpdateParams update;  // without tokens; no key: there is nothing to write
  NewRows rows;
  int64_t entries, cache_rows;  // of the caches
  IndexArray block_table;       // (batch, pages_per_sequence), nullable
  int64_t pages_per_sequence;
  bool ring;
  int64_t table_rows;  // of cos and sin

  // Besides, rotated_query = query, rotated as key; nullable. The rows of query are those of key.
  int64_t heads_q;
  ConstTensor query;  // (batch, -, heads_q, rows, head_dim)
  MutableTensor rotated_query;
};

}  // namespace fastattn
