#include "cache_args.h"

#include <limits>

namespace fastattn::bind {
namespace {

constexpr int64_t kMaxHeadDim = 512;

void require_own_memory(const char* argument, const Tensor& tensor) {
  const Sizes sizes = tensor.sizes(), strides = tensor.strides();
  for (size_t d = 0; d < sizes.size(); ++d) {
    if (sizes[d] > 1 && strides[d] == 0) {
      fail(argument, "memory of its own for every element", "an expanded tensor");
    }
  }
}

void require_dims(const char* argument, const Tensor& tensor, bool bshd) {
  if (tensor.dim() == 4) return;
  fail(argument,
       bshd ? "shape (entries, rows, heads, head_dim)" : "shape (entries, heads, rows, head_dim)",
       shape_text(tensor));
}

void check_scale(const char* argument, const OptionalTensor& scale, const Tensor& cache,
                 const char* cache_argument) {
  if (!scale) {
    fail(argument, std::string("a float32 tensor beside an int8 ") + cache_argument, "None");
  }
  require_device_of(cache, argument, *scale, cache_argument);
  require_dtype(argument, *scale, aoti_torch_dtype_float32(), "float32");
  require_shape(argument, *scale, Sizes(cache.sizes().data(), 3));
}

void set_dtype(CacheStorage& storage, const CacheTensors& t, const char* like_argument,
               const Tensor& like) {
  storage.dtype = dtype_code(t.k_cache);
  storage.is_int8 = storage.dtype == aoti_torch_dtype_int8();
  if (!storage.is_int8 && storage.dtype != dtype_code(like)) {
    fail("k_cache", dtype_text(like) + " like " + like_argument + ", or int8",
         dtype_text(t.k_cache));
  }
  if (dtype_code(t.v_cache) != storage.dtype) {
    fail("v_cache", dtype_text(t.k_cache) + " like k_cache", dtype_text(t.v_cache));
  }
  if (storage.is_int8) {
    check_scale("k_scale", t.k_scale, t.k_cache, "k_cache");
    check_scale("v_scale", t.v_scale, t.v_cache, "v_cache");
    storage.key_scale = cache_view<ConstTensor>(*t.k_scale, t.bshd);
    storage.value_scale = cache_view<ConstTensor>(*t.v_scale, t.bshd);
  } else if (t.k_scale || t.v_scale) {
    fail(t.k_scale ? "k_scale" : "v_scale", "None beside a cache that is not int8", "a tensor");
  }
}

void set_shape(CacheStorage& storage, const CacheTensors& t) {
  require_dims("k_cache", t.k_cache, t.bshd);
  require_dims("v_cache", t.v_cache, t.bshd);
  const Sizes k = t.k_cache.sizes(), v = t.v_cache.sizes();
  for (int d = 0; d < 3; ++d) {
    if (v[d] != k[d]) {
      fail("v_cache", "the shape of k_cache up to head_dim, " + text_of(Sizes(k.data(), 3)),
           shape_text(t.v_cache));
    }
  }
  storage.entries = k[0];
  storage.heads = k[t.bshd ? 2 : 1], storage.rows = k[t.bshd ? 1 : 2];
  storage.head_dim = k[3], storage.head_dim_v = v[3];
  if (k[3] < 1 || k[3] > kMaxHeadDim) {
    fail("k_cache", "a head_dim of 1 to 512", shape_text(t.k_cache));
  }
  if (v[3] < 1 || v[3] > kMaxHeadDim) {
    fail("v_cache", "a head_dim of 1 to 512", shape_text(t.v_cache));
  }
}

void set_pages(CacheStorage& storage, const CacheTensors& t) {
  storage.paged = t.block_table.has_value();
  storage.ring = t.ring;
  if (t.ring && storage.paged) fail("ring", "False beside a block_table", "True");
  if (t.ring && storage.rows < 1) {
    fail("k_cache", "at least one row in a ring", shape_text(t.k_cache));
  }
  if (!storage.paged) return;
  require_device_of(t.k_cache, "block_table", *t.block_table, "k_cache");
  if (t.block_table->dim() != 2) {
    fail("block_table", "shape (batch, pages)", shape_text(*t.block_table));
  }
  if (storage.rows < 1) {
    fail("k_cache", "pages of at least one row", shape_text(t.k_cache));
  }
  storage.block_table =
      index_array(storage.held, "block_table", *t.block_table, t.block_table->sizes());
  storage.table_rows = t.block_table->sizes()[0];
  storage.pages_per_sequence = t.block_table->sizes()[1];
}

// Row `position` of sequence b takes a row of the caches and of the tables.
CacheToken place(const CacheStorage& storage, const RotaryTables& tables, const char* argument,
                 const NewRows& rows, int64_t b, int64_t row, int64_t position) {
  CacheToken token{};
  token.batch = is_packed(rows) ? 0 : b;
  token.row = is_packed(rows) ? index_at(rows.cu_seqlens, b) + row : row;
  token.position = position;
  if (rows.key_starts.data != nullptr) {  // padding before the start is seen by none
    token.position = max_of<int64_t>(position - index_at(rows.key_starts, b), 0);
  }
  if (tables.present()) check_table_position(tables, argument, token.position);
  storage.locate(b, position, &token);
  return token;
}

}  // namespace

void require_writable(const CacheTensors& tensors) {
  require_own_memory("k_cache", tensors.k_cache);
  require_own_memory("v_cache", tensors.v_cache);
  if (tensors.k_scale) require_own_memory("k_scale", *tensors.k_scale);
  if (tensors.v_scale) require_own_memory("v_scale", *tensors.v_scale);
}

int64_t CacheStorage::capacity() const {
  if (ring) return std::numeric_limits<int64_t>::max();
  return paged ? pages_per_sequence * rows : rows;
}

void CacheStorage::check_page(int64_t b, int64_t page) const {
  const int64_t entry = index_at(block_table, b * pages_per_sequence + page);
  if (entry < 0 || entry >= entries) {
    fail("block_table", "pages from 0 to " + got(entries - 1),
         got(entry) + " for page " + got(page) + " of sequence " + got(b));
  }
}

void CacheStorage::locate(int64_t b, int64_t position, CacheToken* token) const {
  if (paged) {
    token->entry = index_at(block_table, b * pages_per_sequence + position / rows);
    token->cache_row = position % rows;
  } else {
    token->entry = b;
    token->cache_row = ring ? position % rows : position;
  }
}

CacheStorage check_storage(const CacheTensors& tensors, const char* like_argument,
                           const Tensor& like) {
  CacheStorage storage;
  require_device_of(like, "k_cache", tensors.k_cache, like_argument);
  require_device_of(like, "v_cache", tensors.v_cache, like_argument);
  set_shape(storage, tensors);
  set_dtype(storage, tensors, like_argument, like);
  set_pages(storage, tensors);
  storage.key = cache_view<ConstTensor>(tensors.k_cache, tensors.bshd);
  storage.value = cache_view<ConstTensor>(tensors.v_cache, tensors.bshd);
  return storage;
}

void check_tables(const RotaryTables& tables, const char* like_argument, const Tensor& like,
                  int64_t head_dim) {
  if (!tables.cos && !tables.sin) return;
  if (!tables.cos || !tables.sin) fail("rope", "a pair (cos, sin)", "one of them");
  require_device_of(like, "rope", *tables.cos, like_argument);
  require_device_of(like, "rope", *tables.sin, like_argument);
  require_float("rope", *tables.cos);
  require_dtype("rope", *tables.sin, dtype_code(*tables.cos), "of cos, for sin");
  if (tables.cos->dim() != 2 || 2 * tables.cos->sizes()[1] > head_dim) {
    fail("rope", "tables of shape (positions, rotary_dim / 2), rotary_dim at most " + got(head_dim),
         shape_text(*tables.cos));
  }
  require_shape("rope", *tables.sin, tables.cos->sizes());
}

void check_table_position(const RotaryTables& tables, const char* argument, int64_t position) {
  if (position < 0 || position >= tables.positions()) {
    fail(argument, "positions from 0 to " + got(tables.positions() - 1) + ", the rows of rope",
         got(position));
  }
}

CacheTokens tokens_of_sequences(const CacheStorage& storage, const RotaryTables& tables,
                                const char* argument, const NewRows& rows) {
  CacheTokens result;
  result.distinct = !storage.paged;  // two sequences may share a page
  for (int64_t b = 0; b < rows.batch; ++b) {
    int64_t count = rows.rows;
    if (is_packed(rows)) count = index_at(rows.cu_seqlens, b + 1) - index_at(rows.cu_seqlens, b);
    if (rows.lengths.data != nullptr) count = index_at(rows.lengths, b);
    if (count == 0) continue;
    const int64_t start = index_at(rows.positions, b);
    if (start < 0) fail(argument, "values >= 0", got(start) + " for sequence " + got(b));
    if (start > storage.capacity() - count) {
      fail(argument,
           "room for " + got(count) + " new rows in a capacity of " + got(storage.capacity()),
           got(start) + " for sequence " + got(b));
    }
    if (storage.paged) {
      const int64_t last = (start + count - 1) / storage.rows;
      for (int64_t page = start / storage.rows; page <= last; ++page) storage.check_page(b, page);
    }
    for (int64_t row = 0; row < count; ++row) {
      result.tokens.push_back(place(storage, tables, argument, rows, b, row, start + row));
    }
    result.distinct &= !(storage.ring && count > storage.rows);
  }
  return result;
}

void check_new_rows(const CacheStorage& storage, const Tensor& key, const Tensor& value,
                    bool bshd) {
  const bool packed = key.dim() == 3;
  if (!packed && key.dim() != 4) {
    fail("key",
         bshd ? "shape (batch, new, kv_heads, head_dim)" : "shape (batch, kv_heads, new, head_dim)",
         shape_text(key));
  }
  const Sizes k = key.sizes(), v = value.sizes();
  require_device_of(key, "value", value, "key");
  if (dtype_code(value) != dtype_code(key)) {
    fail("value", dtype_text(key) + " like key", dtype_text(value));
  }
  bool same = v.size() == k.size();
  for (size_t d = 0; same && d + 1 < k.size(); ++d) same = v[d] == k[d];
  if (!same) {
    fail("value", "the shape of key up to head_dim, " + text_of(Sizes(k.data(), k.size() - 1)),
         shape_text(value));
  }
  const int64_t heads = k[packed ? 1 : bshd ? 2 : 1];
  if (heads != storage.heads)
    fail("key", got(storage.heads) + " heads like k_cache", shape_text(key));
  if (k[k.size() - 1] != storage.head_dim) {
    fail("key", "the head_dim of k_cache, " + got(storage.head_dim), shape_text(key));
  }
  if (v[v.size() - 1] != storage.head_dim_v) {
    fail("value", "the head_dim of v_cache, " + got(storage.head_dim_v), shape_text(value));
  }
}

namespace {

// Of a new key or value.
ConstTensor row_view(const Tensor& x, bool bshd) {
  if (x.dim() == 4) return cache_view<ConstTensor>(x, bshd);
  const Sizes strides = x.strides();
  return {x.data_ptr(), {0, 0, strides[1], strides[0], strides[2]}};
}

MutableTensor writable(const ConstTensor& x) {
  MutableTensor result{const_cast<void*>(x.data), {}};
  for (int d = 0; d < 5; ++d) result.stride[d] = x.stride[d];
  return result;
}

}  // namespace

CacheWriteParams write_params(const CacheStorage& storage, const RotaryTables& tables,
                              const NewRows& rows, const CacheTokens& tokens, const Tensor* key,
                              const Tensor* value, bool bshd) {
  CacheWriteParams p{};
  p.rows = rows;
  p.entries = storage.entries, p.cache_rows = storage.rows;
  p.block_table = storage.block_table;
  p.pages_per_sequence = storage.pages_per_sequence;
  p.ring = storage.ring;
  CacheUpdateParams& u = p.update;
  u.head_dim = storage.head_dim, u.head_dim_v = storage.head_dim_v;
  if (key != nullptr) {
    u.dtype = require_float("key", *key);
    u.heads_kv = storage.heads;
    u.key = row_view(*key, bshd), u.value = row_view(*value, bshd);
    u.k_cache = writable(storage.key), u.v_cache = writable(storage.value);
    u.k_scale = writable(storage.key_scale), u.v_scale = writable(storage.value_scale);
  }
  u.tokens = tokens.tokens.data();
  u.num_tokens = static_cast<int64_t>(tokens.tokens.size());
  u.distinct = tokens.distinct;
  if (!tables.present()) return p;
  p.table_rows = tables.positions();
  u.table_dtype = *float_dtype(*tables.cos);
  u.rotary_dim = 2 * tables.cos->sizes()[1];
  u.interleaved = tables.interleaved;
  const Sizes cos = tables.cos->strides(), sin = tables.sin->strides();
  u.cos = {tables.cos->data_ptr(), {0, 0, 0, cos[0], cos[1]}};
  u.sin = {tables.sin->data_ptr(), {0, 0, 0, sin[0], sin[1]}};
  return p;
}

}  // namespace fastattn::bind
