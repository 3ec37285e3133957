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

  const CacheToken* tokens;
  int64_t num_tokens;
  bool distinct;  // no two tokens go to the same place; else the later one stays

  // Key rows are rotated before they are written, as in RopeParams.
  ConstTensor cos, sin;  // (-, -, -, positions, rotary_dim / 2), nullable
  DType table_dtype;
  int64_t rotary_dim;
  bool interleaved;
};

}  // namespace fastattn
